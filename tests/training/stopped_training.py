"""A training of several processes that stops after some checkpoints; started by test_distribution.py through torchrun.

python stopped_training.py CHECKPOINTS CONFIG [key=value ...]

With 0 it goes on to its end.
"""

import sys

import torch

from visionattn.training.config import load_config
from visionattn.training.loop import train
from visionattn.training.run import Run

last, config, overrides = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
save, saved = Run.save, []


def save_and_stop(run: Run) -> None:
    """In place of Run.save, in every process."""
    save(run)
    saved.append(run.updates)
    if len(saved) == last:
        run.accelerator.wait_for_everyone()
        raise KeyboardInterrupt


Run.save = save_and_stop
torch.set_num_threads(1)
try:
    train(load_config(config, overrides)).accelerator.end_training()
except KeyboardInterrupt:
    torch.distributed.destroy_process_group()
