"""The encoder that the models share: a bidirectional LSTM over right-padded rows.

Letters: B batch, T tokens, E embedding size, H hidden size of one direction.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class BiLSTM(nn.Module):
    """A bidirectional LSTM whose result does not depend on padding, with dense kernels only.

    A padded row must be read backwards from its own end. Packed sequences do that, at half the speed on a
    CPU. Here each direction is an LSTM of its own in one dense kernel (oneDNN, cuDNN), and the backward one
    sees each row reversed within its length. That is exact, and batches of like lengths waste little.

    Args:
        input_size: features of a token.
        hidden_size: H, of one direction.
        num_layers: layers, each reading both directions of the one below.
        dropout: between layers.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = [input_size] + [2 * hidden_size] * (num_layers - 1)
        self.ahead = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
        self.back = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The hidden states.

        Args:
            x: (B,T,E) embedded tokens, right-padded.
            lengths: (B,) int64 real tokens of each row.

        Returns:
            (B,T,2H); what stands beyond a row's length is unspecified.
        """
        steps = torch.arange(x.shape[1], device=x.device)
        mirror = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)[:, :, None]
        for layer, (ahead, back) in enumerate(zip(self.ahead, self.back, strict=True)):
            x = self.dropout(x) if layer else x
            reverse = back(x.gather(1, mirror.expand_as(x)))[0]
            x = torch.cat([ahead(x)[0], reverse.gather(1, mirror.expand_as(reverse))], -1)
        return x

    def as_pytorch(self) -> nn.LSTM:
        """PyTorch's own bidirectional LSTM with a copy of the weights: the same results on packed sequences."""
        first = cast(nn.LSTM, self.ahead[0])
        layers = len(self.ahead)
        lstm = nn.LSTM(
            first.input_size,
            first.hidden_size,
            layers,
            batch_first=True,
            bidirectional=True,
            dropout=self.dropout.p if layers > 1 else 0.0,
        ).to(next(first.parameters()))
        for layer, directions in enumerate(zip(self.ahead, self.back, strict=True)):
            for suffix, direction in zip(("", "_reverse"), directions, strict=True):
                for name, value in direction.state_dict().items():
                    lstm.state_dict()[name.replace("_l0", f"_l{layer}{suffix}")].copy_(value)
        return lstm


def mask_of(lengths: Tensor, steps: int) -> Tensor:
    """(B,T) bool, on at the first `lengths` (B,) positions of each row."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]
