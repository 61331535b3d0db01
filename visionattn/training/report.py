"""What a person sees of a training: a line an epoch, in the log too, and a progress bar on a terminal."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from visionattn.training.loop import Meter
    from visionattn.training.run import Run

_SECONDS_BETWEEN_UPDATES = 0.2


def score(row: Mapping[str, float]) -> float:
    """What decides the best epoch: the accuracy of the averaged weights where there are some."""
    return row.get("ema_top1", row["val_top1"])


class Report:
    """Speaks for the main process; the other processes stay silent.

    Attributes:
        progress: the bar, to be entered as a context around the epochs.
    """

    def __init__(self, run: "Run", console: Console) -> None:
        self.run = run
        self.console = console
        self.speaks = run.accelerator.is_main_process
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not (self.speaks and console.is_terminal),
        )
        updates_per_epoch = run.updates_per_epoch
        self.bar = self.progress.add_task(
            "", total=updates_per_epoch * run.epochs, completed=run.updates, epoch="", state=""
        )
        self.shown = 0.0

    def say(self, line: str) -> None:
        """Prints a line and appends it to the log."""
        if self.speaks:
            self.progress.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
            self.run.folder.log(line)

    def begin(self) -> None:
        """What is trained on what, and what it has to beat."""
        run = self.run
        parameters = sum(x.numel() for x in run.bare_model.parameters()) / 1e6
        size = "x".join(map(str, run.data_config["input_size"]))
        counts = f"{len(run.train)} to train, {len(run.val)} to validate, {len(run.class_names)} classes"
        self.say(f"{run.config.model.name}, {parameters:.2f} M parameters, on {run.accelerator.device}")
        self.say(f"{run.config.data.root or run.config.data.reader}, {size}: {counts}")
        for name, top1 in run.baselines.items():
            self.say(f"baseline on the same split: {name} {top1:.1f} %")
        if run.history or run.within:
            batches = f" and {run.within['batches']} batches" if run.within else ""
            self.say(f"resuming after epoch {len(run.history)} of {run.epochs}{batches}")

    def update(self, meter: "Meter") -> None:
        """Moves the bar, at most five times a second since reading the sums waits for the device."""
        now = time.perf_counter()
        if self.progress.disable or now - self.shown < _SECONDS_BETWEEN_UPDATES:
            return
        self.shown = now
        read = meter.read()
        state = f"loss {read['loss']:.3f}  top-1 {read['top1']:.1f} %  {read['images_per_second']:.0f} images/s"
        epoch = f"{len(self.run.history) + 1}/{self.run.epochs}"
        self.progress.update(self.bar, completed=self.run.updates, epoch=epoch, state=state)

    def epoch(self, row: Mapping[str, float]) -> None:
        """The line of a finished epoch."""
        averaged = f", averaged {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
        self.say(
            f"epoch {row['epoch']:{len(str(self.run.epochs))}d}/{self.run.epochs}  "
            f"loss {row['train_loss']:.3f}  top-1 {row['train_top1']:.2f} % | "
            f"validation loss {row['val_loss']:.3f}  top-1 {row['val_top1']:.2f} %{averaged} | "
            f"{row['images_per_second']:.0f} images/s"
        )

    def end(self) -> None:
        """The best epoch, and where its model lies."""
        best = max(self.run.history, key=score)
        seconds = sum(row["seconds"] for row in self.run.history)
        self.say(
            f"best: {score(best):.2f} % in epoch {best['epoch']}, saved in {self.run.folder.best}; "
            f"{len(self.run.history)} epochs took {seconds:.0f} s"
        )
