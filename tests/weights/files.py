"""Files of weights in every container, for the tests beside it."""

from pathlib import Path

import torch
from safetensors.torch import save_file

CONTAINERS = ("zip", "legacy", "safetensors")


def save(path: Path, checkpoint: dict, container: str) -> None:
    """Write a checkpoint as PyTorch's zip, as its file from before version 1.6, or as safetensors."""
    if container == "safetensors":
        save_file({name: x.contiguous() for name, x in checkpoint.items()}, path)
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=container == "zip")
