"""The training: loop over epochs, evaluate, keep the best. Run by `tools/train.py`.

Each epoch starts from seeds that are a function of (seed, epoch), and a checkpoint holds what else decides the rest, so
that a resumed run ends with the weights of an uninterrupted one, bit for bit on the CPU.
"""

import json
import time
from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from visionattn.training.baselines import score_baselines
from visionattn.training.config import Config
from visionattn.training.entropy import attention_entropy
from visionattn.training.folder import replacing
from visionattn.training.guard import check_loss
from visionattn.training.model import load_model
from visionattn.training.report import Report, score
from visionattn.training.run import Run
from visionattn.training.tracking import begin_tracking, end_tracking
from visionattn.training.webpage import judge, webpage

_ENTROPY_PICTURES = 8


class Meter:
    """Mean loss, top-1 and speed of an epoch so far; its sums stay on the device, so that no step waits for them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums = torch.zeros(3, device=accelerator.device)  # loss, right, count
        self.started = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: its mean loss (), logits (B, classes), labels (B,)."""
        self.sums[0] += loss.detach() * len(labels)
        self.sums[1] += (logits.argmax(1) == labels).sum()
        self.sums[2] += len(labels)

    def read(self, everywhere: bool = False) -> dict[str, float]:
        """Mean loss, top-1 in percent and images a second, of this process or of all of them."""
        sums = self.accelerator.reduce(self.sums, "sum") if everywhere else self.sums
        loss, right, count = sums.tolist()
        seconds = time.perf_counter() - self.started
        return {"loss": loss / count, "top1": 100 * right / count, "images_per_second": count / seconds}


def train_one_epoch(run: Run, epoch: int, on_update: Callable[[Meter], None] = lambda meter: None) -> dict[str, float]:
    """One pass over the training pictures; `on_update` is called after each update of the weights.

    Returns:
        Training loss, top-1 in percent (with mixing: of the unmixed labels), learning rate and images a second.

    Raises:
        ValueError: the loss is no longer a number, or a picture cannot be read.
    """
    accelerator, clip = run.accelerator, run.config.optimizer.clip_grad
    set_seed(int(np.random.SeedSequence((run.config.seed, epoch)).generate_state(1)[0]), device_specific=True)
    run.train_loader.set_epoch(epoch)
    run.model.train()
    meter = Meter(accelerator)
    for number, (images, labels) in enumerate(run.train_loader):
        images, targets = run.augment(images.contiguous(memory_format=run.memory_format), labels)
        with accelerator.accumulate(run.model):
            logits = run.model(images)
            loss = run.loss(logits, targets)
            if run.distill:
                with accelerator.autocast():
                    loss = run.distill(loss, logits, images)
            check_loss(loss, run.bare_model, images, f"batch {number + 1} of epoch {epoch + 1}")
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.model.parameters(), clip)
            run.optimizer.step()
            run.optimizer.zero_grad()
        meter.add(loss, logits, labels)
        if accelerator.sync_gradients:
            run.updates += 1
            run.schedule.step_update(run.updates)
            if run.ema:
                run.ema.update(run.bare_model, step=run.updates)
            on_update(meter)

    seen = meter.read(everywhere=True)
    return {
        "lr": max(group["lr"] for group in run.optimizer.param_groups),
        "train_loss": seen["loss"],
        "train_top1": seen["top1"],
        "images_per_second": seen["images_per_second"],
    }


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, prefix: str = "val") -> dict[str, float]:
    """Mean cross entropy and top-1 in percent of `model` over the validation pictures, each counted once."""
    model.eval()
    scores = []
    for images, labels in run.val_loader:
        with run.accelerator.autocast():
            logits = model(images).float()
        right = (logits.argmax(1) == labels).float()
        losses = cross_entropy(logits, labels, reduction="none")
        scores.append(run.accelerator.gather_for_metrics(torch.stack([losses, right], 1)))
    loss, right = torch.cat(scores).cpu().double().mean(0).tolist()
    return {f"{prefix}_loss": loss, f"{prefix}_top1": 100 * right}


def train(config: Config, console: Console | None = None) -> Run:
    """Trains as `config` says, from its beginning or from the last epoch of an interrupted run.

    Args:
        config: from `visionattn.training.config.load_config`.
        console: where progress is shown; standard output by default.

    Returns:
        The run, trained: its `history` has a row an epoch, its `folder` the files.

    Raises:
        ValueError: see `Run` and `train_one_epoch`; the files of earlier epochs stay as they were.
    """
    run = Run(config)
    report = Report(run, console or Console())
    if run.accelerator.is_main_process:
        run.folder.describe(run.config)
        if config.baselines and not run.baselines:
            run.baselines = score_baselines(run.train.with_transform(run.val.transform), run.val)
    begin_tracking(run.accelerator, run.config)
    report.begin()
    with report.progress:
        for epoch in range(len(run.history), run.epochs):
            started = time.perf_counter()
            row = {"epoch": epoch + 1, **train_one_epoch(run, epoch, report.update), **evaluate(run, run.model)}
            if run.ema:
                row |= evaluate(run, run.ema.module, "ema")
            row["seconds"] = time.perf_counter() - started
            run.history.append(row)
            if run.accelerator.is_main_process:
                save_epoch(run)
            report.epoch(row)
            run.accelerator.log(row, step=row["epoch"])
    end_tracking(run.accelerator)
    if run.accelerator.is_main_process:
        write_examples(run)
        if config.report:
            write_webpage(run)
    report.end()
    return run


def save_epoch(run: Run) -> None:
    """Writes the files of the newest epoch; last.pt comes last, so that a killed run repeats what it did not finish."""
    newest = run.history[-1]
    if all(score(row) < score(newest) for row in run.history[:-1]):
        best = run.ema.module if run.ema else run.bare_model
        run.folder.save_best(best, run.class_names, run.data_config)
    run.folder.save_history(run.history, run.baselines)
    if run.config.attention_entropy:
        images = torch.stack([run.val[position][0] for position in range(min(_ENTROPY_PICTURES, len(run.val)))])
        entropy = attention_entropy(run.bare_model, images.to(run.accelerator.device))
        run.folder.append("attention_entropy.jsonl", json.dumps({"epoch": newest["epoch"], **entropy}))
    run.folder.save_last(run.state())


def write_examples(run: Run) -> None:
    """Writes `examples` validation pictures, each class in turn, as examples/CLASS_NUMBER.png."""
    by_class: dict[int, list[int]] = {}
    for position, index in enumerate(run.val.indices):
        by_class.setdefault(run.val.reader.samples[index][1], []).append(position)
    in_turn = [position for group in zip_longest(*by_class.values()) for position in group if position is not None]
    folder = run.folder.path / "examples"
    for position in in_turn[: run.config.examples]:
        picture, label = run.val.picture(position)
        with replacing(folder / f"{run.class_names[label]}_{position:04d}.png") as temporary:
            picture.save(temporary, format="png")


def write_webpage(run: Run) -> None:
    """Writes report.html of the best model."""
    model = load_model(run.folder.best).to(run.accelerator.device)
    verdicts = judge(model, run.val, run.config.data)
    curves = (run.folder.path / "curves.png").read_bytes()
    page = webpage(run.config, run.history, curves, run.val, run.class_names, verdicts)
    with replacing(run.folder.path / "report.html") as temporary:
        temporary.write_text(page)
