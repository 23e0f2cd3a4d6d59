# SPDX-License-Identifier: Apache-2.0
"""warpconvnet's convolutions against a sum over coordinates, case by case of the specification."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from pytest import fixture, mark, raises

from warpconvnet import _tuning
from warpconvnet.geometry.coords.ops.serialization import POINT_ORDERING
from warpconvnet.geometry.types.voxels import Voxels
from warpconvnet.nn.functional import (
    sparse_avg_pool,
    sparse_max_pool,
    sparse_reduce,
    sparse_unpool,
    spatially_sparse_conv,
)
from warpconvnet.nn.functional.sparse_conv import (
    STRIDED_CONV_MODE,
)
from warpconvnet.nn.modules import (
    SparseConv2d,
    SparseConv3d,
    SpatiallySparseConv,
)

pytestmark = mark.usefixtures("warp_state")
ALGORITHMS = ("explicit_gemm", "implicit_gemm", "cutlass_implicit_gemm")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
REDUCE = STRIDED_CONV_MODE.REDUCE_AND_STRIDE


@fixture
def choices_that_stay(monkeypatch):
    """All candidates are measured by the first call: what runs does not change between calls."""
    monkeypatch.setattr(_tuning, "BUDGET", 60.0)


def applied(matrix):
    def run(x, weight, bias):
        out = torch.einsum("oki,ic,kcd->od", matrix.to(x.dtype), x, weight)
        return out if bias is None else out + bias

    return run


def triple(value, axes=3):
    return (value,) * axes if isinstance(value, int) else value


def coords_of(voxels: Voxels) -> torch.Tensor:
    return voxels.batch_indexed_coordinates.cpu()


CASES = [
    # axes, kernel, stride, dilation, c_in, c_out, dtype
    (3, 1, 2, 1, 3, 7, F32),
    (3, 2, 1, 1, 7, 3, F16),
    (3, 2, 2, 1, 16, 33, BF16),
    (3, 3, 1, 1, 33, 64, F32),
    (3, 3, 1, 2, 3, 1, F64),
    (3, 3, 2, 1, 7, 16, F16),
    (3, 3, 3, 3, 1, 7, F32),
    (3, 4, 1, 1, 3, 3, F32),
    (3, 5, 1, 1, 3, 7, BF16),
    (3, (3, 1, 5), (2, 1, 3), 2, 7, 3, F32),
    (2, 3, 1, 1, 7, 16, F32),
    (2, (5, 2), (1, 2), (1, 3), 3, 7, F64),
]


@mark.parametrize("algorithm", ALGORITHMS)
@mark.parametrize("axes, size, stride, dilation, c_in, c_out, dtype", CASES)
def test_equals_the_sum_over_coordinates(
    oracle,
    axes,
    size,
    stride,
    dilation,
    c_in,
    c_out,
    dtype,
    algorithm,
    scene,
    randn,
    against,
    terms,
):
    x = scene(c_in, axes, dtype)
    size, stride, dilation = (triple(value, axes) for value in (size, stride, dilation))
    weight, bias = randn(math.prod(size), c_in, c_out, dtype=dtype), randn(c_out, dtype=dtype)
    outputs = []

    def run(features, weight, bias):
        out = spatially_sparse_conv(
            x.replace(batched_features=features),
            weight,
            size,
            stride,
            dilation,
            bias,
            fwd_algo=algorithm,
            bwd_algo=algorithm,
        )
        outputs.append(out)
        assert out.dtype == dtype and out.tensor_stride in (None, stride)
        return out.feature_tensor

    probe = spatially_sparse_conv(x, weight, size, stride, dilation, bias, fwd_algo=algorithm)
    fine, coarse = coords_of(x), coords_of(probe)
    if max(stride) == 1:
        assert torch.equal(fine, coarse)
    else:
        steps = torch.tensor((1, *stride))
        assert torch.equal(coarse, fine.div(steps, rounding_mode="floor").unique(dim=0))
    assert probe.offsets.tolist()[-1] == len(probe) and probe.batch_size == 3
    matrix = oracle(fine, coarse, size, stride, dilation)
    count = terms(size, max(c_in, c_out), max(len(fine), len(coarse)))
    against(run, applied(matrix), (x.feature_tensor, weight, bias), count)


def test_full_grid_equals_torch(device, randn, against, terms):
    coords = torch.cartesian_prod(*[torch.arange(5)] * 3).int().to(device)
    weight, bias, features = randn(27, 4, 6), randn(6), randn(125, 4)

    def dense(x, w, b):
        kernel = w.reshape(3, 3, 3, 4, 6).permute(4, 3, 0, 1, 2)
        grid = x.reshape(1, 5, 5, 5, 4).permute(0, 4, 1, 2, 3)
        return torch.nn.functional.conv3d(grid, kernel, b, padding=1)[0].flatten(1).T

    def run(x, w, b):
        return spatially_sparse_conv(Voxels([coords], [x]), w, 3, bias=b).feature_tensor

    against(run, dense, (features, weight, bias), terms((3, 3, 3), 6, 125))


def test_voxels_that_never_merge(device, randn):
    """The centre of k3 s2 reads input 2u, not the row of the same number."""
    coords = torch.tensor([[1, 1, 1], [4, 4, 0], [8, 9, 3]], dtype=torch.int32, device=device)
    x = Voxels([coords], [randn(3, 2)])
    weight = torch.zeros(27, 2, 2, device=device)
    weight[13] = torch.eye(2, device=device)
    out = spatially_sparse_conv(x, weight, 3, stride=2)
    assert out.coordinate_tensor.tolist() == [[0, 0, 0], [2, 2, 0], [4, 4, 1]]
    expected = x.feature_tensor * torch.tensor([[0.0], [1.0], [0.0]], device=device)
    assert torch.equal(out.feature_tensor, expected)


def fresh(voxels: Voxels) -> Voxels:
    """The same rows as a new object without a past."""
    return Voxels(voxels.coordinate_tensor.clone(), voxels.feature_tensor.clone(), voxels.offsets)


def test_cached_maps_equal_fresh_ones(scene, randn, choices_that_stay):
    x, weight = scene(), randn(27, 4, 4)

    def same(a: Voxels, b: Voxels) -> None:
        assert torch.equal(coords_of(a), coords_of(b)) and torch.equal(a.features, b.features)

    first = spatially_sparse_conv(x, weight, 3)
    same(first, spatially_sparse_conv(fresh(x), weight, 3))
    strided = spatially_sparse_conv(x, weight, 3, stride=2)
    same(strided, spatially_sparse_conv(fresh(x), weight, 3, stride=2))
    turned = first.sort(POINT_ORDERING.MORTON_ZYX)
    assert not torch.equal(coords_of(turned), coords_of(first))
    same(spatially_sparse_conv(turned, weight, 3), spatially_sparse_conv(fresh(turned), weight, 3))
    morton = spatially_sparse_conv(x, weight, 3, order=POINT_ORDERING.MORTON_XYZ)
    assert morton.ordering == POINT_ORDERING.MORTON_XYZ
    same(morton, spatially_sparse_conv(fresh(x), weight, 3, order=POINT_ORDERING.MORTON_XYZ))
    same(spatially_sparse_conv(x, weight, 3), first)
    again = spatially_sparse_conv(morton, weight, 3, stride=2)
    assert again.ordering is None
    other = spatially_sparse_conv(x, weight, 3, kernel_dilation=2)
    same(other, spatially_sparse_conv(fresh(x), weight, 3, kernel_dilation=2))


def test_coordinates_changed_in_place_are_noticed(scene, randn):
    x, weight = scene(), randn(27, 4, 4)
    spatially_sparse_conv(x, weight, 3)
    x.coordinate_tensor.mul_(2)
    out = spatially_sparse_conv(x, weight, 3)
    assert torch.equal(out.features, spatially_sparse_conv(fresh(x), weight, 3).features)


@mark.parametrize("known", [True, False])
@mark.parametrize("size, stride", [(3, 2), (2, 2), (4, 3)])
def test_transposed_with_skip(oracle, size, stride, known, scene, randn, against, terms):
    x = scene(3)
    size, stride = triple(size), triple(stride)
    encoder, weight, bias = randn(math.prod(size), 3, 4), randn(math.prod(size), 4, 5), randn(5)
    down = spatially_sparse_conv(x, encoder, size, stride)
    skip = x if known else fresh(x)
    maps = len(x.cache)
    coarse = down if known else fresh(down)

    def run(features, weight, bias):
        return spatially_sparse_conv(
            coarse.replace(batched_features=features),
            weight,
            size,
            stride,
            bias=bias,
            transposed=True,
            output_spatially_sparse_tensor=skip,
        ).feature_tensor

    matrix = oracle(coords_of(x), coords_of(down), size, stride, (1, 1, 1), transposed=True)
    operands = (down.feature_tensor, weight, bias)
    against(run, applied(matrix), operands, terms(size, 5, len(x)))
    if known:
        assert len(x.cache) == maps  # the encoder's map, backwards
    out = spatially_sparse_conv(
        down, weight, size, stride, transposed=True, output_spatially_sparse_tensor=x
    )
    assert out.tensor_stride == x.tensor_stride and torch.equal(coords_of(out), coords_of(x))


@mark.parametrize("size", [3, 2, (3, 1, 4)])
@mark.parametrize(
    "stride, transposed, mode",
    [(1, False, None), (2, False, None), (2, False, REDUCE), (2, True, None), (1, True, None)],
)
def test_generative(
    oracle, offsets_by_hand, size, stride, transposed, mode, scene, randn, against, terms
):
    x = scene(3, samples=(9, 0, 5))
    size, stride = triple(size), triple(stride)
    weight, bias = randn(math.prod(size), 3, 4), randn(4)
    options = {"generative": True, "transposed": transposed, "stride_reduce": "sum"}
    options |= {} if mode is None else {"stride_mode": mode}
    out = spatially_sparse_conv(x, weight, size, stride, bias=bias, **options)
    base = coords_of(x).long()
    source, relation = x, stride
    if mode is REDUCE:
        source, relation = sparse_reduce(x, stride, stride, "sum"), (1, 1, 1)
        base = coords_of(source).long()
    elif transposed:
        base[:, 1:] *= torch.tensor(stride)
    elif max(stride) > 1:
        base = base.div(torch.tensor((1, *stride)), rounding_mode="floor")
    steps = torch.tensor([(0, *step) for step in offsets_by_hand(size, (1, 1, 1))])
    expected = (base[:, None] + steps).flatten(0, 1).unique(dim=0)
    assert torch.equal(coords_of(out).long(), expected)
    sets = (coords_of(out), coords_of(x)) if transposed else (coords_of(source), coords_of(out))
    matrix = oracle(*sets, size, relation, (1, 1, 1), transposed)

    def run(features, weight, bias):
        made = x.replace(batched_features=features)
        return spatially_sparse_conv(
            made, weight, size, stride, bias=bias, **options
        ).feature_tensor

    if mode is REDUCE:
        # Of whole numbers: sums are exact, in float32 too.
        x = x.replace(batched_features=x.features.round())
        weight, bias = weight.round(), bias.round()
        source = sparse_reduce(x, stride, stride, "sum").features.cpu()
        assert torch.equal(
            run(x.features, weight, bias).cpu(), applied(matrix)(source, weight.cpu(), bias.cpu())
        )
        return
    operands = (x.feature_tensor, weight, bias)
    against(run, applied(matrix), operands, terms(size, 4, len(expected)))


def test_one_voxel_grows_to_27(device, randn):
    x = Voxels([torch.ones(1, 3, dtype=torch.int32, device=device)], [randn(1, 2)])
    out = spatially_sparse_conv(x, randn(27, 2, 2), 3, stride=2, transposed=True, generative=True)
    assert len(out) == 27
    assert out.coordinate_tensor.amin(0).tolist() == [1, 1, 1]
    assert out.coordinate_tensor.amax(0).tolist() == [3, 3, 3]


@mark.parametrize("reduction", ["max", "min", "mean", "sum"])
def test_reduce_and_stride_is_pooling_then_convolving(reduction, scene, randn):
    x, weight = scene(), randn(27, 4, 4)
    pooled = sparse_reduce(x, 2, 2, reduction)
    groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for at, row in zip(coords_of(x).tolist(), x.features.cpu(), strict=True):
        groups.setdefault((at[0], *(c // 2 for c in at[1:])), []).append(row)
    function = {"max": torch.amax, "min": torch.amin, "mean": torch.mean, "sum": torch.sum}
    expected = [function[reduction](torch.stack(groups[key]), 0) for key in sorted(groups)]
    torch.testing.assert_close(pooled.features.cpu(), torch.stack(expected))
    out = spatially_sparse_conv(x, weight, 3, 2, stride_mode=REDUCE, stride_reduce=reduction)
    direct = spatially_sparse_conv(fresh(pooled), weight, 3)
    assert torch.equal(coords_of(out), coords_of(direct))
    torch.testing.assert_close(out.features, direct.features)
    assert out.tensor_stride == (2, 2, 2)


def test_pools_and_back(scene):
    x = scene()
    assert torch.equal(sparse_max_pool(x, 2).features, sparse_reduce(x, 2, 2, "max").features)
    pooled = sparse_avg_pool(x, 2)
    back = sparse_unpool(pooled, x, 2)
    rows = dict(zip(map(tuple, coords_of(pooled).tolist()), pooled.features, strict=True))
    expected = [rows[(at[0], *(c // 2 for c in at[1:]))] for at in coords_of(x).tolist()]
    assert torch.equal(back.features, torch.stack(expected))
    both = sparse_unpool(pooled, x, 2, concat_unpooled_voxels=True)
    assert torch.equal(both.features, torch.cat([back.features, x.features], 1))


@mark.parametrize("groups", [1, 2, 4, 8])
def test_groups_are_blocks_of_a_diagonal(groups, scene, randn):
    x = scene(8)
    # Whole numbers, of which every sum is exact.
    x = x.replace(batched_features=x.features.round())
    weight, bias = randn(27, groups, 8 // groups, 8 // groups).round(), randn(8).round()
    whole = torch.zeros(27, 8, 8, device=x.device)
    for g in range(groups):
        at = slice(g * 8 // groups, (g + 1) * 8 // groups)
        whole[:, at, at] = weight[:, g]
    expected = spatially_sparse_conv(x, whole, 3, bias=bias).features
    given = weight[:, 0] if groups == 1 else weight
    found = spatially_sparse_conv(x, given, 3, bias=bias, groups=groups).features
    assert torch.equal(found, expected)
    point = spatially_sparse_conv(x, given[:1], 1, bias=bias, groups=groups).features
    assert torch.equal(point, x.features @ whole[0] + bias)


GRADIENTS = {
    "stride": {"stride": 2},
    "reduce": {"stride": 2, "stride_mode": REDUCE, "stride_reduce": "mean"},
    "generative": {"generative": True},
    "transposed": {"stride": 2, "transposed": True, "generative": True},
}


@mark.parametrize("case", GRADIENTS)
def test_gradcheck(case, scene, randn, choices_that_stay):
    x = scene(2, dtype=F64, samples=(6, 4), extent=2)
    leaves = [x.features, randn(27, 2, 2, dtype=F64), randn(2, dtype=F64)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def run(features, weight, bias):
        made = x.replace(batched_features=features)
        return spatially_sparse_conv(made, weight, 3, bias=bias, **GRADIENTS[case]).features

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, eps=1e-6, atol=1e-4, fast_mode=True)
    out = run(*leaves)
    once = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for leaf in leaves:
        leaf.grad = None
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)


def test_large_numbers_and_precision(scene, randn):
    """Past the largest half-precision number, to 1e-5 of float64."""
    x = scene(16)
    features = x.features * 1e5
    weight = randn(27, 16, 16)
    for algorithm in ALGORITHMS:
        big = spatially_sparse_conv(
            x.replace(batched_features=features), weight, 3, fwd_algo=algorithm
        ).features
        exact = spatially_sparse_conv(
            x.replace(batched_features=features.double()), weight.double(), 3
        ).features
        assert float(exact.abs().max()) > 65504
        assert float((big - exact).abs().max() / exact.abs().max()) < 1e-5


def test_autocast_and_compute_dtype(scene, device):
    x = scene(4)
    module = SparseConv3d(4, 5, 3).to(device)
    with torch.autocast(device.type, dtype=BF16):
        out = module(x)
        assert out.feature_tensor.dtype == BF16
        out.feature_tensor.float().sum().backward()
    assert module.weight.grad.dtype == F32 == module.bias.grad.dtype
    narrow = SparseConv3d(4, 5, 3, compute_dtype=F16).to(device)
    assert narrow(x).feature_tensor.dtype == F32


def test_nothing_and_rows_without_taps(device, randn):
    none = torch.zeros(0, 3, dtype=torch.int32, device=device)
    weight, bias = randn(27, 2, 3).requires_grad_(), randn(3).requires_grad_()
    cases = ({}, {"stride": 2}, {"generative": True}, {"stride": 2, "stride_mode": REDUCE})
    for samples in ([], [none], [none, none]):
        features = [randn(0, 2) for _ in samples]
        x = Voxels(samples, features) if samples else Voxels(none, randn(0, 2), [0])
        for options in cases:
            out = spatially_sparse_conv(x, weight, 3, bias=bias, **options)
            assert out.features.shape == (0, 3) and out.batch_size == len(samples)
            gradients = torch.autograd.grad(out.features.sum(), (weight, bias))
            assert all(int(g.count_nonzero()) == 0 for g in gradients)
    far = Voxels([torch.tensor([[9, 9, 9]], dtype=torch.int32, device=device)], [randn(1, 1)])
    x = Voxels([torch.zeros(1, 3, dtype=torch.int32, device=device)], [randn(1, 2)])
    out = spatially_sparse_conv(x, weight, 3, bias=bias, output_spatially_sparse_tensor=far)
    assert torch.equal(out.features[0], bias)


def test_repeated_voxels(oracle, device, randn):
    """The first row owns the voxel; each row has an output; the gradient is the adjoint."""
    coords = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.int32, device=device)
    x = Voxels([coords], [randn(3, 2, dtype=F64)])
    weight = randn(27, 2, 2, dtype=F64)
    matrix = oracle(coords_of(x), coords_of(x), (3,) * 3, (1,) * 3, (1,) * 3).to(device)
    leaves = [x.features.clone().requires_grad_(), weight.requires_grad_()]
    expected = applied(matrix)(*leaves, None)
    out = spatially_sparse_conv(x.replace(batched_features=leaves[0]), weight, 3).features
    torch.testing.assert_close(out, expected)
    dy = randn(3, 2, dtype=F64)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    )


@mark.parametrize("algorithm", ALGORITHMS)
def test_repeatable(algorithm, scene, randn, threads, device, choices_that_stay):
    x, weight = scene(16, samples=(200, 150)), randn(27, 16, 16).requires_grad_()
    features = x.features.clone().requires_grad_()
    runs = []
    for count in (1, 16, 16) if device.type == "cpu" else (1, 1):
        threads(count)
        out = spatially_sparse_conv(
            x.replace(batched_features=features), weight, 3, fwd_algo=algorithm, bwd_algo=algorithm
        ).features
        runs.append((out, *torch.autograd.grad(out.square().sum(), (features, weight))))
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def test_maps_die_with_their_tensors(scene, randn):
    weight = randn(27, 4, 4).requires_grad_()
    x = scene()
    out = spatially_sparse_conv(x, weight, 3, stride=2)
    map = weakref.ref(next(iter(x.cache._found.values()))[1])
    out.features.sum().backward()
    del x, out
    gc.collect()
    assert map() is None
    x = scene()
    for _ in range(100):
        spatially_sparse_conv(x, weight, 3).features.sum().backward()
        moved = x.replace(x.coordinate_tensor.clone(), x.features)
        spatially_sparse_conv(moved, weight, 3, stride=2).features.sum().backward()
    del moved
    gc.collect()
    assert len(x.cache) <= 2


def test_wrong_arguments(scene, randn):
    x, weight = scene(), randn(27, 4, 4)
    with raises(TypeError, match="expected Voxels"):
        spatially_sparse_conv(x.features, weight, 3)
    cases = {
        "takes no target": {"generative": True, "output_spatially_sparse_tensor": x},
        "needs output_spatially_sparse_tensor": {"transposed": True},
        "REDUCE_AND_STRIDE does not": {
            "transposed": True,
            "output_spatially_sparse_tensor": x,
            "stride_mode": REDUCE,
        },
        "kernel_dilation is": {"kernel_dilation": (1, 2)},
        "together with": {"bwd_algo": "auto", "dgrad_algo": "auto"},
        "groups": {"groups": 3},
    }
    for text, options in cases.items():
        with raises(ValueError, match=text):
            spatially_sparse_conv(x, weight, 3, **options)
    with raises(ValueError, match="weight is"):
        spatially_sparse_conv(x, weight[:8], 3)
    with raises(ValueError, match="channels"):
        spatially_sparse_conv(x, weight[:, :3], 3)
    known = x.replace()
    known.set_tensor_stride(4)
    with raises(ValueError, match="tensor_stride is"):
        other = fresh(x)
        other.set_tensor_stride(3)
        spatially_sparse_conv(known, weight, 3, stride=2, output_spatially_sparse_tensor=other)


def test_modules_have_the_originals_parameters():
    torch.manual_seed(0)
    conv = SpatiallySparseConv(6, 8, 3, 2, 1, True, False, False, 2, 3, "implicit_gemm")
    assert conv.weight.shape == (27, 6, 8) and conv.bias.shape == (8,)
    bound = math.sqrt(3) * math.sqrt(1 / 3) / math.sqrt(27 * 6)
    assert 0.9 * bound < float(conv.weight.detach().abs().max()) <= bound
    assert float(conv.bias.detach().abs().max()) <= 1 / math.sqrt(27 * 6)
    assert conv.kernel_size == (3, 3, 3) and conv.stride == (2, 2, 2) == tuple(conv.stride)
    up = SparseConv3d(6, 8, 2, stride=2, transposed=True, bias=False)
    assert up.bias is None
    bound = math.sqrt(3) * math.sqrt(1 / 3) / math.sqrt(8 * 8)
    assert 0.9 * bound < float(up.weight.detach().abs().max()) <= bound
    assert SparseConv2d(3, 4, 3).weight.shape == (9, 3, 4)
    assert SpatiallySparseConv(6, 8, 3, groups=2).weight.shape == (27, 2, 3, 4)
    with pytest.raises(ValueError, match="groups is 4"):
        SpatiallySparseConv(6, 8, 3, groups=4)
