"""Shards, torchvision's and Hugging Face's data sets; the folders are in test_data.py."""

import struct
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training.generated import SHARD_LENGTHS, png, write_shard

from visionattn.training.config import DataConfig
from visionattn.training.data import AugmentedPictures, Pictures, UnreadablePictureError, check_pictures, open_source
from visionattn.training.folder import RunFolder
from visionattn.training.loop import train
from visionattn.training.run import Run
from visionattn.training.stream import ShardPlan, ShardStream, shuffled, stream_loader

ALL = sum(SHARD_LENGTHS["train"])


def numbered(shards) -> AugmentedPictures:
    """(number of the picture, seed of its augmentation) instead of pixels."""
    source = open_source(DataConfig(reader="wds", root=str(shards)), seed=0)

    def tell(picture, seed):
        return torch.tensor([picture.getpixel((0, 0))[0], seed])

    return AugmentedPictures(source.train, source.train_indices, "RGB", tell)


def epoch_of(shards, processes: int, workers: int, epochs=(0,), batch_size: int = 2) -> list[torch.Tensor]:
    """Number and seed of what each of the processes gets in the last of `epochs`."""
    found = []
    for process in range(processes):
        pictures = numbered(shards)
        plan = ShardPlan(pictures.reader.lengths, batch_size, processes, workers)
        stream = ShardStream(pictures, plan, batch_size, seed=0, process=process)
        keep = workers > 0
        loader = torch.utils.data.DataLoader(stream, batch_size, num_workers=workers, persistent_workers=keep)
        for epoch in epochs:
            stream.set_epoch(epoch)
            batches = [tell for tell, _ in loader]
        assert len(batches) == len(loader)
        found.append(torch.cat(batches))
    return found


# In batches of two, of the shortest shards that a reader may get: 4 + 5 + 6 + 7 and 4 + 5 + 6 of two workers, 4 + 5 + 6
# of two processes, 4 + 5 and 4 of two workers of each.
@pytest.mark.parametrize(
    ("processes", "workers", "count"), [(1, 0, ALL), (1, 2, 22 + 14), (2, 0, 2 * 14), (2, 2, 2 * (8 + 4))]
)
def test_no_picture_of_a_stream_is_seen_twice_in_an_epoch(shards, processes, workers, count):
    found = epoch_of(shards, processes, workers)
    assert len({len(numbers) for numbers in found}) == 1
    numbers = torch.cat(found)[:, 0].tolist()
    assert len(set(numbers)) == len(numbers)
    assert len(numbers) == count


def test_shards_of_equal_length_that_the_readers_can_share_are_read_to_their_ends():
    assert ShardPlan([100] * 16, batch_size=10, processes=2, workers=2).batches == [40, 40]


def test_each_epoch_of_a_stream_has_its_own_order_pictures_and_augmentation(shards):
    first, second, again = (epoch_of(shards, 1, 2, epochs)[0] for epochs in ((0,), (0, 1), (1,)))
    assert torch.equal(second, again)
    assert first[:, 0].tolist() != second[:, 0].tolist()
    seeds = dict(first.tolist())
    assert all(seeds[number] != seed for number, seed in second.tolist() if number in seeds)


def test_the_augmentation_of_a_streamed_picture_does_not_depend_on_who_reads_it(shards):
    alone, shared = dict(epoch_of(shards, 1, 0)[0].tolist()), dict(torch.cat(epoch_of(shards, 2, 2)).tolist())
    assert len(set(shared.values())) == len(shared)
    assert all(alone[number] == seed for number, seed in shared.items() if number in alone)


def test_the_buffer_yields_everything_once_and_in_another_order():
    for held in (1, 7, 100):
        found = list(shuffled(iter(range(50)), held, np.random.default_rng(0)))
        assert sorted(found) == list(range(50))
        assert (found != list(range(50))) == (held > 1)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([9, 9, 9], "3 shards for 2 processes of 2 workers, wanted a shard for each"),
        ([3] * 8, "hold 3 pictures, fewer"),
    ],
)
def test_too_few_or_too_short_shards_are_an_error(lengths, message):
    with pytest.raises(ValueError, match=message):
        ShardPlan(lengths, batch_size=32, processes=2, workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("every", ["null", "2"], ids=["after an epoch", "within an epoch"])
def test_a_stream_trains_validates_every_picture_and_resumes_with_the_same_bits(
    configure, shards, tmp_path, monkeypatch, every
):
    def run(output, *overrides):
        data = ("data.reader=wds", f"data.root={shards}", "data.batch_size=4", "data.workers=2", "report=false")
        return train(configure(*data, f"checkpoint_every={every}", f"output={tmp_path / output}", *overrides))

    whole = run("whole")
    assert (len(whole.train), len(whole.val), whole.class_names) == (ALL, 12, ["0", "1", "2"])
    save_last = RunFolder.save_last

    def save_and_stop(folder, state):
        save_last(folder, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_last", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.undo()
    within = RunFolder(tmp_path / "parts").load_last()["within"]
    assert (within and within["batches"]) == (None if every == "null" else 2)
    with pytest.raises(ValueError, match=r"it has data\.workers=2, asked is 1"):
        run("parts", "resume=true", "data.workers=1")
    state, resumed = whole.folder.load_last(), run("parts", "resume=true").folder.load_last()
    assert resumed["updates"] == state["updates"]
    assert all(torch.equal(resumed["model"][name], value) for name, value in state["model"].items())


def test_the_loader_of_a_stream_has_batches_on_the_device_and_tells_the_last(shards):
    accelerator = Accelerator(cpu=True)
    loader = stream_loader(numbered(shards), DataConfig(batch_size=4, workers=0), 0, accelerator)
    ends = [accelerator.gradient_state.end_of_dataloader for _ in loader]
    assert ends == [False] * (len(loader) - 1) + [True]


def test_shards_are_also_named_by_their_files(shards):
    source = open_source(
        DataConfig(reader="wds", root=str(shards), train_split="train-{0..2}.tar", val_split="validation-0.tar"), 0
    )
    assert len(source.train) == sum(SHARD_LENGTHS["train"][:3])
    pictures = Pictures(source.val, source.val_indices, "RGB", None)
    assert [pictures.picture(n)[0].getpixel((0, 0))[0] for n in range(7)] == list(range(7))
    assert [pictures.picture(n)[1] for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert pictures.name(3).startswith("003 in ")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"0.png": png(0)}, "holds 0 without a label, wanted 0.cls"),
        ({"0.png": png(0), "0.cls": b"cat"}, "a label that is no number"),
        ({"0.png": png(0), "0.cls": b"1"}, r"has the labels \[1\]..., wanted all from 0"),
        ({}, "wanted all from 0"),
        (None, "cannot read the shard"),
    ],
)
def test_shards_that_cannot_be_used_are_an_error(tmp_path, entries, message):
    if entries is None:
        (tmp_path / "a-0.tar").write_bytes(b"not a tar file" * 100)
    else:
        write_shard(tmp_path / "a-0.tar", entries)
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(reader="wds", root=str(tmp_path), train_split="a-0.tar"), seed=0)


def test_a_name_in_two_shards_a_missing_part_and_a_share_held_back_are_errors(shards):
    config = DataConfig(reader="wds", root=str(shards))
    for change, message in (
        ({"train_split": "validation-{0..1}.tar", "val_split": "validation-{0,0}.tar"}, "two pictures of the name 000"),
        ({"train_split": "holdout"}, "no part 'holdout' in"),
        ({"val_split": "train"}, "are both 'train', wanted two parts"),
        ({"val_fraction": 0.2}, "read shard by shard, wanted data.val_split"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(DataConfig(**(vars(config) | change)), seed=0)


def test_an_unreadable_picture_of_a_shard_is_named_with_its_shard(tmp_path):
    write_shard(tmp_path / "a-0.tar", {"5.png": png(5)[:50], "5.cls": b"0"})
    write_shard(tmp_path / "b-0.tar", {"6.png": png(6), "6.cls": b"0"})
    source = open_source(
        DataConfig(reader="wds", root=str(tmp_path), train_split="a-0.tar", val_split="b-0.tar"), seed=0
    )
    with pytest.raises(UnreadablePictureError, match=r"cannot read the picture 5 in .*a-0\.tar"):
        check_pictures(Pictures(source.train, source.train_indices, "RGB", None))


# torchvision


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """MNIST's files with 40 and 20 pictures of noise, the label in the first pixel."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        pixels[:, 0, 0] = labels
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return root


def test_torchvisions_data_sets_are_read_with_their_parts_and_labels(mnist):
    source = open_source(DataConfig(reader="torch/mnist", root=str(mnist)), seed=0)
    assert (len(source.train), len(source.val), len(source.class_names)) == (40, 20, 10)
    pictures = Pictures(source.val, source.val_indices, "RGB", None)
    for position in range(20):
        picture, label = pictures.picture(position)
        assert (picture.mode, picture.getpixel((0, 0))[0], label) == ("RGB", position % 10, position % 10)


def test_an_epoch_of_torchvisions_data_sets_is_trained_and_evaluated(configure, mnist):
    data = (f"data.root={mnist}", "data.reader=torch/mnist", "data.input_size=[1,32,32]", "data.workers=1")
    row = train(configure(*data, "data.mean=[0.5]", "data.std=[0.5]", "schedule.epochs=1")).history[0]
    assert np.isfinite(row["train_loss"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("torch/mnist", "cannot open torch/mnist in .*not found"), ("torch/mnists", "Unknown torchvision dataset mnists")],
)
def test_a_data_set_that_torchvision_does_not_find_is_an_error(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(reader=name, root=str(tmp_path)), seed=0)


# Hugging Face


def write_parquet(root, part: str, count: int) -> None:
    datasets = pytest.importorskip("datasets", reason="data.reader hfds needs the package datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(count)], "label": [n % 2 for n in range(count)]}
    (root / "data").mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "data" / f"{part}-00000-of-00001.parquet")


def test_a_folder_in_the_layout_of_hugging_face_is_read_with_its_class_names(tmp_path):
    write_parquet(tmp_path, "train", 10)
    write_parquet(tmp_path, "test", 6)
    config = DataConfig(reader=f"hfds/{tmp_path}", root=str(tmp_path / "cache"), val_split="test")
    source = open_source(config, seed=0)
    assert (len(source.train), len(source.val), source.class_names) == (10, 6, ["cat", "dog"])
    pictures = Pictures(source.train, source.train_indices, "RGB", None)
    assert [pictures.picture(n)[0].getpixel((0, 0))[0] for n in range(10)] == list(range(10))
    assert [label for _, label in source.train.samples] == [pictures.picture(n)[1] for n in range(10)]
    with pytest.raises(ValueError, match="cannot open the part 'validation' of hfds/"):
        open_source(DataConfig(reader=config.reader, root=config.root), seed=0)


@pytest.mark.parametrize(("reader", "package"), [("hfds/x", "datasets"), ("wds", "webdataset")])
def test_a_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch, reader, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{reader} needs the package {package}: pip install 'visionattn\[readers\]'"):
        open_source(DataConfig(reader=reader, root="."), seed=0)


def test_the_run_refuses_a_reader_that_does_not_exist(configure):
    with pytest.raises(ValueError, match=r"data\.reader is 'tfds/x', wanted one of folder, .*hfds/NAME"):
        Run(configure("data.reader=tfds/x"))
