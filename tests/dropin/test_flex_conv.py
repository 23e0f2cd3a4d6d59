# SPDX-License-Identifier: Apache-2.0
"""flex_gemm's convolutions against torch's dense ones, and what programs do with them."""

from __future__ import annotations

import pickle

import torch
from pytest import mark, raises

import voxgemm as vg
from flex_gemm.ops import spconv
from flex_gemm.ops.spconv import (
    Algorithm,
    SparseConv3dFunction,
    SparseConv3dNeighborCache,
    SubMConv3dFunction,
    SubMConv3dNeighborCache,
    sparse_conv3d,
    sparse_submanifold_conv3d,
)

ALGORITHMS = [name for key, name in vars(Algorithm).items() if key.isupper()]
pytestmark = mark.usefixtures("flex_state")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# kernel size, dilation, Ci, Co, dtype: each value of the specification's list at least once
LAYERS = [
    (1, 1, 3, 6, F32),
    (2, 1, 6, 3, F16),
    (2, 2, 1, 6, F64),
    (3, 1, 48, 96, BF16),
    (3, 2, 96, 48, F16),
    (3, 3, 1, 192, F32),
    (3, 1, 3, 3, F64),
    (4, 1, 3, 6, F32),
    (4, 3, 6, 1, BF16),
    (5, 1, 6, 48, F32),
    (5, 2, 3, 6, F16),
    ((3, 1, 5), 3, 192, 6, F32),
    ((3, 1, 5), 1, 6, 3, BF16),
]
none = torch.tensor(-1, dtype=torch.int32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Torch compares few uint32 numbers."""
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


def triple(value):
    return (value,) * 3 if isinstance(value, int) else value


@mark.parametrize("size, dilation, c_in, c_out, dtype", LAYERS)
def test_submanifold_equals_dense(
    size, dilation, c_in, c_out, dtype, algorithm, layer, reference, against, terms
):
    feats, coords, shape, weight, bias = layer(60, size, c_in, c_out, dtype)
    geometry = vg.Geometry.submanifold(triple(size), triple(dilation))

    def run(feats, weight, bias):
        out, cache = sparse_submanifold_conv3d(
            feats, coords, shape, weight, bias, None, triple(dilation)
        )
        again, same = sparse_submanifold_conv3d(
            feats, coords, shape, weight, bias, cache, triple(dilation)
        )
        assert same is cache and torch.equal(out, again) and out.dtype == dtype
        return out

    count = terms(triple(size), max(c_in, c_out), len(coords))
    against(run, reference(geometry, coords), (feats, weight, bias), count)


STRIDED = [
    (3, 1, 1, 1),
    (3, 1, 1, 2),
    (2, 2, 0, 1),
    (1, 2, 0, 1),
    (3, 2, 1, 1),
    (4, 3, 2, 1),
    ((3, 1, 5), (2, 1, 3), (1, 0, 2), 1),
]


@mark.parametrize("values", STRIDED, ids=str)
def test_strided_equals_dense(values, algorithm, layer, reference, against, terms):
    geometry = vg.Geometry(*(triple(value) for value in values))
    feats, coords, shape, weight, bias = layer(40, geometry.size, 3, 5)
    expected = SparseConv3dFunction._get_output_coords_torch(coords, shape, *geometry)

    def run(feats, weight, bias):
        out, out_coords, cache = sparse_conv3d(
            feats, coords, shape, weight, bias, None, None, *geometry[1:]
        )
        assert torch.equal(out_coords, expected)
        assert isinstance(cache, SparseConv3dNeighborCache)
        assert torch.equal(cache.out_coords, expected)
        again, kept, same = sparse_conv3d(
            feats, coords, shape, weight, bias, cache, None, *geometry[1:]
        )
        assert same is cache and torch.equal(kept, expected) and torch.equal(out, again)
        return out

    count = terms(geometry.size, 5, len(expected))
    against(run, reference(geometry, coords, expected), (feats, weight, bias), count)


def test_given_outputs_in_any_order_and_repeated(layer, reference, against, terms, clouds):
    feats, coords, shape, weight, bias = layer(40, 3, 3, 5)
    geometry = vg.Geometry((3, 3, 3), (2, 2, 2), (1, 1, 1))
    reached = SparseConv3dFunction._get_output_coords(coords, shape, *geometry)
    order = torch.randperm(len(reached), generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([reached[order], reached[:7]]).contiguous()

    def run(feats, weight, bias):
        out, out_coords, _ = sparse_conv3d(
            feats, coords, shape, weight, bias, None, wanted, *geometry[1:]
        )
        assert torch.equal(out_coords, wanted)
        return out

    count = terms(geometry.size, 5, len(wanted))
    against(run, reference(geometry, coords, wanted), (feats, weight, bias), count)


def test_one_odd_voxel_gives_eight_outputs(device):
    coords = torch.tensor([[0, 5, 7, 9]], dtype=torch.int32, device=device)
    found = SparseConv3dFunction._get_output_coords(
        coords, (1, 1, 16, 16, 16), (3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3
    )
    near = [(2, 3), (3, 4), (4, 5)]
    expected = [(0, x, y, z) for x in near[0] for y in near[1] for z in near[2]]
    assert found.tolist() == [list(row) for row in expected]


@mark.parametrize("values", STRIDED, ids=str)
@mark.parametrize("way", [0, 1])
def test_output_coords_of_both_ways(values, way, layer):
    spconv.OUT_COORD_ALGO = way
    geometry = [triple(value) for value in values]
    _, coords, shape, _, _ = layer(50)
    found = SparseConv3dFunction._get_output_coords(coords, shape, *geometry)
    expected = SparseConv3dFunction._get_output_coords_torch(coords, shape, *geometry)
    assert torch.equal(found, expected)


@mark.parametrize("way", [0, 1])
@mark.parametrize("stride", [1, 2])
@mark.parametrize("extent", [1400, 2**11 - 1, 2**14, 2**20])
def test_huge_boxes_stay_lexicographic(extent, stride, way, device):
    """Volumes between 2^31 and 2^32, just below 2^33, and far above."""
    spconv.OUT_COORD_ALGO = way
    batch = 1 if extent == 1400 else 2
    assert extent > 1400 or 2**31 < batch * extent**3 < 2**32
    far = torch.tensor([[0, extent - 1, 0, 5], [batch - 1, 0, extent - 1, 1], [0, 3, 3, 3]])
    coords = far.int().to(device)
    shape = (batch, 1, extent, extent, extent)
    geometry = [triple(value) for value in (3, stride, 1, 1)]
    found = SparseConv3dFunction._get_output_coords(coords, shape, *geometry)
    expected = SparseConv3dFunction._get_output_coords_torch(coords, shape, *geometry)
    assert torch.equal(found, expected)
    assert found.tolist() == sorted(found.tolist())


def test_a_kernel_that_does_not_fit_has_no_outputs(layer):
    feats, coords, shape, weight, bias = layer(10, 5, extent=3)
    out, out_coords, _ = sparse_conv3d(feats, coords, shape, weight, bias)
    assert out.shape == (0, 5) and out_coords.shape == (0, 4) and out_coords.dtype == torch.int32


@mark.parametrize("size", [3, (3, 1, 5), 2])
def test_maps_equal_those_of_sorting_and_searching(size, algorithm, layer):
    _, coords, shape, _, _ = layer(80)
    dilation = (1, 2, 1)
    four = SubMConv3dFunction._compute_neighbor_cache(coords, shape, triple(size), dilation)
    five = SubMConv3dFunction._compute_neighbor_cache(coords, shape, triple(size), dilation, False)
    other = SubMConv3dFunction._compute_neighbor_cache_torch(coords, shape, triple(size), dilation)
    for cache in (four, five, other):
        assert cache.neighbor_map.dtype == torch.uint32 and cache.neighbor_map.is_contiguous()
        assert torch.equal(bits(cache["neighbor_map"]), bits(other.neighbor_map))
    if size != 2:
        middle = bits(four.neighbor_map)[:, four.neighbor_map.shape[1] // 2]
        assert middle.tolist() == list(range(80))


def by_hand(neighbours: list[list[int]], block: int):
    """Every derived field by Python's loops."""
    rows, taps = len(neighbours), len(neighbours[0])
    masks = [sum(1 << v for v in range(taps) if row[v] >= 0) for row in neighbours]

    def decoded(mask: int) -> int:
        value = mask
        while mask := mask >> 1:
            value ^= mask
        return value

    order = sorted(range(rows), key=lambda row: (decoded(masks[row]), row))
    pairs = [(v, o) for v in range(taps) for o in range(rows) if neighbours[o][v] >= 0]
    first = [sum(v < tap for v, _ in pairs) for tap in range(taps + 1)]
    blocks = [order[i : i + block] for i in range(0, rows, block)]
    present = [[v for v in range(taps) if any(masks[r] >> v & 1 for r in b)] for b in blocks]
    return masks, order, pairs, first, present


@mark.parametrize("size", [1, 3, (3, 3, 4), (17, 1, 1), (3, 5, 5)])
def test_derived_fields(size, layer):
    _, coords, shape, _, _ = layer(75)
    cache = SubMConv3dFunction._compute_neighbor_cache(coords, shape, triple(size), (1, 1, 1))
    neighbours = bits(cache.neighbor_map).tolist()
    masks, order, pairs, first, present = by_hand(neighbours, 16)
    words = bits(cache.gray_code).view(75, -1).long() & 0xFFFFFFFF
    found = [sum(w << (32 * i) for i, w in enumerate(row)) for row in words.tolist()]
    assert found == masks
    assert cache.gray_code.dtype == torch.int32
    assert cache.gray_code.ndim == (1 if len(neighbours[0]) <= 32 else 2)
    assert cache.sorted_idx.dtype == torch.int64 and cache.sorted_idx.tolist() == order
    assert [
        (n, o)
        for n, o in zip(
            bits(cache.valid_signal_i).tolist(), bits(cache.valid_signal_o).tolist(), strict=True
        )
    ] == [(neighbours[o][v], o) for v, o in pairs]
    assert bits(cache.valid_signal_seg).tolist() == first
    for name in ("valid_signal_i", "valid_signal_o", "valid_signal_seg"):
        assert cache[name].dtype == torch.uint32
    cache.compute_kernel_idx(16)
    taps, begins = cache.valid_kernel_callback(16), cache.valid_kernel_seg_callback(16)
    assert taps.dtype == begins.dtype == torch.int32
    assert [taps[a:b].tolist() for a, b in zip(begins, begins[1:], strict=False)] == present
    assert int(begins[-1]) == len(taps)


def test_derived_fields_backwards(layer):
    feats, coords, shape, weight, bias = layer(50)
    _, _, cache = sparse_conv3d(
        feats, coords, shape, weight, bias, stride=(2,) * 3, padding=(1,) * 3
    )
    forwards, backwards = bits(cache.neighbor_map), bits(cache.neighbor_map_bwd)
    expected = torch.full((50, 27), -1, dtype=torch.int32)
    for o, row in enumerate(forwards.tolist()):
        for v, i in enumerate(row):
            if i >= 0:
                expected[i, v] = o
    assert torch.equal(backwards.cpu(), expected)
    masks, order, _, _, present = by_hand(expected.tolist(), 32)
    assert (bits(cache.gray_code_bwd).long() & 0xFFFFFFFF).tolist() == masks
    assert cache["sorted_idx_bwd"].tolist() == order
    taps, begins = cache.valid_kernel_bwd_callback(32), cache.valid_kernel_bwd_seg_callback(32)
    assert [taps[a:b].tolist() for a, b in zip(begins, begins[1:], strict=False)] == present
    cache.compute_kernel_idx_bwd(64)
    assert "valid_kernel_bwd_64" in vars(cache)
    assert cache["unknown"] is None


def test_cache_of_a_bare_map_trains_and_freezes(layer):
    feats, coords, shape, weight, bias = layer(50)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    out, made = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    expected = torch.autograd.grad(out.square().sum(), leaves)
    with torch.no_grad():
        _, quiet = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    hint = SubMConv3dFunction._compute_neighbor_cache(coords, shape, (3,) * 3, (1,) * 3, False)
    bare = SubMConv3dNeighborCache(neighbor_map=made.neighbor_map.clone())
    stored = pickle.loads(pickle.dumps(quiet))
    for cache in (quiet, hint, bare, stored):
        again, same = sparse_submanifold_conv3d(feats, coords, shape, weight, bias, cache)
        assert same is cache and torch.equal(again, out)
        found = torch.autograd.grad(again.square().sum(), leaves)
        if cache is not bare:  # whose backward does not know that taps are mirrored
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        torch.testing.assert_close(found, expected)
        frozen = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=cache.freeze())
        torch.testing.assert_close(frozen, out)


def test_assigned_maps_replace_what_was_derived(layer):
    feats, coords, shape, weight, bias = layer(50)
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    before = cache.gray_code.clone()
    cache["neighbor_map"] = torch.flip(bits(cache.neighbor_map), [1]).contiguous()
    assert not torch.equal(cache.gray_code, before)
    mirrored, _ = sparse_submanifold_conv3d(feats, coords, shape, weight.flip(1, 2, 3), bias, cache)
    torch.testing.assert_close(mirrored, out)
    with raises(AttributeError, match="no field 'unknown'"):
        cache["unknown"]
    cache.my_own = 3
    assert cache["my_own"] == 3


@mark.parametrize("wanted", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1), (0, 1, 0)])
@mark.parametrize("with_bias", [True, False])
def test_every_subset_of_gradients(wanted, with_bias, layer, algorithm):
    feats, coords, shape, weight, bias = layer(30)
    bias = bias if with_bias else None
    leaves = [t for t in (feats, weight, bias)]
    for leaf, flag in zip(leaves, wanted, strict=True):
        if leaf is not None:
            leaf.requires_grad_(bool(flag))
    asked = [bool(flag) and leaf is not None for leaf, flag in zip(leaves, wanted, strict=True)]
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    strided, _, strided_cache = sparse_conv3d(feats, coords, shape, weight, bias)
    if any(asked):
        (out.sum() + strided.sum()).backward()
    assert [leaf is not None and leaf.grad is not None for leaf in leaves] == asked
    dy = torch.ones_like(out).expand_as(out)
    for found in (
        SubMConv3dFunction._sparse_submanifold_conv_backward(dy, feats, cache, weight, bias),
        SparseConv3dFunction._sparse_conv_backward(
            torch.ones_like(strided), feats, strided_cache, weight, bias
        ),
    ):
        assert [gradient is not None for gradient in found] == asked


@mark.parametrize("rows", [0, 1])
def test_few_rows(rows, layer, algorithm):
    feats, coords, shape, weight, bias = layer(rows)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    assert out.shape == (rows, 5) and out.dtype == feats.dtype
    strided, out_coords, _ = sparse_conv3d(feats, coords, shape, weight, bias, stride=(2, 2, 2))
    frozen = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=cache.freeze())
    gradients = torch.autograd.grad(out.sum() + strided.sum() + frozen.sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert rows or all(int(g.count_nonzero()) == 0 for g in gradients)
    assert cache.gray_code.shape == (rows,) and cache.sorted_idx.shape == (rows,)


def test_no_outputs_asked_for(layer, device, algorithm):
    feats, coords, shape, weight, bias = layer(20)
    nowhere = torch.empty(0, 4, dtype=torch.int32, device=device)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    out, out_coords, _ = sparse_conv3d(feats, coords, shape, weight, bias, out_coords=nowhere)
    assert out.shape == (0, 5) and out_coords.shape == (0, 4)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert int(gradient.count_nonzero()) == 0


def test_an_empty_sample(layer, algorithm, reference, against, terms):
    feats, coords, shape, weight, bias = layer(30)
    coords[:, 0] *= 2
    shape = torch.Size((3, *shape[1:]))
    geometry = vg.Geometry.submanifold((3,) * 3, (1,) * 3)

    def run(*operands):
        return sparse_submanifold_conv3d(operands[0], coords, shape, *operands[1:])[0]

    against(run, reference(geometry, coords), (feats, weight, bias), terms((3,) * 3, 5, 30))


def test_repeated_voxels_are_their_own_centres(layer, device):
    """A dense matrix of the rule, in double: linear, so its transpose gives the gradients."""
    feats, coords, shape, weight, bias = layer(20, dtype=F64)
    coords = torch.cat([coords, coords[[3, 3, 11]]]).contiguous()
    feats = torch.cat([feats, feats[:3] * 2]).contiguous()
    lowest = {tuple(row): i for i, row in reversed(list(enumerate(coords.tolist())))}
    matrix = torch.zeros(23, 27, 23, dtype=F64)
    for o, (b, *at) in enumerate(coords.tolist()):
        for v in range(27):
            step = (v // 9 - 1, v // 3 % 3 - 1, v % 3 - 1)
            there = (b, *(a + s for a, s in zip(at, step, strict=True)))
            if v == 13:
                matrix[o, v, o] = 1
            elif there in lowest:
                matrix[o, v, lowest[there]] = 1

    def rule(x, w, b):
        return torch.einsum("ovi,ic,dvc->od", matrix.to(device), x, w.reshape(5, 27, 4)) + b

    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    expected = rule(*leaves)
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    frozen = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=cache.freeze())
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for actual in (out, frozen):
        torch.testing.assert_close(actual, expected)
        found = torch.autograd.grad(actual.square().sum(), leaves, retain_graph=True)
        torch.testing.assert_close(found, wanted)
