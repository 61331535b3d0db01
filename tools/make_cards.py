"""Writes model_cards/<family>.md for every family.

python tools/make_cards.py

$ python tools/make_cards.py
model_cards/agent.md: 18 models
...
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from visionattn.cards import families, make_card

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    (ROOT / "model_cards").mkdir(exist_ok=True)
    for family, variants in families().items():
        path = ROOT / "model_cards" / f"{family}.md"
        path.write_text(make_card(family, variants, ROOT / "tests" / "golden"))
        print(f"{path.relative_to(ROOT)}: {len(variants)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
