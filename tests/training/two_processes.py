"""One epoch of the training as one of several processes; started by test_distribution.py through torchrun.

python two_processes.py OUT CONFIG [key=value ...]
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from visionattn.training.config import load_config
from visionattn.training.loop import evaluate, train_one_epoch
from visionattn.training.run import Run

out, config, *overrides = sys.argv[1:]
torch.set_num_threads(1)
compile_ = nn.Module.compile
# Traced and differentiated as by default, but not compiled to C++, which takes minutes.
nn.Module.compile = lambda self: compile_(self, backend="aot_eager")
run = Run(load_config(config, overrides))
held = sum(getattr(p, "_local_tensor", p).numel() for p in run.bare_model.parameters())
seen, rates = [], []
fetch, augment = run.train.picture, run.train.augment
run.train.picture = lambda position: seen.append(int(position)) or fetch(position)
run.train.augment = lambda file, number, seed: seen.append(number) or augment(file, number, seed)  # of a stream
row = train_one_epoch(run, 0, on_update=lambda meter: rates.append(run.optimizer.param_groups[0]["lr"]))
row |= evaluate(run, run.model) | evaluate(run, run.ema.module, "ema")
weights = torch.cat([p.detach().double().flatten() for p in run.whole(run.bare_model).parameters()])
rank = os.environ.get("RANK", "0")
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
found = {"row": row, "seen": seen, "rates": rates, "held": held, "graphs": graphs}
Path(out, f"rank{rank}.json").write_text(json.dumps(found))
torch.save(weights, Path(out, f"rank{rank}.pt"))
run.accelerator.end_training()
