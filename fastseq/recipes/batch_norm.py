"""Batch normalisation over what all processes have of a batch, so that several train what one would."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def share_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces batch normalisation: by `nn.SyncBatchNorm` on a GPU, and by `CommonBatchNorm` on a CPU."""
    if device.type == "cuda":
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats:
            module.__class__ = CommonBatchNorm  # parameters and buffers stay the same objects
    return model


class _Sum(torch.autograd.Function):
    """The sum over the processes; each one's input has a part in every process's loss, so the gradient is a sum too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


def _sum(x: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(x))  # type: ignore[no-untyped-call]


class CommonBatchNorm(_BatchNorm):
    """What `nn.SyncBatchNorm` does, which runs on GPUs only; in float32, and as `nn.BatchNorm2d` in evaluation."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions: the class that this one replaces has its own."""

    def forward(self, x: Tensor) -> Tensor:
        """The input, (B,C,...), normalised; all processes have to call this."""
        if not self.training:
            return super().forward(x)
        kind, x = x.dtype, x.float()
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        sums = _sum(torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = _sum(centred.square().sum(dims)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(kind)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
