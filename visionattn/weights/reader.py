"""Named tensors out of a file, by its format and not its name, with nothing in it executed.

A checkpoint of PyTorch is a program for Python's unpickler, and training scripts leave objects of their own in it:
Namespace, yacs, HistoryBuffer. `torch.load(weights_only=True)` refuses those files, believes the sizes that a file
states, and lets it allocate at will (`bytearray(10**12)` is allowed there). `pickles.py` knows tensors and containers
alone, and reads only the tensors that are asked for, each within the bounds of the file.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionattn.weights.pickles import PickledTensor, Storage, UnsafePickle, read_pickle

# Keys under which training scripts wrap the weights; averaged weights are the published ones, so they come first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
CHUNK = 1 << 22
# What zipfile, safetensors, the pickles and torch raise on bytes that make no sense.
_DAMAGE = (
    ValueError,
    zipfile.BadZipFile,
    struct.error,
    SafetensorError,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, on the CPU, out of the wrapper of whichever training script wrote it.

    Reads safetensors, PyTorch's zip files, and its files from before version 1.6. Memory stays below the file's size
    and what the chosen tensors take, whatever the file states.

    Raises:
        ValueError: The file is missing or of another format, damaged, or holds no named tensors; the message names the
            file and, where one is at fault, the tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            if start.startswith(b"PK"):
                return _read_zip(file, path.stat().st_size)
            if start.startswith(b"\x80\x02"):
                return _read_legacy(file, path.stat().st_size)
        if start[8:9] == b"{":
            return _read_safetensors(path)
    except _DAMAGE as error:
        raise ValueError(f"{path}: {error}") from error
    page = ", but a web page" if start.lstrip()[:1] == b"<" else ""
    raise ValueError(f"{path}: not a checkpoint of PyTorch or safetensors{page}; it begins with {start!r}")


def choose(tree: Any) -> dict[str, Any]:
    """The tensors of a checkpoint by name, out of its wrappers.

    Raises:
        UnsafePickle: There are none.
    """
    for _ in range(len(WRAPPERS)):  # a wrapper may hold another, a hostile one itself
        inner = (tree[key] for key in WRAPPERS if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping))
        if (found := next(inner, None)) is None:
            break
        tree = found
    tree = tree if isinstance(tree, Mapping) else {}
    chosen = {
        name.removeprefix("module."): x
        for name, x in tree.items()
        if isinstance(name, str) and isinstance(x, PickledTensor | Tensor)
    }
    if not chosen:
        raise UnsafePickle(f"holds no named tensors; its keys are {[str(key) for key in tree][:8]}")
    return chosen


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return choose({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (no mapping)


def _read_zip(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """PyTorch's zip: `NAME/data.pkl`, and the bytes of each storage in `NAME/data/KEY`, none of them compressed."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in records:
            raise UnsafePickle("a zip file without data.pkl, so no checkpoint of PyTorch")
        packed = [info for info in records.values() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise UnsafePickle(f"record {packed[0].filename!r} is compressed, which PyTorch never does")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise UnsafePickle("numbers are stored big-endian; wanted little-endian")
        with archive.open(records["data.pkl"]) as stream:
            chosen = choose(read_pickle(stream))
        budget, data = size, {}
        for name, tensor in chosen.items():
            key = tensor.storage.key
            if key not in data:
                info = records.get(f"data/{key}")
                # What is stored uncompressed can pass the file's size only where records overlap.
                if info is None or info.file_size > budget:
                    raise UnsafePickle(f"the data of {name!r} is not in the file")
                budget -= info.file_size
                with archive.open(info) as stream:
                    data[key] = _read_bytes(stream, info.file_size, name)
    return {name: tensor.build(name, data[tensor.storage.key]) for name, tensor in chosen.items()}


def _read_legacy(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """PyTorch before 1.6: pickles of magic, version, system, the object and keys; then storages with their lengths."""
    if read_pickle(file) != LEGACY_MAGIC:
        raise UnsafePickle("a pickle, but not of PyTorch")
    _, _, tree = (read_pickle(file) for _ in range(3))
    chosen, keys = choose(tree), read_pickle(file)
    users = {tensor.storage.key: name for name, tensor in chosen.items()}
    storages: dict[str, Storage] = {tensor.storage.key: tensor.storage for tensor in chosen.values()}
    widths = _widths(tree) | {key: x.dtype.itemsize for key, x in storages.items()}
    data = {}
    for key in keys if isinstance(keys, list) else []:
        count = int.from_bytes(file.read(8), "little", signed=True)
        length = count * widths.get(key, 0)
        if key not in widths or not 0 <= length <= size - file.tell():
            raise UnsafePickle(f"the data of {users.get(key, 'an unused tensor')!r} is cut off or of unknown length")
        if key in users:
            data[key] = _read_bytes(file, length, users[key])
        else:
            file.seek(length, 1)
    for name, tensor in chosen.items():
        if tensor.storage.key not in data:
            raise UnsafePickle(f"the data of {name!r} is not in the file")
    return {name: tensor.build(name, data[tensor.storage.key]) for name, tensor in chosen.items()}


def _widths(tree: Any) -> dict[str, int]:
    """Bytes per element of every storage that is met in nested containers, each container visited once."""
    widths, seen, waiting = {}, set(), [tree]
    while waiting:
        x = waiting.pop()
        if isinstance(x, PickledTensor):
            widths[x.storage.key] = x.storage.dtype.itemsize
        elif isinstance(x, Mapping | list | tuple) and id(x) not in seen:
            seen.add(id(x))
            waiting.extend(x.values() if isinstance(x, Mapping) else x)
    return widths


def _read_bytes(stream: BinaryIO, length: int, name: str) -> Tensor:
    """`length` bytes as a tensor; reading to the end makes the zip reader check the record's sum."""
    data = torch.empty(length, dtype=torch.uint8)
    view, place = memoryview(data.numpy()), 0
    while place < length:
        try:
            part = stream.read(min(CHUNK, length - place))
        except zipfile.BadZipFile as error:
            raise UnsafePickle(f"the data of {name!r} is damaged: {error}") from error
        if not part:
            raise UnsafePickle(f"the data of {name!r} is cut off")
        view[place : place + len(part)] = part
        place += len(part)
    return data
