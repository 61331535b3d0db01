"""How a variant of ours enters timm's registry: its pretrained configuration and its construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from visionattn.weights import fetch, read_weights
from visionattn.weights.nearest import fitting_models

FIGURES = ("top1", "params", "gmacs")


def cfg(
    *,
    paper: str,
    source: str,
    license: str,
    top1: float | None = None,
    params: int | None = None,
    gmacs: float | None = None,
    page: str | None = None,
    dead: bool = False,
    verified: str | None = None,
    **fields: Any,
) -> PretrainedCfg:
    """One entry of a family's `default_cfgs`.

    Args:
        paper: arXiv number of the paper.
        source: Address of the authors' code, which published the figures below.
        license: Licence of the weights, or of the code where the weights name none.
        top1: Published ImageNet-1k top-1 accuracy in percent, at the input size of the entry.
        params: Number of parameters.
        gmacs: Published multiply-accumulates in billions, at the input size of the entry.
        page: Where a person finds weights that no program can fetch, such as the share page of a cloud. Weights that
            a program can fetch are named by `url`, or by `hf_hub_id` and `hf_hub_filename`, instead.
        dead: Whether `page` no longer answers, as far as is known.
        verified: Date (YYYY-MM-DD) on which somebody fetched the weights and they gave the published answer.
        **fields: Other fields of timm's `PretrainedCfg`.

    Returns:
        The entry. Published figures stand in its notes, where `published` finds them, and `weights.source_of` what
        timm has no field for.

    Raises:
        ValueError: A page beside an address that a program can fetch.
    """
    if page and (fields.get("url") or fields.get("hf_hub_id")):
        raise ValueError(f"weights have one source, got page={page!r} beside url or hf_hub_id")
    weights = f"{'dead' if dead else 'manual'} {page}" if page else None
    notes = {"top1": top1, "params": params, "gmacs": gmacs, "weights": weights, "verified": verified}
    defaults = {
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
    }
    return PretrainedCfg(
        paper_ids=f"arXiv:{paper}",
        origin_url=source,
        license=license,
        notes=tuple(f"{name}: {value}" for name, value in notes.items() if value is not None),
        **(defaults | fields),
    )


def published(entry: PretrainedCfg) -> dict[str, float]:
    """The published figures of an entry made by `cfg`: any of top1 (percent), params and gmacs (billions)."""
    notes = dict(note.split(": ", 1) for note in entry.notes or ())
    return {name: float(notes[name]) for name in FIGURES if name in notes}


def build(family: type[nn.Module], variant: str, pretrained: bool, filter_fn: Callable, **kwargs: Any) -> nn.Module:
    """Construct `variant` of `family` as timm does, with features of all stages and weights through `filter_fn`.

    Raises:
        ValueError: The weights cannot be fetched, or their file cannot be read or does not fit; the message names it.
    """
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    file = overlay.get("file")
    if pretrained and not overlay.get("state_dict"):
        entry = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        # Folders and repositories that name a model of ours in their config.json are timm's to open.
        if entry.source not in ("local-dir", "hf-hub"):
            path = file = fetch(entry, kwargs.get("cache_dir"))
            # timm copies the state dict it is given, so it is given the name, and the filter opens the file.
            kwargs["pretrained_cfg_overlay"] = overlay | {"state_dict": {"file": str(path)}}
            filter_fn = partial(_open_and_filter, path=path, filter_fn=filter_fn)
    return _build(family, variant, pretrained, filter_fn, file, kwargs)


def _open_and_filter(_: dict, model: nn.Module, path: Path, filter_fn: Callable) -> dict[str, Tensor]:
    """The weights of a file in our names; of one that does not fit, the error names models that it does fit."""
    weights = read_weights(path)
    try:
        return filter_fn(weights, model)
    except ValueError as error:
        fitting = fitting_models(weights)
        known = f"it fits {', '.join(fitting)}" if fitting else "no model whose published size is near fits either"
        raise ValueError(f"{error}; {known}") from error


def _build(family, variant: str, pretrained: bool, filter_fn: Callable, file: Any, kwargs: dict) -> nn.Module:
    """Let timm construct the model; errors name `file`, and the model keeps no reference to weights."""
    with _errors_naming(str(file)) if file else nullcontext():
        model = build_model_with_cfg(
            family,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={
                "out_indices": tuple(range(4)),
                "flatten_sequential": True,
                "feature_cls": getattr(family, "feature_cls", "list"),
            },
            **kwargs,
        )
    model.pretrained_cfg.pop("state_dict", None)
    return model


@contextmanager
def _errors_naming(file: str) -> Iterator[None]:
    """Turn what torch, safetensors and `checkpoint.fit` raise on a bad file into a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such checkpoint") from None
    except (RuntimeError, EOFError, UnpicklingError, SafetensorError, ValueError) as error:
        named = str(error).startswith(f"{file}: ")
        raise ValueError(str(error) if named else f"{file}: {error}") from error
