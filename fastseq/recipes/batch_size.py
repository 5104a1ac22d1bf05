"""``train.find_batch_size``: a batch that does not fit into memory is worked through in smaller pieces.

Where memory runs out, at any step, the pieces are halved and the update is done again from its first piece, before any
weight has moved. Pieces are averaged by what their examples count in the loss (`loading.Shares.cut`), so that the
update is that of the whole batch, to rounding. Batch normalisation alone sees a smaller batch.

What is caught is an error: where Linux grants memory and kills the process that uses it, there is none. A limit on the
process (``ulimit -v``) makes it one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from fastseq.recipes.distributed import largest_of_all
from fastseq.recipes.errors import RecipeError
from fastseq.recipes.loading import Piece, Pieces, Shares


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory, on the host or on a device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return should_reduce_batch_size(error) or "bad_alloc" in str(error)


def halved(size: int) -> int:
    """The size to try after this one."""
    return -(-size // 2)


class Fitting:
    """Does updates in pieces that fit into memory, as far as it has been seen.

    Args:
        model: its gradients are cleared, and its buffers put back, before an update is done again.
        pieces: makes batches of shares.
        shares: their `at_once` is lowered, in all processes to the same.
        accelerator: says with whom, and prints.
    """

    def __init__(self, model: nn.Module, pieces: Pieces, shares: Shares, accelerator: Accelerator) -> None:
        self.model, self.pieces, self.shares, self.accelerator = model, pieces, shares, accelerator

    def __call__(self, gradients: Callable[[list[Piece]], Tensor], update: list[Piece]) -> Tensor:
        """The loss of an update, whose gradients are then there.

        Args:
            gradients: adds them up over pieces; gives the loss, and exchanges nothing with other processes.
            update: the pieces of this process.

        Raises:
            RecipeError: one example alone does not fit.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        while True:
            pieces = [fitting for piece in update for fitting in self._cut(piece)]
            loss = self._tried(gradients, pieces)
            tried = max(len(piece.share.indices) for piece in pieces)
            too_large = largest_of_all(self.accelerator, 0 if loss is not None else tried)
            if loss is not None and not too_large:
                return loss
            self.model.zero_grad(set_to_none=True)
            for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(kept)
            clear_device_cache(garbage_collection=True)
            self._halve(too_large)

    def _tried(self, gradients: Callable[[list[Piece]], Tensor], pieces: list[Piece]) -> Tensor | None:
        """The loss; None where memory ran out. The error, which holds on to activations, is gone by then."""
        try:
            return gradients(pieces)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return None

    def _cut(self, piece: Piece) -> list[Piece]:
        """The piece itself where it fits: it may have been made before the limit was known."""
        shares = self.shares.cut(piece.share)
        return [piece] if len(shares) == 1 else self.pieces[shares]

    def _halve(self, size: int) -> None:
        """Lowers the limit, from the largest size at which memory ran out."""
        if size == 1:
            raise RecipeError(
                "train.find_batch_size: one example alone does not fit into memory; shorter sequences, a smaller model "
                "or train.gradient_checkpointing=true are left"
            )
        self.shares.at_once = halved(size)
        self.accelerator.print(f"out of memory: from now on a process takes {self.shares.at_once} examples at once")
