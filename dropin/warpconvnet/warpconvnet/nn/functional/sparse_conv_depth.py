# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution on a kernel map."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

import voxgemm
from voxgemm import ArgumentError, depthwise
from voxgemm.kernel_map import KernelMap
from voxgemm.pooling import segment_reduce

from ... import _tuning, constants
from ..._search import Candidate, Names, candidates, names_of
from ...geometry.coords.search.search_results import IntSearchResult


class _Mode(enum.Enum):
    __hash__ = object.__hash__  # an enumeration's own is Python code, and every call asks


class SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE(_Mode):
    EXPLICIT = "explicit"
    IMPLICIT = "implicit"
    AUTO = "auto"


class SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE(_Mode):
    EXPLICIT = "explicit"
    IMPLICIT = "implicit"
    AUTO = "auto"


_VARIABLE = "WARPCONVNET_DEPTHWISE_CONV_{}_ALGO_MODE"


def depthwise_names(fwd: object, bwd: object) -> tuple[Names, Names]:
    """Of the two arguments; None is the environment's."""
    found = []
    for given, way in ((fwd, "FWD"), (bwd, "BWD")):
        if given is not None:
            found.append(names_of(given, f"{way.lower()}_algo", depthwise=True))
        else:
            variable = _VARIABLE.format(way)
            found.append(_of_environment(variable, str(getattr(constants, variable))))
    return tuple(found)


def _environment() -> tuple[str | tuple[str, ...], ...]:
    fwd = constants.WARPCONVNET_DEPTHWISE_CONV_FWD_ALGO_MODE
    bwd = constants.WARPCONVNET_DEPTHWISE_CONV_BWD_ALGO_MODE
    return (
        tuple(fwd) if isinstance(fwd, list) else fwd,
        tuple(bwd) if isinstance(bwd, list) else bwd,
    )


@functools.lru_cache(maxsize=256)
def _known_names(fwd: object, bwd: object, _: tuple[object, ...]) -> tuple[Names, Names]:
    """As the call was written; the last is the environment's part in it."""
    return depthwise_names(fwd, bwd)


@functools.lru_cache(maxsize=16)
def _of_environment(variable: str, _: str) -> Names:
    return names_of(getattr(constants, variable), variable, depthwise=True)


def by_tap(x: Tensor, weight: Tensor, map: KernelMap) -> Tensor:
    """explicit: gathers the rows of a tap, multiplies them, adds them up; in the wider dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros((map.n_out, x.shape[1]), dtype=wide)
    for tap in range(map.taps):
        rows = map.neighbours[tap]
        there = (rows >= 0)[:, None]
        gathered = x[rows.clamp(min=0).long()] if len(x) else out.to(x.dtype)
        # An absent row is left out, not multiplied by 0.
        product = torch.where(there, gathered, 0).to(wide) * weight[tap].to(wide)
        out = out + torch.where(there, product, 0)
    return out.to(x.dtype)


def _run(name: str, x: Tensor, weight: Tensor, map: KernelMap) -> Tensor:
    if name == "explicit":
        return by_tap(x, weight, map)
    return depthwise.forward_rows(x, weight, None, map)


def _adjoint_by_tap(dy: Tensor, x: Tensor, weight: Tensor, map: KernelMap, wanted: Any) -> Any:
    """explicit, backwards: along the transposed map for x, by row sums for the weight."""
    dx = dw = None
    wide = torch.promote_types(x.dtype, torch.float32)
    if wanted[0]:
        dx = by_tap(dy, weight, map.transposed())
    if wanted[1]:
        sums = []
        for tap in range(map.taps):
            out = (map.neighbours[tap] >= 0).nonzero()[:, 0]
            rows = map.neighbours[tap][out].long()
            sums.append((x[rows].to(wide) * dy[out].to(wide)).sum(0))
        dw = torch.stack(sums).to(weight.dtype)
    return dx, dw


def _grad_input_of_any(dy: Tensor, weight: Tensor, map: KernelMap) -> Tensor:
    """Also where several outputs of a tap read one row, of which a transposed map keeps one."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_zeros((map.n_in, dy.shape[1]), dtype=wide)
    for tap in range(map.taps):
        product = dy.to(wide) * weight[tap].to(wide)
        dx = dx + segment_reduce(product, map.neighbours[tap], map.n_in)
    return dx.to(dy.dtype)


def _gradients(
    name: str, dy: Tensor, x: Tensor, weight: Tensor, map: KernelMap, wanted: Any
) -> tuple[Tensor | None, Tensor | None]:
    if name == "explicit":
        return _adjoint_by_tap(dy, x, weight, map, wanted)
    dx = depthwise.input_gradient(dy, weight, map) if wanted[0] else None
    return dx, depthwise.weight_gradient(x, dy, map) if wanted[1] else None


def _choice(
    names: Names,
    way: int,
    map: KernelMap,
    x: Tensor,
    run: Callable[[str], Any],
    magnitude: Callable[[], Tensor],
) -> str:
    """The fastest of the algorithms, by measured times where they may be measured."""
    memo = map.__dict__.get("_warpconvnet")
    if memo is None:
        memo = map.__dict__["_warpconvnet"] = {}
    key = ("depthwise", names, way, x.shape[1], x.dtype)
    if key in memo:
        return memo[key]
    built_in = "implicit" if "implicit" in names else names[0]
    if torch.compiler.is_compiling() or not len(x):
        return built_in
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return built_in

    def of(candidate: Candidate) -> tuple[Hashable, Callable[[], Any]]:
        return candidate.algorithm, lambda: run(candidate.algorithm)

    device = torch.backends.cpu.get_cpu_capability()
    if x.is_cuda:
        device = torch.cuda.get_device_name(x.device)
    rows = f"{map.n_in.bit_length()}>{map.n_out.bit_length()}"
    parts = (voxgemm.__version__, device, "depthwise", ("forward", "backward")[way])
    text = " ".join(map_ for map_ in (*parts, str(map.taps), str(x.shape[1]), str(x.dtype), rows))
    terms = map.n_out if way else map.taps
    agrees = _tuning.agreement(lambda: run("explicit"), magnitude, max(terms, map.taps), 0)
    with torch.no_grad():
        best, complete = _tuning.fastest(text, candidates(names, 0), of, x.device, agrees)
    found = built_in if best is None else best.algorithm
    if complete or not _tuning.may_measure():
        memo[key] = found
    return found


class DepthwiseConvolution(torch.autograd.Function):
    """Of features, a weight [K, C] and a map, with searched passes."""

    @staticmethod
    def forward(ctx, x, weight, map, names):
        ctx.save_for_backward(x, weight)
        ctx.map, ctx.names = map, names

        def run(name: str) -> Tensor:
            return _run(name, x, weight, map)

        def magnitude() -> Tensor:
            return x.abs().max().double() * weight.abs().double().sum(0)

        return run(_choice(names[0], 0, map, x, run, magnitude))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        dx = dw = None
        if wanted[0] and not vars(ctx.map).get("_exact", True):
            dx, wanted = _grad_input_of_any(dy, weight, ctx.map), (False, wanted[1])

        def run(name: str) -> Any:
            return _gradients(name, dy, x, weight, ctx.map, wanted)

        def magnitude() -> Tensor:
            most = dy.abs().max().double()
            if wanted[0]:
                return most * weight.abs().double().sum(0)
            return most * x.abs().max() * ctx.map.n_out

        if torch.is_grad_enabled():
            # For a second derivative: the operators that have one.
            if wanted[0]:
                dx = depthwise.depthwise_conv3d(dy, weight, None, ctx.map.transposed())
            if wanted[1]:
                dw = _adjoint_by_tap(dy, x, weight, ctx.map, (False, True))[1]
            return dx, dw, None, None
        found = (None, None)
        if any(wanted):
            found = run(_choice(ctx.names[1], 1, ctx.map, dy, run, magnitude))
        return dx if found[0] is None else found[0], found[1], None, None


def depthwise_on(x: Tensor, weight: Tensor, map: KernelMap, names: tuple[Names, Names]) -> Tensor:
    if weight.ndim != 2 or weight.shape[0] != map.taps or weight.shape[1] != x.shape[1]:
        raise ArgumentError(
            f"weight is {list(weight.shape)}, expected [{map.taps}, {x.shape[1]}]: taps, channels"
        )
    if len(x) != map.n_in:
        raise ArgumentError(f"in_features has {len(x)} rows, the map {map.n_in}")
    return DepthwiseConvolution.apply(x, weight, map, names)


def spatially_sparse_depthwise_conv(
    in_features: Tensor,
    weight: Tensor,
    kernel_map: IntSearchResult,
    num_out_coords: int,
    fwd_algo: Any = None,
    bwd_algo: Any = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """[num_out_coords, C]: out[o] = sum over pairs (i, o) of tap k of in_features[i] * weight[k].

    weight [K, C]. fwd_algo and bwd_algo are search spaces: a member, a name ('explicit',
    'implicit', 'auto') or a list of these; None is the environment's.
    """
    try:
        names = _known_names(fwd_algo, bwd_algo, _environment())
    except TypeError:  # of lists
        names = depthwise_names(fwd_algo, bwd_algo)
    if not isinstance(kernel_map, IntSearchResult):
        raise TypeError(f"kernel_map is a {type(kernel_map).__name__}, expected IntSearchResult")
    given = in_features.dtype
    dtype = compute_dtype or given
    kind = in_features.device.type
    if compute_dtype is None and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    map = kernel_map.kernel_map(len(in_features), num_out_coords)
    if weight.ndim == 2 and len(weight) > map.taps:
        weight = weight[: map.taps]  # of a map without its mirrored taps
    if given != dtype or weight.dtype != dtype:
        in_features, weight = in_features.to(dtype), weight.to(dtype)
    out = depthwise_on(in_features, weight, map, names)
    return out if compute_dtype is None else out.to(given)
