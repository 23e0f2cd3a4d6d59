# SPDX-License-Identifier: Apache-2.0
"""Sparse convolution of Voxels, and the coordinates and pairs that it has."""

from __future__ import annotations

import dataclasses
import enum
import functools
import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxgemm import ArgumentError, depthwise, kernel_map, passes
from voxgemm.algorithms import precision_of
from voxgemm.columns import narrow
from voxgemm.geometry import Geometry
from voxgemm.kernel_map import KernelMap

from ..._search import Names
from ...geometry import _rows
from ...geometry.coords.integer import IntCoords
from ...geometry.coords.ops.serialization import POINT_ORDERING, order_rows
from ...geometry.coords.search.search_results import IntSearchResult
from ...geometry.coords.search.torch_discrete import identity_of
from ...geometry.features.cat import CatFeatures
from ...geometry.types.voxels import Voxels
from ._choice import (
    Now,
    Search,
    environment,
    how_of,
    how_of_backward,
    memo_of,
    names_by_pass,
)


class _Mode(enum.Enum):
    """Members are looked up at every call; an enumeration's own hash is Python code."""

    __hash__ = object.__hash__


class SPARSE_CONV_FWD_ALGO_MODE(_Mode):
    EXPLICIT_GEMM = "explicit_gemm"
    IMPLICIT_GEMM = "implicit_gemm"
    CUTLASS_IMPLICIT_GEMM = "cutlass_implicit_gemm"
    AUTO = "auto"


class SPARSE_CONV_BWD_ALGO_MODE(_Mode):
    EXPLICIT_GEMM = "explicit_gemm"
    IMPLICIT_GEMM = "implicit_gemm"
    CUTLASS_IMPLICIT_GEMM = "cutlass_implicit_gemm"
    AUTO = "auto"


class SPARSE_CONV_AB_ALGO_MODE(_Mode):
    """Today's names of forward and input gradient."""

    EXPLICIT_GEMM = "explicit_gemm"
    EXPLICIT_GEMM_GROUPED = "explicit_gemm_grouped"
    IMPLICIT_GEMM = "implicit_gemm"
    IMPLICIT_GEMM_GROUPED = "implicit_gemm_grouped"
    CUTLASS_IMPLICIT_GEMM = "cutlass_implicit_gemm"
    CUTLASS_GROUPED_HYBRID = "cutlass_grouped_hybrid"
    CUTE_IMPLICIT_GEMM = "cute_implicit_gemm"
    CUTE_GROUPED = "cute_grouped"
    CUTE_IMPLICIT_GEMM_SM90 = "cute_implicit_gemm_sm90"
    CUTE_GROUPED_SM90 = "cute_grouped_sm90"
    MASK_GEMM = "mask_gemm"
    AUTO = "auto"
    ALL = "all"
    TRIMMED = "trimmed"


SPARSE_CONV_ATB_ALGO_MODE = _Mode(
    "SPARSE_CONV_ATB_ALGO_MODE",
    {member.name: member.value for member in SPARSE_CONV_AB_ALGO_MODE},
    module=__name__,
)


class STRIDED_CONV_MODE(_Mode):
    REDUCE_AND_STRIDE = "reduce_and_stride"
    STRIDE_ONLY = "stride_only"


class Shape(NamedTuple):
    """What a convolution does with coordinates."""

    kernel_size: _rows.Sizes
    dilation: _rows.Sizes
    stride: _rows.Sizes
    generative: bool
    transposed: bool
    order: POINT_ORDERING
    centred: bool = True  # the kernel, around stride * u

    def geometry(self) -> Geometry:
        found = _rows.geometry_of(self.kernel_size, self.stride, self.dilation)
        return found if self.centred else found._replace(padding=(0, 0, 0))


class Place(NamedTuple):
    """Where a convolution leads; a product by rows needs no map."""

    coordinates: IntCoords
    map: KernelMap | None


@dataclasses.dataclass(eq=False, frozen=True)
class Layer:
    """Everything of a convolution but its tensors; one object per distinct layer."""

    shape: Shape
    mode: STRIDED_CONV_MODE
    reduction: str
    groups: int
    search: Search
    point: bool  # 1x1 with stride 1 and no order
    plain: bool  # leads to outputs of its own, straight from the input
    size: tuple[int, int, int]
    ordering: POINT_ORDERING | None  # that the outputs follow and the inputs do not


@functools.lru_cache(maxsize=4096)
def layer_of(
    shape: Shape,
    mode: STRIDED_CONV_MODE,
    reduction: str,
    groups: int,
    names: tuple[Names, Names, Names],
) -> Layer:
    configuration = (*shape[:5], mode.value, groups)
    search = Search(names, " ".join(map(str, configuration)))
    random = shape.order == POINT_ORDERING.RANDOM
    point = random and max(shape.kernel_size) == max(shape.stride) == 1
    reduces = mode == STRIDED_CONV_MODE.REDUCE_AND_STRIDE and max(shape.stride) > 1
    plain = not (shape.generative or shape.transposed or reduces)
    size = (*shape.kernel_size, *(1,) * (3 - len(shape.kernel_size)))
    ordering = None if random else shape.order
    return Layer(shape, mode, reduction, groups, search, point, plain, size, ordering)


def _check(shape: Shape, target: Voxels | None, mode: STRIDED_CONV_MODE) -> None:
    if shape.generative and target is not None:
        raise ArgumentError("a generative convolution makes its outputs, so it takes no target")
    if shape.transposed and target is None and not shape.generative:
        raise ArgumentError(
            "a transposed convolution needs output_spatially_sparse_tensor, or to be generative"
        )
    if mode == STRIDED_CONV_MODE.REDUCE_AND_STRIDE and shape.transposed:
        raise ArgumentError("REDUCE_AND_STRIDE does not go with transposed")


def _out_stride(x: Voxels, shape: Shape, target: Voxels | None) -> tuple[int, ...] | None:
    """The outputs' tensor_stride; one that is not stated is taken as 1."""
    mine = x.tensor_stride
    theirs = target.tensor_stride if target is not None else None
    if mine is not None and theirs is not None:
        fine, coarse = (theirs, mine) if shape.transposed else (mine, theirs)
        if tuple(f * s for f, s in zip(fine, shape.stride, strict=True)) != coarse:
            raise ArgumentError(
                f"tensor_stride is {mine} of the input and {theirs} of the target, which a stride "
                f"of {shape.stride} does not lead to"
            )
    if target is not None:
        return theirs
    mine = mine or (1,) * x.num_spatial_dims
    if shape.transposed:
        if any(m % s for m, s in zip(mine, shape.stride, strict=True)):
            return None
        return tuple(m // s for m, s in zip(mine, shape.stride, strict=True))
    return tuple(m * s for m, s in zip(mine, shape.stride, strict=True))


def _out_coordinates(x: Voxels, shape: Shape, target: Voxels | None) -> IntCoords:
    """The output rows; those of the input themselves where they are the same."""
    if target is not None:
        return target.batched_coordinates
    source, ones = x.batched_coordinates, (1,) * x.num_spatial_dims
    keeps = shape.stride == ones and not shape.generative
    if keeps and shape.order == POINT_ORDERING.RANDOM:
        return source
    rows = source.rows()
    what = ("outputs", *(shape[:6] if shape.generative else shape[2:6]), x.tensor_stride)
    found = x.cache.get(what, rows)
    if found is None:
        made = rows
        if shape.transposed:
            scale = torch.tensor((1, *shape.stride, *(1,) * (3 - len(ones))), device=rows.device)
            made = narrow(rows.long() * scale, "the outputs")
        elif shape.stride != ones:
            made = _rows.strided(rows, shape.stride)
        if shape.generative:
            made = _rows.expanded(made, shape.kernel_size, shape.dilation)
        if shape.order != POINT_ORDERING.RANDOM:
            made = made[order_rows(made, shape.order).permutation].contiguous()
        stride = _out_stride(x, shape, None)
        found = IntCoords.of_rows(made, x.num_spatial_dims, x.batch_size, stride)
        x.cache.put(found, what, rows)
    return found


def _place(x: Voxels, shape: Shape, target: Voxels | None) -> Place:
    coordinates = _out_coordinates(x, shape, target)
    here, there = x.batched_coordinates.rows(), coordinates.rows()
    geometry = shape.geometry()
    fine, coarse = (there, here) if shape.transposed else (here, there)
    map = x.cache.get(geometry, fine, coarse)
    if map is None and target is not None:
        map = target.cache.get(geometry, fine, coarse)
    if map is None:
        odd = all(k % 2 for k in shape.kernel_size)
        if fine is coarse and odd and max(shape.stride) == 1:
            map = kernel_map.submanifold_map(fine, geometry)
        else:
            map = kernel_map.strided_map(fine, coarse, geometry)
        x.cache.put(map, geometry, fine, coarse)
    if shape.transposed:
        map = map.transposed()
    return Place(coordinates, map)


def _shape(
    x: Voxels,
    kernel_size: Any,
    kernel_dilation: Any,
    stride: Any,
    flags: tuple[bool, bool],
    order: POINT_ORDERING,
) -> Shape:
    given = (kernel_size, kernel_dilation, stride)
    if any(isinstance(value, list | Tensor) for value in given):
        axes = x.num_spatial_dims
        names = ("kernel_size", "kernel_dilation", "stride")
        given = tuple(_rows.sizes(v, axes, name) for v, name in zip(given, names, strict=True))
    return shape_of(x.num_spatial_dims, *given, flags, order)


@functools.lru_cache(maxsize=4096)
def shape_of(
    axes: int,
    kernel_size: Any,
    kernel_dilation: Any,
    stride: Any,
    flags: tuple[bool, bool],
    order: POINT_ORDERING,
) -> Shape:
    return Shape(
        _rows.sizes(kernel_size, axes, "kernel_size"),
        _rows.sizes(kernel_dilation, axes, "kernel_dilation"),
        _rows.sizes(stride, axes, "stride"),
        *flags,
        order,
    )


@torch.no_grad()
def generate_output_coords_and_kernel_map(
    input_sparse_tensor: Voxels,
    kernel_size: Any,
    kernel_dilation: Any = 1,
    stride: Any = 1,
    generative: bool = False,
    transposed: bool = False,
    output_spatially_sparse_tensor: Voxels | None = None,
    stride_mode: STRIDED_CONV_MODE = STRIDED_CONV_MODE.STRIDE_ONLY,
    order: POINT_ORDERING = POINT_ORDERING.RANDOM,
) -> tuple[Tensor, Tensor, IntSearchResult]:
    """The output rows int32 [M, 1 + D], their offsets [B + 1] on the CPU, and the pairs by tap."""
    x, target = input_sparse_tensor, output_spatially_sparse_tensor
    shape = _shape(x, kernel_size, kernel_dilation, stride, (generative, transposed), order)
    _check(shape, target, stride_mode)
    if stride_mode == STRIDED_CONV_MODE.REDUCE_AND_STRIDE and max(shape.stride) > 1:
        pooled = _rows.strided(x.batched_coordinates.rows(), shape.stride)
        coordinates = IntCoords.of_rows(pooled, x.num_spatial_dims, x.batch_size, None)
        features = torch.empty((len(pooled), 0), device=x.device)
        x = x.replace(coordinates, CatFeatures(features, coordinates.offsets))
        shape = shape._replace(stride=(1,) * x.num_spatial_dims)
    place = _place(x, shape, target)
    place.map.settle(wait=True)
    found = IntSearchResult.of_table(place.map.neighbours, identity_of(place.map))
    return place.coordinates.batch_indexed_coordinates, place.coordinates.offsets, found


class Convolution(torch.autograd.Function):
    """Of features, a weight [K, C_in, C_out], a bias and a map, with searched passes."""

    @staticmethod
    def forward(ctx, x, weight, bias, map, layer):
        ctx.save_for_backward(x, weight)
        kernel = _kernel(weight, layer.size)
        what = (layer.search, 0, weight.shape[1:], x.dtype, precision_of(None, x))
        # The view again in the backward, unless that is recorded (weight itself counts) or traced.
        ctx.kernel = None if torch.compiler.is_compiling() else kernel
        ctx.map, ctx.layer, ctx.what = map, layer, what
        how = memo_of(map).get(what) or how_of(what, map, _forward_now(x, kernel, bias, map))
        return passes.run_forward(x, kernel, bias, map, how)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        map, layer, wanted = ctx.map, ctx.layer, ctx.needs_input_grad
        recorded = torch.is_grad_enabled()
        kernel = ctx.kernel
        if recorded or kernel is None:
            kernel = _kernel(weight, layer.size)
        search, _, channels, dtype, precision = ctx.what
        what = (search, wanted[:2], channels, dtype, precision)
        how = memo_of(map).get(what)
        if how is None:
            how = how_of_backward(what, map, _backward_now(dy, x, kernel, map, wanted))
        dx, dw, db = passes.gradients(dy, x, kernel, map, how, wanted)
        if dw is not None:
            taps, c_in, _ = weight.shape
            if recorded:
                dw = dw.permute(1, 2, 3, 4, 0).reshape(weight.shape)
            else:
                dw = dw.as_strided(weight.shape, (c_in, 1, taps * c_in))  # of [C_out, K, C_in]
        return dx, dw, db, None, None


def _forward_now(x: Tensor, kernel: Tensor, bias: Tensor | None, map: KernelMap) -> Now:
    def magnitude() -> Tensor:
        sums = x.abs().max().double() * kernel.abs().double().sum((1, 2, 3, 4))
        return sums if bias is None else sums + bias.abs()

    def run(how: passes.How) -> Tensor:
        return passes.run_forward(x, kernel, bias, map, how)

    return Now(x, run, magnitude, map.taps * kernel.shape[4] + 1)


def _backward_now(
    dy: Tensor, x: Tensor, kernel: Tensor, map: KernelMap, wanted: tuple[bool, ...]
) -> tuple[Now | None, Now | None]:
    """The gradients of input and weight."""

    def of_x() -> Tensor:
        return dy.abs().max().double() * kernel.abs().double().sum((0, 1, 2, 3))

    def of_weight() -> Tensor:
        return x.abs().max().double() * dy.abs().max() * map.n_out

    def run(how: passes.How, only: tuple[bool, bool, bool]) -> Any:
        return passes.gradients(dy, x, kernel, map, how, only)

    first = functools.partial(run, only=(True, False, False))
    second = functools.partial(run, only=(False, True, False))
    return (
        Now(dy, first, of_x, map.taps * kernel.shape[0]) if wanted[0] else None,
        Now(dy, second, of_weight, map.n_out) if wanted[1] else None,
    )


def _kernel(weight: Tensor, size: tuple[int, int, int]) -> Tensor:
    """[C_out, Kx, Ky, Kz, C_in], a view of [K, C_in, C_out]."""
    if torch.is_grad_enabled():
        return weight.view(*size, *weight.shape[1:]).permute(4, 0, 1, 2, 3)
    taps, c_in, c_out = weight.shape
    tap, row, column = weight.stride()
    # In one step, which costs a third of two.
    strides = (column, size[1] * size[2] * tap, size[2] * tap, tap, row)
    return weight.as_strided((c_out, *size, c_in), strides)


def _check_weight(weight: Tensor, channels: int, layer: Layer) -> None:
    shape, groups = weight.shape, layer.groups
    taps = layer.size[0] * layer.size[1] * layer.size[2]
    if len(shape) != (3 if groups == 1 else 4) or shape[0] != taps:
        expected = "[K, C_in, C_out]" if groups == 1 else "[K, G, C_in / G, C_out / G]"
        raise ArgumentError(
            f"weight is {list(shape)} for a kernel of {layer.shape.kernel_size} and {groups} "
            f"groups, expected {expected}"
        )
    if groups > 1 and shape[1] != groups:
        raise ArgumentError(f"weight has {shape[1]} groups, expected {groups}")
    if channels != shape[-2] * groups:
        raise ArgumentError(
            f"features have {channels} channels, the weight takes {shape[-2] * groups}"
        )


def spatially_sparse_conv(
    input_sparse_tensor: Voxels,
    weight: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    kernel_dilation: Any = 1,
    bias: Tensor | None = None,
    kernel_matmul_batch_size: int = 2,
    generative: bool = False,
    output_spatially_sparse_tensor: Voxels | None = None,
    transposed: bool = False,
    fwd_algo: Any = None,
    bwd_algo: Any = None,
    stride_mode: STRIDED_CONV_MODE = STRIDED_CONV_MODE.STRIDE_ONLY,
    stride_reduce: str = "max",
    order: POINT_ORDERING = POINT_ORDERING.RANDOM,
    compute_dtype: torch.dtype | None = None,
    implicit_matmul_fwd_block_size: int | None = 16,
    implicit_matmul_bwd_block_size: int | None = 16,
    *,
    dgrad_algo: Any = None,
    wgrad_algo: Any = None,
    groups: int = 1,
    use_fp16_accum: bool | None = None,
) -> Voxels:
    """out[u] = bias + sum over taps i of x[stride * u + offset_i] @ weight[i].

    weight [K, C_in, C_out] (with groups [K, G, C_in / G, C_out / G]), taps row-major, offset_i =
    (k - centre) * dilation, the centre of an even size its first tap. fwd_algo, bwd_algo,
    dgrad_algo and wgrad_algo are search spaces: a member, a name, or a list of these; None is the
    environment's. kernel_matmul_batch_size, the block sizes and use_fp16_accum have no effect.
    """
    x = input_sparse_tensor
    if not isinstance(x, Voxels):
        names_by_pass(fwd_algo, bwd_algo, dgrad_algo, wgrad_algo)
        raise TypeError(f"input_sparse_tensor is a {type(x).__name__}, expected Voxels")
    key = (
        *(kernel_size, stride, kernel_dilation, generative, transposed, stride_mode),
        *(stride_reduce, order, groups, x.batched_coordinates.batched_tensor.shape[1]),
        tuple(fwd_algo) if isinstance(fwd_algo, list) else fwd_algo,
        tuple(bwd_algo) if isinstance(bwd_algo, list) else bwd_algo,
        *(dgrad_algo, wgrad_algo, environment()),
    )
    try:
        layer = _KNOWN.get(key)
    except TypeError:  # of lists and sets
        layer = key = None
    if layer is None:
        names = names_by_pass(fwd_algo, bwd_algo, dgrad_algo, wgrad_algo)
        flags = (generative, transposed)
        shape = _shape(x, kernel_size, kernel_dilation, stride, flags, order)
        layer = layer_of(shape, stride_mode, stride_reduce, groups, names)
        tensors = any(isinstance(v, Tensor) for v in (kernel_size, stride, kernel_dilation))
        if key is not None and not tensors and len(_KNOWN) < 4096:
            _KNOWN[key] = layer
    return convolve(x, (weight, bias, compute_dtype), layer, output_spatially_sparse_tensor)


# Layers by the call as it was written, the environment's part in it included.
_KNOWN: dict[Hashable, Layer] = {}


def find(x: Voxels, shape: Shape, target: Voxels | None, key: Hashable) -> Place:
    """The place of a layer, kept with the input's coordinates."""
    source = x.batched_coordinates
    source.rows()  # forgets places of rows that changed
    there = None if target is None else target.batched_coordinates
    if there is not None:
        key = (key, id(there))
    known = source.places.get(key)
    strides = (source.tensor_stride, there and there.tensor_stride)
    if known is not None and known[0] == strides:
        if there is None:
            return Place(source if known[1] is None else known[1], known[2])
        if known[3]() is there and known[4]() is there.rows():
            return Place(there, known[2])
    stride = _out_stride(x, shape, target)
    place = _place(x, shape, target)
    coordinates = place.coordinates
    if target is None and coordinates is not source and coordinates.tensor_stride != stride:
        coordinates = _with_stride(coordinates, stride)
    # Not the coordinates that keep it themselves, nor a target's: no cycle, no longer lives.
    kept = None if coordinates is source or target is not None else coordinates
    refs = (weakref.ref(coordinates), weakref.ref(coordinates.rows()))
    source.places[key] = (strides, kept, place.map, *refs)
    return Place(coordinates, place.map)


def convolve(
    x: Voxels,
    parameters: tuple[Tensor, Tensor | None, torch.dtype | None],
    layer: Layer,
    target: Voxels | None,
) -> Voxels:
    """spatially_sparse_conv of a known layer."""
    shape: Shape = layer.shape
    weight, bias, compute_dtype = parameters
    key: Hashable = layer
    if target is not None or not layer.plain:
        _check(shape, target, layer.mode)
        if layer.mode == STRIDED_CONV_MODE.REDUCE_AND_STRIDE and max(shape.stride) > 1:
            from .sparse_pool import sparse_reduce

            x = sparse_reduce(x, shape.stride, shape.stride, layer.reduction)
            shape = shape._replace(stride=(1,) * x.num_spatial_dims)
            key = (layer, "reduced")
    if x.batched_features.is_pad:
        x = x.to_cat()
    features = x.feature_tensor
    dtype = features.dtype
    computed = compute_dtype or dtype
    _check_weight(weight, features.shape[1], layer)
    if weight.dtype != computed or dtype != computed:
        features, weight = features.to(computed), weight.to(computed)
    if bias is not None and bias.dtype != computed:
        bias = bias.to(computed)
    if layer.point and target is None:
        place = Place(x.batched_coordinates, None)
        out = _by_row(features, weight, bias, layer.groups)
    else:
        place = find(x, shape, target, key)
        out = _by_group(features, weight, bias, place.map, layer)
    return x.on(place[0], out if computed == dtype else out.to(dtype), layer.ordering)


def _with_stride(coordinates: IntCoords, stride: tuple[int, ...] | None) -> IntCoords:
    """The same rows, so that kernel maps are found again."""
    other = IntCoords(coordinates.batched_tensor, coordinates.offsets, tensor_stride=stride)
    other._rows = (
        coordinates.batched_tensor,
        coordinates.batched_tensor._version,
        coordinates.rows(),
    )
    return other


def _by_row(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    if groups == 1:
        return torch.nn.functional.linear(x, weight[0].t(), bias)
    out = torch.einsum("ngi,gio->ngo", x.view(len(x), groups, -1), weight[0]).reshape(len(x), -1)
    return out if bias is None else out + bias


def _by_group(
    x: Tensor, weight: Tensor, bias: Tensor | None, map: KernelMap, layer: Layer
) -> Tensor:
    """Each group is a convolution of its own channels; one channel a group is depthwise."""
    groups = layer.groups
    if groups == 1:
        return Convolution.apply(x, weight, bias, map, layer)
    if groups == x.shape[1] and weight.shape[3] == 1:
        return depthwise.depthwise_conv3d(x, weight[:, :, 0, 0], bias, map)
    biases = [None] * groups if bias is None else bias.chunk(groups)
    parts = zip(x.chunk(groups, 1), weight.unbind(1), biases, strict=True)
    return torch.cat([Convolution.apply(*part, map, layer) for part in parts], 1)
