"""Model cards, one a family, from the models' entries and the reference answers. Written by `tools/make_cards.py`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import timm
from timm.models import PretrainedCfg, model_entrypoint
from timm.models._registry import _model_default_cfgs

import visionattn  # noqa: F401  (registers the models)
from visionattn.registry import published
from visionattn.weights import source_of

# Licences that the hub knows by these names; others are "other" there.
HUB_LICENSES = ("apache-2.0", "mit")


def families() -> dict[str, list[str]]:
    """Variants of every family, by the name of its module; the small test models are left out."""
    found = defaultdict(list)
    for name in timm.list_models():
        module = model_entrypoint(name).__module__
        if module.startswith("visionattn.") and not name.startswith("test_"):
            found[module.rpartition(".")[2]].append(name)
    return dict(found)


def make_card(family: str, variants: list[str], goldens: Path) -> str:
    """The card of a family as Markdown with front matter of the Hugging Face hub.

    Args:
        family: Name of the module of the family.
        variants: Names of its models.
        goldens: Folder of the reference answers.
    """
    entries = [x for name in variants for x in _entries(name)]
    first = entries[0]
    licenses = sorted({entry.license for entry in entries})
    known = licenses[0] if len(licenses) == 1 and licenses[0] in HUB_LICENSES else "other"
    module = sys.modules[model_entrypoint(variants[0]).__module__]
    figures, sources = [], []
    for entry in entries:
        name, numbers, source = f"`{entry.architecture}.{entry.tag}`", published(entry), source_of(entry)
        params, gmacs, top1 = (f"{numbers[key]:g}" if key in numbers else "-" for key in ("params", "gmacs", "top1"))
        params = f"{int(numbers['params']):,}" if "params" in numbers else params
        figures.append(f"| {name} | {entry.input_size[-1]} | {params} | {gmacs} | {top1} |")
        verified = source.verified or "never"
        sources.append(f"| {name} | {source.state} | {source.address or '-'} | {source.cache or '-'} | {verified} |")
    return "\n".join(
        [
            "---",
            "library_name: timm",
            f"license: {known}",
            "pipeline_tag: image-classification",
            "tags: [image-classification, timm, visionattn]",
            "---",
            f"# {family}",
            "",
            module.__doc__.strip(),
            "",
            "```python",
            "import timm, torch, visionattn",
            "",
            f'model = timm.create_model("{variants[0]}").eval()',
            f"logits = model(torch.randn(1, {', '.join(map(str, first.input_size))}))",
            "```",
            "",
            f"Code: Apache 2.0. Weights: {', '.join(licenses)} (of the code where they name none).",
            "",
            "## Published figures",
            "",
            f"By the authors, {first.origin_url} and {first.paper_ids}; parameters are those of the code here. `-`: not"
            " known.",
            "",
            "| model | size | parameters | GMACs | ImageNet-1k top-1 |",
            "|---|---|---|---|---|",
            *figures,
            "",
            "## Where the weights are",
            "",
            "direct: a program can fetch them; manual: a person must; dead: the address no longer answers as far as is"
            " known; none: there are none. Verified: when somebody fetched them and they gave the published answer.",
            "",
            "| model | state | address | name in the cache | verified |",
            "|---|---|---|---|---|",
            *sources,
            "",
            "## Faithfulness",
            "",
            *_evidence(variants, goldens),
            "",
            "Not known: the accuracy of the published weights here, until one is verified above.",
            "",
        ]
    )


def _entries(name: str) -> list[PretrainedCfg]:
    return [timm.get_pretrained_cfg(f"{name}.{tag}") for tag in _model_default_cfgs[name].tags]


def _evidence(variants: list[str], goldens: Path) -> list[str]:
    """A line for each reference answer of the family."""
    lines = []
    for path in sorted(goldens.glob("*.npz")):
        if path.stem in variants or f"{path.stem}_va" in variants:
            with np.load(path) as arrays:
                source = json.loads(bytes(arrays["text"]))["meta"]["source"]
            lines.append(f"- `{path.stem}`: the logits, features and input gradient of {source}")
    if not lines:
        return ["No reference answer of the authors' code is here."]
    how = "With known weights, within the tolerances of `pytest tests/backbones/test_reference_answers.py`:"
    return [how, "", *lines]
