# SPDX-License-Identifier: Apache-2.0
"""Layers on SparseTensor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from . import functional
from .algorithms import OUTPUT_RULES, filters_of, index_in
from .containers import Sequential, SparseModule
from .depthwise import grouped_conv3d
from .errors import ArgumentError
from .geometry import Geometry, Triple, triple
from .kernel_map import KernelMap
from .map_cache import way_back
from .norm import BatchNorm, SyncBatchNorm, fold_batch_norm
from .pool_layers import SparseAvgPool3d, SparseGlobalPool, SparseMaxPool3d, SparseUnpool3d
from .tensor import SparseTensor

__all__ = [
    "BatchNorm",
    "Sequential",
    "SparseAvgPool3d",
    "SparseConv3d",
    "SparseConvTranspose3d",
    "SparseGlobalPool",
    "SparseInverseConv3d",
    "SparseMaxPool3d",
    "SparseModule",
    "SparseUnpool3d",
    "SubmConv3d",
    "SyncBatchNorm",
    "explain",
    "explanations",
    "fold_batch_norm",
]
Device = torch.device | str | int | None
_Layer = TypeVar("_Layer", bound="_Conv3d")


class _Conv3d(SparseModule):
    """weight [c_out, Kx, Ky, Kz, c_in / groups], bias [c_out]; a subclass knows its map."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    # The layer of torch that computes the same where voxels are.
    _dense: ClassVar[type[nn.Conv3d] | type[nn.ConvTranspose3d]] = nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        groups: int = 1,
        bias: bool = True,
        algorithm: object = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ArgumentError(
                f"groups is {groups} for {in_channels} -> {out_channels} channels, expected a "
                "divisor of both"
            )
        self.groups = groups
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = triple(kernel_size, "kernel_size")
        self.algorithm = algorithm
        filters_of(algorithm)
        shape = (out_channels, *self.kernel_size, in_channels // groups)
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

    if TYPE_CHECKING:

        def __call__(
            self, x: SparseTensor, residual: SparseTensor | None = None, relu: bool = False
        ) -> SparseTensor: ...

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(c_in / groups * taps), weight and bias: as torch.nn.Conv3d."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def group_channels(self) -> tuple[int, int]:
        """c_in and c_out of each group, which are convolutions of their own."""
        return self.in_channels // self.groups, self.out_channels // self.groups

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        """The number in `x.maps` of the coordinates the layer leads to, and the map to them."""
        raise NotImplementedError

    def forward(
        self, x: SparseTensor, residual: SparseTensor | None = None, relu: bool = False
    ) -> SparseTensor:
        """The convolution; a residual on its coordinates is added and ReLU taken where asked for.

        With one group both happen in the convolution's kernel, with more behind it.
        """
        if not isinstance(x, SparseTensor):
            raise ArgumentError(
                f"{type(self).__name__} got a {type(x).__name__}, expected a SparseTensor"
            )
        number, map = self.target(x)
        operands = (x.features, self.weight, self.bias, map)
        if residual is not None and residual.coords is not x.maps.sets[number].coords:
            raise ArgumentError(
                f"the residual stands on other coordinates ({residual.voxels} voxels) than the "
                f"convolution's outputs ({map.n_out} voxels)"
            )
        added = None if residual is None else residual.features
        if self.groups == 1:
            features = functional.conv3d(*operands, self.algorithm, residual=added, relu=relu)
        else:
            features = grouped_conv3d(*operands, self.groups, self.algorithm)
            features = features if added is None else features + added
            features = features.relu() if relu else features
        return x.replace(features, number)

    @classmethod
    def from_torch(cls: type[_Layer], dense: nn.Conv3d | nn.ConvTranspose3d) -> _Layer:
        """The layer that computes on voxels what `dense` computes on a grid; numbers are copied.

        Of a Conv3d a SubmConv3d or a SparseConv3d, of a ConvTranspose3d the other two. Raises
        ArgumentError where there is none, such as a SubmConv3d of a layer with a stride.

        >>> dense = torch.nn.Conv3d(2, 4, 3, padding=1)
        >>> vg.nn.SubmConv3d.from_torch(dense).weight.shape
        torch.Size([4, 3, 3, 3, 2])
        """
        if not isinstance(dense, cls._dense):
            raise ArgumentError(
                f"{cls.__name__} is made of a {cls._dense.__name__}, got a {type(dense).__name__}"
            )
        if dense.padding_mode != "zeros":
            raise ArgumentError(f"padding_mode is {dense.padding_mode!r}, expected 'zeros'")
        layer = cls(
            dense.in_channels,
            dense.out_channels,
            cast(Triple, dense.kernel_size),
            bias=dense.bias is not None,
            groups=dense.groups,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
            **cls._options_of(dense),
        )
        with torch.no_grad():
            weight = cls._weight_of(dense)
            layer.weight.view(weight.shape).copy_(weight)
            if dense.bias is not None and layer.bias is not None:
                layer.bias.copy_(dense.bias)
        return layer

    @classmethod
    def _options_of(cls, dense: Any) -> dict[str, Any]:
        """What a constructor takes from a layer of torch beside what all take."""
        return {name: getattr(dense, name) for name in ("stride", "padding", "dilation")}

    @staticmethod
    def _weight_of(dense: Any) -> Tensor:
        """A view of the weight of a layer of torch, in the order of ours."""
        weight: Tensor = dense.weight
        if not dense.transposed:
            return weight.permute(0, 2, 3, 4, 1)
        # [c_in, c_out / groups, K...]: what comes in is group after group.
        return weight.unflatten(0, (dense.groups, -1)).permute(0, 2, 3, 4, 5, 1)

    def to_torch(self) -> nn.Conv3d | nn.ConvTranspose3d:
        """The layer of torch that computes the same on a grid (`SparseTensor.dense`), as a copy.

        At every voxel the two results are equal; the grid's has values elsewhere, too.
        """
        dense = self._dense(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            bias=self.bias is not None,
            groups=self.groups,
            device=self.weight.device,
            dtype=self.weight.dtype,
            **self._dense_options(),
        )
        with torch.no_grad():
            weight = self._weight_of(dense)
            weight.copy_(self.weight.view(weight.shape))
            if dense.bias is not None and self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense

    def _dense_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation")}

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name, default in (
            ("stride", (1, 1, 1)),
            ("padding", (0, 0, 0)),
            ("dilation", (1, 1, 1)),
            ("output_padding", (0, 0, 0)),
        ):
            value = getattr(self, name, None)
            if value not in (None, default):
                text += f", {name}={value}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text if self.algorithm is None else f"{text}, algorithm={self.algorithm!r}"


class SubmConv3d(_Conv3d):
    """Outputs exactly where inputs are; tap size // 2 of each axis reads the output's own voxel.

    Takes [n, in_channels] to [n, out_channels] on the same coordinates. weight [out_channels, Kx,
    Ky, Kz, in_channels / groups], bias [out_channels]. Any stride but 1 and any padding but the one
    that centres the kernel ('same') is an ArgumentError. `algorithm`: as in `functional.conv3d`.

    >>> conv = vg.nn.SubmConv3d(4, 8, 3)
    >>> x = vg.SparseTensor(torch.ones(2, 4), torch.arange(8, dtype=torch.int32).view(2, 4))
    >>> conv(x).features.shape, conv(x).shares_coords(x)
    (torch.Size([2, 8]), True)
    """

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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        shared = (groups, bias, algorithm, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *shared)
        self.dilation = triple(dilation, "dilation")
        self.geometry = Geometry.submanifold(self.kernel_size, self.dilation)
        if triple(stride, "stride") != (1, 1, 1):
            raise ArgumentError(
                f"stride is {stride}; the outputs of SubmConv3d are its inputs, so it is 1"
            )
        margins = padding if isinstance(padding, str) else triple(padding, "padding")
        if margins not in ("same", self.geometry.padding):
            raise ArgumentError(
                f"padding is {padding}, expected 'same' or {self.geometry.padding}, "
                "which centres the kernel"
            )

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        return x.number, x.maps.submanifold(x.number, self.geometry)

    @classmethod
    def _options_of(cls, dense: Any) -> dict[str, Any]:
        options = super()._options_of(dense)
        if options["padding"] == "same" and any(k % 2 == 0 for k in dense.kernel_size):
            raise ArgumentError(
                f"padding is 'same' with kernel_size {dense.kernel_size}, which torch reads off "
                "its centre; give the padding in numbers"
            )
        return options

    def _dense_options(self) -> dict[str, Any]:
        return {"padding": self.geometry.padding, "dilation": self.dilation}


class SparseConv3d(_Conv3d):
    """Outputs where an input reaches ('reached', as torch) or at floor(in / stride) ('floor').

    Takes [n, in_channels] to [m, out_channels] on coordinates of their own, in ascending order. Per
    axis: in = out * stride - padding + tap * dilation. weight [out_channels, Kx, Ky, Kz,
    in_channels / groups], bias [out_channels]. The first call on a set of coordinates waits for the
    device, unless `max_voxels` says how many rows m shall be, padding included (see
    `output_coords`).

    >>> conv = vg.nn.SparseConv3d(4, 8, 2, stride=2)
    >>> x = vg.SparseTensor(torch.ones(2, 4), torch.tensor([[0, 4, 5, 6], [0, 5, 5, 6]]).int())
    >>> conv(x).coords.tolist(), conv(x).stride
    ([[0, 2, 2, 3]], (2, 2, 2))
    """

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
        device: Device = None,
        dtype: torch.dtype | None = None,
        max_voxels: int | None = None,
    ):
        shared = (groups, bias, algorithm, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *shared)
        self.stride = triple(stride, "stride")
        self.padding = triple(padding, "padding")
        self.dilation = triple(dilation, "dilation")
        index_in(OUTPUT_RULES, output_rule, "output_rule")
        self.output_rule = output_rule
        self.max_voxels = max_voxels
        self.geometry = Geometry(self.kernel_size, self.stride, self.padding, self.dilation)

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        return x.maps.strided(x.number, self.geometry, self.output_rule, self.max_voxels)


class SparseInverseConv3d(_Conv3d):
    """Back to the coordinates from which a SparseConv3d with this kernel came to the input's.

    Takes [m, in_channels] to [n, out_channels] on the rows from which the other layer came, with
    its taps. weight [out_channels, Kx, Ky, Kz, in_channels / groups], bias [out_channels]. Stride,
    padding and dilation are that layer's; give them only to choose between several. ArgumentError
    where no layer with this kernel led to the coordinates.

    >>> down, up = vg.nn.SparseConv3d(4, 8, 2, stride=2), vg.nn.SparseInverseConv3d(8, 4, 2)
    >>> x = vg.SparseTensor(torch.ones(2, 4), torch.tensor([[0, 4, 5, 6], [0, 5, 5, 6]]).int())
    >>> up(down(x)).shares_coords(x)
    True
    """

    _dense = nn.ConvTranspose3d

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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        shared = (groups, bias, algorithm, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *shared)
        self.asked = way_back(kernel_size, stride, padding, dilation)

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        return x.maps.inverse(x.number, self.asked)

    def _dense_options(self) -> dict[str, Any]:
        missing = [name for name in ("stride", "padding", "dilation") if name not in self.asked]
        if missing:
            raise ArgumentError(
                f"to_torch of a SparseInverseConv3d without {', '.join(missing)}: these are the "
                "coupled layer's; give them to the constructor"
            )
        return {name: self.asked[name] for name in ("stride", "padding", "dilation")}


class SparseConvTranspose3d(_Conv3d):
    """Outputs at every voxel that an input reaches: new ones, as torch's ConvTranspose3d has them.

    Per axis: out = in * stride - padding + tap * dilation. weight [out_channels, Kx, Ky, Kz,
    in_channels / groups], bias [out_channels]. With a spatial shape, outputs outside the result's
    are left out. To go back to voxels that were there before, SparseInverseConv3d.

    >>> up = vg.nn.SparseConvTranspose3d(1, 1, 2, stride=2)
    >>> x = vg.SparseTensor(torch.ones(1, 1), torch.tensor([[0, 1, 1, 1]], dtype=torch.int32))
    >>> up(x).coords[:, 1:].tolist()[:3], up(x).stride
    ([[2, 2, 2], [2, 2, 3], [2, 3, 2]], (0.5, 0.5, 0.5))
    """

    _dense = nn.ConvTranspose3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple = 1,
        padding: int | Triple = 0,
        output_padding: int | Triple = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Triple = 1,
        algorithm: object = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        shared = (groups, bias, algorithm, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *shared)
        self.stride = triple(stride, "stride")
        self.padding = triple(padding, "padding")
        self.output_padding = triple(output_padding, "output_padding")
        self.dilation = triple(dilation, "dilation")
        for extra, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if not 0 <= extra < max(s, d):
                raise ArgumentError(
                    f"output_padding is {self.output_padding}, expected less than stride "
                    f"{self.stride} or dilation {self.dilation}"
                )
        self.geometry = Geometry(self.kernel_size, self.stride, self.padding, self.dilation)

    def target(self, x: SparseTensor) -> tuple[int, KernelMap]:
        return x.maps.generated(x.number, self.geometry, self.output_padding)

    @classmethod
    def _options_of(cls, dense: Any) -> dict[str, Any]:
        return {**super()._options_of(dense), "output_padding": dense.output_padding}

    def _dense_options(self) -> dict[str, Any]:
        return {**super()._dense_options(), "output_padding": self.output_padding}


def explain(layer: _Conv3d, x: SparseTensor) -> str:
    """By pass: the kernel that runs a layer on x and who picked it; of every other its times or why
    not.

    >>> x = vg.SparseTensor(torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.int32))
    >>> vg.explain(vg.nn.SubmConv3d(4, 8, 3), x).partition(" (")[0]
    'forward f32 subm3 4->8'

    x is a SparseTensor, features [n, in_channels] in the dtype of the layer.
    Raises ArgumentError: as the layer does.
    """
    _, map = layer.target(x)
    return functional.explain(map, *layer.group_channels, layer.weight.dtype, layer.algorithm)


def explanations(layer: _Conv3d, x: SparseTensor) -> list[dict[str, Any]]:
    """What explain() says of a layer, a dict for each pass: see `functional.explanations`.

    >>> x = vg.SparseTensor(torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.int32))
    >>> [each["problem"] for each in vg.explanations(vg.nn.SubmConv3d(4, 8, 3), x)][1]
    'grad_input f32 subm3 4->8'

    Arguments, shape [n, in_channels], dtype and errors are those of explain.
    """
    _, map = layer.target(x)
    return functional.explanations(map, *layer.group_channels, layer.weight.dtype, layer.algorithm)
