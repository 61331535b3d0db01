"""The folder of a run: what was asked, what ran, what came out, and the state to go on from.

Every file is written beside its place and then renamed into it: a reader, or a run that was killed, sees the old file
or the new one, never half of one.
"""

import csv
import io
import json
import os
import pickle
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

import visionattn
from visionattn.training.config import Config, flatten, load_config, to_yaml
from visionattn.training.drawing import draw_curves
from visionattn.training.model import CONFIG_FILE, WEIGHTS_FILE, save_model

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "albumentations", "numpy", "pillow")
# Of zipfile and torch, for a file with bytes that are not what was written.
_READING_ERRORS = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
_FRESH = ".fresh."
# Keys that may differ between a run and its continuation: they do not change what is computed.
_FREE_KEYS = {
    "output",
    "resume",
    "examples",
    "baselines",
    "attention_entropy",
    "report",
    "time_loop",
    "trackers",
    "keep_last",
    "keep_best",
    "push_to_hub",
    "data.root",
    "data.workers",
    "data.check_pictures",
}


def _reason(error: Exception) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what Python, torch and safetensors raise on a full disk into a ValueError that names the file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error)
        if not isinstance(error, OSError):  # which names a full disk itself, as torch does not
            reason += f" ({shutil.disk_usage(path.parent).free // 2**20} MiB free)"
        raise ValueError(f"cannot write {path}: {reason}") from error


def check_ending(path: str | Path, *endings: str) -> None:
    """Raises ValueError unless `path` has one of `endings`, to be known before hours of work."""
    if Path(path).suffix not in endings:
        raise ValueError(f"{path} ends in {Path(path).suffix!r}, wanted {' or '.join(endings)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, renamed to `path` if the block succeeds and removed if not.

    Raises:
        ValueError: the file cannot be written, as on a full disk; an older one is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it is not there, or could not have been
            temporary.unlink()


class RunFolder:
    """Files of one run below `path`; nothing is created before the first write.

    config.yaml (all keys), environment.json (one entry a start), train.log, summary.csv and metrics.jsonl (the same
    figures, rounded and whole), curves.png, last.pt (the state to resume from), checkpoints/ (those of earlier epochs
    that are kept), best/ (the model for prediction, and its card), last/ and last_ema/ (the weights and their average
    as they are now), report.html, attention_entropy.jsonl, examples/, run.lock (locked while a run is at work).

    Raises:
        ValueError: `path` is a file or cannot be a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            is_folder = stat.S_ISDIR(self.path.stat().st_mode)
        except FileNotFoundError:
            is_folder = True
        except OSError as error:
            raise ValueError(f"output {self.path} cannot be a folder: {error.strerror}") from error
        if not is_folder:
            raise ValueError(f"output {self.path} is a file, wanted a folder")
        self.last = self.path / "last.pt"
        self.best = self.path / "best"

    def begin(self, config: Config) -> bool:
        """Whether to resume from `last`, as `config.resume` asks; creates nothing.

        Raises:
            ValueError: the folder holds a run that is not to be resumed, or of another configuration, or there is
                nothing to resume.
        """
        if not self.last.is_file():
            if config.resume is True:
                raise ValueError(f"nothing to resume: {self.last} does not exist")
            return False
        if not config.resume:
            raise ValueError(f"{self.path} already holds a run; wanted resume=true, another output, or an empty folder")
        before, now = flatten(load_config(self.path / "config.yaml")), flatten(config)
        # Workers share the shards among them, so there they decide who sees what when.
        free = _FREE_KEYS - ({"data.workers"} if config.data.reader == "wds" else set())
        for key in now:
            if key not in free and before[key] != now[key]:
                raise ValueError(f"cannot resume {self.path}: it has {key}={before[key]!r}, asked is {now[key]!r}")
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder until the block ends, or the process, however it does.

        Raises:
            ValueError: another run is at work in the folder, or it cannot be written.
        """
        file = self.path / "run.lock"
        lock = FileLock(file)
        with _writing(file):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise ValueError(f"another run is at work in {self.path}, wanted another output") from error
        try:
            yield
        finally:
            lock.release()

    def with_fitted_batch(self, config: Config) -> Config:
        """`config` with the batch that the run here found to fit, if `data.find_batch_size` asks for one."""
        if not (config.data.find_batch_size and self.last.is_file()):
            return config
        before = load_config(self.path / "config.yaml")
        size, accumulate = before.data.batch_size, before.optimizer.accumulate
        if size * accumulate != config.data.batch_size * config.optimizer.accumulate:
            return config
        return replace(
            config,
            data=replace(config.data, batch_size=size),
            optimizer=replace(config.optimizer, accumulate=accumulate),
        )

    def describe(self, config: Config) -> None:
        """Writes config.yaml, appends this start to environment.json, and removes what a killed run half wrote."""
        starts = [*self.starts(), environment()]
        for leftover in (*self.path.glob(".*.part"), *self.path.glob("*/.*.part")):
            leftover.unlink()
        for leftover in self.path.glob(f"{_FRESH}*"):
            shutil.rmtree(leftover)
        self._write("config.yaml", to_yaml(config))
        self._write("environment.json", json.dumps(starts, indent=2))

    def log(self, line: str) -> None:
        """Appends a line to train.log."""
        self.append("train.log", line)

    def append(self, name: str, line: str) -> None:
        """Appends a line to the file `name`; after a resume some epochs may stand there twice, the later one counts."""
        with _writing(self.path / name), (self.path / name).open("a") as file:
            file.write(line + "\n")

    def save_last(self, state: Mapping[str, Any]) -> None:
        """Replaces last.pt."""
        with replacing(self.last) as temporary:
            torch.save(state, temporary)

    def keep(self, epoch: int, wanted: Collection[int]) -> None:
        """Copies last.pt, which `epoch` ended with, to checkpoints/ if it is wanted, then removes what no longer is.

        What lies there of later epochs, as when a person went back to an earlier checkpoint, is let be.

        Raises:
            ValueError: the copy cannot be written; nothing has been removed then.
        """
        folder = self.path / "checkpoints"
        if epoch in wanted:
            with replacing(folder / f"{epoch:04d}.pt") as temporary:
                shutil.copyfile(self.last, temporary)
        for path in folder.glob("[0-9]*.pt"):
            if int(path.stem) <= epoch and int(path.stem) not in wanted:
                path.unlink()

    def load_last(self) -> dict[str, Any]:
        """The state that was saved last.

        Raises:
            ValueError: the file is damaged or no checkpoint.
        """
        try:
            with zipfile.ZipFile(self.last) as archive:
                damaged = archive.testzip()  # torch.load compares no checksums
            if damaged:
                raise ValueError(f"its part {damaged} is damaged")
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}, wanted the state of a run")
            return state
        except (*_READING_ERRORS, ValueError) as error:
            raise ValueError(f"cannot read the checkpoint {self.last}: {_reason(error)}") from error

    def export(self, name: str, model: nn.Module, class_names: Sequence[str], data_config: Mapping[str, Any]) -> None:
        """Replaces the folder `name`, the model as `visionattn.training.model.load_model` reads it."""
        with _writing(self.path / name):
            self._export(self.path / name, model, class_names, data_config)

    def _export(
        self, place: Path, model: nn.Module, class_names: Sequence[str], data_config: Mapping[str, Any]
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path, prefix=_FRESH) as fresh:
            save_model(model, Path(fresh), class_names, data_config)
            # safetensors lets nobody but the owner read its file.
            shutil.copymode(Path(fresh) / CONFIG_FILE, Path(fresh) / WEIGHTS_FILE)
            # All models of a run share one description, so only the weights' rename changes anything.
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                os.replace(Path(fresh) / file, place / file)

    def save_card(self, card: str) -> None:
        """Replaces best/README.md."""
        self._write("best/README.md", card)

    def starts(self) -> list[dict[str, Any]]:
        """The entries of environment.json.

        Raises:
            ValueError: the file holds something else.
        """
        file = self.path / "environment.json"
        try:
            entries = json.loads(file.read_text()) if file.is_file() else []
        except ValueError as error:
            raise ValueError(f"cannot read {file}: {error}, wanted a list in JSON or no such file") from error
        if not isinstance(entries, list):
            raise ValueError(f"{file} holds {entries!r:.100}, wanted a list in JSON or no such file")
        return entries

    def save_history(self, history: Sequence[Mapping[str, float]], baselines: Mapping[str, float]) -> None:
        """Replaces summary.csv and metrics.jsonl, a row an epoch, and curves.png."""
        table = io.StringIO()
        writer = csv.DictWriter(table, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in history)
        self._write("summary.csv", table.getvalue())
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        with replacing(self.path / "curves.png") as temporary:
            draw_curves(history, baselines, temporary)

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as temporary:
            temporary.write_text(text)


def environment() -> dict[str, Any]:
    """Time, command, machine, versions and git revision of this process."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {"visionattn": visionattn.__version__} | {name: metadata.version(name) for name in _PACKAGES},
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """The revision of the code that runs, with `-dirty` where files differ from it; None outside a checkout."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
