"""Which models a checkpoint fits, told from names and shapes alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

import timm
import torch
from timm.models import model_entrypoint
from timm.models._registry import _model_default_cfgs
from torch import Tensor

# Of the models whose published size is within a twentieth of the checkpoint's, the nearest so many are tried.
CANDIDATES = 6
NEAR = 0.05


def fitting_models(weights: Mapping[str, Tensor], most: int = 3) -> list[str]:
    """Names of models of ours that `weights` fits, through their own filters, at most `most`.

    Only models whose entry states about as many parameters as the checkpoint has are built, on the meta device, where
    nothing is allocated or computed.
    """
    size = sum(x.numel() for x in weights.values())
    shapes = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in weights.items()}
    distances = {name: abs(published - size) for name, published in _published_params().items()}
    near = [name for name in sorted(distances, key=distances.get) if distances[name] <= NEAR * size]
    fitting = []
    for name in near[:CANDIDATES]:
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            sys.modules[model_entrypoint(name).__module__].checkpoint_filter_fn(dict(shapes), model)
        except (ValueError, RuntimeError):
            continue
        fitting.append(name)
        if len(fitting) == most:
            break
    return fitting


@cache
def _published_params() -> dict[str, int]:
    """Number of parameters of each model of ours whose entry states it; all are registered before the first call."""
    found = {}
    for name in timm.list_models():
        if model_entrypoint(name).__module__.startswith("visionattn."):
            notes = dict(note.split(": ", 1) for note in _model_default_cfgs[name].default.notes or ())
            found[name] = int(notes.get("params", 0))
    return {name: params for name, params in found.items() if params}
