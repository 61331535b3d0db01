"""What the cards say of models that can be measured anywhere: parameters, multiply-accumulates, features.

Models run on the meta device, where nothing is allocated or computed, so that the largest takes seconds. The figures
are kept in `model_cards/measured.json`, since to take them all takes minutes.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import visionattn  # noqa: F401  (registers the models)
from visionattn_kernels.flops import FORMULAS


def key_of(name: str, size: int) -> str:
    """How a model at an image size is called in the file."""
    return f"{name}@{size}"


def measure(name: str, size: int) -> dict:
    """Figures of a model on one square image.

    Args:
        name: Name of the model.
        size: Side of the image in pixels.

    Returns:
        params: Number of parameters, with a classifier of 1,000 classes.
        gmacs: Multiply-accumulates in billions, of convolutions and products of matrices, those of attention included.
        features: Channels and stride of each feature.
    """
    model = timm.create_model(name, num_classes=1000, device="meta").eval()
    image = torch.empty(1, model.pretrained_cfg["input_size"][0], size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(image)
    info = model.feature_info
    return {
        "params": sum(x.numel() for x in model.parameters()),
        "gmacs": round(counter.get_total_flops() / 2e9, 4),
        "features": [[x["num_chs"], x["reduction"]] for x in (info if isinstance(info, list) else info.info)],
    }


def machine() -> str:
    """The machine that measures, by the names that it and torch give themselves."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {cpu}, torch {torch.__version__.partition('+')[0]}"


def update(
    path: Path,
    models: Iterable[tuple[str, int]],
    answers: dict[str, Callable[[], dict[str, float]]],
    anew: bool = False,
) -> Iterator[str]:
    """Measure what the file lacks, and forget what is no longer asked for.

    Args:
        path: The file of measurements, written at the end.
        models: Names and image sizes.
        answers: For each reference answer what tells the relative error of each of its parts.
        anew: Whether to measure everything.

    Yields:
        What has been measured.
    """
    kept = json.loads(path.read_text()) if path.exists() and not anew else {"models": {}, "answers": {}}
    figures, differences, about = {}, {}, kept.get("about")
    wanted = {key_of(name, size): (name, size) for name, size in models}
    for key in sorted(wanted):
        figures[key] = kept["models"].get(key) or measure(*wanted[key])
        if key not in kept["models"]:
            yield key
    for key in sorted(answers):
        errors = kept["answers"].get(key) or {name: float(f"{x:.1e}") for name, x in answers[key]().items()}
        differences[key] = errors
        if key not in kept["answers"]:
            yield key
    if figures.keys() - kept["models"].keys() or differences.keys() - kept["answers"].keys():
        about = {"date": date.today().isoformat(), "machine": machine()}
    path.write_text(_lines({"about": about, "models": figures, "answers": differences}))


def _lines(found: dict) -> str:
    """JSON with a line for each entry, so that a change shows as a line."""
    parts = []
    for part, entries in found.items():
        rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        parts.append(f'  "{part}": {{\n{rows}\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
