"""A batch that fits into memory: halved before the training starts, with as many more batches an update."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import find_executable_batch_size
from torch import nn

from visionattn.training.config import Config
from visionattn.training.optimisation import build_optimizer

if TYPE_CHECKING:
    from visionattn.training.run import Run


def fitting(size: int, smallest: int, attempt: Callable[[int], None]) -> int:
    """The first of `size`, its half, its quarter, ... with which `attempt` does not run out of memory.

    Raises:
        ValueError: one that does not fit is odd or no larger than `smallest`, so that no half would make equal updates.
    """
    tried = size

    def succeed(size: int) -> int:
        attempt(size)
        return size

    def halve() -> int:
        nonlocal tried
        if tried % 2 or tried // 2 < smallest:
            raise ValueError(
                f"a batch of {tried} does not fit into memory and cannot be halved; wanted a smaller model"
            )
        tried //= 2
        return tried

    return find_executable_batch_size(succeed, starting_batch_size=size, reduce_batch_size_fn=halve)()


def fit_batch_size(run: "Run", model: nn.Module) -> Config:
    """The configuration of `run` with a batch that fits on every device, and the same pictures an update.

    It takes steps with a copy of the model on noise, averaged weights and teacher beside it: the copy stands for the
    buckets in which processes exchange gradients.

    Raises:
        ValueError: no batch fits.
    """
    config = run.config
    classes = len(run.class_names)

    def attempt(size: int) -> None:
        tried = copy.deepcopy(model).train()
        optimizer = build_optimizer(tried, config.optimizer)
        images = torch.randn(size, *run.data_config["input_size"], device=run.accelerator.device)
        images, targets = run.augment(
            images.contiguous(memory_format=run.memory_format), torch.arange(size, device=images.device) % classes
        )
        with run.accelerator.autocast():
            logits = tried(images)
            loss = run.loss(logits, targets)
            loss = run.distill(loss, logits, images) if run.distill else loss
        loss.backward()
        optimizer.step()

    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    mine = fitting(config.data.batch_size, 2 if mixes else 1, attempt)
    size = int(run.accelerator.gather(torch.tensor([mine], device=run.accelerator.device)).min())
    accumulate = config.optimizer.accumulate * (config.data.batch_size // size)
    return replace(
        config,
        data=replace(config.data, batch_size=size),
        optimizer=replace(config.optimizer, accumulate=accumulate),
    )
