"""The training: loop over epochs, evaluate, keep the best. Run by `tools/train.py`.

Each epoch starts from seeds that are a function of (seed, epoch), what follows a checkpoint within it from those of
(seed, epoch, batches done), and a checkpoint holds what else decides the rest: a resumed run ends with the weights of
an uninterrupted one, bit for bit on the CPU.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from heapq import nlargest
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from visionattn.training.baselines import score_baselines
from visionattn.training.card import model_card
from visionattn.training.config import Config
from visionattn.training.entropy import attention_entropy
from visionattn.training.folder import replacing
from visionattn.training.guard import check_loss
from visionattn.training.hub import push
from visionattn.training.model import WEIGHTS_FILE, load_model
from visionattn.training.report import Report, score
from visionattn.training.run import Run
from visionattn.training.tracking import begin_tracking, end_tracking
from visionattn.training.webpage import judge, webpage

_ENTROPY_PICTURES = 8


class Meter:
    """Mean loss, top-1 and speed of an epoch so far; its sums stay on the device, so that no step waits for them.

    Args:
        accelerator: of the run.
        before: `state` of the same epoch before it was interrupted.
    """

    def __init__(self, accelerator: Accelerator, before: dict[str, Any] | None = None) -> None:
        self.accelerator = accelerator
        sums = before["sums"][accelerator.process_index] if before else torch.zeros(3)  # loss, right, count
        self.sums = sums.to(accelerator.device)
        self.started = time.perf_counter() - (before["seconds"] if before else 0.0)

    @property
    def seconds(self) -> float:
        """Since the epoch began, without what lay between an interruption and its end."""
        return time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        """What goes on from here needs: the sums (processes, 3) and the seconds."""
        return {"sums": self.accelerator.gather(self.sums[None]).cpu(), "seconds": self.seconds}

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: its mean loss (), logits (B, classes), labels (B,)."""
        self.sums[0] += loss.detach() * len(labels)
        self.sums[1] += (logits.argmax(1) == labels).sum()
        self.sums[2] += len(labels)

    def read(self, everywhere: bool = False) -> dict[str, float]:
        """Mean loss, top-1 in percent and images a second, of this process or of all of them."""
        sums = self.accelerator.reduce(self.sums, "sum") if everywhere else self.sums
        loss, right, count = sums.tolist()
        return {"loss": loss / count, "top1": 100 * right / count, "images_per_second": count / self.seconds}


def train_one_epoch(run: Run, epoch: int, on_update: Callable[[Meter], None] = lambda meter: None) -> dict[str, float]:
    """One pass over the training pictures, or what an interruption left of it; `on_update` follows each update.

    Returns:
        Training loss, top-1 in percent (with mixing: of the unmixed labels), learning rate of the last update,
        images a second.

    Raises:
        ValueError: the loss is no longer a number, or a picture cannot be read.
    """
    done = run.within["batches"] if run.within else 0
    run.train_loader.set_epoch(epoch)
    batches = skip_first_batches(run.train_loader, done) if done else run.train_loader
    meter = Meter(run.accelerator, run.within)
    run.model.train()
    _seed(run, epoch, done)
    for number, (images, labels) in enumerate(batches, done + 1):
        rate = max(group["lr"] for group in run.optimizer.param_groups)  # of the next update, which changes it
        loss, logits = _learn(run, images, labels, f"batch {number} of epoch {epoch + 1}")
        meter.add(loss, logits, labels)
        if run.accelerator.sync_gradients:
            on_update(meter)
            every = run.config.checkpoint_every
            if every and run.updates % every == 0 and number < len(run.train_loader):
                run.within = {"batches": number, **meter.state()}
                run.save()
                _seed(run, epoch, number)
    run.within = None

    seen = meter.read(everywhere=True)
    return {
        "lr": rate,
        "train_loss": seen["loss"],
        "train_top1": seen["top1"],
        "images_per_second": seen["images_per_second"],
    }


def _seed(run: Run, epoch: int, done: int) -> None:
    """Seeds each process for the batches of `epoch` that follow the `done` first ones."""
    key = (run.config.seed, epoch, done) if done else (run.config.seed, epoch)
    set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]), device_specific=True)


def _learn(run: Run, images: Tensor, labels: Tensor, batch: str) -> tuple[Tensor, Tensor]:
    """Takes a batch forward and backward and, after the last one that accumulates, the update.

    Returns:
        The mean loss () and the logits (B, classes).
    """
    accelerator, clip = run.accelerator, run.config.optimizer.clip_grad
    images, targets = run.augment(images.contiguous(memory_format=run.memory_format), labels)
    with accelerator.accumulate(run.model):
        try:
            logits = run.model(images)
        except ValueError as error:
            if len(images) > 1:
                raise
            # torch's, of a batch norm that has one value to normalise
            raise ValueError(f"data.batch_size is 1: {error}; wanted at least 2") from error
        loss = run.loss(logits, targets)
        if run.distill:
            with accelerator.autocast():
                loss = run.distill(loss, logits, images)
        check_loss(loss, run.bare_model, images, batch)
        accelerator.backward(loss)
        if clip is not None and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(run.model.parameters(), clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
    if accelerator.sync_gradients:
        run.updates += 1
        run.schedule.step_update(run.updates)
        if run.ema:
            run.ema.update(run.bare_model, step=run.updates)
    return loss, logits


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
    """Trains as `config` says, from its beginning or from the last checkpoint of an interrupted run.

    Args:
        config: from `visionattn.training.config.load_config`.
        console: where progress is shown; standard output by default.

    Returns:
        The run, trained: its `history` has a row an epoch, its `folder` the files.

    Raises:
        ValueError: see `Run` and `train_one_epoch`, or another run is at work in the folder; the files of earlier
            epochs stay as they were.
    """
    run = Run(config)
    with run.folder.locked() if run.accelerator.is_main_process else nullcontext():
        _train(run, Report(run, console or Console()))
    return run


def _train(run: Run, report: Report) -> None:
    """The epochs that `run` still lacks, and what follows them."""
    config = run.config
    if run.accelerator.is_main_process:
        run.folder.begin(config)  # again, as another run may have come and gone since
        if run.history and not (run.folder.best / WEIGHTS_FILE).is_file():
            raise ValueError(
                f"cannot resume {run.folder.path}: {run.folder.best} has no {WEIGHTS_FILE}, "
                "wanted the best model so far, or a copy of last/ in its place"
            )
        run.folder.describe(config)
        if config.baselines and not run.baselines:
            run.baselines = score_baselines(run.train.with_transform(run.val.transform), run.val)
        if run.history and not run.within:
            keep_checkpoints(run)  # which a kill may have cut off
    begin_tracking(run.accelerator, config)
    report.begin()
    with report.progress:
        for epoch in range(len(run.history), run.epochs):
            started = time.perf_counter() - (run.within["seconds"] if run.within else 0.0)
            row = {"epoch": epoch + 1, **train_one_epoch(run, epoch, report.update), **evaluate(run, run.model)}
            if run.ema:
                row |= evaluate(run, run.ema.module, "ema")
            row["seconds"] = time.perf_counter() - started
            run.history.append(row)
            save_epoch(run)
            report.epoch(row)
            run.accelerator.log(row, step=row["epoch"])
    end_tracking(run.accelerator)
    if run.accelerator.is_main_process:
        write_examples(run)
        run.folder.save_card(model_card(run, run.folder.starts()[-1]))
        speed = time_loop(run, report) if config.time_loop else []
        if config.report:
            write_webpage(run, speed)
        if config.push_to_hub:
            report.say(push(run.folder.best, config.push_to_hub))
    report.end()


def save_epoch(run: Run) -> None:
    """Writes the files of the newest epoch; last.pt comes last, so that a killed run repeats what it did not finish.

    Only what is kept of last.pt comes after it.
    """
    newest, writes = run.history[-1], run.accelerator.is_main_process
    models = {"last": run.bare_model} | ({"last_ema": run.ema.module} if run.ema else {})
    if all(score(row) < score(newest) for row in run.history[:-1]):
        models["best"] = run.ema.module if run.ema else run.bare_model
    for name, part in models.items():
        model = run.whole(part)
        if writes:
            run.folder.export(name, model, run.class_names, run.data_config)
    if writes:
        run.folder.save_history(run.history, run.baselines)
    if run.config.attention_entropy:
        model = run.whole(run.bare_model)
        if writes:
            write_entropy(run, model)
    run.save()
    if writes:
        keep_checkpoints(run)


def keep_checkpoints(run: Run) -> None:
    """Keeps last.pt, which the newest epoch ended with, as `keep_last` and `keep_best` ask, and removes older ones."""
    last, best = run.config.keep_last, run.config.keep_best
    if not (last or best):
        return
    rows = nlargest(last, run.history, lambda row: row["epoch"]) + nlargest(best, run.history, score)
    run.folder.keep(run.history[-1]["epoch"], {row["epoch"] for row in rows})


def write_entropy(run: Run, model: nn.Module) -> None:
    """Appends the entropy of each attention of `model` to attention_entropy.jsonl."""
    images = torch.stack([run.val[position][0] for position in range(min(_ENTROPY_PICTURES, len(run.val)))])
    entropy = attention_entropy(model, images.to(next(model.parameters()).device))
    run.folder.append("attention_entropy.jsonl", json.dumps({"epoch": run.history[-1]["epoch"], **entropy}))


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


def time_loop(run: Run, report: Report) -> list[str]:
    """What the loop and the loader cost beside the least that they could, as lines; also reported."""
    from visionattn.training.speed import time_training  # which times what stands above

    lines = time_training(run.config).lines()
    for line in lines:
        report.say(line)
    return lines


def write_webpage(run: Run, speed: Sequence[str]) -> None:
    """Writes report.html of the best model, with the lines of `speed`."""
    model = load_model(run.folder.best).to(run.accelerator.device)
    verdicts = judge(model, run.val, run.config.data)
    curves = (run.folder.path / "curves.png").read_bytes()
    page = webpage(run.config, run.history, curves, run.val, run.class_names, verdicts, speed)
    with replacing(run.folder.path / "report.html") as temporary:
        temporary.write_text(page)
