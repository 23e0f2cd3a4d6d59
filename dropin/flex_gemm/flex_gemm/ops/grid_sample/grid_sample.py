# SPDX-License-Identifier: Apache-2.0
"""Samples of a sparse grid, by voxgemm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from voxgemm import sampling
from voxgemm.columns import as_int32

from ...errors import expect, speaking

MODES = ("trilinear", "nearest")


@speaking
def grid_sample_3d(
    feats: Tensor,
    coords: Tensor,
    shape: Sequence[int],
    grid: Tensor,
    mode: str = "trilinear",
) -> Tensor:
    """[B, L, C]: feats [N, C] of voxels coords [N, 4] at the points grid [B, L, 3], in voxels.

    Voxel (i, j, k) fills [i, i + 1)^3; batch b of the grid samples voxels of batch b. 'trilinear'
    weighs the corners that exist inside the box (shape's last three numbers) and divides by the sum
    of their weights; 'nearest' takes the voxel at the point truncated toward zero. 0 where nothing
    is. Differentiable in feats and, trilinear, in grid.
    """
    expect(mode in MODES, "Invalid interpolation mode")
    expect(
        grid.ndim == 3 and grid.shape[2] == 3,
        f"grid is {list(grid.shape)}, expected [B, L, 3]",
    )
    if coords.is_floating_point():
        raise TypeError(f"coords is {coords.dtype}, expected integers")
    points = grid if grid.dtype.itemsize == 8 else grid.float()
    box = tuple(int(n) for n in shape[-3:])
    coords = as_int32(coords, "coords")
    return sampling.sample(feats, coords, points, mode, spatial_shape=box, rounding="truncate")


class GridSample3dFunction:
    """apply(feats, coords, shape, grid, mode) or (feats, coords, grid, shape, mode, ratio)."""

    @staticmethod
    def apply(feats: Tensor, coords: Tensor, *rest: Any) -> Tensor:
        grid, shape = rest[:2] if isinstance(rest[0], Tensor) else reversed(rest[:2])
        return grid_sample_3d(feats, coords, shape, grid, rest[2])
