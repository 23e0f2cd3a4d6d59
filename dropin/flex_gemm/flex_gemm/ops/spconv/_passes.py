# SPDX-License-Identifier: Apache-2.0
"""The passes of a convolution for FlexGEMM's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxgemm import passes, sampling
from voxgemm.algorithms import filters_of, precision_of
from voxgemm.geometry import Triple
from voxgemm.kernel_map import KernelMap
from voxgemm.passes import How

from ...errors import expect
from ...kernels.triton.spconv import config
from .. import spconv
from ._cache import NeighborCache

Three = tuple[Tensor | None, Tensor | None, Tensor | None]


class Convolution(torch.autograd.Function):
    """apply(feats, weight, bias, map, how) -> out: what both convolutions are on a map."""

    @staticmethod
    def forward(ctx, feats, weight, bias, map, how):
        ctx.save_for_backward(feats, weight)
        ctx.map, ctx.how = map, how
        return passes.run_forward(feats, weight, bias, map, how)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = ctx.needs_input_grad
        return *gradients(grad_output, *ctx.saved_tensors, ctx.map, ctx.how, wanted), None, None


def run(
    feats: Tensor, neighbor_cache: NeighborCache, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The forward in the global algorithm; nothing is recorded."""
    map = neighbor_cache.map_for(feats.shape[0], kernel_size_of(feats, weight), feats.device)
    return passes.run_forward(feats, weight, bias, map, how_of(feats))


def run_backward(
    grad_output: Tensor,
    feats: Tensor,
    neighbor_cache: NeighborCache,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Three:
    """Gradients of those that require one, None for the others, in the global algorithm."""
    map = neighbor_cache.map_for(feats.shape[0], kernel_size_of(feats, weight), feats.device)
    wanted = [t is not None and t.requires_grad for t in (feats, weight, bias)]
    return gradients(grad_output, feats, weight, map, how_of(feats), wanted)


def keep(
    ctx: Any,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    cache: NeighborCache,
    map: KernelMap,
    how: How,
) -> Tensor:
    """A forward whose backward is kept_gradients(); ctx has what programs' own backwards read."""
    ctx.save_for_backward(*tensors)
    ctx.neighbor_cache, ctx.map, ctx.how = cache, map, how
    return passes.run_forward(*tensors, map, how)


def kept_gradients(ctx: Any, grad_output: Tensor) -> Three:
    """Of feats, weight and bias, the arguments 0, 4 and 5."""
    feats, weight, _ = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
    return gradients(grad_output, feats, weight, ctx.map, ctx.how, wanted)


def how_of(feats: Tensor, algorithm: str | None = None) -> How:
    """In an algorithm, or in `ops.spconv.ALGORITHM`."""
    if algorithm is None:
        algorithm = spconv.ALGORITHM
    precision = 0
    if feats.dtype == torch.float32 and feats.is_cuda:
        assigned = vars(config).get("allow_tf32")
        asked = None if assigned is None else "tf32" if assigned else "ieee"
        precision = precision_of(asked, feats)
    if torch.compiler.is_compiling():
        return How(filters_of(algorithm), precision)
    key = (algorithm, precision)
    if key not in _HOWS:
        _HOWS[key] = How(filters_of(spconv.check_algorithm(algorithm)), precision)
    return _HOWS[key]


_HOWS: dict[tuple[str, int], How] = {}


def cast(
    feats: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast all in its dtype; double stays."""
    kind = feats.device.type
    if not torch.is_autocast_enabled(kind) or feats.dtype == torch.float64:
        return feats, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return feats.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def kernel_size_of(feats: Tensor, weight: Tensor) -> Triple:
    if weight.ndim != 5:
        expect(False, f"weight has {weight.ndim} dimensions, expected [Co, Kw, Kh, Kd, Ci]")
    if feats.shape[-1] != weight.shape[4]:
        expect(
            False,
            f"Input channels ({feats.shape[-1]}) should match weight channels ({weight.shape[4]})",
        )
    return tuple(weight.shape[1:4])


def gradients(
    grad_output: Tensor,
    feats: Tensor,
    weight: Tensor,
    map: KernelMap,
    how: How,
    wanted: Sequence[bool],
) -> Three:
    """passes.gradients, also for maps where two rows of a tap have the same input row.

    There are two such: a submanifold map whose voxels repeat, since every row is its own centre,
    and neighbour maps that a program made up.
    """
    if wanted[0]:
        map.settle(wait=True)
        if map.operation == 0 and map.in_first.shape[0]:
            _, *others = passes.gradients(
                grad_output, feats, weight, map, how, (False, *wanted[1:])
            )
            return _repeated_grad_input(grad_output, weight, map, how), *others
        if map.operation == 1 and not exact(map):
            _, *others = passes.gradients(
                grad_output, feats, weight, map, how, (False, *wanted[1:])
            )
            return _general_grad_input(grad_output, weight, map), *others
    return passes.gradients(grad_output, feats, weight, map, how, wanted)


def exact(map: KernelMap) -> bool:
    """Whether transposing loses no pair: so it is of voxgemm's own maps, others are looked at once.

    Entries are counted, not `pairs`: a CUDA device counts a pair where it writes one, and of two
    with one place it writes both. Waits for the device.
    """
    if map.in_first.shape[0] or map.out_first.shape[0] or torch.compiler.is_compiling():
        return True  # voxgemm's own, or not to be known now
    known = vars(map).get("_exact")
    if known is None:
        known = int((map.transposed().neighbours >= 0).sum()) == map.pairs
        map._exact = known
    return known


def centre(size: Triple) -> Triple:
    return tuple(k // 2 for k in size)


def without_centre(weight: Tensor, size: Triple) -> tuple[Tensor, Tensor]:
    """The weights with a zero for the row's own voxel, and that voxel's [Co, Ci]."""
    at = (slice(None), *centre(size))
    rest = torch.ones_like(weight)
    rest[at] = 0
    return weight * rest, weight[at]


def _repeated_grad_input(dy: Tensor, weight: Tensor, map: KernelMap, how: How) -> Tensor:
    """As voxgemm where a row's own voxel is left out, and that one by row."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    rest, own = without_centre(weight.to(wide), map.geometry.size)
    how = How(how.filters, 0)
    dx = passes.GradInput.apply(dy.to(wide), rest, map, how) + dy.to(wide) @ own
    return dx.to(dy.dtype)


def _general_grad_input(dy: Tensor, weight: Tensor, map: KernelMap) -> Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_zeros((map.n_in, weight.shape[4]), dtype=wide)
    by_tap = weight.to(wide).reshape(weight.shape[0], map.taps, -1)
    one = torch.ones((map.n_out, 1), dtype=wide, device=dy.device)
    for tap in range(map.taps):
        rows = map.neighbours[tap][:, None]
        dx = dx + sampling.weighted_sum_grad_features(
            dy.to(wide) @ by_tap[:, tap], rows, one, map.n_in
        )
    return dx.to(dy.dtype)
