"""Optimiser, schedule, loss and averaged weights, all of them timm's or torch's."""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from visionattn.training.config import Config, OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimiser of timm, with the model's own exclusions from weight decay.

    Raises:
        ValueError: an unknown optimiser or argument, or one that needs what is not here.
    """
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **config.kwargs,
        )
    except (ValueError, TypeError, AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(f"optimizer {config.name} with {config.kwargs}: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"optimizer.name is {config.name}, wanted one that needs no second derivatives, such as adamw")
    return optimizer


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, updates_per_epoch: int
) -> tuple[Scheduler, int]:
    """A schedule of timm, to be stepped with `step_update` after each update, and the number of epochs with cooldown.

    It must not go through `accelerator.prepare`, which would step it once for each process
    (github.com/huggingface/accelerate/issues/2318).

    Raises:
        ValueError: epochs that the schedule cannot do with.
    """
    try:
        return create_scheduler_v2(
            optimizer,
            sched=config.name,
            decay_rate=1.0,  # from which timm reads the power of `poly`
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            cooldown_epochs=config.cooldown_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:
        raise ValueError(f"schedule.name={config.name} with {config.warmup_epochs} warmup_epochs: {error}") from error


def build_loss(config: Config) -> nn.Module:
    """Cross entropy with label smoothing, for class indices as for the probabilities that mixing makes."""
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)


def build_ema(model: nn.Module, config: Config) -> ModelEmaV3 | None:
    """The average of the weights, or None; its decay rises to `ema_decay` so that early epochs count less."""
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
