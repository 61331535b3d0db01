"""Measures a trained detector or segmenter on the test set of its config.

python tools/mm_test.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options KEY=VALUE ...]

$ python tools/mm_test.py configs/mmseg/upernet_nat-mini_160k_ade20k-512x512.py output/nat/iter_160000.pth
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import visionattn.openmmlab as openmmlab  # before mmdet and mmseg, whose operators it provides


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after a message if a file is not there or the checkpoint is of another model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config of mmdet or mmseg")
    parser.add_argument("checkpoint", help="weights, as mm_train.py writes them")
    parser.add_argument("--work-dir", metavar="DIR", help="where results go, default CONFIG's or output/NAME")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)
    for file in (arguments.config, arguments.checkpoint):
        if not Path(file).is_file():
            print(f"error: {file}: there is no such file", file=sys.stderr)
            return 1
    config = Config.fromfile(arguments.config)
    config.merge_from_dict(arguments.cfg_options)
    config.work_dir = arguments.work_dir or config.get("work_dir") or f"output/{Path(arguments.config).stem}"
    config.load_from = arguments.checkpoint
    config.resume = False  # which is for training
    runner = Runner.from_cfg(openmmlab.fit_to_machine(config))
    try:
        openmmlab.check_fit(runner.model, arguments.checkpoint)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in runner.test().items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
