# SPDX-License-Identifier: Apache-2.0
"""Pooling of Voxels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from voxgemm import ArgumentError, pooling
from voxgemm.kernel_map import KernelMap

from ...geometry._rows import sizes
from ...geometry.coords.ops.serialization import POINT_ORDERING
from ...geometry.features.cat import CatFeatures
from ...geometry.types.voxels import Voxels
from .sparse_conv import Shape, _out_stride, _place, _with_stride

REDUCTIONS = ("max", "min", "mean", "sum")


def sparse_reduce(
    voxels: Voxels,
    kernel_size: Any,
    stride: Any = None,
    reduction: str = "max",
    order: POINT_ORDERING = POINT_ORDERING.RANDOM,
) -> Voxels:
    """max, min, mean or sum over windows; those of their stride's size start at stride * u."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    shape = _shape(voxels, kernel_size, stride, order, transposed=False)
    place = _place(voxels, shape, None)
    out = _pooled(voxels, place.map, reduction)
    coordinates = _with_stride(place.coordinates, _out_stride(voxels, shape, None))
    extra = {"ordering": order} if order != POINT_ORDERING.RANDOM else {}
    return voxels.replace(coordinates, CatFeatures(out, coordinates.offsets), **extra)


def _shape(
    voxels: Voxels, kernel_size: Any, stride: Any, order: POINT_ORDERING, transposed: bool
) -> Shape:
    """Windows that are as large as their stride begin at stride * u; others are centred there."""
    size = sizes(kernel_size, voxels.num_spatial_dims, "kernel_size")
    steps = size if stride is None else sizes(stride, voxels.num_spatial_dims, "stride")
    return Shape(size, (1,) * len(size), steps, False, transposed, order, centred=size != steps)


def _pooled(voxels: Voxels, map: KernelMap, reduction: str) -> Tensor:
    return pooling.pool(voxels.batched_features.to_cat().batched_tensor, map, reduction)


def sparse_max_pool(voxels: Voxels, kernel_size: Any, stride: Any = None) -> Voxels:
    return sparse_reduce(voxels, kernel_size, stride, "max")


def sparse_avg_pool(voxels: Voxels, kernel_size: Any, stride: Any = None) -> Voxels:
    return sparse_reduce(voxels, kernel_size, stride, "mean")


def sparse_unpool(
    voxels: Voxels,
    unpooled: Voxels,
    kernel_size: Any,
    stride: Any = None,
    concat_unpooled_voxels: bool = False,
) -> Voxels:
    """To each row of `unpooled` the sum of the pooled rows whose windows hold it."""
    shape = _shape(voxels, kernel_size, stride, POINT_ORDERING.RANDOM, transposed=True)
    place = _place(voxels, shape, unpooled)
    out = _pooled(voxels, place.map, "sum")
    if concat_unpooled_voxels:
        out = torch.cat([out, unpooled.batched_features.to_cat().batched_tensor], 1)
    return unpooled.replace(batched_features=CatFeatures(out, unpooled.offsets))
