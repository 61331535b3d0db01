"""The loss of a student that learns from a teacher; the teacher and its normalisation are timm's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.task import DistillationTeacher
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from visionattn.training.config import DistillConfig, ModelConfig
from visionattn.training.model import build_model


class Distillation:
    """(1 - weight) * loss(labels) + weight * temperature^2 * KL(teacher || student).

    Args:
        config: which teacher, and how much of it.
        class_names: of the data; the teacher must know as many, and where it names them the same ones in this order.
        data_config: the student's `input_size`, `mean` and `std`.
        device: where the teacher runs.

    Raises:
        ValueError: a teacher that cannot be had, or that knows other classes.
    """

    def __init__(
        self, config: DistillConfig, class_names: Sequence[str], data_config: Mapping[str, Any], device: torch.device
    ) -> None:
        self.config = config
        if config.weights is not None and not Path(config.weights).is_file():
            raise ValueError(f"distill.weights {config.weights} is not a file")
        source = ModelConfig(name=config.teacher, pretrained=config.weights is None, weights=config.weights)
        model = build_model(source, None, data_config["input_size"])
        if model.num_classes != len(class_names):
            raise ValueError(
                f"distill.teacher {config.teacher} knows {model.num_classes} classes, wanted {len(class_names)}"
            )
        for known, wanted in zip(model.pretrained_cfg.get("label_names") or (), class_names, strict=False):
            if known != wanted:
                raise ValueError(f"distill.teacher {config.teacher} has the class {known} where the data has {wanted}")
        self.teacher = DistillationTeacher(model.requires_grad_(False)).to(device)
        self.mean, self.std = (
            torch.tensor(data_config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std")
        )

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the teacher for images (B, C, H, W) that are normalised for the student."""
        return self.teacher(self.teacher.normalize_input(images, self.mean, self.std)).float()

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss () of the labels joined by the teacher's, for the student's logits (B, classes)."""
        temperature, weight = self.config.temperature, self.config.weight
        student, teacher = (log_softmax(x.float() / temperature, 1) for x in (logits, self.teach(images)))
        apart = kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * loss + weight * apart


def build_distillation(
    config: DistillConfig, class_names: Sequence[str], data_config: Mapping[str, Any], device: torch.device
) -> Distillation | None:
    """The teacher that `config` names, or None. Arguments and errors: `Distillation`."""
    return Distillation(config, class_names, data_config, device) if config.teacher else None
