"""Writes model_cards/<family>.md for every family, and measures the models and reference answers that are new.

python tools/make_cards.py [--measure]

$ python tools/make_cards.py
model_cards/agent.md: 18 models
...

With --measure everything is measured anew, which takes minutes; the figures are kept in model_cards/measured.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm

from visionattn.cards import families, make_card, sizes
from visionattn.measured import update

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "golden"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure everything anew")
    arguments = parser.parse_args(argv)
    folder = ROOT / "model_cards"
    folder.mkdir(exist_ok=True)
    models = [pair for variants in families().values() for pair in sizes(variants)]
    for key in update(folder / "measured.json", models, _answers(), arguments.measure):
        print(f"measured {key}", flush=True)
    measured = json.loads((folder / "measured.json").read_text())
    for family, variants in families().items():
        path = folder / f"{family}.md"
        path.write_text(make_card(family, variants, GOLDENS, measured))
        print(f"{path.relative_to(ROOT)}: {len(variants)} models")
    return 0


def _answers() -> dict:
    """For each reference answer what tells the errors of our answer."""
    sys.path.insert(0, str(GOLDENS))
    from answers import PORTED, answers, differences
    from golden import Golden

    def errors(path: Path, name: str) -> dict[str, float]:
        golden = Golden.load(path)
        overlay = {"state_dict": golden.state_dict()}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        return differences(golden, answers(golden, model))

    return {path.stem: partial(errors, path, name) for path, name in PORTED.items()}


if __name__ == "__main__":
    sys.exit(main())
