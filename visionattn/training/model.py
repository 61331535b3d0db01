"""Models by name, and models saved with what prediction needs: classes, input size and normalisation."""

import json
import os
import pickle
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import resolve_model_input_args, save_for_hf
from torch import nn

import visionattn  # noqa: F401  (registers the models)
from visionattn.training.config import ModelConfig

_CREATION_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    KeyError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever timm, torch and safetensors raise for a bad name, argument or file into one ValueError."""
    try:
        yield
    except _CREATION_ERRORS as error:
        raise ValueError(f"{what}: {textwrap.shorten(str(error), 400)}") from error


def build_model(config: ModelConfig, num_classes: int | None, input_size: Sequence[int] | None = None) -> nn.Module:
    """Creates the model for `num_classes` and images of `input_size` (C, H, W), by default its own.

    With `num_classes` None the classifier stays that of the weights. First weights are loaded into the model as it was
    published, all of them, before the classifier is replaced.

    Raises:
        ValueError: an unknown name or argument, or weights that are missing, truncated or of another model.
    """
    if fixed := {"num_classes", "in_chans", "img_size"} & config.kwargs.keys():
        raise ValueError(f"model.kwargs.{min(fixed)} follows from the data, wanted data.input_size or nothing")
    if config.kwargs.get("features_only"):
        raise ValueError("model.kwargs.features_only is true, wanted a model with a classifier")
    if config.weights is not None and not os.path.isfile(config.weights):
        raise ValueError(f"model.weights {config.weights} is not a file")
    check_name(config.name)
    starts_from_weights = config.pretrained or config.weights is not None
    overlay = {"file": config.weights, "hf_hub_id": None, "url": ""} if config.weights else {}
    with _explained(f"model {config.name}" + (f" with the weights {config.weights}" if config.weights else "")):
        arguments = resolve_model_input_args(
            config.name,
            {"input_size": input_size},
            pretrained_cfg_overlay=overlay,
            num_classes=None if starts_from_weights else num_classes,
            **config.kwargs,
        )
        model = timm.create_model(**arguments, pretrained=starts_from_weights)
    if num_classes is not None and model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """What a model of timm repeats: the children of each module called `blocks`, in order; none where it has none."""
    named = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for module in named for block in module.children()]


def check_name(name: str) -> None:
    """Raises a ValueError that names the nearest known model, if `name` is a plain name that timm does not know."""
    if ":" not in name and not timm.is_model(name):
        nearest = get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown model {name!r}; the nearest known model is {nearest!r}")


def save_model(model: nn.Module, folder: Path, class_names: Sequence[str], data_config: Mapping[str, Any]) -> None:
    """Writes weights and description, so that `timm.create_model(f"local-dir:{folder}", pretrained=True)` loads them.

    Written by timm itself: `model.safetensors` and `config.json` with arguments, classes (`label_names`), input size
    and normalisation.
    """
    labels = {"label_names": list(class_names)}
    save_for_hf(model, str(folder), model_config=labels, safe_serialization=True, data_config=dict(data_config))


def load_model(folder: str | Path) -> nn.Module:
    """The model that `save_model` wrote, in evaluation mode.

    Raises:
        ValueError: no such folder or file, weights that are truncated or of another model.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not os.path.isfile(folder / file):
            raise ValueError(f"{folder} is not a saved model: it has no {file}")
    with _explained(f"cannot load the model in {folder}"):
        check_name(json.loads((folder / CONFIG_FILE).read_text())["architecture"])
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def load_published(name: str) -> nn.Module:
    """A model by name with the weights that timm's registry names for it, in evaluation mode.

    Raises:
        ValueError: an unknown name, or weights that cannot be had.
    """
    check_name(name)
    with _explained(f"cannot load the weights of {name}"):
        return timm.create_model(name, pretrained=True).eval()


def class_names(model: nn.Module) -> list[str]:
    """Name of each class: those saved with the model, ImageNet's where it has ImageNet's classes, else numbers.

    Raises:
        ValueError: more or fewer names were saved than there are classes.
    """
    if names := model.pretrained_cfg.get("label_names"):
        if len(names) != model.num_classes:
            raise ValueError(f"the model has {len(names)} label_names for {model.num_classes} classes, wanted as many")
        return [str(name) for name in names]
    if subset := infer_imagenet_subset(model):
        return ImageNetInfo(subset).label_descriptions()
    return [str(index) for index in range(model.num_classes)]
