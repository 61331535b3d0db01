"""Pictures and configurations for the tests of training: small, generated, and easy to learn."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")
SHARD_LENGTHS = {"train": (5, 9, 7, 8, 6, 9, 4), "validation": (7, 5)}


def write_pictures(root: Path, per_class: int, side: int = 32, seed: int = 0) -> Path:
    """Noisy pictures of one colour in root/CLASS/NUMBER.png."""
    rng = np.random.default_rng(seed)
    for channel, name in zip((2, 1, 0), CLASSES, strict=True):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
            pixels[..., channel] += 130
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def png(number: int) -> bytes:
    """A picture that tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (number, 255 - number, 40)).save(file, format="png")
    return file.getvalue()


def write_shard(path: Path, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def write_shards(root: Path) -> Path:
    """Seven shards of 48 numbered pictures in three classes, two of 12 to validate, and their _info.json."""
    splits = {}
    for part, lengths in SHARD_LENGTHS.items():
        first = np.cumsum((0, *lengths))
        names = [f"{part}-{shard}.tar" for shard in range(len(lengths))]
        for name, start, end in zip(names, first[:-1], first[1:], strict=True):
            each = [{f"{n:03d}.png": png(n), f"{n:03d}.cls": b"%d" % (n % 3)} for n in range(start, end)]
            write_shard(root / name, {key: value for entries in each for key, value in entries.items()})
        splits[part] = {"name": part, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


TINY = """
model: {name: test_nat, kwargs: {layer_scale: 1.0}}
data: {input_size: [3, 32, 32], batch_size: 8, workers: 0, crop_pct: 1.0}
augment: {transforms: [{RandomResizedCrop: {scale: [0.5, 1.0]}}, {HorizontalFlip: {p: 0.5}}]}
optimizer: {lr: 2.0e-3}
schedule: {epochs: 2}
device: cpu
trackers: []
"""
