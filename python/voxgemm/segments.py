# SPDX-License-Identifier: Apache-2.0
"""Sums of rows that become one, in row order and so the same bits every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def merged_rows(rows: Tensor, inverse: Tensor, counts: Tensor, mean: bool = False) -> Tensor:
    """[m, c]: row j is the sum, or mean, of those rows [n, c] whose inverse, int64 [n], is j.

    counts, int64 [m], says how many these are. 16-bit floats are added in float32 and rounded once.
    """
    wide = rows.float() if rows.dtype.itemsize < 4 else rows
    merged: Tensor = _Merge.apply(wide, inverse, counts)
    if mean:
        merged = merged / counts[:, None].to(merged.dtype)
    return merged.to(rows.dtype)


# Each is the other's derivative.
class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, counts)
        in_order = rows[inverse.argsort(stable=True)]
        return torch.segment_reduce(in_order, "sum", lengths=counts, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(g, *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, counts)
        return rows[inverse]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Merge.apply(g.contiguous(), *ctx.saved_tensors), None, None
