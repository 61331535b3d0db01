"""Trains an image classifier as a configuration says.

python tools/train.py CONFIG [key=value ...]
"""

import argparse
import sys
from collections.abc import Sequence

from visionattn.training.config import load_config
from visionattn.training.loop import train


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 after a message if something given cannot be used; 130 after an interrupt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, such as configs/train/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as schedule.epochs=3")
    arguments = parser.parse_args(argv)
    try:
        train(load_config(arguments.config, arguments.overrides))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; resume=true goes on after the last complete epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
