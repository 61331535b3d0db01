"""Checkpoints of mmengine, mmdet and mmseg, read without running code that they carry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import load_file


def _history_attribute(owner: Any, name: str) -> Callable:
    """What stands in for `getattr` in a checkpoint: it knows the statistics of mmengine's training log only."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise ValueError(f"a checkpoint asks for {name!r} of {owner!r}, which is not loaded")
    return getattr(HistoryBuffer, name)


def read_checkpoint(filename: str | Path, map_location: Any = "cpu") -> dict:
    """A checkpoint of mmengine, mmdet, mmseg or any training script, read with `weights_only=True`.

    Beyond tensors only mmengine's training log is allowed, which its own checkpoints hold and need to resume.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or is no checkpoint.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    allowed = [HistoryBuffer, (_history_attribute, "builtins.getattr"), *_numpy_globals()]
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
