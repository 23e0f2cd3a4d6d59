# SPDX-License-Identifier: Apache-2.0
"""Convolution with stride and padding onto computed or given output voxels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxgemm import kernel_map
from voxgemm.columns import narrow
from voxgemm.geometry import Geometry, triple
from voxgemm.kernel_map import KernelMap

from ...errors import expect, expect_tensors, raise_type, speaking
from ...kernels import _coords
from .. import spconv
from ._cache import NeighborCache
from ._passes import (
    Convolution,
    cast,
    how_of,
    keep,
    kept_gradients,
    kernel_size_of,
    run,
    run_backward,
)
from .submanifold_conv3d import box, check_inside, search


class SparseConv3dNeighborCache(NeighborCache):
    """As SubMConv3dNeighborCache, and the same fields of the map backwards: input to output."""

    _backward = True

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name, None)

    def _whole_map(self) -> KernelMap:
        if self._map is None and "neighbor_map_bwd" in vars(self):
            object.__setattr__(self, "_rows", len(self.neighbor_map_bwd))
        return super()._whole_map()

    def compute_kernel_idx_bwd(self, block_size: int) -> None:
        self._derived(f"valid_kernel_bwd_{block_size}")

    def valid_kernel_bwd_callback(self, block_size: int) -> Tensor:
        return getattr(self, f"valid_kernel_bwd_{block_size}")

    def valid_kernel_bwd_seg_callback(self, block_size: int) -> Tensor:
        return getattr(self, f"valid_kernel_bwd_seg_{block_size}")


@functools.lru_cache(maxsize=256)
def geometry_of(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Geometry:
    names = ("kernel_size", "stride", "padding", "dilation")
    values = (kernel_size, stride, padding, dilation)
    return Geometry(*(triple(tuple(v), n) for v, n in zip(values, names, strict=True)))


def _geometry(*values: Sequence[int]) -> Geometry:
    return geometry_of(*(tuple(value) for value in values))


def reached(in_shape: tuple[int, int, int], geometry: Geometry, coords: Tensor) -> Tensor:
    """int64 [m, 4]: every output voxel that an input reaches, ascending, by expanding."""
    size, stride, padding, dilation = geometry
    limits = geometry.out_shape(in_shape)
    taps = torch.cartesian_prod(*(torch.arange(k) for k in size)).view(-1, 3).to(coords.device)
    steps, margins, spread = (
        torch.tensor(values, device=coords.device) for values in (stride, padding, dilation)
    )
    numerator = coords.long()[:, None, 1:] + margins - taps * spread  # [rows, taps, 3]
    out = numerator.div(steps, rounding_mode="floor")
    inside = ((out >= 0) & (out < torch.tensor(limits, device=coords.device))).all(2)
    exact = (out * steps == numerator).all(2) & inside
    batch = coords.long()[:, :1, None].expand(-1, len(taps), -1)
    return torch.cat([batch, out], 2)[exact].unique(dim=0)


class SparseConv3dFunction(torch.autograd.Function):
    """apply(feats, coords, shape, neighbor_cache, weight, bias, out_coords, stride, padding,
    dilation) -> (out, out_coords, cache)."""

    @staticmethod
    def _get_output_coords(
        coords: Tensor,
        shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        """int32 [M, 4] in the order of SERIALIZATION_MODE."""
        sizes = box(shape)
        check_inside(coords, sizes)
        geometry = _geometry(kernel_size, stride, padding, dilation)
        return _coords.output_coords(coords, sizes, geometry, spconv.SERIALIZATION_MODE)

    @staticmethod
    def _get_output_coords_torch(
        coords: Tensor,
        shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        """The same rows by expanding and sorting, for comparison."""
        geometry = _geometry(kernel_size, stride, padding, dilation)
        rows = narrow(reached(box(shape), geometry, coords), "the output coordinates")
        limits = geometry.out_shape(box(shape))
        return _coords.in_order(rows, limits, spconv.SERIALIZATION_MODE)

    @staticmethod
    def _compute_neighbor_cache(
        coords: Tensor,
        out_coords: Tensor,
        shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1, 1, 1),
        padding: Sequence[int] = (0, 0, 0),
        dilation: Sequence[int] = (1, 1, 1),
        needs_grad: bool = True,
        is_out_coords_given: bool = False,
    ) -> SparseConv3dNeighborCache:
        """The last two are hints that nothing here needs."""
        check_inside(coords, box(shape))
        geometry = _geometry(kernel_size, stride, padding, dilation)
        map = kernel_map.strided_map(coords, out_coords, geometry)
        map._exact = True
        cache = SparseConv3dNeighborCache(_map=map, out_coords=out_coords)
        cache._known = geometry
        return cache

    @staticmethod
    def _compute_neighbor_cache_torch(
        coords: Tensor,
        out_coords: Tensor,
        shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1, 1, 1),
        padding: Sequence[int] = (0, 0, 0),
        dilation: Sequence[int] = (1, 1, 1),
        needs_grad: bool = True,
    ) -> SparseConv3dNeighborCache:
        """The same map by sorting and searching, for comparison."""
        size, steps, margins, spread = _geometry(kernel_size, stride, padding, dilation)
        axes = [
            [k * d - p for k in range(n)] for n, d, p in zip(size, spread, margins, strict=True)
        ]
        taps = torch.cartesian_prod(*(torch.tensor(axis) for axis in axes)).view(-1, 3)
        at = out_coords.long() * torch.tensor((1, *steps), device=coords.device)
        found = search(coords, at, box(shape), taps.to(coords.device))
        cache = SparseConv3dNeighborCache(neighbor_map=found.int().view(torch.uint32))
        cache.out_coords = out_coords
        cache._rows = len(coords)
        return cache

    _sparse_conv_forward = staticmethod(run)
    _sparse_conv_backward = staticmethod(run_backward)

    @staticmethod
    def forward(
        ctx,
        feats,
        coords,
        shape,
        neighbor_cache,
        weight,
        bias=None,
        out_coords=None,
        stride=(1, 1, 1),
        padding=(0, 0, 0),
        dilation=(1, 1, 1),
    ):
        tensors = cast(feats, weight, bias)
        how = how_of(tensors[0])
        place, geometry = (coords, shape, out_coords), (stride, padding, dilation)
        cache, out_coords, map = _prepared(tensors, place, neighbor_cache, geometry)
        out = keep(ctx, tensors, cache, map, how)
        return out, out_coords.view_as(out_coords), cache

    @staticmethod
    def backward(ctx, grad_output, *_):
        dx, dw, db = kept_gradients(ctx, grad_output)
        return dx, None, None, None, dw, db, None, None, None, None


def _prepared(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    place: tuple[Tensor, Sequence[int], Tensor | None],
    cache: SparseConv3dNeighborCache | None,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
) -> tuple[SparseConv3dNeighborCache, Tensor, KernelMap]:
    """The cache, made where there is none and compared where there is one, its outputs and map.

    place: coords, shape, out_coords; geometry: stride, padding, dilation.
    """
    feats, weight, _ = tensors
    coords, shape, out_coords = place
    stride, padding, dilation = (tuple(values) for values in geometry)
    if cache is None:
        where = (kernel_size_of(feats, weight), stride, padding, dilation)
        given = out_coords is not None
        if not given:
            out_coords = SparseConv3dFunction._get_output_coords(coords, shape, *where)
        cache = SparseConv3dFunction._compute_neighbor_cache(
            coords, out_coords, shape, *where, is_out_coords_given=given
        )
    elif not isinstance(cache, SparseConv3dNeighborCache):
        raise_type("neighbor_cache", cache, SparseConv3dNeighborCache)
    if out_coords is None:
        out_coords = cache["out_coords"]
        expect(out_coords is not None, "neither out_coords nor the neighbor_cache has any")
    key = (feats.shape, weight.shape, out_coords.shape, stride, padding, dilation, feats.device)
    map = cache.compared.get(key)
    if map is None:
        size, rows = kernel_size_of(feats, weight), len(out_coords)
        cache.expect_geometry(geometry_of(size, stride, padding, dilation))
        map = cache.map_for(feats.shape[0], size, feats.device)
        expect(map.n_out == rows, f"out_coords has {rows} rows, the neighbor_cache {map.n_out}")
        cache.compared[key] = map
    return cache, out_coords, map


@speaking
def sparse_conv3d(
    feats: Tensor,
    coords: Tensor,
    shape: Sequence[int],
    weight: Tensor,
    bias: Tensor | None = None,
    neighbor_cache: SparseConv3dNeighborCache | None = None,
    out_coords: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    *,
    algorithm: str | None = None,
) -> tuple[Tensor, Tensor, SparseConv3dNeighborCache]:
    """out[o] = bias + sum over taps k of weight[:, k, :] @ feats[the row at in(o, k)], in(o, k) =
    o * stride - padding + k * dilation.

    Arguments as sparse_submanifold_conv3d. Gives out [M, Co], its coordinates int32 [M, 4] and the
    neighbour cache. Without out_coords they are all voxels inside the output box that an input
    reaches, in the order of `ops.spconv.SERIALIZATION_MODE`; given ones are taken as they are.
    """
    expect_tensors(feats, weight)
    tensors = cast(feats, weight, bias)
    how = how_of(tensors[0], algorithm)
    place, geometry = (coords, shape, out_coords), (stride, padding, dilation)
    cache, out_coords, map = _prepared(tensors, place, neighbor_cache, geometry)
    return Convolution.apply(*tensors, map, how), out_coords, cache
