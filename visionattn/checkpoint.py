"""From a checkpoint as its authors published it to the names of our modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from visionattn.weights.reader import WRAPPERS


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, out of the wrapper of whichever training script wrote it.

    Names lose what DistributedDataParallel and `torch.compile` put before them.
    """
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            return unwrap(checkpoint[key])
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in checkpoint.items() if isinstance(x, Tensor)}


@dataclass
class Report:
    """What became of a checkpoint's tensors.

    Attributes:
        mapped: Our name or names of each of the authors' names.
        resized: Shapes before and after, of each of our names whose tensor was made to fit.
        dropped: The authors' names that have no place in the model.
        missing: Our names that the checkpoint lacks and that stay as they were initialised, such as a classifier's.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line, then one a tensor that was not simply renamed."""
        counts = f"{len(self.mapped)} mapped, {len(self.resized)} resized, {len(self.dropped)} dropped"
        lines = [f"{counts}, {len(self.missing)} missing"]
        lines += [f"resized {name}: {before} to {after}" for name, (before, after) in self.resized.items()]
        lines += [f"dropped {name}" for name in self.dropped] + [f"missing {name}" for name in self.missing]
        return "\n".join(lines)


class Translated(dict):
    """Named tensors in our names, with a `report` of how they came to be."""

    report: Report


def rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """Apply `rules`, pairs of a regular expression and its replacement, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def translate(
    checkpoint: Mapping,
    model: nn.Module,
    rules: Sequence[tuple[str, str]],
    drop: str | None = None,
    adapt: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    free: Sequence[str] = ("head.fc.",),
    headless: Sequence[str] = ("head.", "norm."),
) -> Translated:
    """The named tensors of a checkpoint for `model`; one that has our names already passes unchanged.

    Of a detector or segmenter of OpenMMLab only the backbone counts, and it may lack the classifier and its norm.

    Args:
        checkpoint: As it was opened, with or without a wrapper.
        model: The model that it is for.
        rules: From the authors' names to ours, as in `rename`. Names that differ only in an ending `#0`, `#1`, ... are
            parts of one tensor, joined along the first axis; a name `a|b` is several, the slices of the first axis.
        drop: Regular expression of the authors' names that have no place in ours, such as tables that are computed.
        adapt: What is done with the renamed tensors before they are compared with the model's, such as resizing tables.
        free: As of `fit`.
        headless: Further prefixes that are free in the backbone of a detector or segmenter.

    Raises:
        ValueError: The checkpoint does not fit the model.
    """
    authors, report = unwrap(checkpoint), Report()
    inner, dense = _backbone(authors)
    report.mapped = _read_names(list(inner), set(model.state_dict()), rules, drop)
    used = {inner[name] for name in report.mapped}
    report.dropped = [name for name in authors if name not in used]
    renamed = {target: authors[inner[name]] for name, target in report.mapped.items()}
    if renamed.keys() != report.mapped.keys():
        _check_names(report.mapped, model)
        renamed = _join_and_split(renamed)
    shapes = {name: tuple(x.shape) for name, x in renamed.items()}
    adapted = renamed if adapt is None else adapt(renamed, model)
    origins = {ours: name for name, target in report.mapped.items() for ours in _targets(target)}
    fitted = Translated(fit(adapted, model, (*free, *headless) if dense else free, origins))
    after = {name: tuple(x.shape) for name, x in fitted.items()}
    report.resized = {name: (shapes[name], to) for name, to in after.items() if shapes.get(name, to) != to}
    lacking = [name for name in model.state_dict() if name not in fitted]
    report.missing = [name for name in lacking if not name.endswith("num_batches_tracked")]
    fitted.report = report
    return fitted


def _read_names(
    names: list[str], wanted: set[str], rules: Sequence[tuple[str, str]], drop: str | None
) -> dict[str, str]:
    """Our name of each name that is not dropped: itself or renamed, whichever gives more names of the model."""
    theirs = {name: rename(name, rules) for name in names if drop is None or not re.search(drop, name)}
    renamed = sum(wanted.issuperset(_targets(target)) for target in theirs.values())
    return theirs if renamed > len(wanted.intersection(names)) else {name: name for name in names}


def _targets(name: str) -> list[str]:
    """The tensors that a name of `translate`, with `#` and `|`, stands for."""
    return name.partition("#")[0].split("|")


def _backbone(authors: Iterable[str]) -> tuple[dict[str, str], bool]:
    """The file's names of the backbone's tensors by their names within it, and whether there is no classifier.

    OpenMMLab's classifiers keep the head outside the backbone; our detectors keep the model in the backbone's `body`.
    """
    prefix, classifier = "backbone.", "head.fc."
    if not any(name.startswith(prefix) for name in authors):
        return {name: name for name in authors}, False
    prefix += "body." * any(name.startswith(f"{prefix}body.") for name in authors)
    kept = {name.removeprefix(prefix): name for name in authors if name.startswith((prefix, classifier))}
    return kept, not any(name.startswith(classifier) for name in kept)


def _check_names(mapped: dict[str, str], model: nn.Module) -> None:
    """Raise ValueError for a name of the file that has a sign of `translate`, or two that mean the same tensor."""
    first = {}
    for name, target in mapped.items():
        if "#" in name or "|" in name or first.setdefault(target, name) != name:
            other = f", which {first[target]!r} means too" if target in first else ""
            raise ValueError(f"checkpoint does not fit {type(model).__name__}: unknown name {name!r}{other}")


def _join_and_split(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Carry out what `#` and `|` say in names, as `translate` describes."""
    done, parts = {}, {}
    for name, x in renamed.items():
        target, numbered, number = name.partition("#")
        if numbered:
            parts.setdefault(target, {})[int(number)] = x
        else:
            names = name.split("|")
            if len(names) > 1 and x.shape[:1] != (len(names),):
                raise ValueError(f"{names} must be the rows of one tensor, got one of shape {tuple(x.shape)}")
            done |= dict(zip(names, x.unbind() if len(names) > 1 else [x], strict=True))
    return done | {name: _join(name, [x[i] for i in sorted(x)]) for name, x in parts.items()}


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if not any(x.ndim for x in parts):
        # The counters of batch norms, which are equal.
        return parts[0]
    if len({x.shape[1:] if x.ndim else None for x in parts}) > 1:
        raise ValueError(f"parts of {name!r} have shapes that do not join: {[tuple(x.shape) for x in parts]}")
    return torch.cat(parts)


def fit(
    state_dict: dict[str, Tensor],
    model: nn.Module,
    free: Sequence[str] = ("head.fc.",),
    origins: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return `state_dict` if its names and shapes are those of `model`, so that nothing is loaded by halves.

    Args:
        state_dict: Named tensors in our names.
        model: The model that they are for.
        free: Prefixes of names that may be missing or have another shape, such as the classifier's. The channels of the
            image in the first convolution are free too, since timm adapts them.
        origins: Names in the file of names of ours, for messages; None where they are the same.

    Raises:
        ValueError: A name is missing, unknown or of another shape; the message names the first of each.
    """
    wanted, origins = model.state_dict(), origins or {}

    def told(name: str) -> str:
        theirs = origins.get(name, name)
        return repr(name) if theirs == name else f"{name!r} ({theirs!r} in the file)"

    # torch itself does without the counters of batch norms, which old files lack.
    bound = {name for name in wanted if not name.startswith(tuple(free)) and not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name in bound and name not in state_dict]
    unknown = [name for name in state_dict if name not in wanted and not name.startswith(tuple(free))]
    shapes = {name: (tuple(state_dict[name].shape), tuple(wanted[name].shape)) for name in bound & state_dict.keys()}
    other = {name: pair for name, pair in shapes.items() if pair[0] != pair[1] and not _differs_in_channels(*pair)}
    # A sum is finite only if all are, up to overflow, which no trained weight comes near.
    broken = [name for name, x in state_dict.items() if x.is_floating_point() and not x.is_meta and not _is_finite(x)]
    if not missing and not unknown and not other and not broken:
        return state_dict
    faults = [f"{len(broken)} tensors have numbers that are not finite, first {told(broken[0])}"] if broken else []
    if missing:
        faults.append(f"{len(missing)} names are missing, first {missing[0]!r}")
    if unknown:
        faults.append(f"{len(unknown)} names are unknown, first {told(unknown[0])}")
    if other:
        name, (seen, expected) = min(other.items())
        faults.append(f"{len(other)} tensors have another shape, first {told(name)}: got {seen}, wanted {expected}")
    raise ValueError(f"checkpoint does not fit {type(model).__name__}: {'; '.join(faults)}")


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach().sum(dtype=torch.float64)))


def _differs_in_channels(seen: torch.Size, wanted: torch.Size) -> bool:
    """Whether both are weights of a convolution on images of different channels."""
    return len(seen) == len(wanted) == 4 and seen[1] == 3 and (seen[0], *seen[2:]) == (wanted[0], *wanted[2:])
