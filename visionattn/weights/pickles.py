"""A reader of pickles that knows containers, numbers, strings and tensors, and calls nothing.

Every other global becomes an `Inert` of its name: calling it, filling it and setting its state give an `Inert` again.
An instruction makes at most one object, so that memory is bounded by the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# What stands on the stack where a tuple, list or dictionary begins.
_MARK = object()
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict")


class UnsafePickle(ValueError):
    """A pickle that is no checkpoint, or not a sound one."""


@dataclass(frozen=True, slots=True)
class Inert:
    """Stands for an object of a class or function that is not known here."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory of tensors, not read yet: the key of its data and the type of its elements."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor whose data is not read yet; offset and strides count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def build(self, name: str, data: Tensor) -> Tensor:
        """The tensor, from the bytes of its storage.

        Raises:
            UnsafePickle: It reaches beyond its storage, or has more elements than that.
        """
        count = data.numel() // self.dtype.itemsize
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if prod(self.size) > count or (prod(self.size) and last >= count):
            raise UnsafePickle(f"tensor {name!r} of size {self.size} reaches beyond its {count} elements")
        typed = data[: count * self.dtype.itemsize].view(self.dtype)
        return typed.as_strided(self.size, self.stride, self.offset)


def read_pickle(stream: BinaryIO) -> Any:
    """The object that the next pickle of a stream describes; the stream is left behind it.

    Raises:
        UnsafePickle: The pickle is damaged or uses an instruction that no checkpoint needs.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack[-1]
            machine.run(opcode.name, argument)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, UnsafePickle):
            raise
        raise UnsafePickle(f"its pickle is damaged: {type(error).__name__}: {error}") from error
    raise UnsafePickle("its pickle has no end")


class _Machine:
    """Stack and memory of one pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self.stack
        if name in _IGNORED:
            return
        if name in _LITERALS:
            stack.append(argument if _LITERALS[name] is None else _LITERALS[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif name == "GLOBAL":
            stack.append(Inert(".".join(argument.split(" "))))
        elif name == "STACK_GLOBAL":
            module, attribute = self._take(2)
            stack.append(Inert(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_call(*self._take(2)))
        elif name == "NEWOBJ_EX":
            stack.append(self._take(3)[0])
        elif name == "BUILD":
            stack.pop()
        else:
            self._fill(name)

    def _fill(self, name: str) -> None:
        """Carry out an instruction that makes or fills a container."""
        stack = self.stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._take(int(name[-1]))))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(self._since_mark())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = self._take(2) if name == "SETITEM" else self._since_mark()
            if name == "DICT":
                stack.append({})
            if isinstance(stack[-1], dict):
                stack[-1].update(_pairs(items))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        else:
            raise UnsafePickle(f"its pickle uses {name}, which no checkpoint needs")

    def _take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise UnsafePickle("its pickle takes from an empty stack")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        taken = []
        while (x := self.stack.pop()) is not _MARK:
            taken.append(x)
        return taken[::-1]


_IGNORED = ("PROTO", "FRAME")
# What an instruction puts on the stack: its argument for None, else what the function makes.
_LITERALS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_LITERALS |= dict.fromkeys(_NUMBERS + _STRINGS + _BYTES)


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    """Keys and values; only plain keys, since the hash of nested tuples takes exponential time."""
    pairs = zip(islice(items, 0, None, 2), islice(items, 1, None, 2), strict=True)
    return ((key if isinstance(key, str | int | float | None) else str(type(key)), value) for key, value in pairs)


def _call(function: Any, arguments: Any) -> Any:
    """What a call of a global gives: a tensor, a dictionary, or something inert."""
    if not isinstance(function, Inert) or not isinstance(arguments, tuple):
        return Inert("call")
    if function.name in _DICTS:
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
        return dict(_pairs([x for pair in pairs for x in pair]))
    if function.name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(*arguments[:4])
    if function.name == "torch._utils._rebuild_tensor_v3":
        return _tensor(*arguments[:4], dtype=arguments[6])
    if function.name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    return arguments if function.name == "torch.Size" else Inert(function.name)


def _storage(identity: Any) -> Storage:
    """The storage that a persistent id ("storage", type, key, device, elements) names."""
    kind, type_, key = identity[:3]
    if kind != "storage" or not isinstance(type_, Inert) or not isinstance(key, str):
        raise UnsafePickle(f"its pickle refers to something that is no storage: {str(kind)[:40]!r}")
    name = type_.name.rpartition(".")[2]
    if name not in _TYPES:
        raise UnsafePickle(f"its pickle has numbers of an unknown type, {type_.name[:40]!r}")
    return Storage(key, _TYPES[name])


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Inert | None = None) -> PickledTensor:
    """A tensor whose description is sound in itself; `build` compares it with its data."""
    size, stride = (
        x[0] if isinstance(x, tuple) and len(x) == 1 and isinstance(x[0], tuple) else x for x in (size, stride)
    )
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or any(type(x) is not int or x < 0 or x > 1 << 48 for x in numbers):
        raise UnsafePickle(f"its pickle has a tensor of impossible size {str(size)[:80]}")
    if len(size) != len(stride) or len(size) > 8:
        raise UnsafePickle(f"its pickle has a tensor of {len(size)} sizes and {len(stride)} strides")
    kind = getattr(torch, dtype.name.rpartition(".")[2], None) if isinstance(dtype, Inert) else storage.dtype
    if not isinstance(kind, torch.dtype):
        raise UnsafePickle(f"its pickle has numbers of an unknown type, {dtype}")
    return PickledTensor(storage, kind, offset, tuple(size), tuple(stride))
