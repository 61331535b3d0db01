"""How a variant of ours enters timm's registry: its pretrained configuration and its construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn


def cfg(
    *,
    paper: str,
    source: str,
    license: str,
    top1: float | None = None,
    params: int | None = None,
    gmacs: float | None = None,
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
        **fields: Other fields of timm's `PretrainedCfg`.

    Returns:
        The entry. Published figures stand in its notes, where `published` finds them.
    """
    figures = {"top1": top1, "params": params, "gmacs": gmacs}
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
        notes=tuple(f"{name}: {value}" for name, value in figures.items() if value is not None),
        **(defaults | fields),
    )


def published(entry: PretrainedCfg) -> dict[str, float]:
    """The published figures of an entry made by `cfg`: any of top1 (percent), params and gmacs (billions)."""
    return {name: float(value) for name, value in (note.split(": ") for note in entry.notes or ())}


def build(family: type[nn.Module], variant: str, pretrained: bool, filter_fn: Callable, **kwargs: Any) -> nn.Module:
    """Construct `variant` of `family` as timm does, with features of all stages and weights through `filter_fn`.

    Raises:
        ValueError: A file of weights cannot be read or does not fit; the message names it.
    """
    file = (kwargs.get("pretrained_cfg_overlay") or {}).get("file")
    with _errors_naming(file) if file else nullcontext():
        return build_model_with_cfg(
            family,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": tuple(range(4)), "flatten_sequential": True},
            **kwargs,
        )


@contextmanager
def _errors_naming(file: str) -> Iterator[None]:
    """Turn what torch, safetensors and `checkpoint.fit` raise on a bad file into a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such checkpoint") from None
    except (RuntimeError, EOFError, UnpicklingError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
