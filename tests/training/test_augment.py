import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup

from visionattn.training.augment import Augmentation, BatchAugment
from visionattn.training.config import AugmentConfig, Config
from visionattn.training.optimisation import build_loss

DATA_CONFIG = {"input_size": (3, 24, 32), "mean": (0.5, 0.4, 0.3), "std": (0.25,) * 3, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_albumentations_does_not_ask_the_network():
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"


def test_sizes_and_interpolation_follow_from_the_data(picture):
    for step in ("Resize", "RandomResizedCrop"):
        assert Augmentation([{step: None}], DATA_CONFIG)(picture, seed=0).shape == (3, 24, 32)


def test_pictures_are_normalised_channel_by_channel():
    grey = Image.fromarray(np.full((24, 32, 3), 102, np.uint8))
    tensor = Augmentation([], DATA_CONFIG)(grey, seed=0)
    # 102/255 = 0.4 exactly; the rest is rounding of float32.
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-0.4, 0.0, 0.4]), atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"Resise": {}}], "unknown 'Resise'; the nearest known is 'Resize'"),
        ([{"Resize": {"hight": 3}}], "Resize: unknown 'hight'; the nearest known is 'height'"),
        ([{"HorizontalFlip": {"p": 3}}], "HorizontalFlip does not accept .*less than or equal to 1"),
        ([{"Resize": {"interpolation": "cubic"}}], "unknown 'cubic'; the nearest known is 'bicubic'"),
        ([{"RandAugment": {"policy": "rand-x9"}}], "RandAugment does not accept"),
        ([{"Resize": {"interpolation": [1]}}], r"unknown \[1\]; the nearest known is"),
        ([{"HorizontalFlip": 3}], "HorizontalFlip has 3, wanted {argument: value}"),
        ([{"HorizontalFlip": [1]}], r"HorizontalFlip has \[1\], wanted {argument: value}"),
        ([{"HorizontalFlip": 0}], "HorizontalFlip has 0, wanted {argument: value}"),
        *(([{name: {}}], f"unknown '{name}'") for name in ("BasicTransform", "ImageOnlyTransform", "DualTransform")),
        *(([{name: {}}], f"unknown '{name}'") for name in ("ToTensorV2", "CubicSymmetry")),
        ([{"Resize": {}, "HorizontalFlip": {}}], "not of the form {name: {argument: value}}"),
    ],
)
def test_a_step_that_does_not_exist_is_an_error_naming_the_nearest(steps, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(steps, DATA_CONFIG)


def test_a_chain_that_ends_at_another_size_is_an_error(picture):
    with pytest.raises(ValueError, match=r"end at \(3, 40, 50\), wanted \(3, 24, 32\)"):
        Augmentation([{"HorizontalFlip": {}}], DATA_CONFIG)(picture, seed=0)


@pytest.mark.parametrize("name", ["BBoxSafeRandomCrop", "CropNonEmptyMaskIfExists"])
def test_a_step_that_fails_is_named(picture, name):
    with pytest.raises(ValueError, match=f"augment.transforms: {name} failed with (KeyError|RuntimeError): "):
        Augmentation([{"HorizontalFlip": {}}, {name: {}}], DATA_CONFIG)(picture, seed=0)


def test_randaugment_changes_grey_pictures(picture):
    grey = {"input_size": (1, 40, 50), "mean": (0.5,), "std": (0.25,), "interpolation": "bicubic"}
    augmentation = Augmentation([{"RandAugment": {"policy": "rand-m9-mstd0.5-inc1"}}], grey)
    changed = [augmentation(picture.convert("L"), seed) for seed in range(40)]
    assert all(tensor.shape == (1, 40, 50) for tensor in changed)
    assert sum(not torch.equal(tensor, changed[0]) for tensor in changed) > 20


def test_randaugment_draws_from_the_seed_and_leaves_the_global_generators_alone(picture):
    augmentation = Augmentation([{"Resize": None}, {"RandAugment": {"policy": "rand-m9-mstd0.5-inc1"}}], DATA_CONFIG)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    first, again, other = (augmentation(picture, seed) for seed in (5, 5, 6))
    assert (random.random(), np.random.random()) == expected
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_randaugment_goes_to_its_ends_where_no_bit_of_a_picture_is_kept(picture):
    augmentation = Augmentation([{"Resize": None}, {"RandAugment": {"policy": "rand-m10-inc1"}}], DATA_CONFIG)
    policy = augmentation.compose.transforms[1].augment
    (operation,) = (operation for operation in policy.ops if operation.name == "PosterizeIncreasing")
    operation.prob = 1.0
    assert not np.asarray(operation(picture)).any()
    for seed in range(200):  # each draws two of fifteen operations, all at their largest
        assert torch.isfinite(augmentation(picture, seed)).all()


def test_mixing_makes_probabilities_and_erasing_changes_pixels():
    images, labels = torch.zeros(8, 3, 16, 16), torch.arange(8) % 5
    mixed, targets = BatchAugment(AugmentConfig(mixup=0.8, erasing=1.0), 5, torch.device("cpu"))(images.clone(), labels)
    assert targets.shape == (8, 5)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    assert (mixed != 0).flatten(1).any(1).all()
    plain = BatchAugment(AugmentConfig(), 5, torch.device("cpu"))(images, labels)
    assert plain[0] is images
    assert plain[1] is labels


def test_smoothing_in_the_loss_equals_timms_smoothing_before_mixing():
    torch.manual_seed(0)
    logits, labels, images = torch.randn(8, 5), torch.arange(8) % 5, torch.randn(8, 3, 4, 4)
    np.random.seed(0)
    _, ours = BatchAugment(AugmentConfig(cutmix=1.0), 5, torch.device("cpu"))(images.clone(), labels)
    np.random.seed(0)
    _, theirs = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)(images.clone(), labels)
    loss = build_loss(Config(label_smoothing=0.1))(logits, ours)
    expected = -(theirs * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(loss, expected, rtol=1e-5)
