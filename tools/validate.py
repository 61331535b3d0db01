"""Measures the accuracy of models on a folder with one folder of pictures for each class.

python tools/validate.py PICTURES [--checkpoint DIR ...] [--model NAME ...] [--real] [--reproduce] [--out OUT]

$ python tools/validate.py PICTURES --checkpoint output/run/best
output/run/best: top-1 100.00 %, top-5 100.00 % of 12 pictures at 3x32x32, crop 1, 412 images/s

PICTURES: ImageNet's validation pictures, ImageNet-V2, -A or -R, or your own; a class folder bears the name or number of
its class. `--real` counts against the labels of ImageNet-ReaL. `--reproduce` compares with the published accuracy.
"""

import argparse
import sys
from collections.abc import Sequence

from visionattn.training.folder import check_ending
from visionattn.training.model import load_model, load_published
from visionattn.training.validation import RESULTS, validate, write_results


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 after a message if something cannot be read, or an accuracy that must be reproduced is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="folder of class folders")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="DIR", help="models that the training saved")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="models of timm with published weights")
    parser.add_argument("--size", type=int, metavar="N", help="side of the test pictures, default the model's own")
    parser.add_argument("--crop-pct", type=float, metavar="SHARE", help="share that is seen, default the model's own")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default %(default)s")
    parser.add_argument("--real", action="store_true", help="the labels of ImageNet-ReaL")
    parser.add_argument("--reproduce", action="store_true", help="fail if top-1 is over 0.1 off the published value")
    parser.add_argument("--out", metavar="OUT", help="write the results to this .csv or .json file")
    arguments = parser.parse_args(argv)
    options = {key: getattr(arguments, key) for key in ("size", "crop_pct", "batch_size", "workers", "real")}
    loaders = [(name, load_model) for name in arguments.checkpoint] + [(x, load_published) for x in arguments.model]
    results = []
    try:
        if not loaders:
            raise ValueError("no model to validate, wanted --checkpoint or --model")
        if arguments.out:
            check_ending(arguments.out, *RESULTS)
        for name, load in loaders:
            result = validate(name, load(name), arguments.pictures, **options)
            results.append(result)
            size = "x".join(map(str, result.input_size))
            print(
                f"{result.model}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % of {result.count} pictures "
                f"at {size}, crop {result.crop_pct:g}, {result.images_per_second:.0f} images/s"
            )
        if arguments.out:
            write_results(results, arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.reproduce:
        for result in (result for result in results if not result.reproduced):
            wanted = "unknown" if result.published_top1 is None else f"{result.published_top1} %"
            print(f"error: {result.model} reached {result.top1:.2f} %, published is {wanted}", file=sys.stderr)
        return int(not all(result.reproduced for result in results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
