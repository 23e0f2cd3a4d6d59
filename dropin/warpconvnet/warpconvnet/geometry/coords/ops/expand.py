# SPDX-License-Identifier: Apache-2.0
"""Coordinates and their neighbours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._rows import expanded, sizes, to_rows
from .batch_index import offsets_from_batch_index


def expand_coords(
    batch_indexed_coords: Tensor,
    kernel_size: Any,
    kernel_dilation: Any = 1,
    kernel_batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """coords + the offset of every tap, once each: int32 [M, 1 + D] ascending, and offsets.

    kernel_batch is accepted and has no effect.
    """
    axes = batch_indexed_coords.shape[1] - 1
    size = sizes(kernel_size, axes, "kernel_size")
    dilation = sizes(kernel_dilation, axes, "kernel_dilation")
    rows = expanded(to_rows(batch_indexed_coords), size, dilation)
    return rows[:, : 1 + axes], offsets_from_batch_index(rows[:, 0])
