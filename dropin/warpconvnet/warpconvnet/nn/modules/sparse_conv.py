# SPDX-License-Identifier: Apache-2.0
"""Sparse convolutions as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from voxgemm import ArgumentError

from ... import constants
from ...geometry._rows import sizes
from ...geometry.coords.ops.serialization import POINT_ORDERING
from ...geometry.types.voxels import Voxels
from ..functional._choice import names_by_pass
from ..functional.sparse_conv import (
    SPARSE_CONV_BWD_ALGO_MODE,
    SPARSE_CONV_FWD_ALGO_MODE,
    STRIDED_CONV_MODE,
    Layer,
    convolve,
    layer_of,
    shape_of,
)
from .base_module import BaseSpatialModule


def as_members(given: Any, modes: Any, default: Any) -> Any:
    """What a module keeps of an algorithm: a name as a member, a list as it was given."""
    given = default if given is None else given
    if isinstance(given, str):
        legal = {member.value: member for member in modes}
        return legal.get(given.strip().lower(), given)
    return given


def uniform_(
    weight: nn.Parameter, bias: nn.Parameter | None, fans: tuple[int, int], axes: int
) -> None:
    """weight in +-sqrt(D) * sqrt(1 / 3) / sqrt(fan), bias in +-1 / sqrt(fan_in); fans: in, used."""
    bound = math.sqrt(axes / 3 / max(fans[1], 1))
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        edge = 1 / math.sqrt(max(fans[0], 1))
        nn.init.uniform_(bias, -edge, edge)


class SpatiallySparseConv(BaseSpatialModule):
    """spatially_sparse_conv with weight [K, C_in, C_out] and bias [C_out]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        bias: bool = True,
        transposed: bool = False,
        generative: bool = False,
        kernel_matmul_batch_size: int = 2,
        num_spatial_dims: int | None = 3,
        fwd_algo: Any = None,
        bwd_algo: Any = None,
        stride_mode: STRIDED_CONV_MODE = STRIDED_CONV_MODE.STRIDE_ONLY,
        order: POINT_ORDERING = POINT_ORDERING.RANDOM,
        compute_dtype: torch.dtype | None = None,
        implicit_matmul_fwd_block_size: int | None = None,
        implicit_matmul_bwd_block_size: int | None = None,
        *,
        groups: int = 1,
        dgrad_algo: Any = None,
        wgrad_algo: Any = None,
        use_fp16_accum: bool | None = None,
    ):
        super().__init__()
        axes = 3 if num_spatial_dims is None else num_spatial_dims
        self.num_spatial_dims = axes
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = sizes(kernel_size, axes, "kernel_size")
        self.stride = sizes(stride, axes, "stride")
        self.dilation = sizes(dilation, axes, "dilation")
        self.transposed, self.generative = transposed, generative
        self.kernel_matmul_batch_size = kernel_matmul_batch_size
        self.stride_mode, self.order, self.compute_dtype = stride_mode, order, compute_dtype
        self.implicit_matmul_fwd_block_size = implicit_matmul_fwd_block_size
        self.implicit_matmul_bwd_block_size = implicit_matmul_bwd_block_size
        self.groups, self.use_fp16_accum = groups, use_fp16_accum
        if in_channels % groups or out_channels % groups or groups < 1:
            raise ArgumentError(
                f"groups is {groups}, which does not divide {in_channels} and {out_channels}"
            )
        self._names = names_by_pass(fwd_algo, bwd_algo, dgrad_algo, wgrad_algo)
        self.fwd_algo = as_members(
            fwd_algo, SPARSE_CONV_FWD_ALGO_MODE, constants.WARPCONVNET_FWD_ALGO_MODE
        )
        self.bwd_algo = as_members(
            bwd_algo, SPARSE_CONV_BWD_ALGO_MODE, constants.WARPCONVNET_BWD_ALGO_MODE
        )
        self.dgrad_algo, self.wgrad_algo = dgrad_algo, wgrad_algo
        self._given = self._algorithms()
        taps = math.prod(self.kernel_size)
        shape = (taps, in_channels, out_channels)
        if groups > 1:
            shape = (taps, groups, in_channels // groups, out_channels // groups)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def _algorithms(self) -> tuple[Any, ...]:
        return self.fwd_algo, self.bwd_algo, self.dgrad_algo, self.wgrad_algo

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform, by the fan of the inputs, or of the outputs if transposed."""
        taps = math.prod(self.kernel_size)
        fan_in = taps * self.in_channels // self.groups
        fan_out = taps * self.out_channels // self.groups
        used = fan_out if self.transposed else fan_in
        uniform_(self.weight, self.bias, (fan_in, used), self.num_spatial_dims)

    def forward(
        self, input_sparse_tensor: Voxels, output_spatially_sparse_tensor: Voxels | None = None
    ) -> Voxels:
        x = input_sparse_tensor
        if not isinstance(x, Voxels):
            raise TypeError(f"input_sparse_tensor is a {type(x).__name__}, expected Voxels")
        layer = self._layer
        if layer is None:
            layer = self._layer = self._made_layer()
        parameters = (self.weight, self.bias, self.compute_dtype)
        return convolve(x, parameters, layer, output_spatially_sparse_tensor)

    def _made_layer(self) -> Layer:
        """Of the attributes, which a program may have assigned since the last call."""
        given = self._algorithms()
        if given != self._given:
            self._given, (fwd, bwd, dgrad, wgrad) = given, given
            both = bwd if dgrad is None and wgrad is None else None
            self._names = names_by_pass(fwd, both, dgrad, wgrad)
        flags = (self.generative, self.transposed)
        where = (self.kernel_size, self.dilation, self.stride, flags, self.order)
        shape = shape_of(self.num_spatial_dims, *where)
        return layer_of(shape, self.stride_mode, "max", self.groups, self._names)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "_layer":
            self.__dict__["_layer"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": None}

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name in ("stride", "dilation"):
            if max(getattr(self, name)) > 1:
                text += f", {name}={getattr(self, name)}"
        for name in ("transposed", "generative"):
            if getattr(self, name):
                text += f", {name}=True"
        if self.groups > 1:
            text += f", groups={self.groups}"
        return text if self.bias is not None else f"{text}, bias=False"


class _OfAxes(SpatiallySparseConv):
    axes = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        bias: bool = True,
        transposed: bool = False,
        generative: bool = False,
        stride_mode: STRIDED_CONV_MODE = STRIDED_CONV_MODE.STRIDE_ONLY,
        fwd_algo: Any = None,
        bwd_algo: Any = None,
        kernel_matmul_batch_size: int = 2,
        order: POINT_ORDERING = POINT_ORDERING.RANDOM,
        compute_dtype: torch.dtype | None = None,
        implicit_matmul_fwd_block_size: int | None = None,
        implicit_matmul_bwd_block_size: int | None = None,
        **more: Any,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            bias=bias,
            transposed=transposed,
            generative=generative,
            kernel_matmul_batch_size=kernel_matmul_batch_size,
            num_spatial_dims=self.axes,
            fwd_algo=fwd_algo,
            bwd_algo=bwd_algo,
            stride_mode=stride_mode,
            order=order,
            compute_dtype=compute_dtype,
            implicit_matmul_fwd_block_size=implicit_matmul_fwd_block_size,
            implicit_matmul_bwd_block_size=implicit_matmul_bwd_block_size,
            **more,
        )


class SparseConv2d(_OfAxes):
    """SpatiallySparseConv of two axes."""

    axes = 2


class SparseConv3d(_OfAxes):
    """SpatiallySparseConv of three axes."""

    axes = 3
