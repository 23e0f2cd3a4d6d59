# SPDX-License-Identifier: Apache-2.0
"""Coarser coordinates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._rows import sizes, strided, to_rows
from .batch_index import offsets_from_batch_index
from .serialization import POINT_ORDERING, order_rows


def stride_coords(
    batch_indexed_coords: Tensor, stride: Any, order: POINT_ORDERING = POINT_ORDERING.RANDOM
) -> tuple[Tensor, Tensor]:
    """floor(coords / stride) once each, int32 [M, 1 + D] ascending or in the order, and offsets."""
    axes = batch_indexed_coords.shape[1] - 1
    rows = strided(to_rows(batch_indexed_coords), sizes(stride, axes, "stride"))
    if order != POINT_ORDERING.RANDOM:
        rows = rows[order_rows(rows, order).permutation]
    return rows[:, : 1 + axes], offsets_from_batch_index(rows[:, 0])
