# SPDX-License-Identifier: Apache-2.0
"""FlexGEMM's functions on tables, codes, coordinates and neighbour maps, for tensors on any device.

A hash table is two tensors of any length, keys and values of 32 or 64 bits; empty is all ones. What
stands in a filled one is known to insertion and look-up alone. A voxel's key is
((b * W + x) * H + y) * D + z; voxels outside the box are never inserted and never found.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from voxgemm import hashmap, kernel_map, sampling, serialization
from voxgemm.columns import as_int32
from voxgemm.geometry import Geometry

from ..errors import speaking
from . import _coords, _tables


@speaking
def hashmap_insert(
    hashmap_keys: Tensor, hashmap_values: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Adds keys [n] with values [n], in place. A table without room is an error."""
    hashmap.insert(hashmap_keys, hashmap_values, keys, values)


@speaking
def hashmap_lookup(hashmap_keys: Tensor, hashmap_values: Tensor, keys: Tensor) -> Tensor:
    """The values [m] of keys [m], all ones where missing."""
    return hashmap.lookup(hashmap_keys, hashmap_values, keys)


@speaking
def hashmap_insert_3d(
    hashmap_keys: Tensor,
    hashmap_values: Tensor,
    coords: Tensor,
    values: Tensor,
    W: int,
    H: int,
    D: int,
) -> None:
    """hashmap_insert of the voxels' keys."""
    keys = hashmap.voxel_keys(coords, (W, H, D), hashmap_keys.dtype)
    hashmap.insert(hashmap_keys, hashmap_values, keys, values, skip_empty=True)


@speaking
def hashmap_lookup_3d(
    hashmap_keys: Tensor, hashmap_values: Tensor, coords: Tensor, W: int, H: int, D: int
) -> Tensor:
    """hashmap_lookup of the voxels' keys."""
    keys = hashmap.voxel_keys(coords, (W, H, D), hashmap_keys.dtype)
    return hashmap.lookup(hashmap_keys, hashmap_values, keys)


@speaking
def hashmap_insert_3d_idx_as_val(
    hashmap_keys: Tensor, hashmap_values: Tensor, coords: Tensor, W: int, H: int, D: int
) -> None:
    """hashmap_insert of the voxels' keys with their row numbers, of repeated ones the lowest."""
    keys = hashmap.voxel_keys(coords, (W, H, D), hashmap_keys.dtype)
    hashmap.insert(hashmap_keys, hashmap_values, keys, skip_empty=True)


def _geometry(numbers: tuple[int, ...]) -> Geometry:
    """Of size, stride, padding and dilation, three numbers each."""
    return Geometry(*(tuple(numbers[i : i + 3]) for i in range(0, 12, 3)))


@speaking
def hashmap_build_submanifold_conv_neighbour_map(
    hashmap_keys: Tensor, hashmap_values: Tensor, coords: Tensor, *numbers: int
) -> Tensor:
    """The neighbour map uint32 [N, V]; fills the table. numbers: W, H, D, the kernel's size and the
    dilation."""
    from ..ops.spconv.submanifold_conv3d import SubMConv3dFunction

    box, size, dilation = numbers[:3], numbers[3:6], numbers[6:9]
    hashmap_insert_3d_idx_as_val(hashmap_keys, hashmap_values, coords, *box)
    shape = (1, 1, *box)
    cache = SubMConv3dFunction._compute_neighbor_cache(coords, shape, size, dilation)
    return cache.neighbor_map


@speaking
def z_order_encode(coords: Tensor, bit_length: int, codes: Tensor) -> None:
    """Writes the codes (int32 or int64 [n]) of coords [n, 4], bit_length bits an axis."""
    serialization.encode(coords, bit_length, curve="z_order", out=codes)


@speaking
def hilbert_encode(coords: Tensor, bit_length: int, codes: Tensor) -> None:
    """As z_order_encode, along a Hilbert curve."""
    serialization.encode(coords, bit_length, curve="hilbert", out=codes)


@speaking
def z_order_decode(codes: Tensor, bit_length: int) -> Tensor:
    """The coordinates int32 [n, 4] of codes [n]."""
    return serialization.decode(codes, bit_length, curve="z_order")


@speaking
def hilbert_decode(codes: Tensor, bit_length: int) -> Tensor:
    """As z_order_decode, along a Hilbert curve."""
    return serialization.decode(codes, bit_length, curve="hilbert")


def sample_rows(coords: Tensor, grid: Tensor, box: tuple[int, int, int], mode: str) -> Any:
    """sampling.sample_map by FlexGEMM's rules: any integers and floats, truncated."""
    points = grid if grid.dtype.itemsize == 8 else grid.float()
    return sampling.sample_map(
        as_int32(coords, "coords"), points, mode, spatial_shape=box, rounding="truncate"
    )


@speaking
def hashmap_build_grid_sample_3d_nearest_neighbor_map(
    hashmap_keys: Tensor,
    hashmap_vals: Tensor,
    coords: Tensor,
    grid: Tensor,
    W: int,
    H: int,
    D: int,
) -> Tensor:
    """uint32 [B, L]: the row of the voxel of each point of grid [B, L, 3]; fills the table."""
    coords = as_int32(coords, "coords")
    hashmap_insert_3d_idx_as_val(hashmap_keys, hashmap_vals, coords, W, H, D)
    rows = sample_rows(coords, grid, (W, H, D), "nearest").rows
    return rows.view(grid.shape[:2]).view(_tables.UINT32)


@speaking
def hashmap_build_grid_sample_3d_trilinear_neighbor_map_weight(
    hashmap_keys: Tensor,
    hashmap_vals: Tensor,
    coords: Tensor,
    grid: Tensor,
    W: int,
    H: int,
    D: int,
) -> tuple[Tensor, Tensor]:
    """The eight corners of each point and their weights: uint32 and float32 [B, L, 8]; bit 0 of a
    corner's number is x. Fills the table."""
    coords = as_int32(coords, "coords")
    hashmap_insert_3d_idx_as_val(hashmap_keys, hashmap_vals, coords, W, H, D)
    found = sample_rows(coords, grid, (W, H, D), "trilinear")
    shape = (*grid.shape[:2], 8)
    return found.rows.view(shape).view(_tables.UINT32), found.weights.float().view(shape)


@speaking
def hashmap_build_sparse_conv_out_coords(
    coords: Tensor, ratio: float, serialization_mode: int, *numbers: int
) -> Tensor:
    """int32 [M, 4]: the output voxels. numbers: B, W, H, D, then size, stride, padding and
    dilation; ratio has no effect."""
    return expand_unique_build_sparse_conv_out_coords(coords, serialization_mode, *numbers)


@speaking
def expand_unique_build_sparse_conv_out_coords(
    coords: Tensor, serialization_mode: int, *numbers: int
) -> Tensor:
    """As hashmap_build_sparse_conv_out_coords."""
    geometry = _geometry(numbers[4:])
    return _coords.output_coords(coords, tuple(numbers[1:4]), geometry, serialization_mode)


@speaking
def hashmap_build_sparse_conv_neighbour_map(
    coords: Tensor, out_coords: Tensor, ratio: float, include_bwd: bool, *numbers: int
) -> tuple[Tensor, Tensor | None]:
    """uint32 [M, V] and, if asked for, [N, V] of the outputs that each input feeds, else None."""
    map = kernel_map.strided_map(coords, out_coords, _geometry(numbers[4:]))
    back = _tables.from_table(map.transposed().neighbours) if include_bwd else None
    return _tables.from_table(map.neighbours), back


@speaking
def neighbor_map_post_process_for_masked_implicit_gemm_1(
    neighbor_map: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gray_code, sorted_idx, valid_signal_i, valid_signal_o, valid_signal_seg of a map [N, V]."""
    table = _tables.to_table(neighbor_map)
    words = _tables.mask_words(table)
    return words, _tables.masked_order(words), *_tables.pairs(table)


@speaking
def neighbor_map_post_process_for_masked_implicit_gemm_1_no_bwd(
    neighbor_map: Tensor,
) -> tuple[Tensor, Tensor]:
    """gray_code and sorted_idx."""
    words = _tables.mask_words(_tables.to_table(neighbor_map))
    return words, _tables.masked_order(words)


@speaking
def neighbor_map_post_process_for_masked_implicit_gemm_2(
    gray_code: Tensor, sorted_idx: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """valid_kernel and valid_kernel_seg of blocks of rows."""
    return _tables.block_taps(gray_code, sorted_idx, block_size)


# One dialect's names of the same functions.
hashmap_insert_cuda = hashmap_insert
hashmap_lookup_cuda = hashmap_lookup
hashmap_insert_3d_cuda = hashmap_insert_3d
hashmap_lookup_3d_cuda = hashmap_lookup_3d
hashmap_insert_3d_idx_as_val_cuda = hashmap_insert_3d_idx_as_val
hashmap_build_submanifold_conv_neighbour_map_cuda = hashmap_build_submanifold_conv_neighbour_map
