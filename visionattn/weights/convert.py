"""A file of weights in whoever's names to one in ours."""

from __future__ import annotations

import sys
import textwrap
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import model_entrypoint
from torch import nn

import visionattn  # noqa: F401  (registers the models)
from visionattn.checkpoint import Report
from visionattn.weights.reader import read_weights


def convert(name: str, source: str | Path, target: str | Path, verify: bool = False) -> Report:
    """Write the weights in `source`, for the model `name`, as safetensors in our names to `target`.

    Args:
        name: Model, with or without tag.
        source: File of weights in any dialect that the family's filter knows.
        target: File to write; it appears whole or not at all.
        verify: Whether to load `target` again and compare every tensor and the answer to a picture of noise.

    Returns:
        What became of the tensors.

    Raises:
        ValueError: The model is none of ours, a file cannot be read, written or does not fit, or what was written does
            not give the same answer.
    """
    variant = name.partition(".")[0]
    if not timm.is_model(variant):
        nearest = get_close_matches(variant, timm.list_models(), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown model {variant!r}; the nearest known model is {nearest!r}")
    family = sys.modules[model_entrypoint(variant).__module__]
    if not family.__name__.startswith("visionattn."):
        raise ValueError(f"{variant} is a model of timm itself, wanted one of visionattn")
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(source)})
    except RuntimeError as error:  # timm's, of an unknown tag
        raise ValueError(f"model {name}: {textwrap.shorten(str(error), 300)}") from error
    report = getattr(family.checkpoint_filter_fn(read_weights(source), model), "report", Report())
    target = Path(target)
    temporary = target.with_name(target.name + ".part")
    try:
        save_file({key: x.contiguous() for key, x in model.state_dict().items()}, temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {target}: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    if verify:
        _verify(name, model, target)
    return report


@torch.no_grad()
def _verify(name: str, model: nn.Module, target: Path) -> None:
    """Raise ValueError unless `target` gives the tensors and the answer of `model`."""
    written = load_file(target)
    for key, x in model.state_dict().items():
        if not torch.equal(written[key], x):
            raise ValueError(f"{target}: {key!r} is not what was read")
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(target)}).eval()
    picture = torch.randn(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    if not torch.equal(model.eval()(picture), again(picture)):
        raise ValueError(f"{target}: does not give the answer of the weights that were read")
