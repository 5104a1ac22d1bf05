"""The linear-chain CRF as a module: pytorch-crf's names around `fastseq.functional`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import functional as F
from fastseq.functional.checks import OFF

__all__ = ["CRF"]


class CRF(nn.Module):
    """A linear-chain conditional random field, with the names and state_dict of pytorch-crf's `torchcrf.CRF`.

    Letters: B sequences, T positions, K tags. Where an input is said to be (B,T,...), it is that with
    `batch_first=True`, and (T,B,...) without. **Every tensor that comes back is batch major in both cases**,
    as the rows of pytorch-crf's `decode` are. A mask may have any pattern: the sequence is the positions that
    are on. Scores are in nats. Wrong shapes, devices and values raise ValueError, wrong types and dtypes
    TypeError.

    Args:
        num_tags: K, at least 1.
        batch_first: Whether inputs are (B,T,...); False, pytorch-crf's default, means (T,B,...).
        allowed_transitions: (K,K) bool, whether y may follow x; None allows all. See `tag_constraints`.
        allowed_start: (K,) bool, whether a sequence may start with x.
        allowed_end: (K,) bool, whether a sequence may end with x. What is forbidden has probability 0 in the
            loss and in all decoders, and its parameter gets no gradient. The three are buffers outside the
            state_dict, which so stays pytorch-crf's.

    Attributes:
        start_transitions: (K,) scores of the first tag.
        end_transitions: (K,) scores of the last tag.
        transitions: (K,K) scores from x to.

    Raises:
        ValueError: num_tags is below 1, or a constraint has another shape.
        TypeError: A constraint is not a bool tensor.

    Source: Lafferty, McCallum & Pereira 2001; the mathematics is in `fastseq.ops.crf`.
    """

    allowed_transitions: Tensor | None
    allowed_start: Tensor | None
    allowed_end: Tensor | None

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        *,
        allowed_transitions: Tensor | None = None,
        allowed_start: Tensor | None = None,
        allowed_end: Tensor | None = None,
    ) -> None:
        if isinstance(num_tags, bool) or not isinstance(num_tags, int):
            raise TypeError(f"num_tags: got {type(num_tags).__name__}, wanted an int")
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")  # pytorch-crf's words
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.allow(allowed_transitions, allowed_start, allowed_end)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from uniform(-0.1, 0.1), as pytorch-crf does, in its order."""
        nn.init.uniform_(self.start_transitions, -0.1, 0.1)
        nn.init.uniform_(self.end_transitions, -0.1, 0.1)
        nn.init.uniform_(self.transitions, -0.1, 0.1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_tags={self.num_tags})"

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: str = "sum",
        *,
        token_weights: Tensor | None = None,
        tag_weights: Tensor | None = None,
    ) -> Tensor:
        """The log-likelihood of `tags`; its negative is the loss. See `functional.crf_log_likelihood`.

        Args:
            emissions: (B,T,K) scores of each tag.
            tags: (B,T) integers in [0,K), or -100 where the position does not exist; or (B,T,K) bool, the
                allowed tags of each position.
            mask: (B,T) bool or uint8, or None for all on.
            reduction: "none", "sum", "mean" or "token_mean".
            token_weights: (B,T) weights of the positions, or None.
            tag_weights: (K,) weights of the tags, or None.

        Returns:
            () in nats, or (B,) for "none".
        """
        if not self.batch_first:
            emissions, tags, mask, token_weights = _swapped(emissions, tags, mask, token_weights)
        return F.crf_log_likelihood(
            emissions,
            tags,
            *self._scores(),
            mask,
            reduction,
            token_weights=token_weights,
            tag_weights=tag_weights,
        )

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> list[list[int]]:
        """The best path of each row as a list of tag ids, one a position that is on. Waits for the device.

        Args:
            emissions: (B,T,K) scores of each tag.
            mask: (B,T) bool or uint8, or None for all on.
        """
        rows: list[list[int]] = self.viterbi(emissions, mask)[0].tolist()
        return rows if mask is None else [_without_off(row) for row in rows]

    def viterbi(self, emissions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The best path of each row and its score, as tensors. See `functional.crf_viterbi`.

        Args:
            emissions: (B,T,K) scores of each tag.
            mask: (B,T) bool or uint8, or None for all on.

        Returns:
            (B,T) int64 tags, -100 where a position is off; and (B,) scores.
        """
        emissions, mask = self._batch_major(emissions, mask)
        return F.crf_viterbi(emissions, *self._scores(), mask)

    def nbest(self, emissions: Tensor, n: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The n best paths of each row, best first. See `functional.crf_nbest`.

        Args:
            emissions: (B,T,K) scores of each tag.
            n: How many paths, at least 1.
            mask: (B,T) bool or uint8, or None for all on.

        Returns:
            (B,n,T) int64 tags, -100 where a position is off; and (B,n) scores, -inf where fewer than n paths
            exist.
        """
        emissions, mask = self._batch_major(emissions, mask)
        return F.crf_nbest(emissions, *self._scores(), n, mask)

    def log_partition(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,) log Z in nats. See `functional.crf_log_partition`.

        Args:
            emissions: (B,T,K) scores of each tag.
            mask: (B,T) bool or uint8, or None for all on.
        """
        emissions, mask = self._batch_major(emissions, mask)
        return F.crf_log_partition(emissions, *self._scores(), mask)

    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,T,K) the probability of each tag, 0 where a position is off. See `functional.crf_marginals`.

        Args:
            emissions: (B,T,K) scores of each tag.
            mask: (B,T) bool or uint8, or None for all on.
        """
        emissions, mask = self._batch_major(emissions, mask)
        return F.crf_marginals(emissions, *self._scores(), mask)

    def entropy(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,) the entropy of p(y | x) in nats. See `functional.crf_entropy`.

        Args:
            emissions: (B,T,K) scores of each tag.
            mask: (B,T) bool or uint8, or None for all on.
        """
        emissions, mask = self._batch_major(emissions, mask)
        return F.crf_entropy(emissions, *self._scores(), mask)

    def sample(
        self,
        emissions: Tensor,
        num_samples: int,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(num_samples,B,T) int64 paths drawn from p(y | x), -100 where a position is off. See `crf_sample`.

        Args:
            emissions: (B,T,K) scores of each tag.
            num_samples: How many paths a row, at least 1.
            mask: (B,T) bool or uint8, or None for all on.
            generator: Source of the randomness, on the emissions' device; None for torch's own.
        """
        emissions, mask = self._batch_major(emissions, mask)
        return F.crf_sample(emissions, *self._scores(), num_samples, mask, generator)

    def _batch_major(self, emissions: Tensor, mask: Tensor | None) -> Any:
        """The inputs as (B,T,...) views; the ops take any strides."""
        return (emissions, mask) if self.batch_first else _swapped(emissions, mask)

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """transitions, start and end, with -inf for what is forbidden."""
        own: dict[str, Any] = self._parameters
        try:  # a look-up that is 3 us faster than three attributes of a module
            transitions, start, end = own["transitions"], own["start_transitions"], own["end_transitions"]
        except KeyError:  # they are not parameters: in a DataParallel replica, or parametrized
            transitions, start, end = self.transitions, self.start_transitions, self.end_transitions
        allowed = self._buffers
        if allowed["allowed_transitions"] is not None:
            transitions = torch.where(allowed["allowed_transitions"], transitions, -math.inf)
        if allowed["allowed_start"] is not None:
            start = torch.where(allowed["allowed_start"], start, -math.inf)
        if allowed["allowed_end"] is not None:
            end = torch.where(allowed["allowed_end"], end, -math.inf)
        return transitions, start, end

    def allow(self, transitions: Tensor | None = None, start: Tensor | None = None, end: Tensor | None = None) -> None:
        """Set the constraints anew; None allows all.

        Args:
            transitions: (K,K) bool, whether y may follow x.
            start: (K,) bool, whether a sequence may start with x.
            end: (K,) bool, whether a sequence may end with x.

        Raises:
            ValueError: A shape is not as above.
            TypeError: A constraint is not a bool tensor.
        """
        k = self.num_tags
        for name, allowed, shape in (
            ("allowed_transitions", transitions, (k, k)),
            ("allowed_start", start, (k,)),
            ("allowed_end", end, (k,)),
        ):
            if allowed is not None:
                if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
                    what = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
                    raise TypeError(f"{name}: got {what}, wanted a bool tensor")
                if allowed.shape != shape:
                    raise ValueError(f"{name}: got shape {tuple(allowed.shape)}, wanted {shape} for {k} tags")
                if allowed.is_meta and not self.transitions.is_meta:
                    raise ValueError(f"{name}: got a tensor on the meta device, wanted one with values")
                allowed = allowed.to(self.transitions.device)
            self.register_buffer(name, allowed, persistent=False)


def _swapped(*inputs: Tensor | None) -> Any:
    """Views with the first two dimensions exchanged; what has fewer is left for the checks to name."""
    return tuple(x.transpose(0, 1) if isinstance(x, Tensor) and x.dim() > 1 else x for x in inputs)


def _without_off(row: list[int]) -> list[int]:
    """The tags of a row at the positions that are on."""
    first = row[: len(row) - row.count(OFF)]  # all of them in the usual case, padding on the right or none
    return first if OFF not in first else [tag for tag in row if tag != OFF]
