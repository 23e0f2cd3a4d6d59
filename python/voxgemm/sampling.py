# SPDX-License-Identifier: Apache-2.0
"""A sparse grid read at real points, and weighted sums of rows, which that is.

Voxel (i, j, k) fills [i, i + 1)^3: its centre is at + 0.5. Every result, gradients too, has the
same bits each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._library import call, ops
from .algorithms import index_in
from .columns import as_int32
from .errors import ArgumentError
from .geometry import Triple, triple
from .kernel_map import PADDING_BATCH

__all__ = [
    "MODES",
    "ROUNDINGS",
    "SampleMap",
    "sample",
    "sample_map",
    "weighted_sum",
    "weighted_sum_grad_features",
]
MODES = ("nearest", "trilinear")
ROUNDINGS = ("floor", "truncate")


class SampleMap(NamedTuple):
    """Which rows each point reads, and how much of each.

    >>> coords = torch.zeros(1, 4, dtype=torch.int32)
    >>> map = vg.sampling.sample_map(coords, torch.tensor([[0.5, 0.5, 0.5]]), "nearest")
    >>> map.rows.tolist(), map.weights.tolist()
    ([[0]], [[1.0]])
    """

    rows: Tensor  # int32 [m, 8 or 1], -1 where there is no voxel
    weights: Tensor  # float32 or float64 [m, 8 or 1]


def sample_map(
    coords: Tensor,
    points: Tensor,
    mode: str = "trilinear",
    *,
    batch: Tensor | None = None,
    spatial_shape: Triple | None = None,
    rounding: str = "floor",
) -> SampleMap:
    """The voxels of coords int32 [n, 4] that points read.

    points is [m, 3] with `batch` int32 [m] (without: all in batch 0), or [b, l, 3], whose first
    index is the batch (m = b * l); float32 or float64, other floats become float32.

    In the mode 'trilinear', corner c of a point is the voxel at floor(point - 0.5) plus
    (c & 1, c >> 1 & 1, c >> 2) and counts with the product of 1 - |point - centre| over the axes;
    the weights of the corners that are there are divided by their sum (at least 1e-12). 'nearest':
    the voxel at floor(point), or with rounding 'truncate' the one towards zero, with weight 1. With
    a spatial_shape, voxels outside it do not count. Of repeated voxels the lowest row is read. A
    point without voxels, or one that is not finite, has rows -1 and weights 0. Weights are
    differentiable in trilinear points. On CUDA, where nothing waits, coordinates too wide for an
    index give weights of NaN.

    >>> coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32)
    >>> map = vg.sampling.sample_map(coords, torch.tensor([[1.25, 0.5, 0.5]]))
    >>> map.rows[0, :2].tolist(), map.weights[0, :2].tolist()
    ([0, 1], [0.25, 0.75])

    Raises ArgumentError: shapes, dtypes or devices that do not fit, an unknown mode or rounding.
    """
    if points.ndim not in (2, 3) or points.shape[-1] != 3 or not points.is_floating_point():
        raise ArgumentError(
            f"points is {points.dtype} {list(points.shape)}, expected floats [m, 3] or [b, l, 3]"
        )
    if points.device != coords.device:
        raise ArgumentError(f"points is on {points.device}, coords on {coords.device}")
    options = [index_in(MODES, mode, "mode"), index_in(ROUNDINGS, rounding, "rounding")]
    if spatial_shape is not None:
        options += triple(spatial_shape, "spatial_shape")
    per_batch = 0
    if points.ndim == 3:
        if batch is not None:
            raise ArgumentError("batch is given with points [b, l, 3], expected points [m, 3]")
        per_batch = points.shape[1]
    elif batch is not None:
        batch = as_int32(batch, "batch", PADDING_BATCH)
    flat = points.reshape(-1, 3)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    if mode == "nearest":
        flat = flat.detach()
    return SampleMap(*_Map.apply(flat, coords, batch, per_batch, options))


def sample(
    features: Tensor,
    coords: Tensor,
    points: Tensor,
    mode: str = "trilinear",
    *,
    batch: Tensor | None = None,
    spatial_shape: Triple | None = None,
    rounding: str = "floor",
) -> Tensor:
    """Features [n, c] on coords int32 [n, 4] at points: [m, c] of points [m, 3] and
    [b, l, c] of [b, l, 3].

    What a point reads is `sample_map`'s, with its mode, batch, spatial_shape and rounding; the
    result is the `weighted_sum`, 0 where there is no voxel. Differentiable in features (any order)
    and in trilinear points (first order).

    >>> coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32)
    >>> features = torch.tensor([[1.0], [3.0]])
    >>> vg.sampling.sample(features, coords, torch.tensor([[1.0, 0.5, 0.5], [9.0, 9.0, 9.0]]))
    tensor([[2.],
            [0.]])

    Raises ArgumentError: as sample_map, and another number of features than of coords.
    """
    if len(features) != len(coords):
        raise ArgumentError(f"features has {len(features)} rows, coords {len(coords)}")
    rows, weights = sample_map(
        coords, points, mode, batch=batch, spatial_shape=spatial_shape, rounding=rounding
    )
    return weighted_sum(features, rows, weights).reshape(*points.shape[:-1], features.shape[1])


def weighted_sum(features: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """y [m, c] = sum over k of weights[:, k] * features[rows[:, k]].

    features [n, c] of any float dtype, rows [m, k] of whole numbers, weights [m, k]. A row number
    outside [0, n), as -1 or the largest uint32, is absent and nothing is read for it. Sums are
    float32 (float64 for float64 features), rounded once to the features' dtype. Differentiable in
    features and weights, any order.

    >>> rows, weights = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    >>> vg.sampling.weighted_sum(torch.tensor([[1.0], [10.0]]), rows, weights).tolist()
    [[21.0], [30.0]]

    Raises ArgumentError: rows that are no whole numbers [m, k], weights of another shape.
    """
    return _Sum.apply(features, weights.to(_sum_dtype(features)), _numbers(rows))


def weighted_sum_grad_features(dy: Tensor, rows: Tensor, weights: Tensor, n: int) -> Tensor:
    """dx [n, c] = sum over the places (i, k) with rows[i, k] = r of weights[i, k] * dy[i].

    The adjoint of `weighted_sum` in its features, differentiable itself.

    >>> rows, weights = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    >>> vg.sampling.weighted_sum_grad_features(torch.ones(2, 1), rows, weights, 2).tolist()
    [[1.0], [5.0]]

    Dtypes and errors are those of weighted_sum; raises ArgumentError.
    """
    return _GradFeatures.apply(dy, weights.to(_sum_dtype(dy)), _numbers(rows), n)


def _sum_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _numbers(rows: Tensor) -> Tensor:
    if rows.is_floating_point() or rows.dtype == torch.bool or rows.ndim != 2:
        raise ArgumentError(
            f"rows is {rows.dtype} {list(rows.shape)}, expected whole numbers [m, k]"
        )
    return as_int32(rows, "rows")


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, coords, batch, per_batch, options):
        rows, weights = call(ops._sample_map.default, coords, points, batch, per_batch, options)
        ctx.save_for_backward(points, rows)
        ctx.mark_non_differentiable(rows)
        return rows, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dweights):
        points, rows = ctx.saved_tensors
        return call(ops._sample_map_grad.default, points, rows, dweights), None, None, None, None


# Each is linear in both operands and the three are each other's derivatives.
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, rows):
        ctx.save_for_backward(x, weights, rows)
        return call(ops._weighted_sum.default, x, rows, weights)

    @staticmethod
    def backward(ctx, dy):
        x, weights, rows = ctx.saved_tensors
        of_x, of_weights, _ = ctx.needs_input_grad
        dx = _GradFeatures.apply(dy, weights, rows, len(x)) if of_x else None
        return dx, _GradWeights.apply(x, dy, rows) if of_weights else None, None


class _GradFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, weights, rows, n):
        ctx.save_for_backward(dy, weights, rows)
        return call(ops._weighted_sum_grad_input.default, dy, rows, weights, n)

    @staticmethod
    def backward(ctx, g):
        dy, weights, rows = ctx.saved_tensors
        d_dy = _Sum.apply(g, weights, rows) if ctx.needs_input_grad[0] else None
        dw = _GradWeights.apply(g, dy, rows) if ctx.needs_input_grad[1] else None
        return d_dy, dw, None, None


class _GradWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dy, rows):
        ctx.save_for_backward(x, dy, rows)
        return call(ops._weighted_sum_grad_weights.default, x, dy, rows)

    @staticmethod
    def backward(ctx, g):
        x, dy, rows = ctx.saved_tensors
        dx = _GradFeatures.apply(dy, g, rows, len(x)) if ctx.needs_input_grad[0] else None
        return dx, _Sum.apply(x, g, rows) if ctx.needs_input_grad[1] else None, None


@torch.library.register_fake("voxgemm::_sample_map")
def _(coords, points, batch, points_per_batch, options):
    shape = (points.shape[0], 8 if options[0] else 1)
    return coords.new_empty(shape, dtype=torch.int32), points.new_empty(shape)


@torch.library.register_fake("voxgemm::_sample_map_grad")
def _(points, rows, dweights):
    return points.new_empty(points.shape)


@torch.library.register_fake("voxgemm::_weighted_sum")
def _(x, rows, weights):
    return x.new_empty((rows.shape[0], x.shape[1]))


@torch.library.register_fake("voxgemm::_weighted_sum_grad_input")
def _(dy, rows, weights, n):
    return dy.new_empty((n, dy.shape[1]))


@torch.library.register_fake("voxgemm::_weighted_sum_grad_weights")
def _(x, dy, rows):
    return x.new_empty(rows.shape, dtype=_sum_dtype(x))
