"""From examples to batches on the device: the order of training data, and the loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from fastseq.recipes.config import TrainConfig
from fastseq.recipes.task import Batch, Task


class EpochBatches(Sampler[list[int]]):
    """The batches of an epoch, as a pure function of (seed, epoch), from any position on.

    Args:
        lengths: (N,) int64 length of each example.
        batch_size: examples a batch.
        seed: of the run.
        buckets: put examples of like length together; else each batch is a random draw.
    """

    drop_last = False

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, buckets: bool) -> None:
        self.lengths, self.batch_size, self.seed, self.buckets = lengths, batch_size, seed, buckets
        self.epoch, self.skip = 0, 0

    def start_at(self, epoch: int, skip: int) -> None:
        """The next iteration gives this epoch without its first `skip` batches."""
        self.epoch, self.skip = epoch, skip

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Every batch of an epoch, as arrays of indices."""
        seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        if self.buckets:
            from fastseq.host import bucket_batches

            return list(bucket_batches(self.lengths, self.batch_size, seed))
        order = np.random.default_rng(seed).permutation(len(self.lengths))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.plan(self.epoch)[self.skip :]:
            yield batch.tolist()

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) - self.skip


def training_batches(task: Task, config: TrainConfig, seed: int) -> EpochBatches:
    """The batch plan of a run, over the fraction of the training data that it uses."""
    count = max(1, round(len(task.train) * config.fraction))
    # Which examples a fraction keeps depends on the seed alone, so that a quick look repeats.
    kept = np.sort(np.random.default_rng(seed).permutation(len(task.train))[:count])
    lengths = np.array([task.length(task.train[i]) for i in kept], dtype=np.int64)
    task.train = [task.train[i] for i in kept] if count < len(task.train) else task.train
    return EpochBatches(lengths, config.batch_size, seed, config.buckets)


def training_loader(task: Task, batches: EpochBatches, config: TrainConfig, gpu: bool) -> DataLoader[Any]:
    """One loader for the run, so that worker processes persist; it leaves the global generators alone."""
    workers = config.workers if config.workers is not None else 2 if gpu else 0
    return DataLoader(
        task.train,  # type: ignore[arg-type]  # any sequence will do
        batch_sampler=batches,
        collate_fn=task.collate,
        num_workers=workers,
        pin_memory=gpu,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )


def evaluation_sample(examples: Sequence[Any], config: TrainConfig, seed: int) -> Sequence[Any]:
    """What fits into `max_eval_batches`: the same random examples each time, or all of them."""
    count = (config.max_eval_batches or len(examples)) * config.eval_batch_size
    if count >= len(examples):
        return examples
    return [examples[i] for i in np.sort(np.random.default_rng(seed).permutation(len(examples))[:count])]


def evaluation_batches(task: Task, examples: Any, device: torch.device, size: int = 128) -> Iterator[Batch]:
    """Batches of like length over all the examples, on the device."""
    order = sorted(range(len(examples)), key=lambda i: task.length(examples[i]))
    collate = task.collate_evaluation or task.collate
    for start in range(0, len(order), size):
        batch = collate([examples[i] for i in order[start : start + size]])
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}
