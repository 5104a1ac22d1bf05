"""From examples to batches on the device: the order of training data, each process's share of it, and the loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastseq.recipes.config import TrainConfig
from fastseq.recipes.task import Batch, Task


class EpochBatches:
    """The batches of an epoch, as a pure function of (seed, epoch): the same for any number of processes.

    Args:
        lengths: (N,) int64 length of each example.
        batch_size: examples a batch, of all processes together.
        seed: of the run.
        buckets: put examples of like length together; else each batch is a random draw.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, buckets: bool) -> None:
        self.lengths, self.batch_size, self.seed, self.buckets = lengths, batch_size, seed, buckets

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Every batch of an epoch, as arrays of indices."""
        seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        if self.buckets:
            from fastseq.host import bucket_batches

            return list(bucket_batches(self.lengths, self.batch_size, seed))
        order = np.random.default_rng(seed).permutation(len(self.lengths))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)


class Share(NamedTuple):
    """Examples that a process works through at once.

    Attributes:
        indices: of the examples.
        part: of the update's loss that their mean loss makes up: the parts of an update, over all its batches and
            processes, add up to 1.
    """

    indices: np.ndarray
    part: float


class Piece(NamedTuple):
    """A share, and the batch of its examples."""

    share: Share
    batch: Batch


class Shares(Sampler[list[Share]]):
    """What one process has of each batch, from any position in an epoch on.

    A batch is dealt out from its shortest example to its longest, in turns: shares differ by one example at most, and
    hardly in length. What is left when there are more processes than examples works on a copy that counts for nothing,
    since all have to take part in what processes do together.

    Args:
        batches: of an epoch.
        weights: (N,) how much each example counts in the loss.
        accumulate: batches an update.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(
        self, batches: EpochBatches, weights: np.ndarray, accumulate: int = 1, rank: int = 0, processes: int = 1
    ) -> None:
        self.batches, self.weights, self.accumulate = batches, weights, accumulate
        self.rank, self.processes = rank, processes
        self.epoch, self.skip = 0, 0
        self.at_once: int | None = None
        """The most examples of a share; a larger one is cut."""

    def start_at(self, epoch: int, skip: int) -> None:
        """The next iteration gives this epoch without its first `skip` batches, which are whole updates."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[list[Share]]:
        batches = self.batches.plan(self.epoch)
        for start in range(self.skip, len(batches), self.accumulate):
            update = batches[start : start + self.accumulate]
            total = sum(self.weights[batch].sum() for batch in update)
            for batch in update:
                yield self.cut(self._mine(batch, total))

    def __len__(self) -> int:
        return len(self.batches) - self.skip

    def _mine(self, batch: np.ndarray, total: float) -> Share:
        if self.processes > 1:
            batch = batch[np.argsort(self.batches.lengths[batch], kind="stable")]
        mine = batch[self.rank :: self.processes]
        return Share(mine, float(self.weights[mine].sum() / total)) if len(mine) else Share(batch[:1], 0.0)

    def cut(self, share: Share) -> list[Share]:
        """The share in as few and as equal pieces as `at_once` allows; they make up the same gradient."""
        count = -(-len(share.indices) // (self.at_once or len(share.indices)))
        if count == 1:
            return [share]
        whole = self.weights[share.indices].sum()
        pieces = np.array_split(share.indices, count)
        return [Share(piece, share.part * float(self.weights[piece].sum() / whole)) for piece in pieces]


class Pieces(Dataset[list[Piece]]):
    """Shares to batches.

    Args:
        task: has the examples, and makes batches of them.
    """

    def __init__(self, task: Task) -> None:
        self.examples, self.collate = task.train, task.collate

    def __getitem__(self, shares: list[Share]) -> list[Piece]:
        return [Piece(share, self.collate([self.examples[i] for i in share.indices])) for share in shares]


def training_shares(task: Task, config: TrainConfig, seed: int, rank: int = 0, processes: int = 1) -> Shares:
    """A process's shares of a run's batches, over the fraction of the training data that it uses."""
    count = max(1, round(len(task.train) * config.fraction))
    # Which examples a fraction keeps depends on the seed alone, so that a quick look repeats.
    kept = np.sort(np.random.default_rng(seed).permutation(len(task.train))[:count])
    lengths = np.array([task.length(task.train[i]) for i in kept], dtype=np.int64)
    task.train = [task.train[i] for i in kept] if count < len(task.train) else task.train
    weights = np.ones(count) if task.weight is None else np.array([task.weight(example) for example in task.train])
    batches = EpochBatches(lengths, config.batch_size, seed, config.buckets)
    return Shares(batches, weights.astype(np.float64), config.accumulate, rank, processes)


def training_loader(task: Task, shares: Shares, config: TrainConfig, gpu: bool) -> DataLoader[list[Piece]]:
    """One loader for the run, so that worker processes persist; it leaves the global generators alone.

    Returns:
        For each batch, this process's pieces of it: one, unless `Shares.at_once` cuts it.
    """
    workers = config.workers if config.workers is not None else 2 if gpu else 0
    return DataLoader(
        Pieces(task),
        sampler=shares,
        batch_size=None,  # what the sampler gives is a batch already
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=gpu if config.pin_memory is None else config.pin_memory,
        persistent_workers=config.persistent_workers and workers > 0,
        prefetch_factor=config.prefetch if workers else None,
        generator=torch.Generator(),
    )


def _as_it_is(pieces: list[Piece]) -> list[Piece]:
    return pieces


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there; the host does not wait for copies from pinned memory."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def evaluation_sample(examples: Sequence[Any], config: TrainConfig, seed: int) -> Sequence[Any]:
    """What fits into `max_eval_batches`: the same random examples each time, or all of them."""
    count = (config.max_eval_batches or len(examples)) * config.eval_batch_size
    if count >= len(examples):
        return examples
    return [examples[i] for i in np.sort(np.random.default_rng(seed).permutation(len(examples))[:count])]


def by_length(task: Task, examples: Sequence[Any]) -> list[int]:
    """The indices of examples, from the shortest to the longest."""
    return sorted(range(len(examples)), key=lambda i: task.length(examples[i]))


def evaluation_batches(
    task: Task, examples: Sequence[Any], device: torch.device, size: int = 128, order: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches on the device, of the examples at the indices of `order`; without it, of all, `by_length`."""
    order = by_length(task, examples) if order is None else order
    collate = task.collate_evaluation or task.collate
    for start in range(0, len(order), size):
        yield on_device(collate([examples[i] for i in order[start : start + size]]), device)
