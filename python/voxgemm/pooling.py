# SPDX-License-Identifier: Apache-2.0
"""Rows reduced over the taps of a kernel map, or over segments."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import call, ops
from .algorithms import index_in
from .columns import as_int32
from .errors import ArgumentError
from .kernel_map import KernelMap
from .sampling import weighted_sum

__all__ = [
    "REDUCTIONS",
    "global_pool",
    "max_pool_rows",
    "pool",
    "segment_reduce",
    "unpool",
]
REDUCTIONS = ("max", "min", "sum", "mean")


def pool(features: Tensor, map: KernelMap, reduction: str = "max") -> Tensor:
    """y [n_out, c]: features [n_in, c] reduced over the taps of each output row, by channel.

    The reduction is 'max', 'min', 'sum' or 'mean' (of the rows that are there). A row without
    inputs is 0; in max and min a NaN wins. Sums are float32 (float64 for float64), rounded once.
    The gradient of max and min goes to the winner of the lowest tap. Differentiable, any order.

    >>> fine = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 4, 0, 0]], dtype=torch.int32)
    >>> coarse = vg.output_coords(fine, vg.Geometry((2, 2, 2), (2, 2, 2)))
    >>> map = vg.build_map(fine, 2, out_coords=coarse, stride=2)
    >>> vg.pooling.pool(torch.tensor([[1.0], [3.0], [-2.0]]), map, "max").tolist()
    [[3.0], [-2.0]]

    Raises ArgumentError: an unknown reduction, features that do not fit the map.
    """
    return max_pool_rows(features, map, reduction)[0]


def max_pool_rows(
    features: Tensor, map: KernelMap, reduction: str = "max"
) -> tuple[Tensor, Tensor]:
    """`pool` of features, and by the same reduction the input rows that won.

    They are int32 [n_out, c], -1 where there was none; of sums and means they are empty.

    >>> map = vg.build_map(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32), 3)
    >>> vg.pooling.max_pool_rows(torch.tensor([[1.0], [3.0]]), map)[1].tolist()
    [[1], [1]]

    Raises ArgumentError: as pool.
    """
    if features.device != map.neighbours.device:
        raise ArgumentError(f"features is on {features.device}, the map on {map.neighbours.device}")
    number = index_in(REDUCTIONS, reduction, "reduction")
    if not map.symmetric and features.requires_grad and torch.is_grad_enabled():
        map.transposed()  # for the backward: made where the map can keep it
    return _Pool.apply(features, map, number)


def unpool(features: Tensor, map: KernelMap, reduction: str = "sum") -> Tensor:
    """[n_in, c] from features [n_out, c]: `pool` back through a map.

    By a reduction of `pool`'s. Where the kernel is as large as its stride, each row gets its
    parent's features.

    >>> fine = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.int32)
    >>> coarse = vg.output_coords(fine, vg.Geometry((2, 2, 2), (2, 2, 2)))
    >>> map = vg.build_map(fine, 2, out_coords=coarse, stride=2)
    >>> vg.pooling.unpool(torch.tensor([[5.0]]), map).tolist()
    [[5.0], [5.0]]

    Dtypes and errors are those of pool; raises ArgumentError.
    """
    return pool(features, map.transposed(), reduction)


def segment_reduce(
    features: Tensor, segments: Tensor, count: int, reduction: str = "sum"
) -> Tensor:
    """y [count, c]: the rows of features [n, c] with segments [n] == s, reduced, for every s.

    The reduction is one of `pool`'s. Segments are whole numbers in any order; rows with a number
    outside [0, count) are left out. A segment without rows is 0. Differentiable, any order; the
    gradient of max and min goes to the lowest row of equals.

    >>> rows = torch.tensor([[1.0], [2.0], [4.0]])
    >>> vg.pooling.segment_reduce(rows, torch.tensor([2, 0, 2]), 3).tolist()
    [[2.0], [0.0], [5.0]]

    Raises ArgumentError: an unknown reduction, another number of segments than of rows.
    """
    number = index_in(REDUCTIONS, reduction, "reduction")
    return _Segments.apply(features, as_int32(segments, "segments"), count, number)


def global_pool(
    features: Tensor, coords: Tensor, batch_size: int, reduction: str = "mean"
) -> Tensor:
    """y [batch_size, c]: features [n, c] reduced by the batch of coords int32 [n, 4].

    The reduction is 'max', 'min', 'sum' or 'mean', as in `segment_reduce`; an item without rows is
    0. Differentiable, any order.

    >>> coords = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [1, 2, 2, 2]], dtype=torch.int32)
    >>> vg.pooling.global_pool(torch.tensor([[1.0], [2.0], [4.0]]), coords, 2).tolist()
    [[1.0], [3.0]]

    Raises ArgumentError: as segment_reduce.
    """
    return segment_reduce(features, coords[:, 0], batch_size, reduction)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, map, number):
        map.settle(wait=False)
        y, winners = call(ops._pool.default, x, *map.lists(), number)
        ctx.save_for_backward(winners)
        ctx.mark_non_differentiable(winners)
        ctx.map, ctx.number = map, number
        return y, winners

    @staticmethod
    def backward(ctx, dy, _):
        (winners,) = ctx.saved_tensors
        return _PoolGrad.apply(dy, winners, ctx.map, ctx.number), None, None


class _PoolGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, winners, map, number):
        map.settle(wait=True)
        picks = REDUCTIONS[number] in ("max", "min")
        ctx.save_for_backward(winners)
        ctx.map, ctx.number = map, number
        grads = [dy, winners] if picks else [dy]
        return call(ops._pool_grad.default, grads, *map.lists(back=True), number)

    @staticmethod
    def backward(ctx, g):
        (winners,) = ctx.saved_tensors
        if winners.numel():
            return _won(g, winners), None, None, None
        return _Pool.apply(g, ctx.map, ctx.number)[0], None, None, None


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, segments, count, number):
        y, winners = call(ops._segment_reduce.default, x, segments, count, number)
        ctx.save_for_backward(segments, winners)
        ctx.number = number
        return y

    @staticmethod
    def backward(ctx, dy):
        return _SegmentsGrad.apply(dy, *ctx.saved_tensors, ctx.number), None, None, None


class _SegmentsGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, segments, winners, number):
        ctx.save_for_backward(segments, winners)
        ctx.number, ctx.count = number, len(dy)
        rows = len(segments)
        if REDUCTIONS[number] in ("max", "min"):
            # A row wins an element of its own segment only: no two gradients meet.
            dx = dy.new_zeros(rows + 1, dy.shape[1])
            return dx.scatter_(0, winners.long() + 1, dy)[1:]
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        weights = dy.new_ones(rows, 1, dtype=wide)
        if REDUCTIONS[number] == "mean":
            counts, _ = call(ops._segment_reduce.default, weights, segments, len(dy), 2)
            weights = weighted_sum(1 / counts, segments[:, None], weights)
        return weighted_sum(dy, segments[:, None], weights)

    @staticmethod
    def backward(ctx, g):
        segments, winners = ctx.saved_tensors
        if REDUCTIONS[ctx.number] in ("max", "min"):
            return _won(g, winners), None, None, None
        return _Segments.apply(g, segments, ctx.count, ctx.number), None, None, None


def _won(rows, winners):
    """[n, c]: of each column the row that won, 0 where none did."""
    padded = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
    return padded.gather(0, winners.long() + 1)


def _reduced(x, rows, number):
    picks = REDUCTIONS[number] in ("max", "min")
    winners = x.new_empty((rows, x.shape[1]) if picks else (0,), dtype=torch.int32)
    return x.new_empty((rows, x.shape[1])), winners


@torch.library.register_fake("voxgemm::_pool")
def _(x, map, layer, reduction):
    return _reduced(x, map[0].shape[1], reduction)


@torch.library.register_fake("voxgemm::_pool_grad")
def _(dy, map, transposed, layer, reduction):
    return dy[0].new_empty((layer[0], dy[0].shape[1]))


@torch.library.register_fake("voxgemm::_segment_reduce")
def _(x, segments, count, reduction):
    return _reduced(x, count, reduction)
