"""Fixtures of the training tests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from training.generated import TINY, write_pictures, write_shards


@pytest.fixture(autouse=True)
def _own_process_state():
    """One thread makes sums repeatable; accelerate keeps, in a process, the precision that it saw first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 training and 12 validation pictures in three classes."""
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", per_class=8)
    write_pictures(root / "validation", per_class=4, seed=1)
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """What `write_shards` writes."""
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    """A folder in the shape of ImageNet: 1,000 classes of two pictures of noise to train and one to validate."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, count in (("train", 2), ("validation", 1)):
        for number in range(1000):
            folder = root / part / f"n{number:08d}"
            folder.mkdir(parents=True)
            for picture in range(count):
                pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{picture}.JPEG", format="jpeg")
    return root


@pytest.fixture
def configure(pictures, tmp_path):
    """`configure("key=value", ...)` is a tiny configuration on `pictures` that writes to tmp_path/run."""
    from visionattn.training.config import load_config

    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    given = (f"data.root={pictures}", f"output={tmp_path / 'run'}")
    return lambda *overrides: load_config(file, (*given, *overrides))
