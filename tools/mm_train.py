"""Trains a detector or segmenter of mmdetection or mmsegmentation on a backbone of ours.

python tools/mm_train.py CONFIG [--work-dir DIR] [--resume] [--cfg-options KEY=VALUE ...]

$ python tools/mm_train.py configs/mmdet/mask-rcnn_nat-mini_3x_coco.py --work-dir output/nat

With --resume an interrupted run ends where an uninterrupted one does (`visionattn.openmmlab.PlaceSeeds` says when).
What no flag says, CONFIG does (`work_dir`, `resume`). On several devices:

$ torchrun --nproc_per_node 8 tools/mm_train.py CONFIG --cfg-options launcher=pytorch
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import visionattn.openmmlab as openmmlab  # before mmdet and mmseg, whose operators it provides


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after a message if there is no such config, or nothing to train or resume by it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config of mmdet or mmseg")
    parser.add_argument("--work-dir", metavar="DIR", help="where results go, default CONFIG's or output/NAME")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)
    if not Path(arguments.config).is_file():
        print(f"error: {arguments.config}: there is no such config", file=sys.stderr)
        return 1
    config = Config.fromfile(arguments.config)
    config.merge_from_dict(arguments.cfg_options)
    config.work_dir = arguments.work_dir or config.get("work_dir") or f"output/{Path(arguments.config).stem}"
    config.resume = arguments.resume or config.get("resume", False)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and config.get("launcher", "none") == "none":
        print(
            f"error: {processes} processes would train apart and write to one folder; wanted "
            "--cfg-options launcher=pytorch, as torchrun needs",
            file=sys.stderr,
        )
        return 1
    try:
        openmmlab.make_resumable(config)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Runner.from_cfg(openmmlab.fit_to_machine(config)).train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
