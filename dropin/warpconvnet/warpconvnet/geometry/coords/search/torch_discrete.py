# SPDX-License-Identifier: Apache-2.0
"""Kernel maps between sets of coordinates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from voxgemm import ArgumentError, kernel_map
from voxgemm.kernel_map import KernelMap

from ..._rows import centre, geometry_of, sizes, to_rows
from .search_results import IntSearchResult


def kernel_offsets_from_size(
    kernel_size: Any,
    kernel_dilation: Any = 1,
    center_offset: Any = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """int32 [K, D + 1]: 0, then (tap - centre) * dilation per axis, the last axis fastest."""
    axes = 3 if isinstance(kernel_size, int) else len(kernel_size)
    size = sizes(kernel_size, axes, "kernel_size")
    dilation = sizes(kernel_dilation, axes, "kernel_dilation")
    middle = tuple(center_offset) if center_offset is not None else tuple(map(centre, size))
    columns = [
        [(k - c) * d for k in range(n)] for n, c, d in zip(size, middle, dilation, strict=True)
    ]
    taps = torch.cartesian_prod(*(torch.tensor(column, dtype=torch.int32) for column in columns))
    taps = taps.view(-1, axes)
    return torch.cat([taps.new_zeros((len(taps), 1)), taps], 1).to(device)


def identity_of(map: KernelMap) -> int | None:
    """The tap that maps every row onto itself, if there is one: looked for at the centre."""
    if map.n_in != map.n_out:
        return None
    size = map.geometry.size
    middle = [centre(k) for k in size]
    tap = (middle[0] * size[1] + middle[1]) * size[2] + middle[2]
    rows = torch.arange(map.n_out, dtype=torch.int32, device=map.neighbours.device)
    return tap if torch.equal(map.neighbours[tap], rows) else None


@torch.no_grad()
def generate_kernel_map(
    batch_indexed_in_coords: Tensor,
    batch_indexed_out_coords: Tensor,
    in_to_out_stride_ratio: Any,
    kernel_size: Any,
    kernel_dilation: Any = None,
    kernel_center_offset: Any = None,
    method: str = "size",
    hash_method: Any = None,
    skip_symmetric_kernel_map: bool = False,
) -> IntSearchResult:
    """in = ratio * out + (tap - centre) * dilation. Both methods ('size', 'offset') are one here.

    With skip_symmetric_kernel_map, for one set and odd sizes, the taps before the centre only,
    with the centre as identity. hash_method has no effect.
    """
    if method not in ("size", "offset"):
        raise ArgumentError(f"method is {method!r}, expected 'size' or 'offset'")
    axes = batch_indexed_in_coords.shape[1] - 1
    size = sizes(kernel_size, axes, "kernel_size")
    dilation = sizes(1 if kernel_dilation is None else kernel_dilation, axes, "kernel_dilation")
    geometry = geometry_of(size, sizes(in_to_out_stride_ratio, axes, "stride"), dilation)
    if kernel_center_offset is not None:
        middle = tuple(int(n) for n in kernel_center_offset)
        padding = tuple(c * d for c, d in zip(middle, dilation, strict=True))
        geometry = geometry._replace(padding=(*padding, *(0,) * (3 - axes)))
    in_rows, out_rows = to_rows(batch_indexed_in_coords), to_rows(batch_indexed_out_coords)
    map = kernel_map.strided_map(in_rows, out_rows, geometry)
    map.settle(wait=True)
    if not skip_symmetric_kernel_map:
        return IntSearchResult.of_table(map.neighbours, identity_of(map))
    if any(k % 2 == 0 for k in size) or not torch.equal(in_rows, out_rows):
        raise ArgumentError(
            f"skip_symmetric_kernel_map needs odd sizes and one set, the kernel is {size} and the "
            f"sets have {len(in_rows)} and {len(out_rows)} rows"
        )
    half = math.prod(size) // 2
    return IntSearchResult.of_table(map.neighbours[:half], half)
