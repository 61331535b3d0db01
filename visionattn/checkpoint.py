"""From a checkpoint as its authors published it to the names of our modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from visionattn.weights.reader import WRAPPERS


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, out of the wrapper of whichever training script wrote it."""
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            return unwrap(checkpoint[key])
    return {name.removeprefix("module."): x for name, x in checkpoint.items() if isinstance(x, Tensor)}


def rename(state_dict: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply `rules`, pairs of a regular expression and its replacement, one after the other to every name."""
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def translate(
    checkpoint: Mapping,
    model: nn.Module,
    rules: Sequence[tuple[str, str]],
    drop: str | None = None,
    adapt: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    free: Sequence[str] = ("head.fc.",),
) -> dict[str, Tensor]:
    """The named tensors of a checkpoint for `model`; one that has our names already passes unchanged.

    Args:
        checkpoint: As it was opened, with or without a wrapper.
        model: The model that it is for.
        rules: From the authors' names to ours, as in `rename`.
        drop: Regular expression of the authors' names that have no place in ours, such as tables that are computed.
        adapt: What is done with the renamed tensors before they are compared with the model's, such as resizing tables.
        free: As of `fit`.

    Raises:
        ValueError: The checkpoint does not fit the model.
    """
    state_dict = unwrap(checkpoint)
    if next(iter(model.state_dict())) not in state_dict:
        kept = {name: x for name, x in state_dict.items() if drop is None or not re.search(drop, name)}
        state_dict = rename(kept, rules)
    return fit(state_dict if adapt is None else adapt(state_dict, model), model, free)


def fit(state_dict: dict[str, Tensor], model: nn.Module, free: Sequence[str] = ("head.fc.",)) -> dict[str, Tensor]:
    """Return `state_dict` if its names and shapes are those of `model`, so that nothing is loaded by halves.

    Args:
        state_dict: Named tensors in our names.
        model: The model that they are for.
        free: Prefixes of names that may be missing or have another shape, such as the classifier's. The channels of the
            image in the first convolution are free too, since timm adapts them.

    Raises:
        ValueError: A name is missing, unknown or of another shape; the message names the first of each.
    """
    wanted = model.state_dict()
    # torch itself does without the counters of batch norms, which old files lack.
    bound = {name for name in wanted if not name.startswith(tuple(free)) and not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name in bound and name not in state_dict]
    unknown = [name for name in state_dict if name not in wanted and not name.startswith(tuple(free))]
    shapes = {name: (tuple(state_dict[name].shape), tuple(wanted[name].shape)) for name in bound & state_dict.keys()}
    other = {name: pair for name, pair in shapes.items() if pair[0] != pair[1] and not _differs_in_channels(*pair)}
    if not missing and not unknown and not other:
        return state_dict
    faults = []
    if missing:
        faults.append(f"{len(missing)} names are missing, first {missing[0]!r}")
    if unknown:
        faults.append(f"{len(unknown)} names are unknown, first {unknown[0]!r}")
    if other:
        name, (seen, expected) = min(other.items())
        faults.append(f"{len(other)} tensors have another shape, first {name!r}: got {seen}, wanted {expected}")
    raise ValueError(f"checkpoint does not fit {type(model).__name__}: {'; '.join(faults)}")


def _differs_in_channels(seen: torch.Size, wanted: torch.Size) -> bool:
    """Whether both are weights of a convolution on images of different channels."""
    return len(seen) == len(wanted) == 4 and seen[1] == 3 and (seen[0], *seen[2:]) == (wanted[0], *wanted[2:])
