# SPDX-License-Identifier: Apache-2.0
"""Convolutions on a kernel map whose channels are in groups, down to one a group: depthwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import call, ops
from .errors import ArgumentError
from .functional import conv3d
from .kernel_map import KernelMap

__all__ = [
    "depthwise_conv3d",
    "grouped_conv3d",
]


def depthwise_conv3d(
    features: Tensor, weight: Tensor, bias: Tensor | None, map: KernelMap
) -> Tensor:
    """y [n_out, c] = bias + sum over taps t of features[in(o, t)] * weight[t].

    features [n_in, c]; weight [taps, c], or [c, Kx, Ky, Kz, 1] as a convolution's with c groups;
    bias [c] or None; all of one dtype (under autocast: any). Sums are float32 (float64 for
    float64), rounded once. Differentiable in all three, any number of times. A map without rows
    gives none.

    >>> map = vg.build_map(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32), 3)
    >>> features = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    >>> vg.depthwise.depthwise_conv3d(features, torch.ones(27, 2), None, map)
    tensor([[ 3., 30.],
            [ 3., 30.]])

    Raises ArgumentError: shapes, dtypes or devices that do not fit.
    """
    if features.device != map.neighbours.device:
        raise ArgumentError(f"features is on {features.device}, the map on {map.neighbours.device}")
    if weight.ndim == 5 and weight.shape[4] == 1:
        if tuple(weight.shape[1:4]) != map.geometry.size:
            raise ArgumentError(
                f"weight has a kernel of {tuple(weight.shape[1:4])}, the map of {map.geometry.size}"
            )
        weight = weight.reshape(len(weight), -1).t()
    if weight.ndim != 2:
        raise ArgumentError(
            f"weight is {list(weight.shape)}, expected [taps, c] or [c, Kx, Ky, Kz, 1]"
        )
    kind = features.device.type
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not map.symmetric and features.requires_grad and torch.is_grad_enabled():
        map.transposed()  # for the backward: made where the map can keep it
    return _Forward.apply(features, weight, bias, map)


def grouped_conv3d(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: KernelMap,
    groups: int,
    algorithm: object = None,
    precision: str | None = None,
) -> Tensor:
    """[n_out, c_out] from features [n_in, c_in]: group g of the output channels reads only group g
    of the input channels.

    weight [c_out, Kx, Ky, Kz, c_in / groups], whose output channels are in order of their groups,
    bias [c_out] or None. One group is `conv3d`, and so is every other group by itself: see there
    for `algorithm`, `precision` and dtypes. One input and one output channel a group are
    `depthwise_conv3d`, which has one algorithm.

    >>> map = vg.build_map(torch.zeros(1, 4, dtype=torch.int32), 1)
    >>> weight = torch.tensor([1.0, 1.0, 2.0, 0.0]).view(2, 1, 1, 1, 2)
    >>> vg.depthwise.grouped_conv3d(torch.tensor([[1.0, 2, 3, 4]]), weight, None, map, groups=2)
    tensor([[3., 6.]])

    Raises ArgumentError: as conv3d, and groups that do not divide both numbers of channels.
    """
    c_in, c_out = features.shape[-1], len(weight)
    if groups < 1 or c_in % groups or c_out % groups:
        raise ArgumentError(
            f"groups is {groups} for {c_in} -> {c_out} channels, expected a divisor of both"
        )
    if weight.ndim != 5 or weight.shape[4] != c_in // groups:
        raise ArgumentError(
            f"weight is {list(weight.shape)}, expected [c_out, Kx, Ky, Kz, {c_in // groups}] "
            f"for {c_in} channels in {groups} groups"
        )
    if groups == 1:
        return conv3d(features, weight, bias, map, algorithm, precision)
    if groups == c_in == c_out:
        return depthwise_conv3d(features, weight, bias, map)
    biases = (None,) * groups if bias is None else bias.chunk(groups)
    parts = zip(features.chunk(groups, 1), weight.chunk(groups), biases, strict=True)
    return torch.cat([conv3d(*part, map, algorithm, precision) for part in parts], 1)


def forward_rows(x: Tensor, weight: Tensor, bias: Tensor | None, map: KernelMap) -> Tensor:
    """depthwise_conv3d of checked operands, weight [taps, c]; without a derivative."""
    map.settle(wait=False)
    return call(ops._depthwise.default, x, weight, bias, *map.lists())


def input_gradient(dy: Tensor, weight: Tensor, map: KernelMap) -> Tensor:
    """Of depthwise_conv3d in the features; without a derivative."""
    map.settle(wait=True)
    return call(ops._depthwise_grad_input.default, dy, weight, *map.lists(back=True))


def weight_gradient(x: Tensor, dy: Tensor, map: KernelMap) -> Tensor:
    """Of depthwise_conv3d in the weight [taps, c]; without a derivative."""
    map.settle(wait=False)
    return call(ops._depthwise_grad_weight.default, x, dy, *map.lists())


# Linear in each operand, and each other's derivatives.
class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, map):
        _keep(ctx, x, weight, map)
        return forward_rows(x, weight, bias, map)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        dx = _GradInput.apply(dy, weight, ctx.map) if of_x else None
        dw = _GradWeight.apply(x, dy, ctx.map) if of_weight else None
        return dx, dw, dy.sum(0) if of_bias else None, None


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, weight, map):
        _keep(ctx, dy, weight, map)
        return input_gradient(dy, weight, map)

    @staticmethod
    def backward(ctx, g):
        dy, weight = ctx.saved_tensors
        of_dy, of_weight, _ = ctx.needs_input_grad
        d_dy = _Forward.apply(g, weight, None, ctx.map) if of_dy else None
        return d_dy, _GradWeight.apply(g, dy, ctx.map) if of_weight else None, None


class _GradWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dy, map):
        _keep(ctx, x, dy, map)
        return weight_gradient(x, dy, map)

    @staticmethod
    def backward(ctx, g):
        x, dy = ctx.saved_tensors
        of_x, of_dy, _ = ctx.needs_input_grad
        dx = _GradInput.apply(dy, g, ctx.map) if of_x else None
        return dx, _Forward.apply(x, g, None, ctx.map) if of_dy else None, None


def _keep(ctx: Any, rows: Tensor, other: Tensor, map: KernelMap) -> None:
    """Of two operands each is kept for the other's derivative only."""
    of_rows, of_other = ctx.needs_input_grad[:2]
    ctx.save_for_backward(rows if of_other else None, other if of_rows else None)
    ctx.map = map


@torch.library.register_fake("voxgemm::_depthwise")
def _(x, weight, bias, map, layer):
    return x.new_empty((map[0].shape[1], x.shape[1]))


@torch.library.register_fake("voxgemm::_depthwise_grad_input")
def _(dy, weight, map, transposed, layer):
    return dy.new_empty((layer[0], dy.shape[1]))


@torch.library.register_fake("voxgemm::_depthwise_grad_weight")
def _(x, dy, map, layer):
    return x.new_empty((map[0].shape[0], x.shape[1]))
