# SPDX-License-Identifier: Apache-2.0
"""The three passes of a convolution as differentiable functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import call, ops
from .algorithms import Filters
from .kernel_map import Asked, KernelMap


class How(NamedTuple):
    filters: Filters
    precision: int


def _channels(weight: Tensor) -> tuple[int, int]:
    """c_in and c_out; of no weights at all, which the operator will say, anything."""
    return (weight.shape[4], weight.shape[0]) if weight.ndim == 5 else (1, 1)


def _asked(number: int, c_in: int, c_out: int, dtype: torch.dtype, how: How) -> Asked:
    return Asked(number, c_in, c_out, dtype, how.precision, how.filters[number])


# The passes are bilinear and each other's gradients: derivatives of any order stay among them.
# `how` is the filters of the three passes and the precision.
class Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, map, how):
        ctx.save_for_backward(x, weight)
        ctx.map, ctx.how = map, how
        return run_forward(x, weight, bias, map, how)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return *gradients(dy, x, weight, ctx.map, ctx.how, ctx.needs_input_grad), None, None


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, map: KernelMap, how: How) -> Tensor:
    """The forward pass alone, for an autograd function of the caller's."""
    map.settle(wait=False)
    choice = map.choice(_asked(0, *_channels(weight), weight.dtype, how))
    return call(ops._forward.default, x, weight, bias, map.tensors(choice.schedule), choice.layer)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    map: KernelMap,
    how: How,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the forward pass in x, weight and bias, None where not wanted; differentiable."""
    dx = dw = db = None
    if wanted[0]:
        dx = GradInput.apply(dy, weight, map, how)
    if any(wanted[1:3]):
        dw, db = GradWeight.apply(x, dy, map, how, list(wanted[1:3]))
    return dx, dw if wanted[1] else None, db if wanted[2] else None


class GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, weight, map, how):
        ctx.save_for_backward(dy, weight)
        ctx.map, ctx.how = map, how
        map.settle(wait=True)
        choice = map.choice(_asked(1, *_channels(weight), weight.dtype, how))
        return call(
            ops._grad_input.default,
            dy,
            weight,
            *map.backward_tensors(choice.schedule),
            choice.layer,
        )

    @staticmethod
    def backward(ctx, g):
        dy, weight = ctx.saved_tensors
        d_dy = dw = None
        if ctx.needs_input_grad[0]:
            d_dy = Forward.apply(g, weight, None, ctx.map, ctx.how)
        if ctx.needs_input_grad[1]:
            dw, _ = GradWeight.apply(g, dy, ctx.map, ctx.how, [True, False])
        return d_dy, dw, None, None


class GradWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dy, map, how, wanted):
        ctx.save_for_backward(x, dy)
        ctx.map, ctx.how, ctx.wanted = map, how, wanted
        map.settle(wait=True)
        choice = map.choice(_asked(2, x.shape[1], dy.shape[1], dy.dtype, how))
        tensors = map.tensors(choice.schedule)
        return call(ops._grad_weight.default, x, dy, tensors, choice.layer, wanted)

    @staticmethod
    def backward(ctx, g, g_bias):
        x, dy = ctx.saved_tensors
        dx = d_dy = None
        if ctx.needs_input_grad[0] and ctx.wanted[0]:
            dx = GradInput.apply(dy, g, ctx.map, ctx.how)
        if ctx.needs_input_grad[1]:
            # <g, dw> + <g_bias, db> is <conv(x, g) + g_bias, dy>.
            if ctx.wanted[0]:
                bias = g_bias if ctx.wanted[1] else None
                d_dy = Forward.apply(x, g, bias, ctx.map, ctx.how)
            else:
                d_dy = g_bias.expand_as(dy)
        return dx, d_dy, None, None, None
