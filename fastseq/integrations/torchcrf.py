"""pytorch-crf's class, errors included: import `CRF` from here instead of from `torchcrf`."""

from __future__ import annotations

from torch import Tensor

from fastseq import nn

__all__ = ["CRF"]


class CRF(nn.CRF):
    """`fastseq.nn.CRF` that refuses what pytorch-crf 0.7.2 refuses, with the same ValueErrors.

    So a mask must be on at the first timestep of every row, and to check that waits for the device. What
    pytorch-crf takes without a ValueError, but has no meaning for (tags of -100, holes in a mask), keeps the
    meaning that `fastseq.nn.CRF` gives it.
    """

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
        """The log-likelihood of `tags`. See `fastseq.nn.CRF.forward`.

        Args:
            emissions: (B,T,K) scores of each tag; (T,B,K) unless `batch_first`.
            tags: (B,T) integers in [0,K), or (B,T,K) bool.
            mask: (B,T) bool or uint8, on at the first timestep of every row; or None.
            reduction: "none", "sum", "mean" or "token_mean".
            token_weights: (B,T) weights of the positions, or None.
            tag_weights: (K,) weights of the tags, or None.

        Returns:
            () in nats, or (B,) for "none".
        """
        self._validate(emissions, tags, mask)
        if reduction not in ("none", "sum", "mean", "token_mean"):
            raise ValueError(f"invalid reduction: {reduction}")
        return super().forward(emissions, tags, mask, reduction, token_weights=token_weights, tag_weights=tag_weights)

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> list[list[int]]:
        """The best path of each row as a list of tag ids. See `fastseq.nn.CRF.decode`.

        Args:
            emissions: (B,T,K) scores of each tag; (T,B,K) unless `batch_first`.
            mask: (B,T) bool or uint8, on at the first timestep of every row; or None.
        """
        self._validate(emissions, None, mask)
        return super().decode(emissions, mask)

    def _validate(self, emissions: Tensor, tags: Tensor | None, mask: Tensor | None) -> None:
        """pytorch-crf's checks, in its order and its words."""
        for name, x in (("emissions", emissions), ("tags", tags), ("mask", mask)):
            if not isinstance(x, Tensor) and (x is not None or name == "emissions"):
                raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        if emissions.size(2) != self.num_tags:
            raise ValueError(f"expected last dimension of emissions is {self.num_tags}, got {emissions.size(2)}")
        leading = tuple(emissions.shape[:2])
        for name, x in (("tags", tags), ("mask", mask)):
            partial = name == "tags" and x is not None and x.shape == emissions.shape  # not in pytorch-crf
            if x is not None and not partial and tuple(x.shape) != leading:
                raise ValueError(
                    f"the first two dimensions of emissions and {name} must match, got {leading} and {tuple(x.shape)}"
                )
        if mask is not None and not mask.is_meta and not (mask[:, 0] if self.batch_first else mask[0]).all():
            raise ValueError("mask of the first timestep must all be on")
