# SPDX-License-Identifier: Apache-2.0
"""Output voxels of strided convolutions, in FlexGEMM's orders of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from voxgemm import kernel_map, serialization
from voxgemm.geometry import Geometry, Triple

from ..errors import expect

CURVES = {1: "z_order", 2: "hilbert"}


def output_coords(coords: Tensor, sizes: Triple, geometry: Geometry, mode: int) -> Tensor:
    """Every voxel inside the output box that an input reaches: int32 [M, 4]."""
    expect(min(geometry.stride) > 0, f"stride is {geometry.stride}, expected 1 or more")
    limits = geometry.out_shape(sizes)
    if min(limits) <= 0:
        return coords.new_empty((0, 4))
    return in_order(kernel_map.output_coords(coords, geometry, "reached", sizes), limits, mode)


def in_order(rows: Tensor, limits: Triple, mode: int) -> Tensor:
    """Ascending lexicographic rows, or along a curve through a box of these sizes."""
    expect(mode in (0, *CURVES), f"the serialization mode is {mode}, expected 0, 1 or 2")
    if mode == 0 or not len(rows):
        return rows
    bits = (max(limits) - 1).bit_length()
    codes = serialization.encode(rows, bits, curve=CURVES[mode], dtype=torch.int64)
    return rows[torch.sort(codes).indices]
