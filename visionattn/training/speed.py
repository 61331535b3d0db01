"""What the training loop and the loader cost beside the least that they could, in one process, taking turns."""

import copy
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from timm.data import ImageDataset, create_loader
from torch import nn

from visionattn.training.config import Config
from visionattn.training.data import Pictures, val_loader
from visionattn.training.loop import train_one_epoch
from visionattn.training.optimisation import build_optimizer
from visionattn.training.run import Run
from visionattn_kernels.benchmark import interleaved


@dataclass(frozen=True)
class TrainingSpeed:
    """Medians.

    Attributes:
        rounds: of how many they are.
        images: training pictures of an epoch.
        epoch: seconds of an epoch as it is configured, loading, averaging of weights and all.
        bare: seconds of forward, backward and step of the same model on the same pictures, loaded and changed before.
        loaded: validation pictures.
        loader: seconds in which they come through our loader.
        timm_loader: the same through timm's, with the same number of workers.
    """

    rounds: int
    images: int
    epoch: float
    bare: float
    loaded: int
    loader: float
    timm_loader: float

    @property
    def overhead(self) -> float:
        """What an epoch takes beyond the bare loop, as a share of it."""
        return self.epoch / self.bare - 1

    @property
    def loader_ratio(self) -> float:
        """Pictures a second through our loader, divided by those through timm's."""
        return self.timm_loader / self.loader

    def lines(self) -> list[str]:
        """The findings as lines for a person."""
        return [
            f"epoch of {self.images} pictures: {self.epoch:.2f} s, bare loop {self.bare:.2f} s: "
            f"{100 * self.overhead:.1f} % overhead",
            f"loader, {self.loaded} pictures: {self.loaded / self.loader:.0f} a second, "
            f"timm's {self.loaded / self.timm_loader:.0f} a second: {100 * self.loader_ratio:.0f} %",
            f"medians of {self.rounds}, taking turns; other work on the machine shows in them",
        ]


def time_training(config: Config, rounds: int = 7) -> TrainingSpeed:
    """Times epochs and the loaders, `rounds` of each after one that does not count; the output folder stays as it is.

    An epoch is of `config.time_loop` pictures, or of all.

    Raises:
        ValueError: fewer pictures than a batch; or see `Run`.
    """
    data = replace(
        config.data, limit=config.time_loop or config.data.limit, check_pictures=False, find_batch_size=False
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(replace(config, data=data, output=folder, resume=False, checkpoint_every=None))
    run.train_loader.set_epoch(0)
    batches = [run.augment(images, labels) for images, labels in run.train_loader]
    model = copy.deepcopy(run.bare_model).train()
    bare = _bare_loop(model, build_optimizer(model, config.optimizer), run.loss, batches)
    loop = interleaved({"epoch": lambda: train_one_epoch(run, 0), "bare": bare}, rounds)
    ours, timms = val_loader(run.val, config.data), _timms_loader(run, config)
    load = interleaved({"loader": lambda: _exhaust(ours), "timm_loader": lambda: _exhaust(timms)}, rounds)
    images = sum(len(targets) for _, targets in batches)
    return TrainingSpeed(rounds=rounds, images=images, loaded=len(run.val), **loop, **load)


def _bare_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module, batches: list[tuple[torch.Tensor, ...]]
) -> Callable[[], None]:
    def run() -> None:
        for images, targets in batches:
            loss(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _timms_loader(run: Run, config: Config) -> Iterable:
    """The validation pictures through timm's data set and loader."""
    pictures: Pictures = run.val
    dataset = ImageDataset(None, reader=pictures.reader, input_img_mode=pictures.mode)
    loader = create_loader(
        torch.utils.data.Subset(dataset, pictures.indices),
        batch_size=config.data.batch_size,
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
        use_prefetcher=False,
        device=torch.device("cpu"),
        **{key: run.data_config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
    )
    # timm gives the transform to the data set that it is handed, and that is only the choice among the pictures.
    dataset.transform = loader.dataset.transform
    return loader


def _exhaust(loader: Iterable) -> None:
    for _ in loader:
        pass
