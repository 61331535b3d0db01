"""The cards are those that tools/make_cards.py writes now, and the hub can read them."""

import json
import re
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard, ModelCardData
from timm.models._registry import _model_default_cfgs

from visionattn.cards import families, make_card, sizes
from visionattn.measured import key_of, measure
from visionattn.registry import published

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "model_cards" / "measured.json").read_text())
RENEW = "run python tools/make_cards.py"


@pytest.mark.parametrize("family", families())
def test_the_card_is_not_stale(family):
    wanted = make_card(family, families()[family], ROOT / "tests" / "golden", MEASURED)
    assert (ROOT / "model_cards" / f"{family}.md").read_text() == wanted, RENEW


def test_there_is_no_card_without_a_family():
    assert {path.stem for path in (ROOT / "model_cards").glob("*.md")} == set(families())


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("extreme", [min, pytest.param(max, marks=pytest.mark.slow)])
def test_measurements_of_the_smallest_and_the_largest_variant_are_those_of_today(family, extreme):
    name, size = extreme(sizes(families()[family]), key=lambda pair: MEASURED["models"][key_of(*pair)]["gmacs"])
    assert measure(name, size) == MEASURED["models"][key_of(name, size)], f"{RENEW} --measure"


@pytest.mark.parametrize("family", families())
def test_published_figures_are_near_the_measured_ones(family):
    for name in families()[family]:
        for tag in _model_default_cfgs[name].tags:
            entry = timm.get_pretrained_cfg(f"{name}.{tag}")
            numbers, measured = published(entry), MEASURED["models"][key_of(name, entry.input_size[-1])]
            if "params" in numbers and entry.num_classes == 1000:
                assert numbers["params"] == measured["params"], name
            if "gmacs" in numbers:
                assert abs(measured["gmacs"] / numbers["gmacs"] - 1) < 0.1, (name, measured["gmacs"], numbers["gmacs"])


def test_every_reference_answer_has_its_measured_difference():
    from answers import PORTED

    assert MEASURED["answers"].keys() == {path.stem for path in PORTED}
    assert all(0 < errors["logits"] <= 1e-5 for errors in MEASURED["answers"].values())


@pytest.mark.parametrize("family", families())
def test_the_hub_reads_the_front_matter(family):
    text = (ROOT / "model_cards" / f"{family}.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "timm"
    assert card.data.license in ("apache-2.0", "mit", "unknown", "other")
    assert card.data.license != "other" or re.fullmatch(r"[a-z0-9.-]+", card.data.license_name)
    assert card.data.pipeline_tag == "image-classification"
    # What the hub's own class makes of the fields says the same.
    assert (
        ModelCard(f"---\n{ModelCardData(**card.data.to_dict()).to_yaml()}\n---\n").data.to_dict() == card.data.to_dict()
    )


@pytest.mark.parametrize("family", families())
def test_every_card_has_the_parts_that_a_reader_looks_for(family):
    text = (ROOT / "model_cards" / f"{family}.md").read_text()
    for part in ("```python", "Weights: ", "## Models", "## Where the weights are", "## Faithfulness", "## Not known"):
        assert part in text, part
    assert re.search(r"```bibtex\n@\w+\{\w+,\n", text)
    for name in families()[family]:
        assert f"`{name}." in text
