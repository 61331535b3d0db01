"""The adapter to albumentations for training pictures, and erasing and mixing for batches.

Validation does not come through here: it uses timm's own transform, so that accuracies compare with published ones
(OpenCV's bicubic has no antialiasing).
"""

import inspect
import os
import random
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, rand_augment_transform
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from torch import Tensor

# albumentations asks the network for a newer version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2

from visionattn.training.config import AugmentConfig

_INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}
# The workers are the parallelism, and OpenCV's own threads do not survive the fork that makes a worker.
cv2.setNumThreads(0)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seeds Python's and NumPy's global generators inside the block and restores them after it."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """As timm does it, but where none of the bits is kept, which Pillow 13 refuses, black as with earlier ones."""
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


class RandAugment(A.ImageOnlyTransform):
    """RandAugment (https://arxiv.org/abs/1909.13719) as timm does it, which albumentations lacks.

    Args:
        policy: timm's string, such as `rand-m9-mstd0.5-inc1`.
        size: (H, W) of the pictures; moves are limited to 0.45 of the shorter side.
        mean_color: colour of what moves in, 0..255 for each channel.
        p: probability of applying it.
    """

    def __init__(self, policy: str, size: tuple[int, int], mean_color: tuple[int, ...], p: float = 1.0) -> None:
        super().__init__(p=p)
        hparams = {"translate_const": int(min(size) * 0.45), "img_mean": mean_color}
        self.augment = rand_augment_transform(policy, hparams)
        for operation in self.augment.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Changes one picture (H, W, 1 or 3), uint8, drawing from this transform's own generator."""
        with _global_seed(self.py_random.getrandbits(32)):
            # Pillow has no pictures with an axis for one channel.
            picture = Image.fromarray(img.squeeze(2) if img.shape[2] == 1 else img)
            return np.asarray(self.augment(picture)).reshape(img.shape)


_ABSTRACT = (A.ImageOnlyTransform, A.DualTransform)
# Neither volumes nor what makes a tensor, which would come before the normalisation.
_TRANSFORMS: dict[str, type] = {
    name: value
    for name, value in vars(A).items()
    if isinstance(value, type)
    and issubclass(value, _ABSTRACT)
    and not issubclass(value, A.Transform3D)
    and value not in _ABSTRACT
} | {"RandAugment": RandAugment}


class Augmentation:
    """A chain of random changes, then normalisation: (picture, seed) -> tensor (C, H, W), float32.

    The arguments that follow from the data (`size`, `height`, `width`, `interpolation`, `mean_color`) may be left out.

    Args:
        steps: each `{name: {argument: value}}`, of albumentations or `RandAugment`.
        data_config: timm's `input_size`, `mean`, `std`, `interpolation`.

    Raises:
        ValueError: an unknown name or argument, named with the nearest known one, or a value that does not fit.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]], data_config: Mapping[str, Any]) -> None:
        self.shape = tuple(data_config["input_size"])
        self._defaults = {
            "size": self.shape[1:],
            "height": self.shape[1],
            "width": self.shape[2],
            "interpolation": data_config["interpolation"],
            "area_for_downscale": "image",
            "mean_color": tuple(round(255 * mean) for mean in data_config["mean"]),
        }
        transforms = [self._build(step) for step in steps]
        self.compose = A.Compose([*transforms, A.Normalize(data_config["mean"], data_config["std"])])

    def _build(self, step: Mapping[str, Any]) -> A.BasicTransform:
        if len(step) != 1:
            raise ValueError(f"augment.transforms: {dict(step)} is not of the form {{name: {{argument: value}}}}")
        ((name, arguments),) = step.items()
        cls = _TRANSFORMS[_known(name, _TRANSFORMS, "augment.transforms")]
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(f"augment.transforms: {name} has {arguments!r}, wanted {{argument: value}}")
        accepted = inspect.signature(cls).parameters
        for argument in arguments:
            _known(argument, accepted, f"augment.transforms: {name}")
        arguments = {key: value for key, value in self._defaults.items() if key in accepted} | dict(arguments)
        if "interpolation" in arguments:
            interpolation = _known(arguments["interpolation"], _INTERPOLATIONS, f"{name}: interpolation")
            arguments["interpolation"] = _INTERPOLATIONS[interpolation]
        try:
            return cls(**arguments)
        except (ValueError, TypeError, AssertionError) as error:
            reason = textwrap.shorten(str(error), 300)
            raise ValueError(f"augment.transforms: {name} does not accept {arguments}: {reason}") from error

    def __call__(self, picture: Image.Image, seed: int) -> Tensor:
        """Changes and normalises the picture; equal seeds give equal results.

        Raises:
            ValueError: a step fails, or the chain does not end at the input size.
        """
        pixels = np.array(picture)
        self.compose.set_random_seed(seed)
        try:
            pixels = self.compose(image=pixels.reshape(*pixels.shape[:2], -1))["image"]
        except Exception as error:  # whatever albumentations, OpenCV or timm raise
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise ValueError(f"augment.transforms: {self._failed(error)} failed with {reason}") from error
        tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"augment.transforms end at {tuple(tensor.shape)}, wanted {self.shape}: crop or resize")
        return tensor

    def _failed(self, error: Exception) -> str:
        """The step that raised `error`: the first one whose method is in the traceback."""
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        steps = self.compose.transforms
        return next((type(owner).__name__ for owner in owners if any(owner is step for step in steps)), "a step")


def _known(name: Any, known: Mapping[str, Any], where: str) -> str:
    """`name` if it is a key of `known`, else a ValueError that names the nearest key."""
    if not isinstance(name, str) or name not in known:
        nearest = get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: unknown {name!r}; the nearest known is {nearest!r}")
    return name


class BatchAugment:
    """Erasing, mixup and CutMix of a batch on its device, by timm: (B, C, H, W), (B,) -> (B, C, H, W), targets.

    Targets are class indices (B,), or probabilities (B, classes) where mixing is on.
    """

    def __init__(self, config: AugmentConfig, num_classes: int, device: torch.device) -> None:
        self.erase = RandomErasing(config.erasing, mode="pixel", device=device) if config.erasing else None
        self.mix = None
        if config.mixup or config.cutmix:
            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_prob,
                switch_prob=config.switch_prob,
                # The loss smooths, and smoothing commutes with mixing.
                label_smoothing=0.0,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Changes `images` in place and returns them with their targets."""
        if self.erase:
            images = self.erase(images)
        return self.mix(images, labels) if self.mix else (images, labels)
