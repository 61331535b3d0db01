"""A look at a training before it starts: one batch forward and backward, nothing written."""

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch

from visionattn.training.guard import check_loss
from visionattn.training.run import Run

_SURE_FACTOR = 2.0


@dataclass(frozen=True)
class Preflight:
    """What one batch showed.

    Attributes:
        train_count: training pictures.
        val_count: validation pictures.
        class_counts: (fewest, most) training pictures of a class.
        num_classes: classes.
        loss: of the first batch, before any update.
        chance_loss: ln(classes), the loss of a guess.
        without_gradient: parameters that the backward did not reach.
        images_per_second: of forward and backward on one device, the second of two batches, without loading.
        memory: peak bytes, of the device or, on the CPU, of the process.
    """

    train_count: int
    val_count: int
    class_counts: tuple[int, int]
    num_classes: int
    loss: float
    chance_loss: float
    without_gradient: list[str]
    images_per_second: float
    memory: int

    def lines(self) -> list[str]:
        """The findings as lines for a person; those that want attention start with `warning:`."""
        low, high = self.class_counts
        lines = [
            f"{self.train_count} pictures to train, {self.val_count} to validate, {self.num_classes} classes "
            f"of {low} to {high} pictures",
            f"first loss {self.loss:.3f}, of a guess {self.chance_loss:.3f}",
            f"{self.images_per_second:.1f} images/s forward and backward, {self.memory / 2**20:.0f} MiB at the peak",
        ]
        if self.loss > _SURE_FACTOR * self.chance_loss:
            lines.append(f"warning: the first loss is over {_SURE_FACTOR:g} times that of a guess")
        if self.without_gradient:
            names = ", ".join(self.without_gradient[:5])
            lines.append(f"warning: {len(self.without_gradient)} parameters get no gradient: {names}")
        return lines


def preflight(run: Run) -> Preflight:
    """Takes the first batch of the training forward and backward twice and updates nothing.

    Raises:
        ValueError: the loss is not a number, or a picture cannot be read.
    """
    run.train_loader.set_epoch(0)
    images, labels = next(iter(run.train_loader))
    images, targets = run.augment(images, labels)
    run.model.train()
    seconds = 0.0
    for _ in range(2):
        run.bare_model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with run.accelerator.autocast():
            loss = run.loss(run.model(images).float(), targets)
        check_loss(loss, run.bare_model, images, "the first batch")
        loss.backward()
        _wait(run.accelerator.device)
        seconds = time.perf_counter() - start
    missing = [name for name, p in run.bare_model.named_parameters() if p.requires_grad and p.grad is None]
    run.bare_model.zero_grad(set_to_none=True)
    counts = _class_counts(run)
    return Preflight(
        train_count=len(run.train),
        val_count=len(run.val),
        class_counts=(min(counts), max(counts)),
        num_classes=len(run.class_names),
        loss=loss.item(),
        chance_loss=math.log(len(run.class_names)),
        without_gradient=missing,
        images_per_second=len(images) / seconds,
        memory=_peak_memory(run.accelerator.device),
    )


def _class_counts(run: Run) -> list[int]:
    """Training pictures of each class."""
    counts = [0] * len(run.class_names)
    for index in run.train.indices:
        counts[run.train.reader.samples[index][1]] += 1
    return counts


def _wait(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes; Linux counts a process in KiB, macOS in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
