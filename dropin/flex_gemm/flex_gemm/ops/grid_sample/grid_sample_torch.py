# SPDX-License-Identifier: Apache-2.0
"""The rule of grid_sample_3d in plain tensor operations, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import expect, speaking
from ..spconv.submanifold_conv3d import search


def _rows(coords: Tensor, at: Tensor, box: Sequence[int]) -> Tensor:
    """int64 [B, L, ...]: the row of each voxel at [B, L, ..., 3], or -1."""
    batch = torch.arange(at.shape[0], device=at.device)
    batch = batch.view(-1, *[1] * (at.ndim - 1)).expand(*at.shape[:-1], 1)
    voxels = torch.cat([batch, at.long()], -1).reshape(-1, 4)
    here = torch.zeros(1, 3, dtype=torch.int64, device=at.device)
    return search(coords.long(), voxels, tuple(box), here).view(at.shape[:-1])


@speaking
def grid_sample_3d_torch(
    feats: Tensor,
    coords: Tensor,
    shape: Sequence[int],
    grid: Tensor,
    mode: str = "trilinear",
) -> Tensor:
    """As grid_sample_3d."""
    expect(mode in ("trilinear", "nearest"), "Invalid interpolation mode")
    box = [int(n) for n in shape[-3:]]
    points = grid if grid.dtype == torch.float64 else grid.float()
    if not len(feats):
        return feats.new_zeros((*grid.shape[:2], feats.shape[1]))
    if mode == "nearest":
        rows = _rows(coords, points.trunc(), box)
        return torch.where((rows >= 0)[..., None], feats[rows.clamp(min=0)], 0)
    corners = torch.tensor([[v & 1, v >> 1 & 1, v >> 2] for v in range(8)], device=grid.device)
    at = (points - 0.5).detach().floor()[:, :, None] + corners  # [B, L, 8, 3]
    rows = _rows(coords, at, box)
    weights = (1 - (points[:, :, None] - at - 0.5).abs()).prod(-1)  # [B, L, 8]
    weights = torch.where(rows >= 0, weights, 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    picked = torch.where((rows >= 0)[..., None], feats[rows.clamp(min=0)], 0)
    wide = torch.promote_types(feats.dtype, torch.float32)
    return (picked.to(wide) * weights[..., None].to(wide)).sum(2).to(feats.dtype)
