"""The training pictures of shards as a stream: every reader reads its shards forwards, and nobody a picture twice.

Every process has shards of its own in an epoch and every worker some of those; both, the order and the augmentation are
functions of (run seed, epoch), so that a run with the same processes and workers resumes exactly. (timm's own stream
begins again where a worker has too few pictures, and so repeats some.)
"""

import io
from collections.abc import Iterator
from itertools import accumulate, chain, islice

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from visionattn.training.config import DataConfig
from visionattn.training.data import AugmentedPictures

# 110 MB a worker of encoded pictures as large as ImageNet's; shards are written in random order.
_HELD = 1024


class ShardPlan:
    """Which process and worker reads which shard in which epoch, and how many batches that makes.

    The numbers are those of the least that any epoch may bring, so that all epochs are equally long: a worker leaves
    out what its shards hold beyond whole batches, and an epoch leaves out shards that the processes cannot share.

    Args:
        lengths: number of pictures of each shard.
        batch_size: pictures of a batch.
        processes: of the training.
        workers: of each process; 0 counts as one.

    Attributes:
        batches: of each worker in any epoch.

    Raises:
        ValueError: fewer shards than readers, or shards too short for a batch.
    """

    def __init__(self, lengths: list[int], batch_size: int, processes: int, workers: int) -> None:
        self.count, self.processes, self.workers = len(lengths), processes, max(workers, 1)
        self.shares = self.count // processes
        if self.shares < self.workers:
            raise ValueError(
                f"{self.count} shards for {processes} processes of {self.workers} workers, wanted a shard for each; "
                "lower data.workers or write more shards"
            )
        shortest = list(accumulate(sorted(lengths), initial=0))
        self.batches = [
            shortest[len(range(worker, self.shares, self.workers))] // batch_size for worker in range(self.workers)
        ]
        if not sum(self.batches):
            raise ValueError(
                f"the shortest shards hold {shortest[1]} pictures, fewer than data.batch_size {batch_size}"
            )

    def shards(self, order: np.ndarray, process: int, worker: int) -> np.ndarray:
        """The shards of one reader, of all in the `order` of the epoch."""
        return order[process :: self.processes][: self.shares][worker :: self.workers]


def shuffled(items: Iterator, held: int, rng: np.random.Generator) -> Iterator:
    """The items in random order, as far as `held` of them at a time allow."""
    buffer = list(islice(items, held))
    rng.shuffle(buffer)
    for item in items:
        place = int(rng.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer


class ShardStream(IterableDataset):
    """The pictures of one process in one epoch: (tensor (C, H, W), label), each at most once.

    Args:
        pictures: of a `visionattn.training.shards.ShardReader`, all of them.
        plan: which shards are whose.
        batch_size: pictures of a batch.
        seed: of the run.
        process: number of this process.
    """

    def __init__(self, pictures: AugmentedPictures, plan: ShardPlan, batch_size: int, seed: int, process: int) -> None:
        self.pictures = pictures
        self.plan = plan
        self.batch_size = batch_size
        self.seed = seed
        self.process = process
        self._epoch = SharedCount()  # workers live through the epochs, and see it change

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; accelerate's loader calls this."""
        self._epoch.value = epoch

    def __len__(self) -> int:
        return sum(self.plan.batches) * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = info.id if (info := get_worker_info()) else 0
        reader, key = self.pictures.reader, (self.seed, self._epoch.value)
        rng = np.random.default_rng(key)
        order, seeds = rng.permutation(self.plan.count), rng.integers(2**32, size=len(reader))
        shards = self.plan.shards(order, self.process, worker)
        read = chain.from_iterable(reader.read(int(shard)) for shard in shards)
        mixed = shuffled(read, _HELD, np.random.default_rng((*key, self.process, worker)))
        for position, encoded in islice(mixed, self.plan.batches[worker] * self.batch_size):
            yield self.pictures.augment(io.BytesIO(encoded), position, int(seeds[position]))


def stream_loader(pictures: AugmentedPictures, config: DataConfig, seed: int, accelerator: Accelerator) -> DataLoader:
    """Full batches of this process on its device; it must not go through `accelerator.prepare`, which would split it.

    Raises:
        ValueError: fewer shards than workers of all processes, or shards too short for a batch.
    """
    lengths, processes = pictures.reader.lengths, accelerator.num_processes
    plan = ShardPlan(lengths, config.batch_size, processes, config.workers)
    loader = DataLoader(
        ShardStream(pictures, plan, config.batch_size, seed, accelerator.process_index),
        batch_size=config.batch_size,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        generator=torch.Generator(),  # as for other data, see `train_loader`
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
