# SPDX-License-Identifier: Apache-2.0
"""Orders of rows."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from voxgemm import serialization
from voxgemm.columns import narrow

from .batch_index import batch_index_from_offset, cpu_offsets


class POINT_ORDERING(enum.Enum):
    RANDOM = 0
    MORTON_XYZ = 1
    MORTON_XZY = 2
    MORTON_YXZ = 3
    MORTON_YZX = 4
    MORTON_ZXY = 5
    MORTON_ZYX = 6

    @property
    def axes(self) -> str:
        """The most significant first."""
        return self.name.rpartition("_")[2].lower()


class SerializationResult(NamedTuple):
    codes: Tensor  # int64 [N]
    perm: Tensor  # int64 [N]: rows by sample and code
    inverse_perm: Tensor | None = None


def order_rows(rows: Tensor, order: POINT_ORDERING) -> serialization.CurveOrder:
    """Of int32 [N, 4] (batch, x, y, z): codes, permutation and inverse, sample by sample."""
    return serialization.curve_order(rows, curve="z_order", axes=order.axes)


@torch.no_grad()
def encode(
    grid_coord: Tensor,
    batch_offsets: Tensor | None = None,
    order: POINT_ORDERING = POINT_ORDERING.MORTON_XYZ,
    return_perm: bool = False,
    return_inverse: bool = False,
) -> Tensor | SerializationResult:
    """Codes [N] of grid_coord [N, 3], or [N, 4] with the sample in front, along a Morton curve.

    With return_perm or return_inverse, the permutation that sorts within samples comes along.
    """
    coords = narrow(grid_coord, "grid_coord")
    if coords.shape[1] == 3:
        if batch_offsets is None:
            batch = coords.new_zeros(len(coords))
        else:
            offsets = cpu_offsets(batch_offsets, len(coords))
            batch = batch_index_from_offset(offsets, coords.device)
        coords = torch.cat([batch[:, None], coords], 1)
    if order == POINT_ORDERING.RANDOM:
        codes = torch.arange(len(coords), device=coords.device)
        found = serialization.CurveOrder(codes, codes, codes)
    else:
        found = order_rows(coords.contiguous(), order)
    if not return_perm and not return_inverse:
        return found[0]
    return SerializationResult(found[0], found[1], found[2] if return_inverse else None)
