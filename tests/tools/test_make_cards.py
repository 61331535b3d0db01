"""The cards are those that tools/make_cards.py writes now, and the hub can read them."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from visionattn.cards import families, make_card

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", families())
def test_the_card_is_not_stale(family):
    wanted = make_card(family, families()[family], ROOT / "tests" / "golden")
    assert (ROOT / "model_cards" / f"{family}.md").read_text() == wanted, "run python tools/make_cards.py"


def test_there_is_no_card_without_a_family():
    assert {path.stem for path in (ROOT / "model_cards").glob("*.md")} == set(families())


@pytest.mark.parametrize("family", families())
def test_the_hub_reads_the_front_matter(family):
    card = ModelCard.load(ROOT / "model_cards" / f"{family}.md")
    assert card.data.library_name == "timm"
    assert card.data.license in ("apache-2.0", "mit", "other")
    assert card.data.pipeline_tag == "image-classification"
