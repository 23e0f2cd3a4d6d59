# SPDX-License-Identifier: Apache-2.0
"""What programs do with flex_gemm's convolutions: errors, state, configs, replaced functions."""

from __future__ import annotations

import concurrent.futures

import pytest
import torch
from pytest import mark, raises

import flex_gemm
import voxgemm as vg
from flex_gemm.ops import spconv
from flex_gemm.ops.spconv import (
    Algorithm,
    SparseConv3dFunction,
    SpConvConfig,
    SubMConv3dCompiledFunction,
    SubMConv3dFunction,
    SubMConv3dNeighborCache,
    sparse_conv3d,
    sparse_submanifold_conv3d,
)

ALGORITHMS = [name for key, name in vars(Algorithm).items() if key.isupper()]
pytestmark = mark.usefixtures("flex_state")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Torch compares few uint32 numbers."""
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


def test_wrong_arguments_are_both_kinds_of_errors(layer, device):
    feats, coords, shape, weight, bias = layer(20)
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    _, _, strided = sparse_conv3d(feats, coords, shape, weight, bias, stride=(2, 2, 2))
    run = sparse_submanifold_conv3d
    cases = {
        "Unsupported algorithm x": lambda: spconv.set_algorithm("x"),
        "ratio is 0.5": lambda: spconv.set_hashmap_ratio(0.5),
        "ratio is nan": lambda: spconv.set_hashmap_ratio(float("nan")),
        "ratio is inf": lambda: spconv.set_hashmap_ratio(float("inf")),
        r"Input channels \(3\) should match weight channels \(4\)": lambda: run(
            feats[:, :3], coords, shape, weight, bias
        ),
        "feats has 19 rows, the neighbor_cache was made of 20": lambda: run(
            feats[:19], coords, shape, weight, bias, cache
        ),
        "size is .* made for": lambda: run(feats, coords, shape, weight[:, :1], bias, cache),
        "dilation is .* made for": lambda: run(
            feats, coords, shape, weight, bias, cache, (2, 2, 2)
        ),
        "stride is .* made for": lambda: sparse_conv3d(
            feats, coords, shape, weight, bias, strided, stride=(3, 3, 3)
        ),
        "padding is .* made for": lambda: sparse_conv3d(
            feats, coords, shape, weight, bias, strided, stride=(2, 2, 2), padding=(1, 1, 1)
        ),
        "row 0": lambda: run(feats, coords + 9, shape, weight, bias),
        "expected the five numbers": lambda: run(feats, coords, shape[2:], weight, bias),
        "bfloat16|bf16": lambda: run(feats, coords, shape, weight.bfloat16(), bias),
        "Unsupported algorithm y": lambda: cache.freeze(algorithm="y"),
        "Unsupported algorithm z": lambda: run(feats, coords, shape, weight, bias, algorithm="z"),
        "neighbor_map names row 20": lambda: run(
            feats,
            coords,
            shape,
            weight,
            bias,
            SubMConv3dNeighborCache(neighbor_map=bits(cache.neighbor_map).clamp(min=20)),
        ),
    }
    for text, call in cases.items():
        for kind in (ValueError, AssertionError, vg.ArgumentError, flex_gemm.ArgumentError):
            with raises(kind, match=text):
                call()


def test_a_bad_assigned_algorithm_is_found_at_use(layer):
    spconv.ALGORITHM = "fastest"
    with raises(ValueError, match="Unsupported algorithm fastest"):
        sparse_submanifold_conv3d(*layer(5))


def test_the_backward_runs_the_forwards_algorithm(layer, algorithm):
    feats, coords, shape, weight, bias = layer(60, c_in=16, c_out=16)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    runs = []
    for then in (algorithm, *ALGORITHMS):
        spconv.set_algorithm(algorithm)
        out, _ = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
        spconv.set_algorithm(then)
        runs.append(torch.autograd.grad(out.square().sum(), leaves))
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def test_the_named_algorithm_runs(layer, algorithm):
    """The kernels' names in the map's record of choices."""
    feats, coords, shape, weight, bias = layer(200)
    out, cache = sparse_submanifold_conv3d(
        feats.requires_grad_(), coords, shape, weight.requires_grad_(), bias
    )
    out.sum().backward()
    chosen = {asked.number: choice.kernel for asked, choice in cache._map._choices.items()}
    assert sorted(chosen) == [0, 1, 2]
    expected = dict.fromkeys(chosen, algorithm)
    if feats.is_cuda:
        # Every weight gradient there splits its sum over rows where that pays: one row of the
        # registry stands in both search spaces, under the plain name.
        expected[2] = algorithm.removesuffix("_splitk")
    for number, kernel in chosen.items():
        assert kernel.startswith(f"{expected[number]}_"), chosen


def test_algorithm_for_one_call(layer):
    feats, coords, shape, weight, bias = layer(60)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    for name in ALGORITHMS:
        spconv.set_algorithm(name)
        expected = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)[0]
        strided = sparse_conv3d(feats, coords, shape, weight, bias)[0]
        wanted = torch.autograd.grad(expected.sum() + strided.sum(), leaves)
        spconv.set_algorithm(ALGORITHMS[0])
        out = sparse_submanifold_conv3d(feats, coords, shape, weight, bias, algorithm=name)[0]
        other = sparse_conv3d(feats, coords, shape, weight, bias, algorithm=name)[0]
        assert torch.equal(out, expected) and torch.equal(other, strided)
        found = torch.autograd.grad(out.sum() + other.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@mark.parametrize("with_bias", [True, False])
@mark.parametrize("dtype, bound", [(F16, 1e-3), (F32, 1e-6)])
def test_frozen_configs(dtype, bound, with_bias, layer, algorithm):
    feats, coords, shape, weight, bias = layer(80, c_in=8, c_out=8, dtype=dtype)
    weight = weight / 15  # results near 1, so that the specification's bounds are relative ones
    bias = bias if with_bias else None
    leaves = [t.requires_grad_() for t in (feats, weight, bias) if t is not None]
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    config = cache.freeze(algorithm=algorithm)
    assert isinstance(config, SpConvConfig) and config.block_sizes == [32, 64, 128, 256]
    assert config.splitk == 1 and config.algorithm == algorithm
    assert config.neighbor_map is cache.neighbor_map and config.sorted_idx is cache.sorted_idx
    assert len(config.valid_kernels) == len(config.valid_kernel_segs) == 4
    assert config.valid_kernels[1] is cache.valid_kernel_64
    size = (8, 27, 8)
    fields = [getattr(config, f) for f in list(config.__dataclass_fields__)]
    dy = torch.randn_like(out) / 16
    wanted = torch.autograd.grad(out, leaves, dy)
    for result in (
        sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=config),
        SubMConv3dCompiledFunction.apply(feats, weight.reshape(size), bias, *fields),
        sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=SpConvConfig(*fields)),
    ):
        torch.testing.assert_close(result, out, rtol=bound, atol=bound)
        found = torch.autograd.grad(result, leaves, dy)
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    config.splitk = 4
    result = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=config)
    torch.testing.assert_close(result, out, rtol=bound, atol=bound)


@mark.parametrize("backend", ["aot_eager", "inductor"])
def test_configs_compile_whole(backend, layer, device):
    feats, coords, shape, weight, bias = layer(60, c_in=8, c_out=8)
    # In double: a compiler sums in another order.
    leaves = [t.double().requires_grad_() for t in (feats, weight, bias)]
    with torch.no_grad():
        _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    config = cache.freeze()

    def step(feats, weight, bias):
        out = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=config)
        return torch.nn.functional.silu(out).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    expected, found = step(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), wanted)


def test_a_replaced_backward(layer, monkeypatch):
    """As programs do that offload what the backward reads."""
    feats, coords, shape, weight, bias = layer(30)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    out, _ = SubMConv3dFunction.apply(feats, coords, shape, None, weight, bias, (1, 1, 1))
    expected = torch.autograd.grad(out.square().sum(), leaves)
    seen = []

    def backward(ctx, grad_output, _):
        feats, weight, bias = ctx.saved_tensors
        seen.append(ctx.neighbor_cache)
        gi, gw, gb = SubMConv3dFunction._sparse_submanifold_conv_backward(
            grad_output.contiguous(), feats, ctx.neighbor_cache, weight, bias
        )
        return gi, None, None, None, gw, gb, None

    monkeypatch.setattr(SubMConv3dFunction, "backward", staticmethod(backward))
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    found = torch.autograd.grad(out.square().sum(), leaves)
    assert seen == [cache]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_static_helpers_take_the_programs_keywords(layer, algorithm):
    feats, coords, shape, weight, bias = layer(30)
    cache = SubMConv3dFunction._compute_neighbor_cache(coords, shape, (3, 3, 3), (1, 1, 1))
    out = SubMConv3dFunction._sparse_submanifold_conv_forward(
        feats=feats, neighbor_cache=cache, weight=weight, bias=bias
    )
    assert torch.equal(out, sparse_submanifold_conv3d(feats, coords, shape, weight, bias)[0])
    geometry = ((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3)
    rows = SparseConv3dFunction._get_output_coords(coords, shape, *geometry)
    made = SparseConv3dFunction._compute_neighbor_cache(
        coords, rows, shape, *geometry, needs_grad=False, is_out_coords_given=True
    )
    other = SparseConv3dFunction._compute_neighbor_cache_torch(coords, rows, shape, *geometry)
    first = SparseConv3dFunction._sparse_conv_forward(feats, made, weight, bias)
    second = SparseConv3dFunction._sparse_conv_forward(feats, other, weight, bias)
    assert torch.equal(first, second)


def test_checkpointing_reuses_the_cache(layer):
    """Three layers of one resolution under non-reentrant checkpointing, as TRELLIS.2 runs them."""
    feats, coords, shape, weight, bias = layer(60, c_in=5)
    caches = {}

    def block(x):
        for _ in range(3):
            spconv.set_algorithm(Algorithm.IMPLICIT_GEMM_SPLITK)
            spconv.set_hashmap_ratio(2.0)
            x, caches["cache"] = sparse_submanifold_conv3d(
                x, coords, shape, weight, bias, caches.get("cache"), (1, 1, 1)
            )
        return x

    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    expected = torch.autograd.grad(block(feats).square().sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(block, feats, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_order(layer):
    feats, coords, shape, weight, bias = layer(12, c_in=2, c_out=2, dtype=F64, extent=3)
    _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    _, _, strided = sparse_conv3d(feats, coords, shape, weight, bias)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    for run in (
        lambda *a: sparse_submanifold_conv3d(a[0], coords, shape, a[1], a[2], cache)[0],
        lambda *a: sparse_conv3d(a[0], coords, shape, a[1], a[2], strided)[0],
    ):
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves, atol=1e-4)


def test_autocast(layer, device):
    feats, coords, shape, weight, bias = layer(40)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    with torch.autocast(device.type, dtype=BF16):
        out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
        direct, _ = SubMConv3dFunction.apply(feats, coords, shape, cache, weight, bias, (1, 1, 1))
        strided, _, _ = sparse_conv3d(feats, coords, shape, weight, bias)
        frozen = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=cache.freeze())
    for result in (out, direct, strided, frozen):
        assert result.dtype == BF16
        gradients = torch.autograd.grad(result.float().sum(), leaves)
        assert [g.dtype for g in gradients] == [F32] * 3


def test_non_finite_rows_reach_their_neighbours_only(layer, algorithm):
    feats, coords, shape, weight, bias = layer(60)
    feats[7] = float("nan")
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    reached = (bits(cache.neighbor_map) == 7).any(1)
    assert torch.equal(out.isnan().any(1), reached)


def test_any_strides(layer):
    feats, coords, shape, weight, bias = layer(40)
    expected, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    wide = torch.zeros(40, 8, device=feats.device)[:, ::2]
    wide.copy_(feats)
    turned = weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    dy = torch.ones(1, 1, device=feats.device).expand(40, 5)
    wide.requires_grad_(), turned.requires_grad_()
    out, _ = sparse_submanifold_conv3d(wide, coords, shape, turned, bias)
    assert torch.equal(out, expected)
    found = torch.autograd.grad(out, (wide, turned), dy)
    assert [g.shape for g in found] == [wide.shape, turned.shape]


def test_repeatable(layer, algorithm, threads, device):
    feats, coords, shape, weight, bias = layer(300, c_in=16, c_out=16)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    runs = []
    for count in (1, 3, 16, 16) if device.type == "cpu" else (1, 1):
        threads(count)
        out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
        strided, _, _ = sparse_conv3d(feats, coords, shape, weight, bias, stride=(2, 2, 2))
        gradients = torch.autograd.grad(out.square().sum() + strided.square().sum(), leaves)
        runs.append((out, strided, *gradients, bits(cache.neighbor_map)))
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def test_allow_tf32_is_torchs_until_assigned(device, layer):
    config = flex_gemm.kernels.triton.spconv.config
    assert config.allow_tf32 == torch.backends.cuda.matmul.allow_tf32
    feats, coords, shape, weight, bias = layer(200, c_in=64, c_out=64)
    exact = sparse_submanifold_conv3d(feats.double(), coords, shape, weight.double(), bias.double())
    errors = {}
    for allowed in (True, False):
        config.allow_tf32 = allowed
        out, _ = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
        errors[allowed] = float((out - exact[0]).abs().max() / exact[0].abs().max())
    assert errors[False] < 1e-5
    # On the CPU the switch changes nothing.
    assert errors[True] > 1e-5 if device.type == "cuda" else errors[True] == errors[False]
    config._kernel_config.configure(allow_tf32=False, invalid_neigh=-1)
    assert config.allow_tf32 is False


def test_threads_with_algorithms_of_their_own(layer):
    feats, coords, shape, weight, bias = layer(200, c_in=16, c_out=16)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)

    def train(name):
        out, _ = sparse_submanifold_conv3d(
            feats, coords, shape, weight, bias, cache, algorithm=name
        )
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    expected = {name: train(name) for name in ALGORITHMS}
    names = ALGORITHMS * 4
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, found in zip(names, pool.map(train, names), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected[name], strict=True))


def test_side_streams_and_captured_graphs(layer, device):
    if device.type != "cuda":
        pytest.skip("streams and graphs are CUDA's")
    feats, coords, shape, weight, bias = layer(200, c_in=16, c_out=16)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    cache = SubMConv3dFunction._compute_neighbor_cache(coords, shape, (3,) * 3, (1,) * 3)

    def train():
        out, _ = sparse_submanifold_conv3d(feats, coords, shape, weight, bias, cache)
        # Detached: a graph of derivatives that lives keeps the leaves' part of the next one on the
        # stream that it was made on, which torch then makes the captured stream wait for.
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    expected = train()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = train()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = train()
        graph.replay()
    torch.cuda.synchronize()
    for found in (beside, captured):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_products_beyond_32_bits(device):
    """Rows times taps and rows times channels above 2^31, looked at in a few rows."""
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 80 * 2**30:
        pytest.skip("needs 80 GiB of free GPU memory")
    rows, channels = 82_000_000, 27
    number = torch.arange(rows, device=device, dtype=torch.int32)
    place = torch.stack([number % 512, number // 512 % 512, number // 512**2], 1)
    coords = torch.nn.functional.pad(place, (1, 0)).contiguous()
    del number, place
    shape = (1, channels, 512, 512, 512)
    feats = torch.ones(rows, channels, dtype=F16, device=device)
    weight = torch.full((1, 3, 3, 3, channels), 1 / 32, dtype=F16, device=device)
    spconv.set_algorithm(Algorithm.IMPLICIT_GEMM)
    out, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, None)
    last = rows - 1
    for row in (0, last, last - 512**2 - 700, 40_000_123):
        at = coords[row].tolist()[1:]
        steps = [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]
        there = [tuple(a + s for a, s in zip(at, step, strict=True)) for step in steps]
        found = [x + 512 * y + 512**2 * z for x, y, z in there]
        count = sum(
            min(p) >= 0 and max(p) < 512 and n < rows for p, n in zip(there, found, strict=True)
        )
        assert float(out[row, 0]) == count * channels / 32
