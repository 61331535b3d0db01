"""Files that a folder of pictures may hold, and a disk that is full."""

import resource
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import train as tool
from PIL import Image
from training.generated import TINY

from visionattn.training.data import UnreadablePictureError, read_picture
from visionattn.training.loop import train
from visionattn.training.run import Run


@pytest.fixture
def own_pictures(pictures, tmp_path):
    """A copy of the pictures that a test may damage."""
    return shutil.copytree(pictures, tmp_path / "pictures")


def ramp(side: int = 32) -> np.ndarray:
    """(side, side), 0 to 65535."""
    return np.linspace(0, 65535, side * side).astype(np.uint16).reshape(side, side)


def test_a_16_bit_picture_keeps_its_shades(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "deep.png")
    found = np.asarray(read_picture(tmp_path / "deep.png", "RGB"))
    assert found.shape == (32, 32, 3)
    assert np.array_equal(found[..., 0], ramp() >> 8)


def test_a_16_bit_colour_picture_keeps_its_shades(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "deep.png"), np.stack([ramp(), ramp() // 2, ramp() // 4], 2))  # blue, green, red
    found = np.asarray(read_picture(tmp_path / "deep.png", "RGB")).astype(int)
    assert abs(found - (np.stack([ramp() // 4, ramp() // 2, ramp()], 2) >> 8)).max() <= 1


def test_a_cmyk_or_palette_picture_becomes_its_colours_and_a_grey_one_three_equal_channels(tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 60)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert abs(np.asarray(read_picture(tmp_path / "cmyk.jpg", "RGB")).astype(int) - (200, 30, 60)).max() <= 4
    Image.new("RGB", (32, 32), (200, 30, 60)).quantize(4).save(tmp_path / "palette.png")
    assert (np.asarray(read_picture(tmp_path / "palette.png", "RGB")) == (200, 30, 60)).all()
    Image.new("L", (32, 32), 77).save(tmp_path / "grey.png")
    assert (np.asarray(read_picture(tmp_path / "grey.png", "RGB")) == 77).all()


def test_a_picture_of_20000_by_20000_is_named_and_not_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)  # one bit a pixel, grey
    rows = zlib.compress(bytes(20000 * (1 + 20000 // 8)), 1)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(png)
    with pytest.raises(UnreadablePictureError, match=r"huge\.png: .*400000000 pixels"):
        read_picture(tmp_path / "huge.png", "RGB")


@pytest.mark.parametrize("how", ["symlink", "truncated", "empty"])
def test_what_cannot_be_read_stops_the_training_before_it_starts(configure, own_pictures, tmp_path, how):
    file = own_pictures / "train" / "red" / "3.png"
    Image.open(file).convert("RGB").save(file, format="jpeg")
    whole = file.read_bytes()
    file.unlink()
    if how == "symlink":
        file.symlink_to(tmp_path / "nowhere.png")
    else:
        file.write_bytes(whole[: len(whole) // 2] if how == "truncated" else b"")
    with pytest.raises(UnreadablePictureError, match=r"cannot read the picture .*red/3\.png"):
        Run(configure(f"data.root={own_pictures}"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(configure, tmp_path):
    """The disk is a limit on the size of a file, which fails a write as a full disk does."""
    limit = 64 * 1024  # the model of the test alone has more
    (tmp_path / "tiny.yaml").write_text(TINY)
    given = [f"data.root={configure().data.root}", f"output={tmp_path / 'full'}"]
    done = subprocess.run(
        [sys.executable, tool.__file__, str(tmp_path / "tiny.yaml"), *given],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {tmp_path / 'full'}")
    assert done.stderr.endswith(" MiB free)\n")
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "full").rglob("*.part"))
    assert not (tmp_path / "full" / "last.pt").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(configure, monkeypatch):
    run = train(configure("schedule.epochs=1"))
    before = run.folder.last.read_bytes()

    def fill(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(ValueError, match=r"cannot write .*last\.pt: .*No space left on device"):
        run.folder.save_last(run.state())
    assert run.folder.last.read_bytes() == before
    assert not list(run.folder.path.glob(".*"))
