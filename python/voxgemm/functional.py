# SPDX-License-Identifier: Apache-2.0
"""Kernel maps, and convolutions on them as functions of plain tensors."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._library import call, ops, text_of, version_and_kernels
from .errors import ArgumentError

Triple = tuple[int, int, int]
# The search space of each pass as numbers: algorithms, and after -1 the bytes of a kernel's name.
Filters = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


# The order of these is that of the C++ enumerations.
class Algorithm(str, enum.Enum):
    """The search spaces of a layer's choice of kernels; without one, all of them."""

    explicit_gemm = "explicit_gemm"
    implicit_gemm = "implicit_gemm"
    implicit_gemm_splitk = "implicit_gemm_splitk"
    masked_implicit_gemm = "masked_implicit_gemm"
    masked_implicit_gemm_splitk = "masked_implicit_gemm_splitk"


PASSES = ("forward", "grad_input", "grad_weight")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPERATIONS = ("submanifold", "strided", "inverse")
OUTPUT_RULES = ("reached", "floor")
PRECISIONS = ("ieee", "tf32", "bf16x3", "bf16x6")
_NUMBERS = {algorithm.value: number for number, algorithm in enumerate(Algorithm)}
_ANYTHING: Filters = ((), (), ())


def index_in(names: tuple[object, ...], name: object, what: str) -> int:
    if name not in names:
        known = ", ".join(map(str, names))
        raise ArgumentError(f"{what} is {name!r}, expected one of {known}")
    return names.index(name)


def _filter(algorithm: object) -> tuple[int, ...]:
    if algorithm is None or algorithm == "auto":
        return ()
    if isinstance(algorithm, str):
        if algorithm in _NUMBERS:
            return (_NUMBERS[algorithm],)
        if any(algorithm in names for names in version_and_kernels()[1].values()):
            return (-1, *algorithm.encode())
    elif isinstance(algorithm, Iterable) and not isinstance(algorithm, Mapping):
        names = list(algorithm)
        if names and all(isinstance(name, str) and name in _NUMBERS for name in names):
            return tuple(_NUMBERS[name] for name in names)
    raise ArgumentError(
        f"algorithm is {algorithm!r}, expected 'auto', a kernel's full name, one or a list of "
        f"{', '.join(_NUMBERS)}, or a dict of these by pass ({', '.join(PASSES)})"
    )


def filters_of(algorithm: object) -> Filters:
    """None or 'auto' | name | list of names | {pass: any of these}."""
    if algorithm is None:
        return _ANYTHING
    if isinstance(algorithm, Mapping):
        for name in algorithm:
            index_in(PASSES, name, "a pass of algorithm")
        return tuple(_filter(algorithm.get(name)) for name in PASSES)
    return (_filter(algorithm),) * 3


def precision_of(name: str | None, features: Tensor) -> int:
    """The number of a precision; None: torch's own switch for float32 products on CUDA."""
    if name is not None:
        return index_in(PRECISIONS, name, "precision")
    if features.dtype != torch.float32 or not features.is_cuda:
        return 0
    switch = torch.backends.cuda.matmul
    # A traced graph can ask for the older of torch's two names only.
    tf32 = switch.allow_tf32 if torch.compiler.is_compiling() else switch.fp32_precision == "tf32"
    return PRECISIONS.index("tf32" if tf32 else "ieee")


def triple(value: int | Iterable[int], what: str) -> Triple:
    values = (value,) * 3 if isinstance(value, int) else value
    if isinstance(values, Iterable):
        values = tuple(values)
        if len(values) == 3 and all(isinstance(v, int) for v in values):
            return values
    raise ArgumentError(f"{what} is {value!r}, expected an int or three")


class Geometry(NamedTuple):
    """Per axis (x, y, z): in = out * stride - padding + tap * dilation, with 0 <= tap < size."""

    size: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)

    @staticmethod
    def submanifold(size: Triple, dilation: Triple) -> Geometry:
        """Stride 1 and the padding under which tap size // 2 reads the output's own voxel."""
        padding = tuple(k // 2 * d for k, d in zip(size, dilation, strict=True))
        return Geometry(size, padding=padding, dilation=dilation)

    def numbers(self) -> list[int]:
        return [*self.size, *self.stride, *self.padding, *self.dilation]

    def out_shape(self, shape: Triple) -> Triple:
        """As torch's Conv3d; 0 where the kernel does not fit."""
        axes = zip(shape, *self, strict=True)
        return tuple(max((n + 2 * p - d * (k - 1) - 1) // s + 1, 0) for n, k, s, p, d in axes)


class Asked(NamedTuple):
    """A pass of a layer on a map, without the map."""

    number: int  # of PASSES
    c_in: int
    c_out: int
    dtype: torch.dtype
    precision: int
    filter: tuple[int, ...]


class Choice(NamedTuple):
    """What an operator of a pass takes beside its tensors and those of the map."""

    schedule: list[Tensor]
    layer: list[int]

    @property
    def kernel(self) -> str:
        return bytes(self.layer[self.layer.index(-1) + 1 :]).decode()


class _Status:
    """Three numbers on their way from a CUDA device."""

    def __init__(self, status: Tensor):
        self.in_place, self.out_place = 1, 2
        self.host = torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=True)
        self.host.copy_(status, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(status.device))

    def transposed(self) -> _Status:
        """The same numbers, for the map with the sides exchanged."""
        other = copy.copy(self)
        other.in_place, other.out_place = self.out_place, self.in_place
        return other

    def arrived(self, wait: bool) -> bool:
        if torch.cuda.is_current_stream_capturing():
            return False
        if wait:
            self._event.synchronize()
        return self._event.query()


@dataclasses.dataclass(eq=False)
class KernelMap:
    """Which input row feeds which output row through which tap; what every convolution runs on.

    Made by `build_map`, shared by all layers and passes with the same coordinates and geometry. A
    pytree of tensors and ints; the transposed map, kept from its first use on, is no part of that.
    """

    neighbours: Tensor  # int32 [taps, n_out]: the input row, or -1
    pairs_per_tap: Tensor  # int64 [taps]
    in_first: Tensor  # int32 [n_in]: the lowest row of the same voxel; empty if no voxel repeats
    out_first: Tensor  # int32 [n_out], likewise
    n_in: int
    geometry: Geometry
    operation: int  # of OPERATIONS
    symmetric: bool  # transposing only mirrors the taps
    is_transposed: bool
    _transposed: KernelMap | None = dataclasses.field(default=None, repr=False)
    # By options the tensors of a schedule; by what is asked for what runs.
    _schedules: dict[tuple[int, ...], list[Tensor]] = dataclasses.field(default_factory=dict)
    _choices: dict[Asked, Choice] = dataclasses.field(default_factory=dict)
    _status: _Status | None = None

    def __getstate__(self) -> dict[str, object]:
        """For pickle and copy: without what is on its way from a device."""
        return {**vars(self), "_status": None}

    @property
    def n_out(self) -> int:
        return self.neighbours.shape[1]

    @property
    def taps(self) -> int:
        return self.neighbours.shape[0]

    @property
    def pairs(self) -> int:
        """The sum of pairs_per_tap. Waits for a CUDA device."""
        return int(call(ops._pairs.default, self.tensors(), self.layer()))

    def tensors(self, schedule: Iterable[Tensor] = ()) -> list[Tensor]:
        """What crosses to C++; a schedule of the map comes behind it."""
        return [self.neighbours, self.pairs_per_tap, self.in_first, self.out_first, *schedule]

    def layer(
        self,
        precision: int = 0,
        schedule: tuple[int, ...] = (0, 1, 128, 128),
        filter: tuple[int, ...] = (),
    ) -> list[int]:
        """The numbers that cross to C++ beside the tensors (struct Layer)."""
        flags = [self.n_in, self.operation, int(self.symmetric), int(self.is_transposed)]
        return [*flags, *self.geometry.numbers(), precision, *schedule, *filter]

    def choice(self, asked: Asked) -> Choice:
        """What a pass runs, found once: while a graph is traced, the operator finds it itself."""
        if torch.compiler.is_compiling():
            return Choice([], self.layer(asked.precision, filter=asked.filter))
        if asked not in self._choices:
            layer = self.layer(asked.precision, filter=asked.filter)
            dtype = index_in(DTYPES, asked.dtype, "the dtype")
            problem = [asked.number, dtype, asked.c_in, asked.c_out]
            order, groups, tile_rows, chunk_rows, *name = call(
                ops._choice.default, self.tensors(), layer, problem
            ).tolist()
            options = (order, groups, tile_rows, chunk_rows)
            backward = asked.number == 1 and not self.symmetric
            parts = (self.transposed() if backward else self).schedule(options)
            layer = self.layer(asked.precision, options, (-1, *name))
            self._choices[asked] = Choice(parts, layer)
        return self._choices[asked]

    def schedule(self, options: tuple[int, ...]) -> list[Tensor]:
        """The tensors of a schedule with these options, built once."""
        if options not in self._schedules:
            parts = call(ops._schedule.default, self.tensors(), self.layer(), list(options))
            self._schedules[options] = parts
        return self._schedules[options]

    def watch(self) -> KernelMap:
        """Asks a CUDA device, without waiting, for what settle() must know."""
        if not self.neighbours.is_cuda or torch.compiler.is_compiling():
            return self
        if not torch.cuda.is_current_stream_capturing():
            self._status = _Status(call(ops._map_status.default, self.tensors(), self.layer()))
        return self

    def settle(self, wait: bool) -> None:
        """Raises if a CUDA map could not be built; forgets the first rows if nothing repeats.

        Unless it is to wait, only where the device has already answered.
        """
        status = self._status
        if status is None or torch.compiler.is_compiling() or not status.arrived(wait):
            return
        self._status = None
        numbers = status.host.tolist()
        if numbers[0] < 0:
            self.pairs  # noqa: B018  raises with the reason
        if numbers[status.in_place] == 0:
            self.in_first = self.in_first[:0]
        if numbers[status.out_place] == 0:
            self.out_first = self.out_first[:0]

    def transposed(self) -> KernelMap:
        """The same pairs with the sides exchanged: for inverse convolutions and gradients."""
        if self._transposed is None:
            # The way back is a copy of this map, not this map: no cycle keeps memory alive. Its
            # tensors are views: torch 2.10 cannot trace a function that sees one tensor twice.
            views = {name: getattr(self, name).detach() for name in _TENSORS}
            neighbours, pairs = call(ops._transpose.default, self.tensors(), self.layer())
            self._transposed = KernelMap(
                neighbours=neighbours,
                pairs_per_tap=pairs,
                in_first=self.out_first.detach(),
                out_first=self.in_first.detach(),
                n_in=self.n_out,
                geometry=self.geometry,
                operation=(0, 2, 1)[self.operation],
                symmetric=self.symmetric,
                is_transposed=not self.is_transposed,
                _transposed=dataclasses.replace(self, **views),
                _status=self._status and self._status.transposed(),
            )
        return self._transposed

    def backward_tensors(
        self, schedule: Iterable[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The two maps of grad_input, the second empty where mirrored taps do; the schedule is of
        the one that is walked."""
        if self.symmetric:
            return self.tensors(schedule), []
        return self.tensors(), self.transposed().tensors(schedule)

    def __repr__(self) -> str:
        size, stride = self.geometry.size, self.geometry.stride
        return (
            f"KernelMap({OPERATIONS[self.operation]}, kernel_size={size}, stride={stride}, "
            f"n_in={self.n_in}, n_out={self.n_out})"
        )


_TENSORS = ("neighbours", "pairs_per_tap", "in_first", "out_first")
_CONTEXT = ("geometry", "operation", "symmetric", "is_transposed")
pytree.register_pytree_node(
    KernelMap,
    lambda map: ([*map.tensors(), map.n_in], tuple(getattr(map, name) for name in _CONTEXT)),
    lambda leaves, context: KernelMap(*leaves, *context),
    serialized_type_name="voxgemm.KernelMap",
    to_dumpable_context=lambda context: [context[0].numbers(), *context[1:]],
    from_dumpable_context=lambda values: (
        Geometry(*(tuple(values[0][i : i + 3]) for i in range(0, 12, 3))),
        *values[1:],
    ),
)


class UniqueCoords(NamedTuple):
    coords: Tensor  # int32 [m, 4], in order of first appearance
    first_row: Tensor  # int32 [m]: the lowest row of each
    inverse: Tensor  # int32 [n]: which of the m each row became


def unique(coords: Tensor) -> UniqueCoords:
    """Distinct coordinates of int32 [n, 4] (batch, x, y, z) rows."""
    return UniqueCoords(*call(ops._unique.default, coords))


def output_coords(
    coords: Tensor,
    geometry: Geometry,
    output_rule: str = "reached",
    spatial_shape: Triple | None = None,
) -> Tensor:
    """The output voxels of a strided convolution, int32 [m, 4], ascending.

    'reached': every voxel some input reaches through some tap, inside
    `geometry.out_shape(spatial_shape)` if a shape is given. 'floor': floor(in / stride).
    """
    rule = index_in(OUTPUT_RULES, output_rule, "output_rule")
    return call(ops._output_coords.default, coords, geometry.numbers(), rule, spatial_shape)


def build_map(
    coords: Tensor,
    kernel_size: int | Triple,
    *,
    out_coords: Tensor | None = None,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
) -> KernelMap:
    """The map of coords int32 [n, 4]: submanifold (outputs are inputs), or to `out_coords`."""
    size = triple(kernel_size, "kernel_size")
    spread = triple(dilation, "dilation")
    if out_coords is not None:
        steps, margins = triple(stride, "stride"), triple(padding, "padding")
        return strided_map(coords, out_coords, Geometry(size, steps, margins, spread))
    if stride not in (1, (1, 1, 1)) or padding not in (0, (0, 0, 0)):
        raise ArgumentError(
            f"stride is {stride} and padding {padding} without out_coords; a submanifold map has "
            "stride 1 and the padding that centres its kernel"
        )
    return submanifold_map(coords, Geometry.submanifold(size, spread))


def submanifold_map(coords: Tensor, geometry: Geometry) -> KernelMap:
    table, pairs, first = call(ops._submanifold_map.default, coords, geometry.numbers())
    odd = all(k % 2 == 1 for k in geometry.size)
    map = KernelMap(table, pairs, first, first, coords.shape[0], geometry, 0, odd, False)
    return map.watch()


def strided_map(coords: Tensor, out_coords: Tensor, geometry: Geometry) -> KernelMap:
    parts = call(ops._kernel_map.default, coords, out_coords, geometry.numbers())
    return KernelMap(*parts, coords.shape[0], geometry, 1, False, False).watch()


# The passes are bilinear and each other's gradients: derivatives of any order stay among them.
# `how` is the filters of the three passes and the precision.
class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, map, how):
        ctx.save_for_backward(x, weight)
        ctx.map, ctx.how = map, how
        map.settle(wait=False)
        choice = map.choice(_asked(0, *_channels(weight), weight.dtype, how))
        return call(
            ops._forward.default, x, weight, bias, map.tensors(choice.schedule), choice.layer
        )

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _GradInput.apply(dy, weight, ctx.map, ctx.how)
        wanted = list(ctx.needs_input_grad[1:3])
        if any(wanted):
            dw, db = _GradWeight.apply(x, dy, ctx.map, ctx.how, wanted)
        return dx, dw if wanted[0] else None, db if wanted[1] else None, None, None


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, weight, map, how):
        ctx.save_for_backward(dy, weight)
        ctx.map, ctx.how = map, how
        map.settle(wait=True)
        choice = map.choice(_asked(1, *_channels(weight), weight.dtype, how))
        return call(
            ops._grad_input.default,
            dy,
            weight,
            *map.backward_tensors(choice.schedule),
            choice.layer,
        )

    @staticmethod
    def backward(ctx, g):
        dy, weight = ctx.saved_tensors
        d_dy = dw = None
        if ctx.needs_input_grad[0]:
            d_dy = _Forward.apply(g, weight, None, ctx.map, ctx.how)
        if ctx.needs_input_grad[1]:
            dw, _ = _GradWeight.apply(g, dy, ctx.map, ctx.how, [True, False])
        return d_dy, dw, None, None


class _GradWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dy, map, how, wanted):
        ctx.save_for_backward(x, dy)
        ctx.map, ctx.how, ctx.wanted = map, how, wanted
        map.settle(wait=True)
        choice = map.choice(_asked(2, x.shape[1], dy.shape[1], dy.dtype, how))
        tensors = map.tensors(choice.schedule)
        return call(ops._grad_weight.default, x, dy, tensors, choice.layer, wanted)

    @staticmethod
    def backward(ctx, g, g_bias):
        x, dy = ctx.saved_tensors
        dx = d_dy = None
        if ctx.needs_input_grad[0] and ctx.wanted[0]:
            dx = _GradInput.apply(dy, g, ctx.map, ctx.how)
        if ctx.needs_input_grad[1]:
            # <g, dw> + <g_bias, db> is <conv(x, g) + g_bias, dy>.
            if ctx.wanted[0]:
                bias = g_bias if ctx.wanted[1] else None
                d_dy = _Forward.apply(x, g, bias, ctx.map, ctx.how)
            else:
                d_dy = g_bias.expand_as(dy)
        return dx, d_dy, None, None, None


class _How(NamedTuple):
    filters: Filters
    precision: int


def _channels(weight: Tensor) -> tuple[int, int]:
    """c_in and c_out; of no weights at all, which the operator will say, anything."""
    return (weight.shape[4], weight.shape[0]) if weight.ndim == 5 else (1, 1)


def _asked(number: int, c_in: int, c_out: int, dtype: torch.dtype, how: _How) -> Asked:
    return Asked(number, c_in, c_out, dtype, how.precision, how.filters[number])


def conv3d(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: KernelMap,
    algorithm: object = None,
    precision: str | None = None,
) -> Tensor:
    """Sparse convolution: [n_out, c_out] from features [n_in, c_in] on a map of any kind.

    weight [c_out, Kx, Ky, Kz, c_in], bias [c_out] or None, all of one dtype (under autocast: any).
    `algorithm`: see `Algorithm`; a name, a list of them, or a dict by pass. `precision` of float32
    products on CUDA: 'ieee', 'tf32', 'bf16x3' (about 16 bits) or 'bf16x6' (about 24); without, as
    `torch.backends.cuda.matmul.fp32_precision` says.
    """
    if features.device != map.neighbours.device:
        raise ArgumentError(f"features is on {features.device}, the map on {map.neighbours.device}")
    kind = features.device.type
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not map.symmetric and features.requires_grad and torch.is_grad_enabled():
        # For the backward: made here, where the map can keep it, also while a graph is traced.
        map.transposed()
    how = _How(filters_of(algorithm), precision_of(precision, features))
    return _Forward.apply(features, weight, bias, map, how)


def inverse_conv3d(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: KernelMap,
    algorithm: object = None,
    precision: str | None = None,
) -> Tensor:
    """Back through a strided convolution's map: [n_in, c_out] from features [n_out, c_in]."""
    return conv3d(features, weight, bias, map.transposed(), algorithm, precision)


def explain(
    map: KernelMap,
    c_in: int,
    c_out: int,
    dtype: torch.dtype = torch.float32,
    algorithm: object = None,
) -> str:
    """By pass: the kernel that runs; of every other its predicted time or why it cannot."""
    if dtype not in DTYPES:
        raise ArgumentError(
            f"dtype is {dtype}, expected one of {', '.join(str(d) for d in DTYPES)}"
        )
    tables = []
    for number, filter in enumerate(filters_of(algorithm)):
        problem = [number, DTYPES.index(dtype), c_in, c_out]
        tables.append(
            text_of(call(ops._explain.default, map.tensors(), map.layer(filter=filter), problem))
        )
    return "\n".join(tables)
