"""Times and memory of whole models relative to one that everybody knows, in one process, interleaved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import nn

from visionattn_kernels.benchmark import interleaved, peak_memory, slope


@dataclass(frozen=True)
class ModelTiming:
    """What one model costs; times are medians.

    Attributes:
        name: timm's name of the model.
        forward: Seconds of a forward in eval mode without gradients.
        step: Seconds of a training step in train mode: forward, cross entropy, backward; no optimiser.
        memory: Bytes that the training step takes at most beyond the parameters, the gradients included.
        forward_ratio, step_ratio, memory_ratio: The same divided by those of the first model timed.
    """

    name: str
    forward: float
    step: float
    memory: int
    forward_ratio: float
    step_ratio: float
    memory_ratio: float


def time_models(
    names: Sequence[str],
    batch: int = 4,
    size: int = 224,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> list[ModelTiming]:
    """Time models with random weights in turns; ratios are to the first, and `clock` as of `interleaved`.

    Raises:
        RuntimeError: A model's logits or gradients are not finite, or a parameter gets none; nothing is timed.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch)
    models = {name: timm.create_model(name) for name in names}
    for name, model in models.items():
        _check(name, model, images, labels)
    for model in models.values():
        model.eval()
    forward = interleaved({name: _forward(model, images) for name, model in models.items()}, rounds, clock)
    for model in models.values():
        model.train()
    step = interleaved({name: _step(model, images, labels) for name, model in models.items()}, rounds, clock)
    memory = {name: _step_memory(model, images, labels) for name, model in models.items()}
    costs = {name: (forward[name], step[name], memory[name]) for name in names}
    first = costs[names[0]]
    return [
        ModelTiming(name, *cost, *(own / other for own, other in zip(cost, first, strict=True)))
        for name, cost in costs.items()
    ]


def _forward(model: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    return torch.no_grad()(lambda: model(images))


def _step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return step


def _step_memory(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    model.zero_grad()  # or the gradients of the step before would count as held already
    return peak_memory(_step(model, images, labels))


def _check(name: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise RuntimeError unless a step gives finite logits and a finite gradient to every parameter."""
    _step(model.eval(), images, labels)()
    if not torch.isfinite(model(images)).all():
        raise RuntimeError(f"{name}: the logits are not finite, so its time means nothing")
    for parameter, x in model.named_parameters():
        if x.grad is None or not torch.isfinite(x.grad).all():
            raise RuntimeError(f"{name}: {parameter} gets no finite gradient, so its time means nothing")


def growing_model(name: str) -> Callable[[int], Callable[[], None]]:
    """For `visionattn_kernels.benchmark.grow`: a training step of one square image, by its side."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    labels = torch.zeros(1, dtype=torch.long)

    def make(side: int) -> Callable[[], None]:
        step = _step(model, torch.randn(1, 3, side, side), labels)

        def run() -> None:
            step()
            model.zero_grad()  # or the next side's memory would count what this one's gradients take

        return run

    return make


# The smallest model of each family, and of each trunk that a family is built on, that gives maps at several strides.
PYRAMIDS = (
    "nat_mini",
    "dinat_mini",
    "dinat_s_tiny",
    "biformer_tiny",
    "halonet_h0_va",
    "mala_tiny",
    "l2vit_tiny",
    "van_b0",
    "davit_tiny_va",
    "ela_b_resnet18",
    "ulsam_mobilenetv2",
    "agent_pvt_tiny",
    "agent_swin_tiny",
    "inline_pvt_tiny",
    "inline_swin_tiny",
)


@dataclass(frozen=True)
class FeatureCost:
    """What the maps of all stages of one image, or what a detector sees in it, cost without gradients.

    Attributes:
        name: timm's name of the model, or the file of a detector's config.
        seconds: By size (height, width), the median time.
        memory: By size, the bytes held at most beyond the model's own.
        own: The bytes of parameters and buffers.
    """

    name: str
    seconds: dict[tuple[int, int], float]
    memory: dict[tuple[int, int], int]
    own: int

    @property
    def slopes(self) -> tuple[float, float]:
        """Exponents with which time and memory grow with the pixels; 1 is linear."""
        return slope(_by_side(self.seconds)), slope(_by_side(self.memory))


def cost_features(
    name: str,
    sizes: Sequence[tuple[int, int]],
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> FeatureCost:
    """Measure a model with random weights as a detector's backbone, or a detector, on one image of each size.

    Args:
        name: timm's name of the model, or the file of a config of mmdet.
        sizes: (height, width) of the images.
        rounds: Samples of each.
        clock: As of `visionattn_kernels.benchmark.interleaved`.
    """
    torch.manual_seed(0)
    whole = name.endswith(".py")
    model = (_detector(name) if whole else timm.create_model(name, num_classes=0)).eval()
    own = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    calls = {size: (_detections if whole else _features)(model, *size) for size in sizes}
    memory = {size: peak_memory(call) for size, call in calls.items()}
    return FeatureCost(name, interleaved(calls, rounds, clock), memory, own)


def _features(model: nn.Module, height: int, width: int) -> Callable[[], object]:
    image = torch.randn(1, 3, height, width)
    return torch.no_grad()(lambda: model.forward_intermediates(image, intermediates_only=True))


def _detector(config: str) -> nn.Module:
    """The detector of a config; as many boxes get a mask as the config allows, whatever their scores."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from visionattn import openmmlab

    settings = openmmlab.fit_to_machine(Config.fromfile(config))
    settings.model.backbone.pretrained = False
    for stage in settings.model.test_cfg, settings.model.test_cfg.get("rcnn", {}):
        if "score_thr" in stage:
            stage["score_thr"] = 0.0
    init_default_scope(settings.default_scope)
    return MODELS.build(settings.model)


def _detections(model: nn.Module, height: int, width: int) -> Callable[[], object]:
    from mmdet.structures import DetDataSample

    shape = {"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)}
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return torch.no_grad()(
        lambda: model.test_step({"inputs": [image], "data_samples": [DetDataSample(metainfo=shape)]})
    )


def _by_side(costs: dict[tuple[int, int], float]) -> dict[float, float]:
    """The same by the side of a square of as many pixels."""
    return {math.sqrt(height * width): cost for (height, width), cost in costs.items()}
