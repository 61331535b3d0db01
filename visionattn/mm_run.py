"""What a config of mmdet or mmseg needs to run on this machine, and to resume where it was interrupted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint

# What needs a GPU, and what does the same without one.
_WITHOUT_GPU = {"SyncBN": "BN", "AmpOptimWrapper": "OptimWrapper"}


def fit_to_machine(config: Config) -> Config:
    """Without a GPU put plain batch norms for synchronised ones and full precision for mixed in `config`, in place."""
    if not torch.cuda.is_available():
        _fit_to_cpu(list(config.values()))
    return config


def _fit_to_cpu(node: Any) -> None:
    if isinstance(node, dict):
        if node.get("type") == "AmpOptimWrapper":
            node.pop("loss_scale", None)
            node.pop("dtype", None)
        if node.get("type") in _WITHOUT_GPU:
            node["type"] = _WITHOUT_GPU[node["type"]]
        for child in node.values():
            _fit_to_cpu(child)
    elif isinstance(node, list | tuple):
        for child in node:
            _fit_to_cpu(child)


def _seed(*place: int) -> None:
    """Seed Python's, numpy's and torch's draws by a place in a run: its seed, rank, iteration and perhaps worker."""
    first, second, third = np.random.SeedSequence(place).generate_state(3)
    random.seed(int(first))
    np.random.seed(second)
    torch.manual_seed(int(third))


def _seed_worker(worker: int, *place: int) -> None:
    """Seed the draws of a process that loads data."""
    _seed(*place, worker + 1)


class _SeededBatches:
    """Batches of an iteration-based loop; before each, all draws are seeded by its number."""

    def __init__(self, batches: Iterator, *run: int):
        self.batches, self.run, self.number = batches, run, 0

    def __iter__(self) -> _SeededBatches:
        return self

    def __next__(self) -> Any:
        _seed(*self.run, self.number)
        self.number += 1
        return next(self.batches)


@HOOKS.register_module()
class PlaceSeeds(Hook):
    """Makes a run's draws depend on the place in it alone, so that what resumes goes on as if never interrupted.

    Augmentation, dropout, stochastic depth, and the sampling of regions draw anew from each iteration's own seed, which
    is made of the run's seed, the rank and the iteration; validation in between changes nothing. With mmengine's
    restoring of weights, averages, optimiser and schedules, and its drawing the batches before the interruption once
    more, an iteration-based run resumes bit by bit from any of its checkpoints, whatever the number of workers.

    An epoch-based run does from the checkpoints at the ends of epochs; its draws are seeded epoch by epoch, and so are
    its workers, which must not outlive an epoch (`make_resumable` sees to that). What no hook can restore: gradients
    accumulated over a checkpoint, operators that are not deterministic (`randomness=dict(deterministic=True)`), and a
    resumption on another number of devices.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Put seeds before the batches, those that are skipped on resuming included."""
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _SeededBatches(loop.dataloader_iterator, runner.seed, get_rank())

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed an epoch and the workers that it will start."""
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            place = runner.seed, get_rank(), runner.iter
            _seed(*place)
            loop.dataloader.worker_init_fn = partial(_seed_worker, *place)


def make_resumable(config: Config) -> Config:
    """Let an interrupted run and its resumption end where an uninterrupted one does, as `PlaceSeeds` says; in place.

    If `config.resume` is set and there is a checkpoint to resume from, the run keeps the seed that it records.

    Raises:
        FileNotFoundError: That checkpoint is not there.
        ValueError: The config says nothing of training, or the checkpoint is none of a training.
    """
    if not config.get("train_cfg"):
        raise ValueError(f"train_cfg must say how long to train, got {config.get('train_cfg')!r}")
    config.custom_hooks = [*(config.get("custom_hooks") or []), {"type": "PlaceSeeds"}]
    if config.train_cfg.get("type") == "EpochBasedTrainLoop" or config.train_cfg.get("by_epoch"):
        config.train_dataloader.persistent_workers = False
    # Of both mmengine takes load_from.
    latest = (config.get("load_from") or find_latest_checkpoint(config.work_dir)) if config.get("resume") else None
    if latest:
        checkpoint = CheckpointLoader.load_checkpoint(latest, "cpu")
        meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
        if not isinstance(meta, dict) or not {"epoch", "iter"} <= meta.keys():
            raise ValueError(f"{latest}: no checkpoint of a training to resume, whose meta has an epoch and an iter")
        if meta.get("seed") is not None:
            config.randomness = {**(config.get("randomness") or {}), "seed": meta["seed"]}
    return config
