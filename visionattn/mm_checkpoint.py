"""Checkpoints of mmengine, mmdet and mmseg, read without running code that they carry."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from safetensors.torch import load_file
from torch import nn

# Stands for the class in a checkpoint, which names its functions but needs no object of it.
_ONE_CYCLE = object()


def _attribute(owner: Any, name: str) -> Callable:
    """What stands in for `getattr` in a checkpoint: it knows statistics of mmengine's log and curves of schedules."""
    if owner is HistoryBuffer and name in ("min", "max", "mean", "current"):
        return getattr(HistoryBuffer, name)
    if owner is _ONE_CYCLE and name in ("_annealing_cos", "_annealing_linear"):
        return getattr(OneCycleParamScheduler, name)
    raise ValueError(f"a checkpoint asks for {name!r} of {owner!r}, which is not loaded")


def read_checkpoint(filename: str | Path, map_location: Any = "cpu") -> dict:
    """A checkpoint of mmengine, mmdet, mmseg or any training script, read with `weights_only=True`.

    Beyond tensors only mmengine's training log, its schedules' curves and its dicts of settings are allowed, which its
    own checkpoints hold and need to resume.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or is no checkpoint.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    one_cycle = f"{OneCycleParamScheduler.__module__}.{OneCycleParamScheduler.__qualname__}"
    allowed = [HistoryBuffer, ConfigDict, (_attribute, "builtins.getattr"), (_ONE_CYCLE, one_cycle), *_numpy_globals()]
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(map_location or "cpu"))
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not read, since it is no checkpoint or holds more than tensors: {error}") from error


def _numpy_globals() -> list:
    """The names by which numpy's arrays of numbers are pickled, old and new."""
    import numpy
    from numpy._core import multiarray

    names = [(getattr(multiarray, name), f"{core}.multiarray.{name}")
             for name in ("_reconstruct", "scalar") for core in ("numpy.core", "numpy._core")]  # fmt: skip
    kinds = {type(numpy.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")}
    return [*names, numpy.ndarray, numpy.dtype, *kinds]


def read_trained(filename: str | Path) -> tuple[dict, dict]:
    """A checkpoint of a whole detector or segmenter, and its named tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such checkpoint.
    """
    checkpoint = read_checkpoint(filename)
    # Where mmengine looks for them.
    tensors = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{filename}: no checkpoint of a detector or segmenter, since it holds no named tensors")
    return checkpoint, tensors


def check_fit(model: nn.Module, filename: str | Path) -> None:
    """Load a checkpoint of a whole detector or segmenter, unless it is one of another model.

    Counters and losses, which a trained model does without, may differ, and the file may have further parts beside
    those of the model, such as a teacher.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such checkpoint, or a name is missing or unknown or of another shape.
    """
    model = model.module if is_model_wrapper(model) else model
    _, tensors = read_trained(filename)
    metadata = getattr(tensors, "_metadata", None)
    tensors = OrderedDict((name.removeprefix("module."), x) for name, x in tensors.items())
    tensors._metadata = metadata  # by which modules know names of their older versions
    try:
        result = model.load_state_dict(tensors, strict=False)
    except (ValueError, RuntimeError) as error:
        # torch has a line for each tensor of another shape.
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"{filename}: of another model: {first}") from error
    parts = {name for name, _ in model.named_children()}
    faults = []
    for kind, names in (("missing", result.missing_keys), ("unknown", result.unexpected_keys)):
        names = [name for name in names if name.partition(".")[0] in parts and not _is_idle(name)]
        if names:
            faults.append(f"{len(names)} names are {kind}, such as {', '.join(names[:: -(-len(names) // 3)])}")
    if faults:
        raise ValueError(f"{filename}: of another model: {'; '.join(faults)}")


def _is_idle(name: str) -> bool:
    """Whether a tensor is of no use to a trained model."""
    first, *others = name.split(".")
    of_loss = any(part.startswith("loss") for part in others)
    return first == "data_preprocessor" or of_loss or name.endswith("num_batches_tracked")
