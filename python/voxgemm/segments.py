# SPDX-License-Identifier: Apache-2.0
"""Sums of rows that become one, with derivatives of any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._library import call, ops
from .pooling import REDUCTIONS


def merged_rows(rows: Tensor, inverse: Tensor, count: int, mean: bool = False) -> Tensor:
    """[count, c]: row j is the sum, or mean, of those rows [n, c] whose inverse, int32 [n], is j.

    Rows with the inverse -1 are left out. 16-bit floats are added in float32 and rounded once.
    """
    merge: Callable[..., Any] = _Merge.apply  # without types in torch 2.10
    if not mean:
        sums: Tensor = merge(rows, inverse, count)
        return sums
    wide = rows.float() if rows.dtype.itemsize < 4 else rows
    sizes = (inverse.long() + 1).bincount(minlength=count + 1)[1:, None]
    means: Tensor = merge(wide, inverse, count) / sizes.to(wide.dtype)
    return means.to(rows.dtype)


# Each is the other's derivative.
class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.count = count
        sums, _ = call(ops._segment_reduce.default, rows, inverse, count, REDUCTIONS.index("sum"))
        return sums

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        spread: Callable[..., Any] = _Spread.apply
        return spread(g, *ctx.saved_tensors, ctx.count), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.count = count
        return torch.cat([rows.new_zeros(1, rows.shape[1]), rows])[inverse.long() + 1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        merge: Callable[..., Any] = _Merge.apply
        return merge(g, *ctx.saved_tensors, ctx.count), None, None
