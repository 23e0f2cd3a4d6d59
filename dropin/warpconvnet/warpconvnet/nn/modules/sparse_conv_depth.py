# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolutions as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ... import constants
from ...geometry._rows import sizes
from ...geometry.coords.ops.serialization import POINT_ORDERING
from ...geometry.types.voxels import Voxels
from ..functional.sparse_conv import (
    STRIDED_CONV_MODE,
    _check,
    _shape,
    find,
)
from ..functional.sparse_conv_depth import (
    SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE,
    SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE,
    depthwise_names,
    depthwise_on,
)
from .base_module import BaseSpatialModule
from .sparse_conv import as_members, uniform_


class SpatiallySparseDepthwiseConv(BaseSpatialModule):
    """Each channel by itself: weight [K, C] and bias [C]; the rows as SpatiallySparseConv."""

    def __init__(
        self,
        channels: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        bias: bool = True,
        transposed: bool = False,
        generative: bool = False,
        num_spatial_dims: int | None = 3,
        fwd_algo: Any = None,
        bwd_algo: Any = None,
        stride_mode: STRIDED_CONV_MODE = STRIDED_CONV_MODE.STRIDE_ONLY,
        stride_reduce: str = "max",
        order: POINT_ORDERING = POINT_ORDERING.RANDOM,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        axes = 3 if num_spatial_dims is None else num_spatial_dims
        self.num_spatial_dims, self.channels = axes, channels
        self.kernel_size = sizes(kernel_size, axes, "kernel_size")
        self.stride = sizes(stride, axes, "stride")
        self.dilation = sizes(dilation, axes, "dilation")
        self.transposed, self.generative = transposed, generative
        self.stride_mode, self.stride_reduce = stride_mode, stride_reduce
        self.order, self.compute_dtype = order, compute_dtype
        self._names = depthwise_names(fwd_algo, bwd_algo)
        self.fwd_algo = as_members(
            fwd_algo,
            SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE,
            constants.WARPCONVNET_DEPTHWISE_CONV_FWD_ALGO_MODE,
        )
        self.bwd_algo = as_members(
            bwd_algo,
            SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE,
            constants.WARPCONVNET_DEPTHWISE_CONV_BWD_ALGO_MODE,
        )
        self.weight = nn.Parameter(torch.empty(math.prod(self.kernel_size), channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        taps = math.prod(self.kernel_size)
        uniform_(self.weight, self.bias, (taps, taps), self.num_spatial_dims)

    def forward(
        self, input_sparse_tensor: Voxels, output_spatially_sparse_tensor: Voxels | None = None
    ) -> Voxels:
        x, target = input_sparse_tensor, output_spatially_sparse_tensor
        if not isinstance(x, Voxels):
            raise TypeError(f"input_sparse_tensor is a {type(x).__name__}, expected Voxels")
        flags = (self.generative, self.transposed)
        shape = _shape(x, self.kernel_size, self.dilation, self.stride, flags, self.order)
        _check(shape, target, self.stride_mode)
        if self.stride_mode == STRIDED_CONV_MODE.REDUCE_AND_STRIDE and max(self.stride) > 1:
            from ..functional.sparse_pool import sparse_reduce

            x = sparse_reduce(x, self.stride, self.stride, self.stride_reduce)
            shape = shape._replace(stride=(1,) * x.num_spatial_dims)
        if x.batched_features.is_pad:
            x = x.to_cat()
        place = find(x, shape, target, ("depthwise", shape))
        features = x.feature_tensor
        dtype = features.dtype
        computed = self.compute_dtype or dtype
        features, weight = features.to(computed), self.weight.to(computed)
        bias = None if self.bias is None else self.bias.to(computed)
        out = depthwise_on(features, weight, place.map, self._names)
        out = (out if bias is None else out + bias).to(dtype)
        ordering = None if shape.order == POINT_ORDERING.RANDOM else shape.order
        return x.on(place.coordinates, out, ordering)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class _OfAxes(SpatiallySparseDepthwiseConv):
    axes = 3

    def __init__(
        self,
        channels: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        bias: bool = True,
        transposed: bool = False,
        generative: bool = False,
        fwd_algo: Any = None,
        bwd_algo: Any = None,
        stride_mode: STRIDED_CONV_MODE = STRIDED_CONV_MODE.STRIDE_ONLY,
        stride_reduce: str = "max",
        order: POINT_ORDERING = POINT_ORDERING.RANDOM,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            channels,
            kernel_size,
            stride,
            dilation,
            bias,
            transposed,
            generative,
            self.axes,
            fwd_algo,
            bwd_algo,
            stride_mode,
            stride_reduce,
            order,
            compute_dtype,
        )


class SparseDepthwiseConv2d(_OfAxes):
    """SpatiallySparseDepthwiseConv of two axes."""

    axes = 2


class SparseDepthwiseConv3d(_OfAxes):
    """SpatiallySparseDepthwiseConv of three axes."""

    axes = 3


SparseDepthwiseConv = SparseDepthwiseConv3d
