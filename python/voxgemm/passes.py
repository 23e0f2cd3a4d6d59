# SPDX-License-Identifier: Apache-2.0
"""The three passes of a convolution as differentiable functions of tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from ._library import call, ops
from .algorithms import Filters
from .errors import Unsupported
from .kernel_map import Asked, KernelMap, Lists


class How(NamedTuple):
    filters: Filters
    precision: int
    trains: bool = False  # gradients are wanted, of what asks for one


Layer = tuple[int, int, torch.dtype]  # c_in, c_out


def _layer(weight: Tensor) -> Layer:
    """Of no weights at all, which the operator will say, anything."""
    shape = weight.shape
    return (shape[4], shape[0], weight.dtype) if len(shape) == 5 else (1, 1, weight.dtype)


def _asked(number: int, layer: Layer, how: How) -> Asked:
    return Asked(number, *layer, how.precision, how.filters[number])


def _lists(map: KernelMap, number: int, layer: Layer, how: How, later: Iterable[int] = ()) -> Lists:
    """What the operator of a pass takes behind its operands.

    Kept with the map by what it depends on: making it takes as long as the smallest kernels. Where
    it is made, what the later passes run is chosen, too: one call does for all.
    """
    asked = _asked(number, layer, how)
    if torch.compiler.is_compiling():
        return map.lists(map.choice(asked), back=number == 1)
    key = (asked, torch.are_deterministic_algorithms_enabled())
    lists = map._lists.get(key)
    if lists is None:
        # Where no kernel computes a later pass, that pass raises, and the forward runs.
        with contextlib.suppress(Unsupported):
            map.choices([asked, *(_asked(each, layer, how) for each in later)])
        lists = map._lists[key] = map.lists(map.choice(asked), back=number == 1)
    return lists


# Every pass is linear in each of its operands, and the passes are each other's derivatives: those
# of any order stay among these three. First derivatives record nothing and call plain functions.
def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: KernelMap,
    how: How,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    map.settle(wait=False)
    layer = _layer(weight)
    if not torch.compiler.is_compiling():
        tuning.see(map, layer, how)
    later = compress((1, 2), (x.requires_grad, weight.requires_grad)) if how.trains else ()
    lists = _lists(map, 0, layer, how, later)
    epilogue = () if residual is None and not relu else (residual, relu)
    return call(ops._forward.default, x, weight, bias, *lists, *epilogue)


def grad_input(dy: Tensor, weight: Tensor, map: KernelMap, how: How) -> Tensor:
    map.settle(wait=True)
    return call(ops._grad_input.default, dy, weight, *_lists(map, 1, _layer(weight), how))


def grad_weight(
    x: Tensor, dy: Tensor, wanted: list[bool], map: KernelMap, how: How
) -> tuple[Tensor, Tensor]:
    """Of the weights and of the bias, an empty tensor for what is not wanted."""
    map.settle(wait=True)
    layer = x.shape[1], dy.shape[1], dy.dtype
    return call(ops._grad_weight.default, x, dy, *_lists(map, 2, layer, how), wanted)


class Forward(torch.autograd.Function):
    """run_forward(), with derivatives of any order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, map: KernelMap, how: How
    ) -> Tensor:
        _keep(ctx, x, weight, map, how)
        return run_forward(x, weight, bias, map, how)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return *gradients(dy, x, weight, ctx.map, ctx.how, wanted), None, None


class FusedForward(torch.autograd.Function):
    """run_forward() with a residual, or ReLU, or both, with derivatives of any order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        map: KernelMap,
        how: How,
    ) -> Tensor:
        y = run_forward(x, weight, bias, map, how, residual, relu)
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x if of_weight else None, weight if of_x else None, y if relu else None
        )
        ctx.map, ctx.how = map, how
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        *wanted, of_residual = ctx.needs_input_grad[:4]
        found = gradients(dy, x, weight, ctx.map, ctx.how, wanted)
        return *found, dy if of_residual else None, None, None, None


def gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    map: KernelMap,
    how: How,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of run_forward() in x, weight and bias, None where not wanted; differentiable.

    x is needed for the weights' gradient only, and the weights for that in x.
    """
    recorded = torch.is_grad_enabled()
    of_input: Callable[..., Any] = applied(GradInput) if recorded else grad_input
    of_weight: Callable[..., Any] = applied(GradWeight) if recorded else grad_weight
    dx = dw = db = None
    if wanted[0]:
        dx = of_input(dy, weight, map, how)
    if wanted[1] or wanted[2]:
        both = [wanted[1], wanted[2]]
        rows = x if wanted[1] else dy  # the bias's gradient reads no x
        dw, db = of_weight(rows, dy, both, map, how)
    return dx, dw if wanted[1] else None, db if wanted[2] else None


class GradInput(torch.autograd.Function):
    """grad_input(), with derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: Tensor, map: KernelMap, how: How) -> Tensor:
        _keep(ctx, dy, weight, map, how)
        return grad_input(dy, weight, map, how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, weight = ctx.saved_tensors
        d_dy = dw = None
        if ctx.needs_input_grad[0]:
            d_dy = applied(Forward)(g, weight, None, ctx.map, ctx.how)
        if ctx.needs_input_grad[1]:
            dw, _ = applied(GradWeight)(g, dy, [True, False], ctx.map, ctx.how)
        return d_dy, dw, None, None


class GradWeight(torch.autograd.Function):
    """grad_weight(), with derivatives of any order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dy: Tensor, wanted: list[bool], map: KernelMap, how: How
    ) -> tuple[Tensor, Tensor]:
        ctx.wanted = wanted
        _keep(ctx, x, dy, map, how)
        return grad_weight(x, dy, wanted, map, how)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_bias: Tensor) -> tuple[Tensor | None, ...]:
        x, dy = ctx.saved_tensors
        dx = d_dy = None
        if ctx.needs_input_grad[0] and ctx.wanted[0]:
            dx = applied(GradInput)(dy, g, ctx.map, ctx.how)
        if ctx.needs_input_grad[1]:
            # <g, dw> + <g_bias, db> is <conv(x, g) + g_bias, dy>.
            if ctx.wanted[0]:
                bias = g_bias if ctx.wanted[1] else None
                d_dy = applied(Forward)(x, g, bias, ctx.map, ctx.how)
            else:
                d_dy = g_bias.expand(ctx.map.n_out, -1)
        return dx, d_dy, None, None, None


def _keep(ctx: Any, rows: Tensor, weight: Tensor, map: KernelMap, how: How) -> None:
    """Of two operands each is kept for the other's derivative only."""
    of_rows, of_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
    ctx.map, ctx.how = map, how


def inside_transform() -> bool:
    """Of torch.func, such as torch.func.grad."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply; inside torch.func.grad and its like, what these can work with."""
    if inside_transform():
        return functools.partial(_apply_transformed, function)
    return function.apply


def _apply_transformed(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Transforms ask for setup_context, which costs 15 us a call, and take pytrees apart."""
    *operands, map, how = args
    compute: Any = {Forward: run_forward, GradInput: grad_input, GradWeight: grad_weight}[function]

    class Transformed(function):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(*operands: Any) -> Any:
            return compute(*operands, map, how)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if len(inputs) > 2:
                ctx.wanted = inputs[2]
            _keep(ctx, inputs[0], inputs[1], map, how)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return function.backward(ctx, *gradients)[:-2]

    return Transformed.apply(*operands)
