# SPDX-License-Identifier: Apache-2.0
"""Sums of rows that become one, in row order and so the same bits every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def merged_rows(rows: Tensor, inverse: Tensor, count: int, mean: bool = False) -> Tensor:
    """[count, c]: row j is the sum, or mean, of those rows [n, c] whose inverse, int32 [n], is j.

    Rows with the inverse -1 are left out. 16-bit floats are added in float32 and rounded once.
    """
    wide = rows.float() if rows.dtype.itemsize < 4 else rows
    groups = inverse.long() + 1
    sizes = groups.bincount(minlength=count + 1)
    merged: Tensor = _Merge.apply(wide, groups, sizes)[1:]
    if mean:
        merged = merged / sizes[1:, None].to(merged.dtype)
    return merged.to(rows.dtype)


# Each is the other's derivative.
class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
        ctx.save_for_backward(groups, sizes)
        in_order = rows[groups.argsort(stable=True)]
        return torch.segment_reduce(in_order, "sum", lengths=sizes, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(g, *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
        ctx.save_for_backward(groups, sizes)
        return rows[groups]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Merge.apply(g.contiguous(), *ctx.saved_tensors), None, None
