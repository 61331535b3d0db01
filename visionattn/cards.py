"""Model cards, one a family: entries, measurements and literature, as Markdown. Written by `tools/make_cards.py`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
from timm.models import PretrainedCfg, model_entrypoint
from timm.models._registry import _model_default_cfgs

import visionattn  # noqa: F401  (registers the models)
from visionattn.literature import CITATIONS, DENSE, UNKNOWN
from visionattn.measured import key_of
from visionattn.registry import published
from visionattn.weights import source_of

# Licences that the hub knows by these names; others are "other" there, several at once too.
HUB_LICENSES = {"apache-2.0": "apache-2.0", "mit": "mit", "unspecified": "unknown"}


def families() -> dict[str, list[str]]:
    """Variants of every family, by the name of its module; the small test models are left out."""
    found = defaultdict(list)
    for name in timm.list_models():
        module = model_entrypoint(name).__module__
        if module.startswith("visionattn.") and not name.startswith("test_"):
            found[module.rpartition(".")[2]].append(name)
    return dict(found)


def sizes(variants: Sequence[str]) -> list[tuple[str, int]]:
    """Every model with every image size of its entries."""
    return sorted({(entry.architecture, entry.input_size[-1]) for name in variants for entry in _entries(name)})


def make_card(family: str, variants: Sequence[str], goldens: Path, measured: dict) -> str:
    """The card of a family as Markdown with front matter of the Hugging Face hub.

    Args:
        family: Name of the module of the family.
        variants: Names of its models.
        goldens: Folder of the reference answers.
        measured: As `measured.update` writes it.
    """
    entries = [x for name in variants for x in _entries(name)]
    licenses = sorted({entry.license for entry in entries})
    module = sys.modules[model_entrypoint(variants[0]).__module__]
    about = measured["about"]
    parts = [
        _front_matter(licenses, weights=any(source_of(entry).state != "none" for entry in entries)),
        [f"# {family}", "", module.__doc__.strip()],
        _usage(entries),
        [f"Code: Apache 2.0. Weights: {', '.join(licenses)} (of the code where they name none)."],
        ["## Models", "", *_models(entries, measured["models"])],
        _dense(family),
        ["## Where the weights are", "", *_weights(entries)],
        ["## Faithfulness", "", *_evidence(variants, goldens, measured["answers"])],
        [
            "## Measured where",
            "",
            "Parameters, GMACs, features and differences: `python tools/make_cards.py --measure`, last on "
            f"{about['machine']}, {about['date']}. Nothing else on this page was measured here.",
        ],
        ["## Not known", "", *_unknown(family, entries)],
        ["## Citation", "", "```bibtex", *_citations(entries), "```"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _entries(name: str) -> list[PretrainedCfg]:
    return [timm.get_pretrained_cfg(f"{name}.{tag}") for tag in _model_default_cfgs[name].tags]


def _front_matter(licenses: list[str], weights: bool) -> list[str]:
    license = HUB_LICENSES.get(licenses[0], "other") if len(licenses) == 1 else "other"
    return [
        "---",
        "library_name: timm",
        f"license: {license}",
        *([f"license_name: {'-and-'.join(licenses)}"] if license == "other" else []),
        *(["datasets: [imagenet-1k]"] if weights else []),
        "pipeline_tag: image-classification",
        "tags: [image-classification, image-feature-extraction, timm, visionattn]",
        "---",
    ]


def _usage(entries: list[PretrainedCfg]) -> list[str]:
    """Three lines of use, with weights where a program can fetch them."""
    first = next((entry for entry in entries if source_of(entry).state == "direct"), entries[0])
    pretrained = ", pretrained=True" if source_of(first).state == "direct" else ""
    return [
        "```python",
        "import timm, torch, visionattn",
        f'model = timm.create_model("{first.architecture}"{pretrained}).eval()',
        f"logits = model(torch.randn(1, {', '.join(map(str, first.input_size))}))",
        "```",
    ]


def _models(entries: list[PretrainedCfg], measured: dict) -> list[str]:
    """A row for each entry, of what was measured and what was published."""
    rows = []
    for entry in entries:
        size, numbers = entry.input_size[-1], published(entry)
        figures = measured[key_of(entry.architecture, size)]
        gmacs, top1 = (f"{numbers[key]:g}" if key in numbers else "-" for key in ("gmacs", "top1"))
        features = " ".join(f"{channels}/{stride}" for channels, stride in figures["features"])
        # Entries with classes of another number share the backbone; theirs is another classifier.
        params = f"{figures['params']:,}" if entry.num_classes == 1000 else "-"
        name = f"`{entry.architecture}.{entry.tag}`"
        rows.append(f"| {name} | {size} | {params} | {figures['gmacs']:.3g} | {gmacs} | {top1} | {features} |")
    return [
        f"Published by {entries[0].origin_url} and {', '.join(sorted({x.paper_ids for x in entries}))}, not measured"
        " here: GMACs and ImageNet-1k top-1 accuracy in percent. GMACs measured count convolutions and products of"
        " matrices, attention's own included. Features: channels/stride. `-`: not known.",
        "",
        "| model | size | parameters | GMACs | published GMACs | published top-1 | features |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _dense(family: str) -> list[str]:
    if family not in DENSE:
        return []
    rows = [f"| `{row.model}` | {row.data} | {row.head} | {row.figures} |" for row in DENSE[family]]
    lines = ["Published by the authors with their own training, not measured here.", ""]
    return [
        "## Detection and segmentation",
        "",
        *lines,
        "| backbone | data | head | result |",
        "|---|---|---|---|",
        *rows,
    ]


def _weights(entries: list[PretrainedCfg]) -> list[str]:
    """A row for each source."""
    rows = []
    for entry in entries:
        source = source_of(entry)
        cells = (source.state, source.address or "-", source.cache or "-", source.verified or "never")
        rows.append(f"| `{entry.architecture}.{entry.tag}` | {' | '.join(cells)} |".replace("*", r"\*"))
    return [
        "direct: a program can fetch them; manual: a person must; dead: the address no longer answers as far as is"
        " known; none: there are none. Verified: when somebody fetched them and they gave the published answer.",
        "",
        "| model | state | address | name in the cache | verified |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _evidence(variants: Sequence[str], goldens: Path, measured: dict) -> list[str]:
    """A row for each reference answer of the family, with the largest difference of each kind."""
    rows = []
    for path in sorted(goldens.glob("*.npz")):
        name = next((x for x in (path.stem, f"{path.stem}_va") if x in variants), None)
        if name is None:
            continue
        with np.load(path) as arrays:
            source = json.loads(bytes(arrays["text"]))["meta"]["source"]
        errors = measured[path.stem]
        worst = [
            max((x for answer, x in errors.items() if answer.startswith(kind)), default=None)
            for kind in ("logits", "feature_", "grad_input", "delta_")
        ]
        cells = " | ".join("-" if x is None else f"{x:.1e}" for x in worst)
        rows.append(f"| `{name}` | {cells} | {source} |")
    if not rows:
        return ["No reference answer of the authors' code is here."]
    return [
        "Largest relative difference to the answers of the code named, with the same known weights in float32;"
        " `pytest tests/backbones/test_reference_answers.py` bounds it.",
        "",
        "| model | logits | features | input gradient | what modules add | code |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _unknown(family: str, entries: list[PretrainedCfg]) -> list[str]:
    lines = list(UNKNOWN.get(family, []))
    if any(source_of(entry).state != "none" and not source_of(entry).verified for entry in entries):
        lines.append("The accuracy of the published weights here, until they are verified above.")
    return [f"- {line}" for line in lines or ["The accuracy of these models here: nobody has trained them."]]


def _citations(entries: list[PretrainedCfg]) -> list[str]:
    papers = sorted({entry.paper_ids.removeprefix("arXiv:") for entry in entries})
    return "\n\n".join(CITATIONS[paper].bibtex(paper) for paper in papers).splitlines()
