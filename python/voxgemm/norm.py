# SPDX-License-Identifier: Apache-2.0
"""Batch norm of rows, however few and whoever knows how many: for small clouds, traced graphs and
several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ArgumentError


class _Joined(torch.autograd.Function):
    """The sum over the default group's processes, and so of their gradients."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _joined(gradient)


def _alone(part: Tensor) -> Tensor:
    return part


def _joined(part: Tensor) -> Tensor:
    apply: Callable[..., Any] = _Joined.apply  # without types in torch 2.10
    joined: Tensor = apply(part)
    return joined


class BatchNorm(nn.BatchNorm1d):
    """torch.nn.BatchNorm1d for the rows [n, channels] of a cloud: any n, and in a traced graph too.

    In training a single row, which has no variance, comes back as it is and counts for nothing;
    parameters do get a gradient, of zeros. Torch's own raises an error there. In a graph
    (`torch.compile`, `torch.export`) n may be a number that only the device knows. Parameters of
    16 bits, as FSDP's mixed precision makes them, go with running statistics of 32.

    >>> norm = vg.nn.BatchNorm(2)
    >>> norm(torch.tensor([[3.0, 5.0]])).tolist()
    [[3.0, 5.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels], normalised by channel; of one row in training, that row."""
        statistics = self.running_mean
        mixed = statistics is not None and self.affine and self.weight.dtype != statistics.dtype
        if torch.compiler.is_compiling() or mixed or (self.training and x.shape[0] == 1):
            return without_branches(self, x)
        return super().forward(x)


class SyncBatchNorm(BatchNorm):
    """BatchNorm over the rows of all processes of the default group, on CPUs and GPUs.

    A process may have no row, but takes part: every process must run the layer equally often.

    >>> net = vg.nn.SyncBatchNorm.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(4)))
    >>> type(net[0]).__name__
    'SyncBatchNorm'
    """

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels], normalised by the statistics of all processes."""
        return without_branches(self, x, _joined if self.training else _alone)

    @staticmethod
    def convert(net: nn.Module) -> nn.Module:
        """Makes every batch norm of rows in `net`, of torch or of this module, one of these."""
        for module in net.modules():
            if type(module) in (BatchNorm, nn.BatchNorm1d):
                module.__class__ = SyncBatchNorm
        return net


_Layer = TypeVar("_Layer", bound=nn.Module)


@torch.no_grad()
def fold_batch_norm(conv: _Layer, norm: nn.Module) -> _Layer:
    """A copy of the sparse convolution `conv` that computes norm(conv(x)) by its weights alone.

    weight * s and (bias - running_mean) * s + norm.bias, s = norm.weight / sqrt(running_var + eps)
    by output channel: what `norm` does in evaluation mode. For inference, where the convolution
    then takes residual and ReLU into its kernel, too. Raises ArgumentError: a norm without running
    statistics, or of another number of channels.

    >>> conv, norm = vg.nn.SubmConv3d(4, 8, 3, bias=False), vg.nn.BatchNorm(8).eval()
    >>> vg.nn.fold_batch_norm(conv, norm).bias.shape
    torch.Size([8])
    """
    source: Any = conv
    statistics: Any = norm
    if statistics.running_mean is None:
        raise ArgumentError("the batch norm keeps no running statistics, which folding needs")
    channels = source.weight.shape[0]
    if statistics.num_features != channels:
        raise ArgumentError(
            f"the batch norm has {statistics.num_features} channels, the convolution {channels}"
        )
    mean, variance = statistics.running_mean.double(), statistics.running_var.double()
    scale = (variance + statistics.eps).rsqrt()
    shift = -mean * scale
    if statistics.affine:
        scale = scale * statistics.weight
        shift = shift * statistics.weight + statistics.bias
    if source.bias is not None:
        shift = shift + source.bias * scale
    folded: Any = copy.deepcopy(conv)
    folded.weight.copy_(source.weight * scale.view(-1, 1, 1, 1, 1))
    folded.bias = nn.Parameter(shift.to(source.weight.dtype))
    result: _Layer = folded
    return result


def without_branches(module: Any, x: Tensor, total: Callable[[Tensor], Tensor] = _alone) -> Tensor:
    """What BatchNorm makes of x with `module`'s parameters, by formulas for every number of rows.

    `total` adds a sum of this process to those of the others.
    """
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    if not (module.training or module.running_mean is None):
        return _scaled(module, rows, module.running_mean, module.running_var).to(x.dtype)
    # Two rounds: squares of differences from the mean do not cancel.
    count = total(rows.new_full((1,), x.shape[0]))
    mean = total(rows.sum(0)) / count.clamp(min=1)
    variance = total((rows - mean).square().sum(0)) / count.clamp(min=1)
    if module.training and module.running_mean is not None:
        _remember(module, mean.detach(), variance.detach(), count)
    return torch.where(count == 1, x, _scaled(module, rows, mean, variance).to(x.dtype))


def _scaled(module: Any, rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    y = (rows - mean) * (variance + module.eps).rsqrt()
    return y * module.weight + module.bias if module.affine else y


@torch.no_grad()
def _remember(module: Any, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Moves the running statistics, whose variance is without bias, unless count is 0 or 1."""
    counts = (count > 1)[0]
    module.num_batches_tracked += counts
    share = module.momentum
    if share is None:
        share = 1 / module.num_batches_tracked.clamp(min=1)
    unbiased = variance * (count / (count - 1).clamp(min=1))
    for running, now in ((module.running_mean, mean), (module.running_var, unbiased)):
        moved = running + share * (now.to(running.dtype) - running)
        running.copy_(torch.where(counts, moved, running))
