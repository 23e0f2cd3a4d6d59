# SPDX-License-Identifier: Apache-2.0
"""flex_gemm's specification where no other file has the line: calls as written, state, limits."""

from __future__ import annotations

import inspect
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from pytest import mark, raises
from torch.utils._python_dispatch import TorchDispatchMode

import flex_gemm
from flex_gemm.kernels import cuda, triton
from flex_gemm.ops import grid_sample, serialize, spconv
from flex_gemm.ops.grid_sample import grid_sample_3d, grid_sample_3d_torch
from flex_gemm.ops.spconv import (
    SparseConv3dFunction,
    SparseConv3dNeighborCache,
    SpConvConfig,
    SubMConv3dFunction,
    SubMConv3dNeighborCache,
    sparse_conv3d,
    sparse_submanifold_conv3d,
)

pytestmark = mark.usefixtures("flex_state")
DROPIN = pathlib.Path(flex_gemm.__file__).resolve().parents[1]
subm, strided = SubMConv3dFunction, SparseConv3dFunction

# What programs give by position, in its order.
SIGNATURES = {
    sparse_submanifold_conv3d: "feats coords shape weight bias neighbor_cache dilation config",
    sparse_conv3d: "feats coords shape weight bias neighbor_cache out_coords stride padding "
    "dilation",
    subm._compute_neighbor_cache: "coords shape kernel_size dilation needs_grad",
    subm._compute_neighbor_cache_torch: "coords shape kernel_size dilation",
    subm._sparse_submanifold_conv_forward: "feats neighbor_cache weight bias",
    subm._sparse_submanifold_conv_backward: "grad_output feats neighbor_cache weight bias",
    strided._get_output_coords: "coords shape kernel_size stride padding dilation",
    strided._get_output_coords_torch: "coords shape kernel_size stride padding dilation",
    strided._compute_neighbor_cache: "coords out_coords shape kernel_size stride padding dilation "
    "needs_grad is_out_coords_given",
    strided._compute_neighbor_cache_torch: "coords out_coords shape kernel_size stride padding "
    "dilation needs_grad",
    strided._sparse_conv_forward: "feats neighbor_cache weight bias",
    strided._sparse_conv_backward: "grad_output feats neighbor_cache weight bias",
    SubMConv3dNeighborCache.freeze: "self splitk algorithm",
    SpConvConfig: "neighbor_map sorted_idx valid_kernels valid_kernel_segs block_sizes "
    "valid_signal_i valid_signal_o valid_signal_seg splitk algorithm",
    grid_sample_3d: "feats coords shape grid mode",
    grid_sample_3d_torch: "feats coords shape grid mode",
    serialize.encode_seq: "coords shape mode",
    serialize.decode_seq: "code shape mode",
    flex_gemm.ops.utils.init_hashmap: "spatial_size hashmap_size device with_values",
    flex_gemm.utils.save_autotune_cache: "path",
    flex_gemm.utils.load_autotune_cache: "path_or_mapping",
}


@mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_arguments_have_the_originals_order(function):
    names = list(inspect.signature(function).parameters)
    wanted = SIGNATURES[function].split()
    assert names[: len(wanted)] == wanted
    more = list(inspect.signature(function).parameters.values())[len(wanted) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in more)


SCHEMAS = {
    "hashmap_insert_cuda": "hashmap_keys hashmap_values keys values",
    "hashmap_lookup_3d_cuda": "hashmap_keys hashmap_values coords W H D",
    "hilbert_encode": "coords bit_length codes",
    "hashmap_build_grid_sample_3d_nearest_neighbor_map": "hashmap_keys hashmap_vals coords grid "
    "W H D",
    "hashmap_build_submanifold_conv_neighbour_map_cuda": "hashmap_keys hashmap_vals coords W H D "
    "Kw Kh Kd Dw Dh Dd",
    "_grid_sample_3d_trilinear_fwd": "feats coords query_pts shape hashmap_ratio",
    "_grid_sample_3d_trilinear_bwd": "grad_output indices interp_weight N",
    "sparse_conv_masked_splitk_bwd": "grad_output input weight bias neighbor sorted_idx "
    "valid_kernels valid_kernel_segs block_sizes valid_signal_i valid_signal_o valid_signal_seg "
    "splitk",
}


@mark.parametrize("name", SCHEMAS)
def test_operators_have_the_originals_arguments(name):
    schema = getattr(torch.ops.flex_gemm, name).default._schema
    assert [argument.name for argument in schema.arguments] == SCHEMAS[name].split()
    if "bias" in SCHEMAS[name]:
        assert str(next(a for a in schema.arguments if a.name == "bias").type) == "Optional[Tensor]"
        assert len(schema.returns) == 3


class Launches(TorchDispatchMode):
    """Notes the convolutions that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.namespace == "voxgemm" and operator._opname in (
            *("_forward", "_grad_input", "_grad_weight"),
            *("_submanifold_map", "_kernel_map"),
        ):
            self.seen.append(operator._opname)
        return operator(*arguments, **(keywords or {}))


def test_errors_come_before_any_launch(layer):
    feats, coords, shape, weight, bias = layer(20)
    _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    with Launches() as run:
        sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    assert run.seen == ["_submanifold_map", "_forward"]
    place = (coords, shape)
    wrong = (
        lambda: sparse_submanifold_conv3d(feats[:, :3], *place, weight, bias),
        lambda: sparse_submanifold_conv3d(feats[:19], *place, weight, bias, cache),
        lambda: sparse_submanifold_conv3d(feats, *place, weight, bias, cache, (2, 2, 2)),
        lambda: sparse_submanifold_conv3d(feats, *place, weight, bias, algorithm="fast"),
        lambda: sparse_submanifold_conv3d(feats, coords + 9, shape, weight, bias),
        lambda: sparse_conv3d(feats[:, :3], *place, weight, bias),
        lambda: sparse_conv3d(feats, *place, weight, bias, stride=(2, 0, 2)),
        lambda: grid_sample_3d(feats, *place, torch.rand(1, 2, 3, device=feats.device), "cubic"),
        lambda: serialize.encode_seq(coords, shape, "spiral"),
    )
    for call in wrong:
        for kind in (ValueError, AssertionError):
            with Launches() as run, raises(kind):
                call()
            assert run.seen == []


def test_wrong_types(layer, device):
    feats, coords, shape, weight, bias = layer(20)
    _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    other = SparseConv3dNeighborCache(neighbor_map=cache.neighbor_map)
    wrong = (
        lambda: sparse_submanifold_conv3d(feats.tolist(), coords, shape, weight, bias),
        lambda: sparse_submanifold_conv3d(feats, coords, shape, None, bias),
        lambda: sparse_submanifold_conv3d(feats, coords, shape, weight, bias, other),
        lambda: sparse_submanifold_conv3d(feats, coords, shape, weight, bias, {"neighbor_map": 1}),
        lambda: sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=cache),
        lambda: sparse_conv3d(feats, coords, shape, weight, bias, cache),
        lambda: spconv.set_hashmap_ratio("2"),
        lambda: SubMConv3dNeighborCache(neighbor_map=feats).gray_code,
        lambda: grid_sample_3d(feats, coords.float(), shape, torch.rand(1, 2, 3, device=device)),
    )
    for call in wrong:
        with raises(TypeError):
            call()


@mark.parametrize("size", [3, 24, 1024])
def test_blocks_of_rows_are_powers_of_two(size, layer):
    _, coords, shape, _, _ = layer(20)
    cache = subm._compute_neighbor_cache(coords, shape, (3, 3, 3), (1, 1, 1))
    with raises(ValueError, match=f"block_size is {size}"):
        cache.compute_kernel_idx(size)


def test_hints_lose_nothing(layer, device):
    feats, coords, shape, weight, bias = layer(200)
    expected, at, _ = sparse_conv3d(feats, coords, shape, weight, bias, stride=(2, 2, 2))
    same, _ = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    spconv.HASHMAP_RATIO, spconv.OUT_COORD_HASHMAP_RATIO = 0.01, 0.01
    out, rows, _ = sparse_conv3d(feats, coords, shape, weight, bias, stride=(2, 2, 2))
    assert torch.equal(out, expected) and torch.equal(rows, at)
    assert torch.equal(sparse_submanifold_conv3d(feats, coords, shape, weight, bias)[0], same)


@mark.parametrize("mode, curve", [(1, "z_order"), (2, "hilbert")])
def test_outputs_follow_the_assigned_order(mode, curve, layer):
    feats, coords, shape, weight, bias = layer(60)
    plain, at, _ = sparse_conv3d(feats, coords, shape, weight, bias, stride=(2, 2, 2))
    spconv.SERIALIZATION_MODE = mode
    out, rows, _ = sparse_conv3d(feats, coords, shape, weight, bias, stride=(2, 2, 2))
    codes = serialize.encode_seq(at, (2, 1, 3, 3, 3), curve)
    order = torch.sort(codes).indices
    assert torch.equal(rows, at[order]) and torch.equal(out, plain[order])


def test_what_hung_is_done_within_a_second(device):
    """CPU time, which waiting in a loop spends, too."""
    coords = torch.tensor([[0, 5, 7, 9]], dtype=torch.int32, device=device)
    weight = torch.ones(1, 3, 3, 3, 1, device=device)
    keys, values = (torch.full((8,), -1, device=device) for _ in range(2))
    for _ in range(2):  # the first loads the library
        begin = time.process_time()
        out, rows, _ = sparse_conv3d(
            torch.ones(1, 1, device=device),
            *(coords, (1, 1, 16, 16, 16), weight),
            stride=(2, 2, 2),
            padding=(1, 1, 1),
        )
        assert out.flatten().tolist() == [1] * 8 and len(rows) == 8
        with raises(ValueError, match="slots"):
            number = torch.arange(9, device=device)
            cuda.hashmap_insert(keys.view(torch.uint64), values.view(torch.uint64), number, number)
    assert time.process_time() - begin < 1


@mark.parametrize("kind", [torch.int32, torch.int64])
def test_texture_baking_and_mesh_rendering(kind, clouds, randn, device):
    """The calls of TRELLIS.2: without gradients, points outside the box among them."""
    place = clouds.random(300, 16, batch=1)[:, 1:].to(kind)
    attributes, points = randn(300, 6), randn(500, 3) * 0.6
    origin, voxel_size = torch.full((3,), -0.5, device=device), 1 / 16
    grid = ((points - origin) / voxel_size).reshape(1, -1, 3)
    assert bool((grid < 0).any()) and bool((grid > 16).any())
    with torch.no_grad():
        baked = grid_sample_3d(
            attributes,
            torch.cat([torch.zeros_like(place[:, :1]), place], dim=-1),
            shape=torch.Size([1, attributes.shape[1], 16, 16, 16]),
            grid=grid,
            mode="trilinear",
        )
        rendered = grid_sample_3d(
            attributes,
            torch.cat([torch.zeros_like(place[..., :1]), place], dim=-1),
            torch.Size([1, 6, 16, 16, 16]),
            grid,
            mode="trilinear",
        )[0]
    coords = torch.cat([torch.zeros_like(place[:, :1]), place], 1)
    expected = grid_sample_3d_torch(attributes, coords, (1, 6, 16, 16, 16), grid)
    torch.testing.assert_close(baked, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rendered, baked[0]) and not baked.requires_grad
    spread = grid.expand(2, -1, -1)[:, ::2]
    assert not spread.is_contiguous()
    two = torch.cat([coords, coords + torch.tensor([1, 0, 0, 0], device=device)])
    both = grid_sample_3d(attributes.repeat(2, 1), two, (2, 6, 16, 16, 16), spread)
    assert torch.equal(both[0], baked[0, ::2]) and torch.equal(both[0], both[1])


@mark.parametrize("dtype", [torch.int32, torch.uint32])
def test_weighted_sums_compile_whole(dtype, randn, device):
    feats, weight = randn(50, 6), randn(30, 8)
    rows = torch.arange(240, dtype=torch.int32, device=device).view(30, 8) % 50
    rows[3] = -1
    rows = rows.view(dtype)
    dy = randn(30, 6)

    def both(feats, rows, weight, dy):
        forward = torch.ops.flex_gemm.indice_weighed_sum_fwd(feats, rows, weight)
        return forward, torch.ops.flex_gemm.indice_weighed_sum_bwd_input(dy, rows, weight, 50)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    arguments = (feats, rows, weight, dy)
    for a, b in zip(compiled(*arguments), both(*arguments), strict=True):
        assert torch.equal(a, b)


def everything(operands, points, dy, near):
    """A result of every function that computes."""
    feats, coords, shape, weight, bias = operands
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    config = cache.freeze()
    results = []
    for mode in ("trilinear", "nearest"):
        y = grid_sample_3d(feats, coords, shape, points, mode)
        results += [y, *torch.autograd.grad(y.square().sum(), feats)]
    frozen = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=config)
    results += [frozen, *torch.autograd.grad(frozen.square().sum(), leaves)]
    order = (cache.sorted_idx, cache.valid_kernel_callback, cache.valid_kernel_seg_callback)
    flat = weight.detach().reshape(16, 27, 16)
    for name in ("implicit_gemm_splitk", "masked_implicit_gemm"):
        launch = getattr(triton, f"sparse_submanifold_conv_fwd_{name}")
        more = order if "masked" in name else ()
        results.append(launch(feats.detach(), flat, None, cache.neighbor_map, *more))
    rows = (torch.arange(4800, device=dy.device) * 7 % 300).view(600, 8).int()
    results.append(triton.indice_weighed_sum_fwd(feats.detach(), rows, near))
    results.append(triton.indice_weighed_sum_bwd_input(dy, rows, near, 300))
    codes = serialize.encode_seq(coords, shape, "hilbert")
    results += [codes, serialize.decode_seq(codes, shape, "hilbert"), cache.sorted_idx]
    results += [config.valid_kernels[0], config.valid_signal_i.view(torch.int32)]
    geometry = ((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3)
    return [*results, strided._get_output_coords(coords, shape, *geometry)]


def test_every_function_is_repeatable(layer, randn, device, threads):
    arguments = layer(300, c_in=16, c_out=16), randn(2, 400, 3) * 3 + 4
    arguments = (*arguments, randn(600, 16), randn(600, 8))
    runs = []
    for count in (1, 3, 16, 16) if device.type == "cpu" else (1, 1):
        threads(count)
        runs.append(everything(*arguments))
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def test_compiled_configs_repeat(layer):
    feats, coords, shape, weight, bias = layer(200, c_in=16, c_out=16)
    leaves = [t.requires_grad_() for t in (feats, weight, bias)]
    with torch.no_grad():
        _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    config = cache.freeze()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(feats, weight, bias):
        out = sparse_submanifold_conv3d(feats, weight=weight, bias=bias, config=config)
        return out.square().sum()

    runs = []
    for _ in range(3):
        loss = step(*leaves)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def test_voxels_of_wide_integers(device):
    """Beyond 32 bits they are outside of the box, not another voxel of it."""
    coords = torch.tensor([[0, 0, 0, 0], [0, 2**32, 1, 1], [2**32, 2, 2, 2]], device=device)
    feats = torch.tensor([[1.0], [2.0], [3.0]], device=device)
    grid = torch.tensor([[[0.5] * 3, [0.5, 1.5, 1.5], [2.5] * 3]], device=device)
    for mode in ("nearest", "trilinear"):
        out = grid_sample_3d(feats, coords, (1, 1, 4, 4, 4), grid, mode)
        assert torch.equal(out, grid_sample_3d_torch(feats, coords, (1, 1, 4, 4, 4), grid, mode))
        assert out.flatten().tolist() == [1, 0, 0]


def test_samples_beyond_32_bits(device):
    """Points times channels above 2^31, looked at in a few rows."""
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    points, channels = 2_200_000, 1024
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32, device=device)
    feats = torch.stack([torch.arange(channels), torch.ones(channels)]).half().to(device)
    grid = torch.full((1, points, 3), 0.5, device=device)
    grid[0, -7:, 0] = 1.5
    out = grid_sample_3d(feats, coords, (1, channels, 4, 4, 4), grid, "nearest")
    assert out.numel() > 2**31
    for row, wanted in ((0, 0), (points // 2, 0), (-8, 0), (-7, 1), (-1, 1)):
        assert torch.equal(out[0, row], feats[wanted])


def test_another_gpu_than_the_current_one(layer):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = torch.device("cuda:1")
    found = []
    made = layer(60)
    for place in (torch.device("cpu"), there):
        feats, coords, shape, weight, bias = (
            t if isinstance(t, torch.Size) else t.to(place) for t in made
        )
        leaves = [t.double().detach().requires_grad_() for t in (feats, weight, bias)]
        out, _ = sparse_submanifold_conv3d(leaves[0], coords, shape, *leaves[1:])
        grid = torch.full((2, 5, 3), 3.2, dtype=torch.float64, device=place)
        sampled = grid_sample_3d(out, coords, shape, grid)
        gradients = torch.autograd.grad(sampled.sum() + out.sum(), leaves)
        found.append([t.cpu() for t in (out, sampled, *gradients)])
    assert torch.cuda.current_device() == 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cache_of_another_device_is_refused(layer, device):
    if device.type != "cuda":
        pytest.skip("needs a GPU beside the CPU")
    feats, coords, shape, weight, bias = layer(20)
    _, cache = sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    with raises(ValueError, match="feats is on cpu, the neighbor_cache on cuda"):
        sparse_submanifold_conv3d(feats.cpu(), coords.cpu(), shape, weight.cpu(), bias.cpu(), cache)


def shell(code: str, home: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    """A document's block in a shell of its own, where python is this one."""
    path = os.pathsep.join([str(DROPIN), *sys.path])
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-ec", code],
        capture_output=True,
        text=True,
        env=environment | variables,
        cwd=home,
    )


def test_clearing_compiled_extensions_changes_nothing(document, tmp_path):
    """The package notes' second shell block, after a first import."""
    block = next(b for b in document("flexgemm-package-notes.md", "bash") if b.startswith("rm -rf"))
    use = f"{sys.executable} -c 'import flex_gemm; print(flex_gemm.__version__)'\n"
    done = shell(use + block + use, tmp_path)
    assert done.stdout.split() == [flex_gemm.__version__] * 2, done.stderr
    assert not (tmp_path / ".cache/torch_extensions").exists()


def test_installing_as_the_readme_says(document, tmp_path):
    """Its pip line in the drop-in's folder, into a folder of its own and without a network."""
    block = document("flexgemm-readme.md", "bash")[0]
    line = block.strip().splitlines()[-1]
    assert line == "pip install . --no-build-isolation"
    pytest.importorskip("scikit_build_core")
    options = f"--quiet --no-deps --no-index --target {tmp_path / 'here'}"
    done = shell(
        f"cp -r {DROPIN} source && cd source\n{sys.executable} -m {line} {options}\n"
        # Found by its path: an editable one of this environment would go first.
        f"cd .. && PYTHONPATH=here:$PYTHONPATH {sys.executable} -c '"
        "from importlib.machinery import PathFinder\n"
        "from importlib.util import module_from_spec\n"
        "import sys\n"
        'spec = PathFinder.find_spec("flex_gemm")\n'
        "sys.modules[spec.name] = module = module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.__file__)'",
        tmp_path,
    )
    assert done.stdout.strip().startswith(str(tmp_path / "here")), done.stderr


def test_modules_are_attributes_after_one_import(tmp_path):
    names = (
        *("kernels.cuda", "kernels.cuda_ops", "kernels.triton.utils"),
        *("kernels.triton.spconv.config", "kernels.triton.grid_sample.config"),
        *("ops.spconv.submanifold_conv3d", "ops.spconv._custom_ops", "ops.grid_sample"),
        *("ops.serialize", "ops.utils", "utils.autotuner"),
    )
    uses = "; ".join(f"flex_gemm.{name}" for name in names)
    done = shell(f"{sys.executable} -c 'import flex_gemm; {uses}'", tmp_path)
    assert done.returncode == 0, done.stderr


def test_tuners_speak_where_they_are_asked_to(tmp_path):
    code = (
        "import flex_gemm\n"
        "@flex_gemm.utils.autotune(configs=[dict(b=1), dict(b=2)], key=['n'], warmup=0, runs=1)\n"
        "def kernel(n, b): return n\n"
        "kernel(3)\n"
    )
    ignored = {"FLEX_GEMM_BACKEND": "x", "FLEX_GEMM_QUIET": "x", "BUILD_TARGET": "x"}
    spoken = {"FLEX_GEMM_AUTOTUNER_VERBOSE": "1"}
    for variables, lines in ((ignored, 0), (ignored | spoken, 1)):
        done = shell(f'{sys.executable} -c "{code}"', tmp_path, **variables)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == lines, done.stderr


def test_ratios_of_both_packages_are_apart():
    spconv.set_hashmap_ratio(3.5)
    assert grid_sample.HASHMAP_RATIO == 2.0 and spconv.HASHMAP_RATIO == 3.5
