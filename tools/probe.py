"""Judges the features of a frozen backbone by nearest neighbours, a linear and an attentive probe.

python tools/probe.py PICTURES (--checkpoint DIR | --model NAME) [--probes knn linear attentive] [--val-fraction SHARE]

PICTURES holds train/ and validation/ with one folder for each class, or with --val-fraction the class folders.
It prints a line a probe, `knn: top-1 91.67 %`.
"""

import argparse
import sys
from collections.abc import Sequence

from visionattn.training.config import DataConfig
from visionattn.training.model import load_model, load_published
from visionattn.training.probing import PROBES, probe_features


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after a message if something given cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="folder of pictures")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", help="a model that the training saved")
    source.add_argument("--model", metavar="NAME", help="a model of timm with published weights")
    parser.add_argument("--probes", nargs="+", default=PROBES, metavar="PROBE", help="default: all three")
    parser.add_argument("--val-fraction", type=float, metavar="SHARE", help="hold back this share of each class")
    parser.add_argument(
        "--queries", type=int, default=32, metavar="M", help="of the attentive probe, default %(default)s"
    )
    parser.add_argument(
        "--epochs", type=int, default=30, metavar="N", help="of the attentive probe, default %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default %(default)s")
    arguments = parser.parse_args(argv)
    data = DataConfig(
        root=arguments.pictures,
        val_fraction=arguments.val_fraction,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    try:
        model = load_model(arguments.checkpoint) if arguments.checkpoint else load_published(arguments.model)
        scores = probe_features(model, data, tuple(arguments.probes), arguments.queries, arguments.epochs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, top1 in scores.items():
        print(f"{name}: top-1 {top1:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
