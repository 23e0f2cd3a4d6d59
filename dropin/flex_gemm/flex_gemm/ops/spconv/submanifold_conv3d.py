# SPDX-License-Identifier: Apache-2.0
"""Submanifold convolution: outputs where inputs are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxgemm import kernel_map, passes
from voxgemm._library import call, ops
from voxgemm.geometry import Geometry, Triple, triple
from voxgemm.kernel_map import KernelMap

from ...errors import expect, expect_tensors, raise_type, speaking
from ...kernels import _tables
from .. import spconv
from ._cache import NeighborCache, user_map
from ._passes import (
    Convolution,
    cast,
    centre,
    how_of,
    keep,
    kept_gradients,
    kernel_size_of,
    run,
    run_backward,
    without_centre,
)

BLOCK_SIZES = (32, 64, 128, 256)


def box(shape: Sequence[int]) -> tuple[int, int, int]:
    """W, H, D of the five numbers N, C, W, H, D."""
    sizes = tuple(int(n) for n in shape)
    expect(len(sizes) == 5, f"shape is {sizes}, expected the five numbers N, C, W, H, D")
    return sizes[2:]


def check_inside(coords: Tensor, sizes: tuple[int, int, int]) -> None:
    capturing = coords.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing:
        call(ops._check_coords.default, coords, sizes, None)


@dataclasses.dataclass
class SpConvConfig:
    """A neighbour cache as plain tensors and numbers, which a traced function can take."""

    neighbor_map: Tensor  # uint32 [N, V]
    sorted_idx: Tensor  # int64 [N]
    valid_kernels: list[Tensor]  # by block size
    valid_kernel_segs: list[Tensor]
    block_sizes: list[int]
    valid_signal_i: Tensor  # uint32 [L]
    valid_signal_o: Tensor
    valid_signal_seg: Tensor  # uint32 [V + 1]
    splitk: int = 1
    algorithm: str = "masked_implicit_gemm_splitk"

    def __post_init__(self) -> None:
        self._map: KernelMap | None = None  # what runs; made of neighbor_map where it is missing


class SubMConv3dNeighborCache(NeighborCache):
    """The neighbours of every voxel, and what is derived from them."""

    def freeze(
        self, splitk: int = 1, algorithm: str = "masked_implicit_gemm_splitk"
    ) -> SpConvConfig:
        """A config for `sparse_submanifold_conv3d(config=)`; it shares the cache's tensors."""
        spconv.check_algorithm(algorithm)
        map = self._whole_map()
        map.settle(wait=True)
        if not map.symmetric:
            map.transposed()
        config = SpConvConfig(
            neighbor_map=self.neighbor_map,
            sorted_idx=self.sorted_idx,
            valid_kernels=[self.valid_kernel_callback(size) for size in BLOCK_SIZES],
            valid_kernel_segs=[self.valid_kernel_seg_callback(size) for size in BLOCK_SIZES],
            block_sizes=list(BLOCK_SIZES),
            valid_signal_i=self.valid_signal_i,
            valid_signal_o=self.valid_signal_o,
            valid_signal_seg=self.valid_signal_seg,
            splitk=splitk,
            algorithm=algorithm,
        )
        config._map = map
        return config


class SubMConv3dFunction(torch.autograd.Function):
    """apply(feats, coords, shape, neighbor_cache, weight, bias, dilation) -> (out, cache)."""

    @staticmethod
    def _compute_neighbor_cache(
        coords: Tensor,
        shape: Sequence[int],
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        needs_grad: bool = True,
    ) -> SubMConv3dNeighborCache:
        """needs_grad is a hint that nothing here needs: what a backward reads is made in it."""
        check_inside(coords, box(shape))
        geometry = _geometry(tuple(kernel_size), tuple(dilation))
        map = kernel_map.submanifold_map(coords, geometry)
        own_centre(map)
        cache = SubMConv3dNeighborCache(_map=map)
        cache._known = geometry
        return cache

    @staticmethod
    def _compute_neighbor_cache_torch(
        coords: Tensor, shape: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
    ) -> SubMConv3dNeighborCache:
        """The same map by sorting and searching, for comparison."""
        size, spread = tuple(kernel_size), tuple(dilation)
        offsets = [[(k - n // 2) * d for k in range(n)] for n, d in zip(size, spread, strict=True)]
        steps = torch.cartesian_prod(*(torch.tensor(axis) for axis in offsets)).view(-1, 3)
        found = search(coords, coords, box(shape), steps.to(coords.device))
        own = (centre(size)[0] * size[1] + centre(size)[1]) * size[2] + centre(size)[2]
        found[:, own] = torch.arange(len(coords), device=coords.device)
        return SubMConv3dNeighborCache(neighbor_map=found.int().view(torch.uint32))

    _sparse_submanifold_conv_forward = staticmethod(run)
    _sparse_submanifold_conv_backward = staticmethod(run_backward)

    @staticmethod
    def forward(ctx, feats, coords, shape, neighbor_cache, weight, bias=None, dilation=(1, 1, 1)):
        tensors = cast(feats, weight, bias)
        how = how_of(tensors[0])
        cache, map = _prepared(tensors, coords, shape, neighbor_cache, dilation)
        return keep(ctx, tensors, cache, map, how), cache

    @staticmethod
    def backward(ctx, grad_output, _):
        dx, dw, db = kept_gradients(ctx, grad_output)
        return dx, None, None, None, dw, db, None


@functools.lru_cache(maxsize=256)
def _geometry(size: Triple, dilation: Triple) -> Geometry:
    return Geometry.submanifold(triple(size, "kernel_size"), triple(dilation, "dilation"))


def own_centre(map: KernelMap) -> None:
    """Every row is its own centre, also where a voxel repeats."""
    size = map.geometry.size
    middle = (centre(size)[0] * size[1] + centre(size)[1]) * size[2] + centre(size)[2]
    torch.arange(map.n_out, out=map.neighbours[middle])


def search(in_coords: Tensor, at: Tensor, sizes: tuple[int, int, int], steps: Tensor) -> Tensor:
    """int64 [rows of at, steps]: the lowest row of in_coords at `at` plus a step, or -1."""
    if not len(in_coords) or not len(at):
        return at.new_full((len(at), len(steps)), -1, dtype=torch.int64)
    strides = (sizes[0] * sizes[1] * sizes[2], sizes[1] * sizes[2], sizes[2], 1)
    weights = torch.tensor(strides, device=at.device)
    keys, rows = torch.sort((in_coords.long() * weights).sum(1), stable=True)
    wanted = at.long()[:, None, :].repeat(1, len(steps), 1)  # [rows, steps, 4]
    wanted[:, :, 1:] += steps.long()
    limits = torch.tensor(sizes, device=at.device)
    inside = ((wanted[:, :, 1:] >= 0) & (wanted[:, :, 1:] < limits)).all(2)
    sought = (wanted * weights).sum(2)
    place = torch.searchsorted(keys, sought).clamp(max=len(keys) - 1)
    return torch.where(inside & (keys[place] == sought), rows[place], -1)


def _prepared(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    coords: Tensor | None,
    shape: Sequence[int] | None,
    cache: SubMConv3dNeighborCache | None,
    dilation: Sequence[int],
) -> tuple[SubMConv3dNeighborCache, KernelMap]:
    """The cache, made where there is none and compared where there is one, and its map."""
    feats, weight, _ = tensors
    dilation = tuple(dilation)
    if cache is None:
        size = kernel_size_of(feats, weight)
        cache = SubMConv3dFunction._compute_neighbor_cache(coords, shape, size, dilation)
    elif not isinstance(cache, SubMConv3dNeighborCache):
        raise_type("neighbor_cache", cache, SubMConv3dNeighborCache)
    key = (feats.shape, weight.shape, dilation, feats.device)
    map = cache.compared.get(key)
    if map is None:
        size = kernel_size_of(feats, weight)
        cache.expect_geometry(_geometry(size, dilation))
        map = cache.compared[key] = cache.map_for(feats.shape[0], size, feats.device)
    return cache, map


def _frozen(feats: Tensor, weight: Tensor, bias: Tensor | None, config: SpConvConfig) -> Tensor:
    """The convolution of a config; traced as voxgemm's own."""
    feats, weight, bias = cast(feats, weight, bias)
    size = kernel_size_of(feats, weight)
    map = config._map
    if map is None or map.n_in != feats.shape[0] or map.geometry.size != size:
        map = _map_of_config(config, feats.shape[0], size)
    algorithm = config.algorithm
    if algorithm == "masked_implicit_gemm_splitk" and config.splitk == 1:
        algorithm = "masked_implicit_gemm"
    how = how_of(feats, algorithm)
    if not map.symmetric and torch.is_grad_enabled():
        map.transposed()
    if map.operation == 0 and map.in_first.shape[0]:
        return _repeated(feats, weight, bias, map, how)
    return passes.Forward.apply(feats, weight, bias, map, how)


def _map_of_config(config: SpConvConfig, rows: int, size: tuple[int, int, int]) -> KernelMap:
    made = config._map
    if made is not None:
        expect(made.n_in == rows, f"feats has {rows} rows, the config was made of {made.n_in}")
        expect(
            made.operation == 1,
            f"the weight has a {size} kernel, the config was made for {made.geometry.size}",
        )
    map = user_map(_tables.to_table(config.neighbor_map), rows, size)
    if not torch.compiler.is_compiling():
        config._map = map
    return map


def _repeated(
    feats: Tensor, weight: Tensor, bias: Tensor | None, map: KernelMap, how: passes.How
) -> Tensor:
    """Where voxels repeat: voxgemm's convolution without a row's own voxel, and that by row."""
    wide = torch.promote_types(feats.dtype, torch.float32)
    rest, own = without_centre(weight.to(wide), map.geometry.size)
    how = passes.How(how.filters, 0)
    out = passes.Forward.apply(feats.to(wide), rest, None, map, how) + feats.to(wide) @ own.t()
    if bias is not None:
        out = out + bias
    return out.to(feats.dtype)


class SubMConv3dCompiledFunction:
    """apply(feats, weight [Co, V, Ci], bias, the eight tensors and lists of a config, splitk,
    algorithm) -> out; differentiable."""

    @staticmethod
    def apply(feats: Tensor, weight: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
        config = SpConvConfig(*fields)
        return _frozen(feats, weight[:, :, None, None, :], bias, config)


@speaking
def sparse_submanifold_conv3d(
    feats: Tensor,
    coords: Tensor | None = None,
    shape: Sequence[int] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    neighbor_cache: SubMConv3dNeighborCache | None = None,
    dilation: Sequence[int] = (1, 1, 1),
    *,
    config: SpConvConfig | None = None,
    algorithm: str | None = None,
) -> tuple[Tensor, SubMConv3dNeighborCache] | Tensor:
    """out[i] = bias + sum over taps k of weight[:, k, :] @ feats[the row at in(i, k)], in(i, k) =
    coords[i] + (k - K // 2) * dilation.

    feats [N, Ci], coords int32 [N, 4] (batch, x, y, z), shape (N, C, W, H, D), weight
    [Co, Kw, Kh, Kd, Ci], bias [Co] or None. Gives out [N, Co] and the neighbour cache, which the
    next layer on these coordinates takes; with a config, out alone. `algorithm` overrides
    `ops.spconv.ALGORITHM`.
    """
    if config is not None:
        if not isinstance(config, SpConvConfig):
            raise_type("config", config, SpConvConfig)
        return _frozen(feats, weight, bias, config)
    expect_tensors(feats, weight)
    feats, weight, bias = cast(feats, weight, bias)
    if algorithm is not None:
        tensors, how = (feats, weight, bias), how_of(feats, algorithm)
        cache, map = _prepared(tensors, coords, shape, neighbor_cache, dilation)
        return Convolution.apply(*tensors, map, how), cache
    return SubMConv3dFunction.apply(feats, coords, shape, neighbor_cache, weight, bias, dilation)
