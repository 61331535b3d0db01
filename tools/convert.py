"""Writes a file of weights in whoever's names as safetensors in ours.

python tools/convert.py --model NAME --in FILE --out model.safetensors [--verify]

$ python tools/convert.py --model van_b0 --in reference.pth --out van_b0.safetensors --verify
372 mapped, 0 resized, 0 dropped, 0 missing
verified: van_b0.safetensors gives the answer of reference.pth

The reference file has the weights of tests/golden/van_b0.npz. Reads PyTorch's files of any age and safetensors;
executes nothing in them. The names may be those of the authors' classifier, of their detector or segmenter, of
transformers or mmpretrain where they have the family, of timm, or ours.
"""

import argparse
import sys
from collections.abc import Sequence

from visionattn.weights.convert import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after a message if the file cannot be read or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME", help="model, with or without tag")
    parser.add_argument("--in", required=True, metavar="FILE", dest="source", help="file of weights")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--verify", action="store_true", help="load the result again and compare its answer")
    arguments = parser.parse_args(argv)
    try:
        report = convert(arguments.model, arguments.source, arguments.out, arguments.verify)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    if arguments.verify:
        print(f"verified: {arguments.out} gives the answer of {arguments.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
