# SPDX-License-Identifier: Apache-2.0
"""Layers on SparseTensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional
from .algorithms import OUTPUT_RULES, filters_of, index_in
from .errors import ArgumentError
from .kernel_map import Geometry, KernelMap, Triple, triple
from .tensor import SparseTensor


class SparseModule(nn.Module):
    """A module that takes a SparseTensor. In `Sequential` every other module takes the features."""


class Sequential(SparseModule, nn.Sequential):
    """torch.nn.Sequential on a SparseTensor: torch's own modules act on its features."""

    def forward(self, x: SparseTensor | Tensor) -> SparseTensor | Tensor:
        for module in self:
            if isinstance(module, SparseModule) or not isinstance(x, SparseTensor):
                x = module(x)
            else:
                x = x.replace(module(x.features))
        return x


class _Conv3d(SparseModule):
    """weight [c_out, Kx, Ky, Kz, c_in], bias [c_out]; a subclass knows its map."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        *,
        groups: int,
        bias: bool,
        algorithm: object,
        device: object,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if groups != 1:
            raise NotImplementedError(f"groups is {groups}, only 1 is implemented")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = triple(kernel_size, "kernel_size")
        self.algorithm = algorithm
        filters_of(algorithm)
        shape = (out_channels, *self.kernel_size, in_channels)
        if min(shape) < 1:
            raise ArgumentError(
                f"in_channels is {in_channels}, out_channels {out_channels} and kernel_size "
                f"{self.kernel_size}, expected at least 1 of each"
            )
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(c_in * taps), weight and bias: what torch.nn.Conv3d does."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        """The number in `x.maps` of the coordinates the layer leads to, and the map to them."""
        raise NotImplementedError

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not isinstance(x, SparseTensor):
            raise ArgumentError(
                f"{type(self).__name__} got a {type(x).__name__}, expected a SparseTensor"
            )
        number, map = self.target(x)
        features = functional.conv3d(x.features, self.weight, self.bias, map, self.algorithm)
        return x.replace(features, number)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name, default in (
            ("stride", (1, 1, 1)),
            ("padding", (0, 0, 0)),
            ("dilation", (1, 1, 1)),
        ):
            value = getattr(self, name, None)
            if value not in (None, default):
                text += f", {name}={value}"
        if self.bias is None:
            text += ", bias=False"
        return text if self.algorithm is None else f"{text}, algorithm={self.algorithm!r}"


class SubmConv3d(_Conv3d):
    """Outputs exactly where inputs are; tap size // 2 of each axis reads the output's own voxel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple = 1,
        padding: int | Triple | str = "same",
        dilation: int | Triple = 1,
        groups: int = 1,
        bias: bool = True,
        algorithm: object = None,
        device: object = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            groups=groups,
            bias=bias,
            algorithm=algorithm,
            device=device,
            dtype=dtype,
        )
        self.dilation = triple(dilation, "dilation")
        self.geometry = Geometry.submanifold(self.kernel_size, self.dilation)
        if triple(stride, "stride") != (1, 1, 1):
            raise ArgumentError(
                f"stride is {stride}; the outputs of SubmConv3d are its inputs, so it is 1"
            )
        if padding != "same" and triple(padding, "padding") != self.geometry.padding:
            raise ArgumentError(
                f"padding is {padding}, expected 'same' or {self.geometry.padding}, "
                "which centres the kernel"
            )

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        return x.number, x.maps.submanifold(x.number, self.geometry)


class SparseConv3d(_Conv3d):
    """Outputs where an input reaches ('reached', as torch) or at floor(in / stride) ('floor')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple = 1,
        padding: int | Triple = 0,
        dilation: int | Triple = 1,
        groups: int = 1,
        bias: bool = True,
        output_rule: str = "reached",
        algorithm: object = None,
        device: object = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            groups=groups,
            bias=bias,
            algorithm=algorithm,
            device=device,
            dtype=dtype,
        )
        self.stride = triple(stride, "stride")
        self.padding = triple(padding, "padding")
        self.dilation = triple(dilation, "dilation")
        index_in(OUTPUT_RULES, output_rule, "output_rule")
        self.output_rule = output_rule
        self.geometry = Geometry(self.kernel_size, self.stride, self.padding, self.dilation)

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        return x.maps.strided(x.number, self.geometry, self.output_rule)


class SparseInverseConv3d(_Conv3d):
    """Back to the coordinates from which a SparseConv3d with this kernel came to the input's.

    Stride, padding and dilation are that layer's; give them only to choose between several.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple | None = None,
        padding: int | Triple | None = None,
        dilation: int | Triple | None = None,
        groups: int = 1,
        bias: bool = True,
        algorithm: object = None,
        device: object = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            groups=groups,
            bias=bias,
            algorithm=algorithm,
            device=device,
            dtype=dtype,
        )
        self.asked = {"size": self.kernel_size}
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
            if value is not None:
                self.asked[name] = triple(value, name)

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        return x.maps.inverse(x.number, self.asked)


def explain(layer: _Conv3d, x: SparseTensor) -> str:
    """By pass: the kernel that runs on x; of every other its predicted time or why it cannot."""
    _, map = layer.target(x)
    return functional.explain(
        map, layer.in_channels, layer.out_channels, layer.weight.dtype, layer.algorithm
    )
