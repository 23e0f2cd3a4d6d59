# SPDX-License-Identifier: Apache-2.0
"""Kernel maps, and convolutions on them as functions of plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tuning
from .algorithms import (
    DTYPES,
    OPERATIONS,
    OUTPUT_RULES,
    PASSES,
    PRECISIONS,
    Algorithm,
    Filters,
    filters_of,
    index_in,
    precision_of,
)
from .errors import ArgumentError
from .geometry import Geometry, Triple
from .kernel_map import (
    PADDING_BATCH,
    Asked,
    Choice,
    KernelMap,
    UniqueCoords,
    build_map,
    generated_coords,
    output_coords,
    strided_map,
    submanifold_map,
    unique,
)
from .passes import Forward, FusedForward, How, applied, inside_transform

__all__ = [
    "DTYPES",
    "OPERATIONS",
    "OUTPUT_RULES",
    "PADDING_BATCH",
    "PASSES",
    "PRECISIONS",
    "Algorithm",
    "Asked",
    "Choice",
    "Filters",
    "Geometry",
    "KernelMap",
    "Triple",
    "UniqueCoords",
    "build_map",
    "conv3d",
    "explain",
    "explanations",
    "filters_of",
    "generated_coords",
    "inverse_conv3d",
    "output_coords",
    "strided_map",
    "submanifold_map",
    "unique",
]


def conv3d(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: KernelMap,
    algorithm: object = None,
    precision: str | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Sparse convolution: [n_out, c_out] from features [n_in, c_in] on a map of any kind.

    y[o] = bias + sum over the map's pairs (i, o, tap) of weight[:, tap] @ features[i], for weight
    [c_out, Kx, Ky, Kz, c_in] and bias [c_out] or None; of repeated voxels the lowest row is read.
    `residual` [n_out, c_out] is added and with `relu` max(0, .) taken before y is rounded and
    written, in the same kernel.
    float16, bfloat16, float32 or float64, all the same (under autocast: any but float64, in
    autocast's dtype); 16-bit products are added in float32 and rounded once. No rows in give the
    bias, no rows out give none. Differentiable any number of times in all tensors.

    `algorithm` limits the choice of kernels: see `Algorithm`; a name, a list of them, or a dict by
    pass. `precision` of float32 products on CUDA: 'ieee', 'tf32', 'bf16x3' (about 16 bits) or
    'bf16x6' (about 24; tensor cores cut off what they add, so that long sums are no better than
    those of bf16x3); without, as `torch.backends.cuda.matmul.fp32_precision` says.

    >>> coords = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
    >>> weight = torch.ones(1, 3, 3, 3, 1)
    >>> vg.functional.conv3d(torch.tensor([[1.0], [2.0]]), weight, None, vg.build_map(coords, 3))
    tensor([[3.],
            [3.]])

    Raises ArgumentError: shapes, dtypes or devices that do not fit. NotImplementedError: no kernel
    inside the filter runs this; its message has every kernel's reason.
    """
    if features.device != map.neighbours.device:
        raise ArgumentError(f"features is on {features.device}, the map on {map.neighbours.device}")
    kind = features.device.type
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    recorded = torch.is_grad_enabled()
    if not map.symmetric and features.requires_grad and recorded:
        # For the backward: made here, where the map can keep it, also while a graph is traced.
        map.transposed()
    how = How(filters_of(algorithm), precision_of(precision, features), recorded)
    if residual is None and not relu:
        return applied(Forward)(features, weight, bias, map, how)
    if inside_transform():
        # These transform what they can take apart.
        y = applied(Forward)(features, weight, bias, map, how)
        y = y if residual is None else y + residual
        return y.relu() if relu else y
    return FusedForward.apply(features, weight, bias, residual, relu, map, how)


def inverse_conv3d(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: KernelMap,
    algorithm: object = None,
    precision: str | None = None,
) -> Tensor:
    """Back through a strided convolution's map: [n_in, c_out] from features [n_out, c_in].

    The same as conv3d on `map.transposed()`: taps are those of the strided convolution, weight is
    [c_out, Kx, Ky, Kz, c_in], bias [c_out] or None.

    >>> fine = torch.tensor([[0, 2, 2, 2], [0, 2, 2, 3]], dtype=torch.int32)
    >>> coarse = vg.output_coords(fine, vg.Geometry((2, 2, 2), (2, 2, 2)))
    >>> map = vg.build_map(fine, 2, out_coords=coarse, stride=2)
    >>> x, weight = torch.ones(1, 1), torch.arange(8.0).view(1, 2, 2, 2, 1)
    >>> vg.functional.inverse_conv3d(x, weight, None, map).tolist()
    [[0.0], [1.0]]

    Dtypes and errors are those of conv3d.
    """
    return conv3d(features, weight, bias, map.transposed(), algorithm, precision)


def explain(
    map: KernelMap,
    c_in: int,
    c_out: int,
    dtype: torch.dtype = torch.float32,
    algorithm: object = None,
    precision: str | None = None,
) -> str:
    """By pass: the kernel that runs and who picked it; of every other its times or why it cannot.

    Of a layer with c_in and c_out channels and operands of a dtype; nothing is computed.

    >>> map = vg.build_map(torch.zeros(1, 4, dtype=torch.int32), 3)
    >>> vg.functional.explain(map, 64, 64, torch.bfloat16).partition(" (")[0]
    'forward bf16 subm3 64->64'

    Raises ArgumentError: another dtype than conv3d takes, an unknown algorithm or precision.
    """
    index_in(DTYPES, dtype, "dtype")
    number = precision_of(precision, map.neighbours.new_empty(0, dtype=dtype))
    layer = tuning.Layer(map, c_in, c_out, dtype, number, filters_of(algorithm))
    return "\n".join(tuning.table(map, layer.asked(of_pass)) for of_pass in range(3))


def explanations(
    map: KernelMap,
    c_in: int,
    c_out: int,
    dtype: torch.dtype = torch.float32,
    algorithm: object = None,
    precision: str | None = None,
) -> list[dict[str, Any]]:
    """What explain() says of c_in, c_out and dtype, a dict for each pass: problem, rows_in,
    rows_out, pairs, device, picked, picked_by ('filter', 'store' of measured times, or 'model') and
    candidates, each with kernel, predicted_ms, measured_ms and reason (why it cannot run); None
    where there is none.

    >>> map = vg.build_map(torch.zeros(1, 4, dtype=torch.int32), 3)
    >>> vg.functional.explanations(map, 64, 64)[2]["problem"]
    'grad_weight f32 subm3 64->64'

    Raises ArgumentError: as explain.
    """
    index_in(DTYPES, dtype, "dtype")
    number = precision_of(precision, map.neighbours.new_empty(0, dtype=dtype))
    layer = tuning.Layer(map, c_in, c_out, dtype, number, filters_of(algorithm))
    return [tuning.explanation(map, layer.asked(of_pass)) for of_pass in range(3)]
