"""Pictures and configurations for the tests of training: small, generated, and easy to learn."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")


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


TINY = """
model: {name: test_nat, kwargs: {layer_scale: 1.0}}
data: {input_size: [3, 32, 32], batch_size: 8, workers: 0, crop_pct: 1.0}
augment: {transforms: [{RandomResizedCrop: {scale: [0.5, 1.0]}}, {HorizontalFlip: {p: 0.5}}]}
optimizer: {lr: 2.0e-3}
schedule: {epochs: 2}
device: cpu
trackers: []
"""
