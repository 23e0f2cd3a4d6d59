# SPDX-License-Identifier: Apache-2.0
"""flex_gemm's tables, codes, samples, launchers and operators."""

from __future__ import annotations

import pytest
import torch
from pytest import fixture, mark, raises

import flex_gemm
from flex_gemm import kernels
from flex_gemm.kernels import cuda, triton
from flex_gemm.ops import grid_sample, serialize, spconv
from flex_gemm.ops.grid_sample import GridSample3dFunction, grid_sample_3d, grid_sample_3d_torch
from flex_gemm.ops.spconv import SubMConv3dFunction, sparse_submanifold_conv3d
from flex_gemm.ops.utils import init_hashmap

pytestmark = mark.usefixtures("flex_state")
ops = torch.ops.flex_gemm
KINDS = [(a, b) for a in (torch.uint32, torch.uint64) for b in (torch.uint32, torch.uint64)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Torch compares few unsigned numbers."""
    signed = {torch.uint32: torch.int32, torch.uint64: torch.int64}
    return tensor.view(signed.get(tensor.dtype, tensor.dtype))


def table(slots: int, key_dtype, value_dtype, device):
    keys = torch.full((slots,), -1, dtype=bits(torch.empty(0, dtype=key_dtype)).dtype)
    # Values of an empty table may be anything.
    values = torch.full((slots,), 77, dtype=bits(torch.empty(0, dtype=value_dtype)).dtype)
    return keys.view(key_dtype).to(device), values.view(value_dtype).to(device)


@mark.parametrize("load", [0.5, 0.95, 1.0])
@mark.parametrize("key_dtype, value_dtype", KINDS, ids=str)
def test_tables_find_what_was_inserted(load, key_dtype, value_dtype, device):
    slots = 1000
    count = int(load * slots)
    numbers = torch.randperm(10**6, generator=torch.Generator().manual_seed(3))[: count + 50]
    keys = bits(torch.empty(0, dtype=key_dtype)).dtype
    keys, absent = (part.to(keys).view(key_dtype).to(device) for part in numbers.split(count))
    values = torch.arange(count, 0, -1).to(bits(torch.empty(0, dtype=value_dtype)).dtype)
    values = values.view(value_dtype).to(device)
    for insert, lookup in (
        (cuda.hashmap_insert, cuda.hashmap_lookup),
        (cuda.hashmap_insert_cuda, cuda.hashmap_lookup_cuda),
        (ops.hashmap_insert_cuda, ops.hashmap_lookup_cuda),
    ):
        made = table(slots, key_dtype, value_dtype, device)
        insert(*made, keys, values)
        found = lookup(*made, keys)
        assert found.dtype == value_dtype and torch.equal(bits(found), bits(values))
        assert bool((bits(lookup(*made, absent)) == -1).all())
    full = table(count, key_dtype, value_dtype, device)
    cuda.hashmap_insert(*full, keys, values)
    with raises(flex_gemm.ArgumentError, match="slots"):
        cuda.hashmap_insert(*full, absent[:1], values[:1])


@mark.parametrize("key_dtype, value_dtype", KINDS, ids=str)
def test_tables_of_voxels(key_dtype, value_dtype, clouds, device):
    coords = clouds.random(100)
    box = (8, 8, 8)
    made = table(150, key_dtype, value_dtype, device)
    cuda.hashmap_insert_3d_idx_as_val(*made, coords, *box)
    found = cuda.hashmap_lookup_3d_cuda(*made, coords, *box)
    assert bits(found).tolist() == list(range(100))
    outside = coords.clone()
    outside[:, 1] += 8
    assert bool((bits(cuda.hashmap_lookup_3d(*made, outside, *box)) == -1).all())
    values = bits(found).flip(0).contiguous().view(value_dtype)
    other = table(150, key_dtype, value_dtype, device)
    ops.hashmap_insert_3d_cuda(*other, torch.cat([coords, outside]), values.repeat(2), *box)
    found = ops.hashmap_lookup_3d_cuda(*other, coords, *box)
    assert torch.equal(bits(found), bits(values))


def test_init_hashmap(device):
    keys, values = init_hashmap((2, 5, 1024, 1024, 1024), 33, device)
    assert keys.dtype == values.dtype == torch.uint32 and keys.shape == values.shape == (33,)
    assert bool((bits(keys) == -1).all())
    keys = init_hashmap((4, 5, 1024, 1024, 1024), 33, device, with_values=False)
    assert keys.dtype == torch.uint64 and bool((bits(keys) == -1).all())


@mark.parametrize("mode", ["z_order", "hilbert"])
@mark.parametrize("size", [1, 2, 3, 8, 100, 1024, 2048])
def test_codes_go_back_and_sort_by_sample(mode, size, device):
    batch = 5 if size == 2048 else 3
    generator = torch.Generator().manual_seed(size)
    coords = torch.randint(0, size, (200, 4), generator=generator, dtype=torch.int32)
    coords[:, 0] = torch.arange(200) % batch
    coords = coords.to(device)
    shape = torch.Size((batch, 7, size, max(size - 1, 1), size))
    coords[:, 2].clamp_(max=max(size - 2, 0))
    codes = serialize.encode_seq(coords, shape, mode)
    total = 3 * (size - 1).bit_length() + (batch - 1).bit_length()
    assert codes.dtype == (torch.int32 if total <= 31 else torch.int64)
    assert torch.equal(serialize.decode_seq(codes, shape, mode), coords)
    order = torch.sort(codes).indices
    samples = coords[order, 0].tolist()
    assert samples == sorted(samples)
    length = (size - 1).bit_length()
    raw = torch.empty(200, dtype=codes.dtype, device=device)
    getattr(cuda, f"{mode}_encode")(coords, length, raw)
    assert torch.equal(raw, codes)
    by_operator = torch.empty_like(raw)
    getattr(ops, f"{mode}_encode")(coords, length, by_operator)
    assert torch.equal(by_operator, codes)
    assert torch.equal(getattr(ops, f"{mode}_decode")(codes, length), coords)


def test_z_order_has_x_on_top(device):
    corners = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    codes = serialize.encode_seq(corners.int().to(device), (2, 1, 2, 2, 2))
    assert codes.tolist() == [4, 2, 1, 8]


def test_codes_that_cannot_be(device):
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    with raises(flex_gemm.ArgumentError, match="2097153|4194304|bits"):
        serialize.encode_seq(coords, (2, 1, 2**22, 2**22, 2**22))
    with raises(ValueError, match="Unknown encoding mode: spiral"):
        serialize.encode_seq(coords, (2, 1, 2, 2, 2), "spiral")


@mark.parametrize("mode", ["z_order", "hilbert"])
def test_codes_of_wide_integers(mode, device):
    """Beyond 32 bits they are refused, not taken for another voxel of the box."""
    shape, good = (2, 1, 4, 4, 4), torch.tensor([[1, 2, 3, 0], [0, 1, 2, 3]], device=device)
    codes = serialize.encode_seq(good.int(), shape, mode)
    for dtype in (torch.int64, torch.int16, torch.uint8, torch.uint32, torch.uint64):
        assert torch.equal(serialize.encode_seq(good.to(dtype), shape, mode), codes)
    for column in range(4):
        for value in (2**32, -(2**32), 2**31):
            coords = good.clone()
            coords[1, column] += value
            said = rf"row 1 of coords is \[{', '.join(map(str, coords[1].tolist()))}\]"
            with raises(flex_gemm.ArgumentError, match=f"{said}, expected numbers of 32 bits"):
                serialize.encode_seq(coords, shape, mode)
    for dtype in (torch.uint32, torch.uint64):
        coords = good.clone()
        coords[0, 1] = -1
        with raises(flex_gemm.ArgumentError, match="row 0 of coords is"):
            serialize.encode_seq(coords.to(dtype), shape, mode)
    with raises(TypeError, match="coords is torch.float32, expected integers"):
        serialize.encode_seq(good.float(), shape, mode)
    # Of batch 2^32, which came back as batch 0.
    code = torch.tensor([2**38], device=device)
    with raises(flex_gemm.ArgumentError, match="is of batch 4294967296, expected at most"):
        serialize.decode_seq(code, shape, mode)
    with raises(flex_gemm.ArgumentError, match="is of batch 4294967296, expected at most"):
        getattr(cuda, f"{mode}_decode")(code, 2)


@fixture
def scene(clouds, randn, device):
    """feats, coords, shape and points inside, outside and at negative places."""
    coords = clouds.random(120)
    points = randn(2, 90, 3) * 3 + 4
    return randn(120, 5), coords, (2, 5, 8, 8, 8), points


@mark.parametrize("mode", ["trilinear", "nearest"])
def test_samples_equal_the_rule(mode, scene):
    feats, coords, shape, points = scene
    assert bool((points < 0).any()) and bool((points > 8).any())
    expected = grid_sample_3d_torch(feats, coords, shape, points, mode)
    assert int((expected != 0).sum()) > 50
    for found in (
        grid_sample_3d(feats, coords, shape, points, mode),
        grid_sample_3d(feats, coords.long(), torch.Size(shape), points, mode=mode),
        GridSample3dFunction.apply(feats, coords, shape, points, mode),
        GridSample3dFunction.apply(feats, coords, points, shape, mode, 2.0),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    by_half = grid_sample_3d(feats, coords, shape, points.half(), mode)
    torch.testing.assert_close(
        by_half, grid_sample_3d_torch(feats, coords, shape, points.half().float(), mode)
    )


def test_nearest_truncates(device):
    """A point in (-1, 0) reads voxel 0, as the original does."""
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    points = torch.tensor([[[-0.5, 0.2, 0.9], [-1.0, 0, 0], [0.99, 0.5, 1.0]]], device=device)
    found = grid_sample_3d(
        torch.ones(1, 1, device=device), coords, (1, 1, 4, 4, 4), points, "nearest"
    )
    assert found.flatten().tolist() == [1, 0, 0]


@mark.parametrize("mode", ["trilinear", "nearest"])
def test_sample_gradients(mode, scene):
    feats, coords, shape, points = scene
    leaves = [feats.double().requires_grad_(), points.double().requires_grad_()]
    if mode == "nearest":
        leaves[1].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = grid_sample_3d_torch(leaves[0], coords, shape, leaves[1], mode)
    found = grid_sample_3d(leaves[0], coords, shape, leaves[1], mode)
    dy = torch.randn_like(expected)
    reference = torch.autograd.grad(expected, wanted, dy)
    first = torch.autograd.grad(found, wanted, dy, retain_graph=True)
    torch.testing.assert_close(first, reference)
    again = torch.autograd.grad(found, wanted, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_row_zero_does_not_leak(scene):
    feats, coords, shape, points = scene
    poisoned = feats.clone()
    poisoned[0] = float("nan")
    for mode in ("trilinear", "nearest"):
        clean = grid_sample_3d(feats, coords, shape, points, mode)
        found = grid_sample_3d(poisoned, coords, shape, points, mode)
        touched = found.isnan().any(-1)
        assert torch.equal(found[~touched], clean[~touched])
        marked = torch.zeros_like(feats)
        marked[0] = 1
        assert torch.equal(touched, grid_sample_3d(marked, coords, shape, points, mode)[..., 0] > 0)


def test_nothing_to_sample(device):
    feats = torch.zeros(0, 3, device=device, requires_grad=True)
    coords = torch.zeros(0, 4, dtype=torch.int32, device=device)
    points = torch.ones(2, 4, 3, device=device)
    for mode in ("trilinear", "nearest"):
        out = grid_sample_3d(feats, coords, (2, 3, 4, 4, 4), points, mode)
        assert out.shape == (2, 4, 3) and int(out.count_nonzero()) == 0
        assert torch.autograd.grad(out.sum(), feats)[0].shape == (0, 3)
        assert grid_sample_3d(feats, coords, (2, 3, 4, 4, 4), points[:, :0], mode).shape == (
            2,
            0,
            3,
        )


def test_sampling_arguments(scene):
    feats, coords, shape, points = scene
    for kind in (ValueError, AssertionError):
        with raises(kind, match="Invalid interpolation mode"):
            grid_sample_3d(feats, coords, shape, points, "cubic")
        with raises(kind, match="ratio is 0.5"):
            grid_sample.set_hashmap_ratio(0.5)
    grid_sample.set_hashmap_ratio(3.0)
    assert grid_sample.HASHMAP_RATIO == 3.0 and spconv.HASHMAP_RATIO == 2.0
    grid_sample.HASHMAP_RATIO = 0.01  # a hint: nothing is lost
    expected = grid_sample_3d_torch(feats, coords, shape, points)
    torch.testing.assert_close(grid_sample_3d(feats, coords, shape, points), expected)
    grid_sample.set_hashmap_ratio(2.0)


def test_neighbour_maps_of_samples(scene, device):
    feats, coords, shape, points = scene
    box = shape[2:]
    made = table(150, torch.uint32, torch.uint32, device)
    rows = cuda.hashmap_build_grid_sample_3d_nearest_neighbor_map(*made, coords, points, *box)
    assert rows.dtype == torch.uint32 and rows.shape == (2, 90)
    expected = grid_sample_3d_torch(feats, coords, shape, points, "nearest")
    picked = feats[bits(rows).clamp(min=0)] * (bits(rows) >= 0)[..., None]
    assert torch.equal(picked, expected)
    made = table(150, torch.uint32, torch.uint32, device)
    rows, weights = ops.hashmap_build_grid_sample_3d_trilinear_neighbor_map_weight(
        *made, coords, points, *box
    )
    assert rows.shape == weights.shape == (2, 90, 8)
    assert rows.dtype == torch.uint32 and weights.dtype == torch.float32
    for corner in range(8):
        step = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2], device=device)
        at = (points - 0.5).floor() + step
        there = bits(rows)[..., corner]
        found = coords[there.clamp(min=0)][..., 1:]
        assert bool((found[there >= 0] == at[there >= 0]).all())


@mark.parametrize("dtype", [torch.int32, torch.uint32, torch.int64])
def test_weighted_sums(dtype, randn, device):
    feats, weight = randn(50, 6), randn(30, 8)
    rows = torch.randint(-1, 50, (30, 8), generator=torch.Generator().manual_seed(1)).to(device)
    matrix = torch.zeros(30, 50, dtype=torch.float64, device=device)
    present = (rows >= 0).nonzero()
    at = (present[:, 0], rows[rows >= 0])
    matrix.index_put_(at, weight[rows >= 0].double(), accumulate=True)
    indices = rows.int().view(torch.uint32) if dtype == torch.uint32 else rows.to(dtype)
    expected = (matrix @ feats.double()).float()
    back = (matrix.t() @ expected.double()).float()
    for forward, backward in (
        (triton.indice_weighed_sum_fwd, triton.indice_weighed_sum_bwd_input),
        (ops.indice_weighed_sum_fwd, ops.indice_weighed_sum_bwd_input),
    ):
        torch.testing.assert_close(forward(feats, indices, weight), expected)
        torch.testing.assert_close(backward(expected, indices, weight, 50), back)


LAUNCHERS = [f"{middle}implicit_gemm{end}" for middle in ("", "masked_") for end in ("", "_splitk")]


@mark.parametrize("name", LAUNCHERS)
def test_launchers(name, clouds, randn, device):
    """With the program's own map: int64, -1 for none, no bias."""
    coords, feats = clouds.random(60), randn(60, 6)
    weight = randn(7, 27, 6)
    cache = SubMConv3dFunction._compute_neighbor_cache(coords, (2, 6, 8, 8, 8), (3,) * 3, (1,) * 3)
    order = (cache.sorted_idx, cache.valid_kernel_callback, cache.valid_kernel_seg_callback)
    pairs = (cache.valid_signal_i, cache.valid_signal_o, cache.valid_signal_seg)
    masked = name.startswith("masked")
    spconv.set_algorithm(name)
    leaves = [feats.requires_grad_(), weight.requires_grad_(), randn(7).requires_grad_()]
    shaped = weight.reshape(7, 3, 3, 3, 6)
    for bias in (leaves[2], None):
        out, _ = sparse_submanifold_conv3d(feats, coords, (2, 6, 8, 8, 8), shaped, bias, cache)
        dy = torch.randn_like(out)
        present = [t for t in (feats, weight, bias) if t is not None]
        expected = torch.autograd.grad(out, present, dy)
        for map in (cache.neighbor_map, bits(cache.neighbor_map).long()):
            forward = getattr(triton, f"sparse_submanifold_conv_fwd_{name}")
            backward = getattr(triton, f"sparse_submanifold_conv_bwd_{name}")
            more = order if masked else ()
            found = forward(feats, weight, bias, map, *more)
            assert torch.equal(found, out) and not found.requires_grad
            gi, gw, gb = backward(dy, feats, weight, bias, map, *more, *(pairs if masked else ()))
            assert gw.shape == weight.shape and (gb is None) == (bias is None)
            torch.testing.assert_close([g for g in (gi, gw, gb) if g is not None], list(expected))
    strided = getattr(triton, f"sparse_conv_fwd_{name}")
    assert torch.equal(strided(feats, weight, None, cache.neighbor_map, *more), out)
    back = getattr(triton, f"sparse_conv_bwd_{name}")
    gi, _, _ = back(dy, feats, weight, None, cache.neighbor_map, cache.neighbor_map)
    torch.testing.assert_close(gi, expected[0])
    none = triton.sparse_submanifold_conv_bwd_implicit_gemm(
        dy, feats.detach(), weight.detach(), None, cache.neighbor_map
    )
    assert none == (None, None, None)


def test_split_launchers_are_tuners(randn, device):
    tuner = triton.sparse_submanifold_conv_fwd_masked_implicit_gemm_splitk
    assert isinstance(tuner, flex_gemm.utils.autotuner.PersistentCacheAutoTuner)
    feats, weight = randn(40, 8), randn(8, 3, 8)
    rows = torch.arange(40, device=device)
    map = torch.stack([rows - 1, rows, torch.where(rows < 39, rows + 1, -1)], 1)
    one, many = (tuner.kernel(feats, weight, None, map, SPLITK=s) for s in (1, 8))
    torch.testing.assert_close(one, many)
    plain = triton.sparse_submanifold_conv_fwd_masked_implicit_gemm(feats, weight, None, map)
    assert torch.equal(one, plain)
    tried = []
    tuner.config_fn = lambda *args, **kwargs: tried.append(1) or [{"SPLITK": 1}]
    tuner.key_fn = lambda input, *args: f"{len(input)}"
    try:
        assert torch.equal(tuner(feats, weight, None, map), one)
        assert tried and tuner.cache["40"] == {"SPLITK": 1}
    finally:
        tuner.config_fn = tuner.key_fn = None
        tuner.cache.clear()


def test_maps_that_are_not_symmetric(randn, device):
    """An octree's matrix: several rows of a tap may read one input row."""
    feats, weight = randn(20, 4).double(), randn(5, 3, 4).double()
    map = torch.randint(-1, 20, (30, 3), generator=torch.Generator().manual_seed(5)).to(device)
    dense = torch.zeros(30, 3, 20, dtype=torch.float64, device=device)
    for o, row in enumerate(map.tolist()):
        for v, i in enumerate(row):
            if i >= 0:
                dense[o, v, i] = 1
    leaves = [feats.requires_grad_(), weight.requires_grad_()]
    expected = torch.einsum("ovi,ic,dvc->od", dense, *leaves)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, dy)
    out = triton.sparse_submanifold_conv_fwd_implicit_gemm(feats, weight, None, map, -1)
    torch.testing.assert_close(out, expected.detach())
    gi, gw, _ = triton.sparse_submanifold_conv_bwd_implicit_gemm(dy, feats, weight, None, map)
    torch.testing.assert_close((gi, gw), wanted, check_dtype=False)


def test_functions_of_neighbour_maps(clouds, device):
    coords = clouds.random(50)
    made = table(80, torch.uint32, torch.uint32, device)
    numbers = (8, 8, 8, 3, 3, 3, 1, 1, 1)
    map = cuda.hashmap_build_submanifold_conv_neighbour_map(*made, coords, *numbers)
    cache = SubMConv3dFunction._compute_neighbor_cache(coords, (2, 1, 8, 8, 8), (3,) * 3, (1,) * 3)
    assert torch.equal(bits(map), bits(cache.neighbor_map))
    assert bits(cuda.hashmap_lookup_3d(*made, coords, 8, 8, 8)).tolist() == list(range(50))
    first = cuda.neighbor_map_post_process_for_masked_implicit_gemm_1(map)
    names = ("gray_code", "sorted_idx", "valid_signal_i", "valid_signal_o", "valid_signal_seg")
    for name, value in zip(names, first, strict=True):
        assert torch.equal(bits(value), bits(cache[name])), name
    short = cuda.neighbor_map_post_process_for_masked_implicit_gemm_1_no_bwd(map)
    assert all(torch.equal(a, b) for a, b in zip(short, first[:2], strict=True))
    second = cuda.neighbor_map_post_process_for_masked_implicit_gemm_2(*short, 32)
    assert torch.equal(second[0], cache.valid_kernel_32)
    assert torch.equal(second[1], cache.valid_kernel_seg_32)
    geometry = (3, 3, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1)
    rows = cuda.hashmap_build_sparse_conv_out_coords(coords, 1.1, 0, 2, 8, 8, 8, *geometry)
    same = cuda.expand_unique_build_sparse_conv_out_coords(coords, 0, 2, 8, 8, 8, *geometry)
    assert torch.equal(rows, same)
    for mode, curve in ((1, "z_order"), (2, "hilbert")):
        along = cuda.hashmap_build_sparse_conv_out_coords(coords, 1.1, mode, 2, 8, 8, 8, *geometry)
        codes = serialize.encode_seq(rows, (2, 1, 4, 4, 4), curve)
        assert torch.equal(along, rows[torch.sort(codes).indices])
    forth, back = cuda.hashmap_build_sparse_conv_neighbour_map(
        coords, rows, 1.1, True, 2, 8, 8, 8, *geometry
    )
    assert forth.shape == (len(rows), 27) and back.shape == (50, 27)
    o, v = (bits(forth) >= 0).nonzero(as_tuple=True)
    assert torch.equal(bits(back)[bits(forth)[o, v], v], o.int())
    assert (
        cuda.hashmap_build_sparse_conv_neighbour_map(
            coords, rows, 1.1, False, 2, 8, 8, 8, *geometry
        )[1]
        is None
    )


def samples(device, clouds):
    """Arguments of every operator of torch.ops.flex_gemm."""
    coords = clouds.random(40)
    cache = SubMConv3dFunction._compute_neighbor_cache(coords, (2, 4, 8, 8, 8), (3,) * 3, (1,) * 3)
    config = cache.freeze()
    fresh = lambda: table(64, torch.uint32, torch.uint32, device)  # noqa: E731
    filled = fresh()
    cuda.hashmap_insert_3d_idx_as_val(*filled, coords, 8, 8, 8)
    keys = torch.arange(10, dtype=torch.int32, device=device).view(torch.uint32)
    codes = torch.empty(40, dtype=torch.int32, device=device)
    draw = torch.Generator().manual_seed(2)
    points = torch.rand(2, 9, 3, generator=draw).to(device) * 8
    feats = torch.randn(40, 4, generator=draw).to(device)
    weight = torch.randn(5, 27, 4, generator=draw).to(device).requires_grad_()
    bias = torch.zeros(5, device=device, requires_grad=True)
    dy = torch.randn(40, 5, generator=draw).to(device)
    rows = torch.randint(0, 40, (9, 8), generator=draw, dtype=torch.int32).to(device)
    weights = torch.rand(9, 8, generator=draw).to(device)
    query = (feats, coords, points, [2, 4, 8, 8, 8], 2.0)
    masked = (config.neighbor_map, config.sorted_idx, config.valid_kernels)
    masked = (*masked, config.valid_kernel_segs, config.block_sizes)
    pairs = (config.valid_signal_i, config.valid_signal_o, config.valid_signal_seg)
    leaf = feats.clone().requires_grad_()
    return {
        "hashmap_insert_cuda": (*fresh(), keys, keys),
        "hashmap_lookup_cuda": (*filled, keys),
        "hashmap_insert_3d_cuda": (*fresh(), coords[:10], keys, 8, 8, 8),
        "hashmap_lookup_3d_cuda": (*filled, coords, 8, 8, 8),
        "hashmap_insert_3d_idx_as_val_cuda": (*fresh(), coords, 8, 8, 8),
        "z_order_encode": (coords, 3, codes),
        "hilbert_encode": (coords, 3, codes.clone()),
        "z_order_decode": (torch.arange(9, device=device), 3),
        "hilbert_decode": (torch.arange(9, device=device), 3),
        "hashmap_build_grid_sample_3d_nearest_neighbor_map": (*fresh(), coords, points, 8, 8, 8),
        "hashmap_build_grid_sample_3d_trilinear_neighbor_map_weight": (
            *(*fresh(), coords, points),
            *(8, 8, 8),
        ),
        "hashmap_build_submanifold_conv_neighbour_map_cuda": (
            *(*fresh(), coords),
            *(8, 8, 8, 3, 3, 3, 1, 1, 1),
        ),
        "neighbor_map_post_process_for_masked_implicit_gemm_1": (config.neighbor_map,),
        "neighbor_map_post_process_for_masked_implicit_gemm_2": (
            *(cache.gray_code, cache.sorted_idx),
            32,
        ),
        "indice_weighed_sum_fwd": (feats, rows, weights),
        "indice_weighed_sum_bwd_input": (dy[:9], rows, weights, 40),
        "_grid_sample_3d_nearest_fwd": query,
        "_grid_sample_3d_trilinear_fwd": query,
        "_grid_sample_3d_trilinear_bwd": (dy[:9], rows, weights, 40),
        "sparse_conv_masked_fwd": (leaf, weight, bias, *masked),
        "sparse_conv_masked_bwd": (dy, feats, weight.detach(), None, *masked, *pairs),
        "sparse_conv_masked_splitk_fwd": (leaf, weight, None, *masked, 2),
        "sparse_conv_masked_splitk_bwd": (
            *(dy, feats, weight.detach(), bias.detach()),
            *(*masked, *pairs, 2),
        ),
    }


OPERATORS = [
    "hashmap_insert_cuda",
    "hashmap_lookup_cuda",
    "hashmap_insert_3d_cuda",
    "hashmap_lookup_3d_cuda",
    "hashmap_insert_3d_idx_as_val_cuda",
    "z_order_encode",
    "hilbert_encode",
    "z_order_decode",
    "hilbert_decode",
    "hashmap_build_grid_sample_3d_nearest_neighbor_map",
    "hashmap_build_grid_sample_3d_trilinear_neighbor_map_weight",
    "hashmap_build_submanifold_conv_neighbour_map_cuda",
    "neighbor_map_post_process_for_masked_implicit_gemm_1",
    "neighbor_map_post_process_for_masked_implicit_gemm_2",
    "indice_weighed_sum_fwd",
    "indice_weighed_sum_bwd_input",
    "_grid_sample_3d_nearest_fwd",
    "_grid_sample_3d_trilinear_fwd",
    "_grid_sample_3d_trilinear_bwd",
    "sparse_conv_masked_fwd",
    "sparse_conv_masked_bwd",
    "sparse_conv_masked_splitk_fwd",
    "sparse_conv_masked_splitk_bwd",
]


@mark.parametrize("name", OPERATORS)
def test_operators_pass_opcheck(name, device, clouds):
    arguments = samples(device, clouds)[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)


COMPILED = [name for name in OPERATORS if "insert" not in name and "encode" not in name]


@mark.parametrize("name", COMPILED)
def test_operators_compile_whole(name, device, clouds):
    if name.startswith("hashmap_build"):
        pytest.skip("writes its arguments; opcheck traces it")
    arguments = samples(device, clouds)[name]
    operator = getattr(ops, name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: operator(*a), fullgraph=True, backend="aot_eager")
    expected, found = operator(*arguments), compiled(*arguments)
    single = isinstance(expected, torch.Tensor)
    for a, b in [(expected, found)] if single else zip(expected, found, strict=True):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def test_masked_operators_are_differentiable(device, clouds):
    arguments = samples(device, clouds)["sparse_conv_masked_fwd"]
    out = ops.sparse_conv_masked_fwd(*arguments)
    leaves = arguments[:3]
    found = torch.autograd.grad(out.square().sum(), leaves)
    coords = clouds.random(40)
    shaped = arguments[1].reshape(5, 3, 3, 3, 4)
    spconv.set_algorithm("masked_implicit_gemm")
    same, _ = sparse_submanifold_conv3d(arguments[0], coords, (2, 4, 8, 8, 8), shaped, arguments[2])
    wanted = torch.autograd.grad(same.square().sum(), leaves)
    torch.testing.assert_close(found, wanted)


@mark.parametrize("mode", ["trilinear", "nearest"])
def test_sampling_compiles_whole(mode, scene):
    feats, coords, shape, points = scene

    def run(feats, points):
        return grid_sample_3d(feats, coords, shape, points, mode)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    feats.requires_grad_()
    expected, found = run(feats, points), compiled(feats, points)
    assert torch.equal(expected, found)
    wanted = torch.autograd.grad(expected.sum(), feats)
    assert torch.equal(torch.autograd.grad(found.sum(), feats)[0], wanted[0])


def test_every_function_has_both_spellings():
    for name in ("hashmap_insert", "hashmap_lookup", "hashmap_insert_3d", "hashmap_lookup_3d"):
        assert getattr(kernels.cuda, f"{name}_cuda") is getattr(kernels.cuda, name)


@mark.parametrize("name", ["implicit_gemm_splitk", "masked_implicit_gemm_splitk"])
def test_a_transposed_weight_gives_the_input_gradient(name, clouds, randn):
    # Whole numbers, of which every sum is exact.
    coords, feats, weight = clouds.random(50), randn(50, 4).round(), randn(6, 27, 4).round()
    options = {"stride": (2, 2, 2), "padding": (1, 1, 1)}
    shaped = weight.reshape(6, 3, 3, 3, 4)
    feats.requires_grad_()
    out, _, cache = spconv.sparse_conv3d(feats, coords, (2, 4, 8, 8, 8), shaped, **options)
    dy = torch.randn_like(out).round()
    expected = torch.autograd.grad(out, feats, dy)[0]
    launch = getattr(triton, f"sparse_conv_fwd_{name}")
    found = launch(dy, weight, None, cache.neighbor_map_bwd, TRANSPOSE_WEIGHT=True)
    assert torch.equal(found, expected)
