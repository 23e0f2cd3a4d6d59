# SPDX-License-Identifier: Apache-2.0
"""voxgemm's coordinates int32 [N, 4] of coordinates with one to three axes; missing axes are 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from voxgemm import ArgumentError, kernel_map
from voxgemm.columns import narrow
from voxgemm.geometry import Geometry

Sizes = tuple[int, ...]


def sizes(value: Any, axes: int, what: str) -> Sizes:
    """An int for all axes, or one each."""
    if isinstance(value, Tensor):
        value = value.tolist()
    numbers = (value,) * axes if isinstance(value, int) else value
    if isinstance(numbers, Iterable):
        numbers = tuple(numbers)
        if len(numbers) == axes and all(isinstance(n, int) and n >= 1 for n in numbers):
            return numbers
    raise ArgumentError(f"{what} is {value!r}, expected a positive int or {axes} of them")


def to_rows(batch_indexed: Tensor) -> Tensor:
    """int32 [N, 4], contiguous."""
    axes = batch_indexed.shape[1] - 1
    if batch_indexed.is_floating_point() or not 1 <= axes <= 3:
        raise ArgumentError(
            f"coordinates are {batch_indexed.dtype} {list(batch_indexed.shape)}, expected integers "
            "[N, 1 + D] with one to three axes"
        )
    rows = narrow(batch_indexed, "the coordinates")
    if axes < 3:
        rows = torch.cat([rows, rows.new_zeros((len(rows), 3 - axes))], 1)
    return rows.contiguous()


def geometry_of(kernel_size: Sizes, stride: Sizes, dilation: Sizes) -> Geometry:
    """in = stride * out + (tap - centre) * dilation; an even size has its centre at tap 0."""
    axes = len(kernel_size)
    one, none = (1,) * (3 - axes), (0,) * (3 - axes)
    padding = tuple(centre(k) * d for k, d in zip(kernel_size, dilation, strict=True))
    return Geometry((*kernel_size, *one), (*stride, *one), (*padding, *none), (*dilation, *one))


def centre(size: int) -> int:
    return (size - 1) // 2 if size % 2 else 0


def expanded(rows: Tensor, kernel_size: Sizes, dilation: Sizes) -> Tensor:
    """Every voxel that is a row plus a tap's offset: int32 [M, 4], ascending."""
    geometry = geometry_of(kernel_size, (1,) * len(kernel_size), dilation)
    # voxgemm's outputs are in + padding - tap * dilation: the last tap counted back is the first.
    padding = tuple(
        (k - 1) * d - p
        for k, d, p in zip(geometry.size, geometry.dilation, geometry.padding, strict=True)
    )
    return kernel_map.output_coords(rows, geometry._replace(padding=padding), "reached")


def strided(rows: Tensor, stride: Sizes) -> Tensor:
    """floor(row / stride) per axis, once each: int32 [M, 4], ascending."""
    steps = (*stride, *(1,) * (3 - len(stride)))
    return kernel_map.output_coords(rows, Geometry((1, 1, 1), steps), "floor")
