"""Names what is on pictures.

python tools/predict.py IMAGE|FOLDER... [--checkpoint DIR | --model NAME] [--topk K] [--table OUT] [--sheet OUT.png]

$ python tools/predict.py output/quickstart/examples/[78]_*.png --sheet output/quickstart/sheet.png
output/quickstart/examples/7_0700.png: 7 73.3%  2 7.9%  8 7.2%
output/quickstart/examples/7_0701.png: 1 50.4%  7 22.7%  2 10.3%
output/quickstart/examples/8_0800.png: 8 97.2%  1 0.7%  2 0.6%
output/quickstart/examples/8_0801.png: 8 95.6%  9 1.7%  5 0.8%
drawn on output/quickstart/sheet.png

`--table` takes a name that ends in .csv, .json or .parquet.
The examples carry their true class in front of their names; the model has not seen them.
"""

import argparse
import sys
from collections.abc import Sequence

from visionattn.training.folder import check_ending
from visionattn.training.model import load_model, load_published
from visionattn.training.prediction import SHEETS, TABLES, classify, find_pictures, write_sheet, write_table


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after a message if a picture or the model cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, and folders of them")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="DIR", default="output/quickstart/best", help="default: %(default)s")
    source.add_argument("--model", metavar="NAME", help="a model of timm with published weights")
    parser.add_argument("--topk", type=int, default=3, metavar="K", help="classes to show, default %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once, default %(default)s")
    parser.add_argument("--table", metavar="OUT", help="write paths, classes and probabilities to this file")
    parser.add_argument("--sheet", metavar="OUT.png", help="draw pictures and classes on this contact sheet")
    arguments = parser.parse_args(argv)
    try:
        for path, endings in ((arguments.table, TABLES), (arguments.sheet, SHEETS)):
            if path:
                check_ending(path, *endings)
        model = load_published(arguments.model) if arguments.model else load_model(arguments.checkpoint)
        predictions = classify(model, find_pictures(arguments.images), arguments.topk, arguments.batch_size)
        for prediction in predictions:
            classes = "  ".join(f"{name} {probability:.1%}" for name, probability in prediction.classes)
            print(f"{prediction.path}: {classes}")
        if arguments.table:
            write_table(predictions, arguments.table)
        if arguments.sheet:
            write_sheet(predictions, arguments.sheet)
            print(f"drawn on {arguments.sheet}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
