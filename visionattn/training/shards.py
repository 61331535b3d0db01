"""webdataset shards: tar files that hold NAME.jpg beside NAME.cls, the label as text.

Their headers are read once, so that labels, classes and lengths are known before the training starts, and validation
finds its pictures by number. The training reads them as `visionattn.training.stream` says.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from timm.data import create_dataset
from timm.data.readers.reader import Reader

from visionattn.training.readers import require

_ENDINGS = ("jpg", "jpeg", "png", "webp")


class Member(NamedTuple):
    """Where a picture lies in a shard: its name, its first byte, its bytes, and its label."""

    name: str
    offset: int
    length: int
    label: int


class ShardReader(Reader):
    """The pictures of some shards by number, in the order in which they lie.

    Args:
        root: folder of the shards, on a file system, with the `_info.json` that names the parts where there is one.
        split: a part that it names, or the shards as `train-{0000..0099}.tar`.

    Attributes:
        shards: path of each shard.
        starts: number of the first picture of each shard, and of all pictures.
        samples: (name, label) of each picture.
        class_to_idx: "0", "1", ... to the label.

    Raises:
        ValueError: the package `webdataset` is missing; a part or shard does not exist or is no tar file; a picture
            without a label, a label that is no number, a class without pictures, a name that occurs twice.
    """

    def __init__(self, root: str, split: str) -> None:
        super().__init__()
        require("webdataset", "wds")
        try:
            names = create_dataset("wds/", root=root, split=split).reader.split_info.filenames
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"no part {split!r} in {root}, wanted one of its _info.json or shards: {error}") from error
        self.root = root
        self.shards = [os.path.join(root, name) for name in names]
        with ThreadPoolExecutor() as pool:
            listed = list(pool.map(_members, self.shards))
        self.members = [member for shard in listed for member in shard]
        self.starts = list(accumulate(map(len, listed), initial=0))
        self.samples = [(member.name, member.label) for member in self.members]
        labels = {label for _, label in self.samples}
        if labels != set(range(len(labels))) or not labels:
            raise ValueError(f"{split} in {root} has the labels {sorted(labels)[:5]}..., wanted all from 0 to the last")
        if len({name for name, _ in self.samples}) < len(self.samples):
            seen: set[str] = set()
            twice = next(name for name, _ in self.samples if name in seen or seen.add(name))
            raise ValueError(f"{split} in {root} holds two pictures of the name {twice}")
        self.class_to_idx = {str(label): label for label in sorted(labels)}

    @property
    def lengths(self) -> list[int]:
        """Number of pictures of each shard."""
        return [end - start for start, end in pairwise(self.starts)]

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        member = self.members[index]
        with open(self._shard_of(index), "rb") as file:
            file.seek(member.offset)
            return io.BytesIO(file.read(member.length)), member.label

    def __len__(self) -> int:
        return len(self.members)

    def read(self, shard: int) -> Iterator[tuple[int, bytes]]:
        """(number, encoded picture) of each picture of a shard, which is opened once and read forwards."""
        with open(self.shards[shard], "rb") as file:
            for index in range(self.starts[shard], self.starts[shard + 1]):
                file.seek(self.members[index].offset)
                yield index, file.read(self.members[index].length)

    def _shard_of(self, index: int) -> str:
        return self.shards[int(np.searchsorted(self.starts, index, side="right")) - 1]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"{self.members[index].name} in {self._shard_of(index)}"


def _members(shard: str) -> list[Member]:
    """The pictures of a shard as they lie there; only the headers and the labels are read."""
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                folder, _, file = entry.name.rpartition("/")
                stem, _, ending = file.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if ending.lower() in _ENDINGS:
                    pictures[name] = entry
                elif ending == "cls":
                    labels[name] = tar.extractfile(entry).read()
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"cannot read the shard {shard}: {error}") from error
    if bare := sorted(pictures.keys() - labels.keys()):
        raise ValueError(f"{shard} holds {bare[0]} without a label, wanted {bare[0]}.cls beside it")
    try:
        return [Member(name, entry.offset_data, entry.size, int(labels[name])) for name, entry in pictures.items()]
    except ValueError as error:
        raise ValueError(f"{shard} holds a label that is no number: {error}") from error
