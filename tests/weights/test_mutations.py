"""A thousand mutated files: each is refused by name or loads whole; nothing in it runs, and memory stays bounded."""

import copy
import random
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from files import CONTAINERS, save
from timm.models import model_entrypoint
from zoo import TINY

from visionattn.weights import read_weights

BLOCKS, BLOCK = 20, 50
# What reading one file of a small model may add to the memory of the process, in KiB: these files have less than 2 MiB.
MEMORY = 64 << 10


class Exploit:
    """Creates a file when Python's unpickler meets it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Allocation:
    """Takes ten terabytes when Python's unpickler meets it, which `weights_only=True` allows."""

    def __reduce__(self):
        return bytearray, (10**13,)


@dataclass
class Mutation:
    """A mutated checkpoint; an error must give one of `culprits`, if there are any: flipped bits tell no name."""

    checkpoint: dict
    culprits: tuple[str, ...] = ()
    cut: float = 1.0
    flips: int = 0


def truncate(weights: dict, dice: random.Random, trap: Path) -> Mutation:
    return Mutation(weights, cut=dice.random())


def flip(weights: dict, dice: random.Random, trap: Path) -> Mutation:
    return Mutation(weights, flips=dice.randint(1, 8))


def reshape(weights: dict, dice: random.Random, trap: Path) -> Mutation:
    name = dice.choice(sorted(weights))
    x = weights[name]
    shapes = [
        x[..., None],
        x.flatten()[:1],
        x.flatten()[0],
        x.flatten()[:0],
        x[None],
        torch.cat([x, x]) if x.ndim else x[None],
    ]
    shapes += [x.transpose(0, -1)] if x.ndim > 1 and x.shape[0] != x.shape[-1] else []
    return Mutation(weights | {name: dice.choice(shapes).clone()}, (name,))


def rename(weights: dict, dice: random.Random, trap: Path) -> Mutation:
    name = dice.choice([name for name in sorted(weights) if not name.endswith("num_batches_tracked")])
    position = dice.randrange(len(name))
    signs = "xq0._#|".replace(name[position], "")
    other = name[:position] + dice.choice(signs) + name[position + 1 :]
    kept = {key: x for key, x in weights.items() if key != name}
    return Mutation(kept | {other: weights[name]} if dice.random() < 0.7 else kept, (name, other))


def spoil(weights: dict, dice: random.Random, trap: Path) -> Mutation:
    name = dice.choice([name for name, x in weights.items() if x.is_floating_point()])
    x = weights[name].clone()
    x.view(-1)[dice.randrange(x.numel())] = dice.choice([torch.nan, torch.inf, -torch.inf])
    return Mutation(weights | {name: x}, (name,))


def attack(weights: dict, dice: random.Random, trap: Path) -> Mutation:
    """Objects that Python's unpickler would execute: beside the weights, in their place, or around them."""
    hostile = dice.choice([Exploit(trap), Allocation(), [Exploit(trap)] * 3, {"model": Exploit(trap)}])
    deep = []
    for _ in range(200):
        deep = [deep, deep]
    name = dice.choice([name for name in sorted(weights) if not name.endswith("num_batches_tracked")])
    endless = {"state_dict": weights}
    endless["model"] = endless
    return dice.choice(
        [
            Mutation({"model": weights, "args": hostile}),
            Mutation({"args": hostile, "model": weights, "optimizer": deep}),
            Mutation(weights | {name: hostile}, (name,)),
            Mutation({"model": hostile, "epoch": 3}),
            Mutation(endless),
        ]
    )


KINDS = (truncate, flip, reshape, rename, spoil, attack)


def write(mutation: Mutation, container: str, path: Path, dice: random.Random) -> None:
    save(path, mutation.checkpoint, container)
    data = bytearray(path.read_bytes())
    for _ in range(mutation.flips):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data[: int(mutation.cut * len(data))])


def peak_memory(reset: bool = False) -> int:
    """The most memory that the process has held since the last reset, in KiB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@cache
def untouched(name: str) -> tuple[torch.nn.Module, dict]:
    """A model that no file may change, and a copy of its weights."""
    model = timm.create_model(name)
    return model, copy.deepcopy(model.state_dict())


def check_refusal(error: ValueError, mutation: Mutation, name: str, path: Path, told: str) -> None:
    """Fail unless the error names the file and the culprit, and a model that exists keeps its weights."""
    assert str(error).startswith(f"{path}: "), told
    named = any(name in str(error) for name in mutation.culprits)
    assert named or not mutation.culprits, f"{told}: none of {mutation.culprits} is in: {error}"
    model, before = untouched(name)
    with suppress(ValueError):
        sys.modules[model_entrypoint(name).__module__].checkpoint_filter_fn(read_weights(path), model)
    after = model.state_dict()
    assert after.keys() == before.keys(), told
    assert all(torch.equal(after[key], x) for key, x in before.items()), told


def check_load(loaded: dict, mutation: Mutation, weights: dict, told: str) -> None:
    """Fail unless all weights are there, and the file's unless its bytes were flipped or a table resized."""
    assert loaded.keys() == weights.keys(), told
    assert all(torch.isfinite(x).all() for x in loaded.values()), told
    if not mutation.flips:
        assert all(torch.equal(loaded[key], x) for key, x in weights.items() if key not in mutation.culprits), told


# A block is a share of the thousand; the first is everyday's.
@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, BLOCKS))])
def test_mutated_files_are_refused_by_name_or_load_whole(block, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "weights"
    refused = 0
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        dice = random.Random(number)
        name, kind = TINY[number % len(TINY)], KINDS[number % len(KINDS)]
        container = CONTAINERS[dice.randrange(2 if kind is attack else 3)]
        # Values that no model begins with, to tell what has been loaded.
        weights = {key: x + 1 for key, x in untouched(name)[1].items()}
        mutation = kind({key: x.clone() for key, x in weights.items()}, dice, trap)
        write(mutation, container, path, dice)
        told = f"{number}: {kind.__name__} of {name} as {container}"
        memory, error = peak_memory(reset=True), None
        try:
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        except ValueError as raised:
            refused, error = refused + 1, raised
        if error is None:
            assert kind in (flip, reshape, attack), told
            check_load(model.state_dict(), mutation, weights, told)
        else:
            check_refusal(error, mutation, name, path, told)
        assert peak_memory() - memory < MEMORY, told
        assert not trap.exists(), told
    assert refused > BLOCK // 2
