# SPDX-License-Identifier: Apache-2.0
"""torch.ops.flex_gemm: the operators that one dialect's programs call and torch.compile traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from voxgemm import sampling

from . import _tables, cuda
from .triton.spconv import _launchers

_TABLE = "Tensor(a!) hashmap_keys, Tensor(b!) hashmap_values"
_BOX = "SymInt W, SymInt H, SymInt D"
_SAMPLE = f"{_TABLE.replace('values', 'vals')}, Tensor coords, Tensor grid, {_BOX}"
_MASKED = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor neighbor, Tensor sorted_idx, "
    "Tensor[] valid_kernels, Tensor[] valid_kernel_segs, SymInt[] block_sizes"
)
_PAIRS = "Tensor valid_signal_i, Tensor valid_signal_o, Tensor valid_signal_seg"
_QUERY = "Tensor feats, Tensor coords, Tensor query_pts, SymInt[] shape, float hashmap_ratio"

_library = torch.library.Library("flex_gemm", "FRAGMENT")


def _operator(schema: str, function: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flex_gemm::{name}", fake, lib=_library)


def _nothing(*_: Any) -> None:
    return None


def _u32(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.uint32)


def _i32(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


_operator(
    f"hashmap_insert_cuda({_TABLE}, Tensor keys, Tensor values) -> ()",
    cuda.hashmap_insert,
    _nothing,
)
_operator(
    "hashmap_lookup_cuda(Tensor hashmap_keys, Tensor hashmap_values, Tensor keys) -> Tensor",
    cuda.hashmap_lookup,
    lambda table, values, keys: values.new_empty(keys.shape),
)
_operator(
    f"hashmap_insert_3d_cuda({_TABLE}, Tensor coords, Tensor values, {_BOX}) -> ()",
    cuda.hashmap_insert_3d,
    _nothing,
)
_operator(
    "hashmap_lookup_3d_cuda(Tensor hashmap_keys, Tensor hashmap_values, Tensor coords, "
    f"{_BOX}) -> Tensor",
    cuda.hashmap_lookup_3d,
    lambda table, values, coords, *box: values.new_empty((coords.shape[0],)),
)
_operator(
    f"hashmap_insert_3d_idx_as_val_cuda({_TABLE}, Tensor coords, {_BOX}) -> ()",
    cuda.hashmap_insert_3d_idx_as_val,
    _nothing,
)
for _curve in ("z_order", "hilbert"):
    _operator(
        f"{_curve}_encode(Tensor coords, SymInt bit_length, Tensor(a!) codes) -> ()",
        getattr(cuda, f"{_curve}_encode"),
        _nothing,
    )
    _operator(
        f"{_curve}_decode(Tensor codes, SymInt bit_length) -> Tensor",
        getattr(cuda, f"{_curve}_decode"),
        lambda codes, bit_length: _i32(codes, codes.shape[0], 4),
    )
_operator(
    f"hashmap_build_grid_sample_3d_nearest_neighbor_map({_SAMPLE}) -> Tensor",
    cuda.hashmap_build_grid_sample_3d_nearest_neighbor_map,
    lambda keys, vals, coords, grid, *box: _u32(grid, *grid.shape[:2]),
)
_operator(
    f"hashmap_build_grid_sample_3d_trilinear_neighbor_map_weight({_SAMPLE}) -> (Tensor, Tensor)",
    cuda.hashmap_build_grid_sample_3d_trilinear_neighbor_map_weight,
    lambda keys, vals, coords, grid, *box: (
        _u32(grid, *grid.shape[:2], 8),
        grid.new_empty((*grid.shape[:2], 8), dtype=torch.float32),
    ),
)
_operator(
    f"hashmap_build_submanifold_conv_neighbour_map_cuda({_TABLE.replace('values', 'vals')}, "
    f"Tensor coords, {_BOX}, SymInt Kw, SymInt Kh, SymInt Kd, SymInt Dw, SymInt Dh, SymInt Dd) "
    "-> Tensor",
    cuda.hashmap_build_submanifold_conv_neighbour_map,
    lambda keys, vals, coords, *n: _u32(coords, coords.shape[0], n[3] * n[4] * n[5]),
)


def _fake_derived(neighbor_map: Tensor) -> tuple[Tensor, ...]:
    rows, taps = neighbor_map.shape
    words = (rows,) if taps <= _tables.WORD else (rows, -(-taps // _tables.WORD))
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        _i32(neighbor_map, *words),
        neighbor_map.new_empty((rows,), dtype=torch.int64),
        _u32(neighbor_map, pairs),
        _u32(neighbor_map, pairs),
        _u32(neighbor_map, taps + 1),
    )


def _fake_blocks(gray_code: Tensor, sorted_idx: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    return _i32(gray_code, total), _i32(gray_code, -(-gray_code.shape[0] // block_size) + 1)


_operator(
    "neighbor_map_post_process_for_masked_implicit_gemm_1(Tensor neighbor_map) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    cuda.neighbor_map_post_process_for_masked_implicit_gemm_1,
    _fake_derived,
)
_operator(
    "neighbor_map_post_process_for_masked_implicit_gemm_2(Tensor gray_code, Tensor sorted_idx, "
    "SymInt block_size) -> (Tensor, Tensor)",
    cuda.neighbor_map_post_process_for_masked_implicit_gemm_2,
    _fake_blocks,
)
_operator(
    "indice_weighed_sum_fwd(Tensor input, Tensor indices, Tensor weight) -> Tensor",
    lambda input, indices, weight: sampling.weighted_sum(input, indices, weight),
    lambda input, indices, weight: input.new_empty((indices.shape[0], input.shape[1])),
)
_operator(
    "indice_weighed_sum_bwd_input(Tensor grad_output, Tensor indices, Tensor weight, SymInt N) "
    "-> Tensor",
    lambda dy, indices, weight, n: sampling.weighted_sum_grad_features(dy, indices, weight, n),
    lambda dy, indices, weight, n: dy.new_empty((n, dy.shape[1])),
)


def _sampled(feats: Tensor, coords: Tensor, query_pts: Tensor, shape: Any, mode: str) -> Any:
    found = cuda.sample_rows(coords, query_pts, tuple(shape[-3:]), mode)
    out = sampling.weighted_sum(feats, found.rows, found.weights)
    return out.view(*query_pts.shape[:2], feats.shape[1]), found


def _nearest(feats, coords, query_pts, shape, hashmap_ratio):
    out, found = _sampled(feats, coords, query_pts, shape, "nearest")
    rows = found.rows.view(query_pts.shape[:2])
    return out, rows.clamp(min=0), rows >= 0


def _trilinear(feats, coords, query_pts, shape, hashmap_ratio):
    out, found = _sampled(feats, coords, query_pts, shape, "trilinear")
    return out, found.rows.view(torch.uint32), found.weights.float()


def _fake_out(feats: Tensor, query_pts: Tensor) -> Tensor:
    return feats.new_empty((*query_pts.shape[:2], feats.shape[1]))


_operator(
    f"_grid_sample_3d_nearest_fwd({_QUERY}) -> (Tensor, Tensor, Tensor)",
    _nearest,
    lambda feats, coords, query_pts, shape, ratio: (
        _fake_out(feats, query_pts),
        _i32(feats, *query_pts.shape[:2]),
        feats.new_empty(query_pts.shape[:2], dtype=torch.bool),
    ),
)
_operator(
    f"_grid_sample_3d_trilinear_fwd({_QUERY}) -> (Tensor, Tensor, Tensor)",
    _trilinear,
    lambda feats, coords, query_pts, shape, ratio: (
        _fake_out(feats, query_pts),
        _u32(feats, query_pts.shape[0] * query_pts.shape[1], 8),
        feats.new_empty((query_pts.shape[0] * query_pts.shape[1], 8), dtype=torch.float32),
    ),
)
_operator(
    "_grid_sample_3d_trilinear_bwd(Tensor grad_output, Tensor indices, Tensor interp_weight, "
    "SymInt N) -> Tensor",
    lambda dy, indices, weight, n: sampling.weighted_sum_grad_features(dy, indices, weight, n),
    lambda dy, indices, weight, n: dy.new_empty((n, dy.shape[1])),
)


def _masked_operators(split: bool) -> None:
    """sparse_conv_masked[_splitk]_{fwd,bwd}; the backward is an operator of its own."""
    name = "sparse_conv_masked_splitk" if split else "sparse_conv_masked"
    more = ", SymInt splitk" if split else ""

    def algorithm(rest: tuple[Any, ...]) -> str:
        return _launchers.with_split("masked_implicit_gemm_splitk", rest[-1] if split else 1)

    def forward(input, weight, bias, neighbor, *rest):
        return _launchers.forward(algorithm(rest), input, weight, bias, neighbor)

    def backward(dy, input, weight, bias, neighbor, *rest):
        tensors = (input, weight, bias)
        wanted = (True, True, True)
        return _launchers.backward(algorithm(rest), dy, tensors, neighbor, wanted)

    def fake_forward(input, weight, bias, neighbor, *rest):
        return input.new_empty((neighbor.shape[0], weight.shape[0]))

    def fake_backward(dy, input, weight, bias, neighbor, *rest):
        return (
            input.new_empty(input.shape),
            weight.new_empty(weight.shape),
            weight.new_empty((weight.shape[0],)),
        )

    _operator(f"{name}_fwd({_MASKED}{more}) -> Tensor", forward, fake_forward)
    schema = (
        f"{name}_bwd(Tensor grad_output, {_MASKED}, {_PAIRS}{more}) -> (Tensor, Tensor, Tensor)"
    )
    _operator(schema, backward, fake_backward)

    def keep(ctx, inputs, output):
        input, weight, bias, neighbor, order, kernels, segments, blocks, *splitk = inputs
        ctx.save_for_backward(input, weight, neighbor, order)
        ctx.rest, ctx.with_bias = (blocks, splitk), bias is not None
        ctx.lists = [None] * len(kernels), [None] * len(segments)

    def differentiate(ctx, dy):
        input, weight, neighbor, order = ctx.saved_tensors
        blocks, splitk = ctx.rest
        none = neighbor.new_empty((0,))
        operator = getattr(torch.ops.flex_gemm, f"{name}_bwd")
        dx, dw, db = operator(
            dy, input, weight, None, neighbor, order, [], [], blocks, none, none, none, *splitk
        )
        some = db if ctx.with_bias else None
        return dx, dw, some, None, None, *ctx.lists, *[None] * (1 + len(splitk))

    torch.library.register_autograd(
        f"flex_gemm::{name}_fwd", differentiate, setup_context=keep, lib=_library
    )


_masked_operators(split=False)
_masked_operators(split=True)
