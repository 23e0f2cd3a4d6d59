# SPDX-License-Identifier: Apache-2.0
"""warpconvnet's specification where no other file has the line: calls, shells, limits."""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest
import torch
from pytest import fixture, mark, raises

import voxgemm as vg
import warpconvnet
from warpconvnet import _search, _tuning, constants
from warpconvnet.geometry.types.voxels import Voxels
from warpconvnet.nn import functional, modules
from warpconvnet.nn.functional import (
    generate_output_coords_and_kernel_map,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
)

PAGE = "warpconvnet-sparse-convolutions.md"
DROPIN = pathlib.Path(warpconvnet.__file__).resolve().parents[1]
SEED = pathlib.Path(__file__).resolve().parents[3] / "shared/seeds" / PAGE

CONV = (
    "in_channels out_channels kernel_size stride dilation bias transposed generative "
    "kernel_matmul_batch_size num_spatial_dims fwd_algo bwd_algo stride_mode order compute_dtype "
    "implicit_matmul_fwd_block_size implicit_matmul_bwd_block_size"
)
CONV_3D = (
    "in_channels out_channels kernel_size stride dilation bias transposed generative stride_mode "
    "fwd_algo bwd_algo kernel_matmul_batch_size order compute_dtype "
    "implicit_matmul_fwd_block_size implicit_matmul_bwd_block_size"
)
DEPTHWISE = (
    "channels kernel_size stride dilation bias transposed generative num_spatial_dims fwd_algo "
    "bwd_algo stride_mode stride_reduce order compute_dtype"
)
# What programs give by position, in its order.
SIGNATURES = {
    spatially_sparse_conv: "input_sparse_tensor weight kernel_size stride kernel_dilation bias "
    "kernel_matmul_batch_size generative output_spatially_sparse_tensor transposed fwd_algo "
    "bwd_algo stride_mode stride_reduce order compute_dtype implicit_matmul_fwd_block_size "
    "implicit_matmul_bwd_block_size",
    spatially_sparse_depthwise_conv: "in_features weight kernel_map num_out_coords fwd_algo "
    "bwd_algo compute_dtype",
    generate_output_coords_and_kernel_map: "input_sparse_tensor kernel_size kernel_dilation "
    "stride generative transposed output_spatially_sparse_tensor stride_mode order",
    functional.sparse_reduce: "voxels kernel_size stride reduction order",
    modules.SpatiallySparseConv: CONV,
    modules.SparseConv2d: CONV_3D,
    modules.SparseConv3d: CONV_3D,
    modules.SpatiallySparseDepthwiseConv: DEPTHWISE,
    modules.SparseDepthwiseConv2d: DEPTHWISE.replace("num_spatial_dims ", ""),
    modules.SparseDepthwiseConv3d: DEPTHWISE.replace("num_spatial_dims ", ""),
    Voxels: "batched_coordinates batched_features offsets device",
    Voxels.from_dense: "dense_tensor dense_tensor_channel_dim target_spatial_sparse_tensor "
    "dense_max_coords",
    Voxels.to_dense: "self channel_dim spatial_shape min_coords max_coords",
}


@mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_arguments_have_the_originals_order(function):
    parameters = inspect.signature(function).parameters
    wanted = SIGNATURES[function].split()
    assert list(parameters)[: len(wanted)] == wanted
    more = list(parameters.values())[len(wanted) :]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in more)


@mark.parametrize("name", ["geometry.types.points", "nn.modules.attention", "models", "dataset"])
def test_what_is_not_there_is_an_import_error(name):
    with raises(ImportError):
        importlib.import_module(f"warpconvnet.{name}")


@mark.usefixtures("warp_state")
def test_every_statement_of_the_pages_snippets(document, scene, randn, device):
    """Each call and each layer, also those whose name the snippet gives away again."""
    x = scene(64, samples=(20, 15))
    space = {
        "input_voxels": x,
        "weight": randn(27, 64, 128),
        "input_features": x.features,
        "depthwise_weight": randn(27, 64),
        "kernel_map": generate_output_coords_and_kernel_map(x, 3, 1, 1)[2],
        "num_out_coords": len(x),
        "SPARSE_CONV_BWD_ALGO_MODE": functional.SPARSE_CONV_BWD_ALGO_MODE,
        "SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE": functional.SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE,
    }
    results = 0
    for block in document(PAGE):
        for statement in ast.parse(block).body:
            exec(compile(ast.Module([statement], []), PAGE, "exec"), space)
            if isinstance(statement, ast.Assign):
                made = space[statement.targets[0].id]
                out = made.to(device)(x) if isinstance(made, torch.nn.Module) else made
                features = getattr(out, "feature_tensor", out)
                assert features.shape in ((35, 128), (35, 64)) and bool(features.isfinite().all())
                results += 1
    assert results == 11


NAMES = """
from warpconvnet.nn.modules import SpatiallySparseConv, SparseDepthwiseConv3d
print(SpatiallySparseConv(4, 4, 3)._names, SparseDepthwiseConv3d(4, 3)._names)
"""


def shell(code: str, home: pathlib.Path) -> subprocess.CompletedProcess:
    """A block of the page in a shell of its own, where python is this one."""
    path = os.pathsep.join([str(DROPIN), *sys.path])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WARPCONVNET_")}
    environment |= {"HOME": str(home), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", "-ec", code], capture_output=True, text=True, env=environment)


def lines_of_page() -> list[str]:
    return re.findall(r"`(export [^`]+)`", SEED.read_text())


def test_the_pages_shell_blocks(document, tmp_path):
    """As written, by bash; each ends with the settings that its last lines make."""
    regular, depthwise = document(PAGE, "bash")
    use = f"\n{sys.executable} -c '{NAMES}'"
    every = _search.names_of("auto", "x"), _search.names_of("auto", "x", depthwise=True)
    automatic = ((every[0],) * 3, (every[1],) * 2)
    two = regular.partition("# AUTO")[0], depthwise.partition("# AUTO")[0]
    listed = ((("implicit_gemm", "cutlass_implicit_gemm"),) * 3, (("explicit", "implicit"),) * 2)
    forced = ((("explicit_gemm", "implicit_gemm"), *automatic[0][1:]), automatic[1])
    cases = {
        regular + depthwise: automatic,
        two[0] + two[1]: listed,
        lines_of_page()[0]: forced,
    }
    for code, wanted in cases.items():
        done = shell(code + use, tmp_path)
        assert done.stdout.strip() == f"{wanted[0]} {wanted[1]}", done.stderr


def test_the_pages_reset(document, tmp_path):
    """`rm -rf` between two runs: the second measures again, in a folder made anew."""
    document(PAGE)
    line = re.findall(r"`(rm -rf [^`]+)`", SEED.read_text())[0]
    use = f"""{sys.executable} -c '
import torch
from warpconvnet import _tuning
from warpconvnet.geometry.types.voxels import Voxels
from warpconvnet.nn.functional import spatially_sparse_conv
_tuning.BUDGET, _tuning.REPEATS = 60.0, 1
at = torch.cartesian_prod(*[torch.arange(3)] * 3).int()
spatially_sparse_conv(Voxels([at], [torch.ones(27, 2)]), torch.ones(27, 2, 2), 3)
print(_tuning.times.measured)'
"""
    done = shell(f"{use}{line}\ntest ! -e ~/.cache/warpconvnet\n{use}{use}", tmp_path)
    assert done.stdout.split() == ["20", "20", "0"], done.stderr
    assert (tmp_path / ".cache/warpconvnet" / _tuning.FILE).is_file()


@mark.parametrize("value", ["bogus", "[implicit,bogus]", "[implicit", "a,b", ""])
@mark.parametrize("way", ["FWD", "BWD"])
def test_bad_settings_of_depthwise_stop_the_import(way, value, monkeypatch):
    name = f"WARPCONVNET_DEPTHWISE_CONV_{way}_ALGO_MODE"
    monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("warpconvnet._again", constants.__file__)
    with raises(ValueError, match=name) as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "explicit_gemm" in str(error.value)


@fixture
def depthwise(scene, randn):
    """call(**algorithms) of one depthwise convolution."""
    x = scene(6)
    map = generate_output_coords_and_kernel_map(x, 3, 1, 1)[2]
    features, weight = x.features.clone().requires_grad_(), randn(27, 6).requires_grad_()

    def call(**algorithms):
        out = spatially_sparse_depthwise_conv(features, weight, map, len(x), **algorithms)
        return out, *torch.autograd.grad(out.square().sum(), (features, weight))

    return call


@mark.usefixtures("warp_state")
def test_settings_reach_depthwise_calls(depthwise, monkeypatch):
    from warpconvnet.nn.functional import sparse_conv_depth

    ran = []
    for name in ("_run", "_gradients"):
        real = getattr(sparse_conv_depth, name)

        def noted(algorithm, *rest, real=real):
            ran.append(algorithm)
            return real(algorithm, *rest)

        monkeypatch.setattr(sparse_conv_depth, name, noted)
    for forward, backward in (("explicit", ["implicit_gemm"]), (["implicit"], "explicit_gemm")):
        monkeypatch.setattr(constants, "WARPCONVNET_DEPTHWISE_CONV_FWD_ALGO_MODE", forward)
        monkeypatch.setattr(constants, "WARPCONVNET_DEPTHWISE_CONV_BWD_ALGO_MODE", backward)
        ran.clear()
        depthwise()
        names = [v[0] if isinstance(v, list) else v for v in (forward, backward)]
        assert set(ran) == {name.removesuffix("_gemm") for name in names}
        assert ran[-1] == names[1].removesuffix("_gemm")


@mark.usefixtures("warp_state")
def test_depthwise_adds_up_over_a_retained_graph(scene, randn):
    x = scene(6)
    map = generate_output_coords_and_kernel_map(x, 3, 1, 1)[2]
    for algorithm in ("explicit", "implicit"):
        features, weight = x.features.clone().requires_grad_(), randn(27, 6).requires_grad_()
        algorithms = {"fwd_algo": algorithm, "bwd_algo": algorithm}
        out = spatially_sparse_depthwise_conv(features, weight, map, len(x), **algorithms)
        out.sum().backward(retain_graph=True)
        once = features.grad.clone(), weight.grad.clone()
        out.sum().backward()
        assert torch.equal(features.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])


@mark.usefixtures("warp_state")
def test_another_device_model_is_another_configuration(scene, randn, monkeypatch, device):
    x, weight = scene(8), randn(27, 8, 8)
    spatially_sparse_conv(x, weight, 3)
    before = set(_tuning.times.known)
    if device.type == "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "another")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    spatially_sparse_conv(Voxels(x.coordinate_tensor.clone(), x.features, x.offsets), weight, 3)
    (new,) = set(_tuning.times.known) - before
    assert " another " in new


@mark.usefixtures("warp_state")
@mark.parametrize("place", range(20))
def test_every_set_of_parameters_is_repeatable(
    place, scene, randn, threads, within, device, monkeypatch
):
    """One candidate of each pass's grid after the other; within rounding they agree."""

    def pick(key, space, *rest):
        return space[place % len(space)], True

    monkeypatch.setattr(_tuning, "fastest", pick)
    x, weight = scene(16, samples=(200, 150)), randn(27, 16, 16).requires_grad_()
    features = x.features.clone().requires_grad_()
    made = x.replace(batched_features=features)
    runs = []
    for count in (1, 16) if device.type == "cpu" else (1, 1):
        threads(count)
        out = spatially_sparse_conv(made, weight, 3, fwd_algo="auto", bwd_algo="auto").features
        runs.append((out, *torch.autograd.grad(out.square().sum(), (features, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact, magnitude = (
        spatially_sparse_conv(x.replace(batched_features=f.double()), w.double(), 3).features.cpu()
        for f, w in ((x.features, weight.detach()), (x.features.abs(), weight.detach().abs()))
    )
    within(runs[0][0].detach(), exact, magnitude, 27 * 16)


@mark.usefixtures("warp_state")
def test_iterations_do_not_grow_memory(scene, randn):
    """No more live tensors after 120 iterations than after 20."""
    x, weight = scene(), randn(27, 4, 4).requires_grad_()

    def train(steps: int) -> int:
        for _ in range(steps):
            out = spatially_sparse_conv(x, weight, 3)
            spatially_sparse_conv(out, weight, 3, stride=2).features.sum().backward()
        del out
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    some = train(20)
    assert train(100) <= some


@mark.usefixtures("warp_state")
def test_maps_that_are_there_make_nobody_wait(scene, randn, device):
    if device.type != "cuda":
        pytest.skip("waiting is CUDA's")
    x, weight = scene(16), randn(27, 16, 16).requires_grad_()
    features = x.features.clone().requires_grad_()
    made = x.replace(batched_features=features)
    constants_before = torch.cuda.get_sync_debug_mode()
    algorithms = {"fwd_algo": "implicit_gemm", "bwd_algo": "implicit_gemm"}

    def step():
        out = spatially_sparse_conv(made, weight, 3, **algorithms)
        down = spatially_sparse_conv(out, weight, 3, stride=2, **algorithms)
        down.features.backward(torch.ones_like(down.features))

    for _ in range(40):  # until everything is measured
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(constants_before)


def test_other_properties_of_voxels(scene):
    x = scene(5)
    nested = x.nested_features
    assert nested.is_nested and [len(part) for part in nested.unbind()] == [30, 0, 25]
    assert x.half().float().dtype == torch.float32
    assert x.to(dtype=torch.float64).dtype == torch.float64 and x.to("cpu").device.type == "cpu"
    pad = x.to_pad()
    assert pad.batched_features.is_pad and not x.batched_features.is_pad
    assert torch.equal(pad.to_cat().features, x.features)
    moved = x.replace_features(x.features + 1)
    assert torch.equal(moved.features, x.features + 1) and moved.cache is x.cache
    assert len(x[-1]) == 25
    for number in (3, -4):
        with pytest.raises(IndexError, match=f"sample {number} of 3"):
            x[number]
    with pytest.raises(ValueError, match="coordinates are an empty list"):
        type(x)([], [])
    x.set_tensor_stride((1, 2, 3))
    assert x.stride == (1, 2, 3) and x.batched_coordinates.tensor_stride == (1, 2, 3)


@mark.usefixtures("warp_state")
def test_assigned_attributes_and_copies_of_modules(scene, device):
    """A module looks at its attributes again once one was assigned, and copies have their own."""
    import copy
    import pickle

    x = scene(4)
    conv = modules.SparseConv3d(4, 4, 3).to(device)
    expected = conv(x).features
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        torch.testing.assert_close(twin(x).features, expected)
        twin.dilation = (2, 2, 2)
        wide = spatially_sparse_conv(x, twin.weight, 3, 1, 2, twin.bias).features
        torch.testing.assert_close(twin(x).features, wide)
        torch.testing.assert_close(conv(x).features, expected)
    assert set(conv.state_dict()) == {"weight", "bias"}
    with raises(vg.ArgumentError):
        conv.fwd_algo = "bogus"
        conv(x)


@mark.usefixtures("warp_state")
def test_nobody_waits_for_the_disk(scene, randn, monkeypatch):
    """A folder that takes long is the writing thread's business."""
    may_go_on = threading.Event()
    real = os.makedirs

    def slow(*arguments, **options):
        assert may_go_on.wait(30)
        real(*arguments, **options)

    monkeypatch.setattr(_tuning.os, "makedirs", slow)
    x, weight = scene(8), randn(27, 8, 8)
    for _ in range(3):
        spatially_sparse_conv(x, weight, 3)
    file = pathlib.Path(constants.WARPCONVNET_BENCHMARK_CACHE_DIR, _tuning.FILE)
    assert _tuning.times.measured > 0 and not file.exists()
    may_go_on.set()
    _tuning.times.save()
    assert file.is_file()


@mark.usefixtures("warp_state")
def test_what_cannot_run_is_left_out_or_an_error(scene, randn, monkeypatch, caplog):
    """One warning where others remain; where none does, the reason, and no other algorithm."""
    real = vg.KernelMap.choice
    masked = ("masked_implicit_gemm", "masked_implicit_gemm_splitk")
    numbers = {vg.functional.filters_of(name)[0][0] for name in masked}

    def choice(self, asked):
        if asked.filter and set(asked.filter) <= numbers:
            raise NotImplementedError("this device has no such kernel")
        return real(self, asked)

    monkeypatch.setattr(vg.KernelMap, "choice", choice)
    monkeypatch.setattr(_tuning, "BUDGET", 60.0)
    monkeypatch.setattr(_tuning, "REPEATS", 1)
    x, weight = scene(8), randn(27, 8, 8)
    out = spatially_sparse_conv(x, weight, 3, fwd_algo=["cutlass_implicit_gemm", "implicit_gemm"])
    assert bool(out.features.isfinite().all())
    told = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(told) == 1 and "no such kernel" in told[0]
    fresh = Voxels(x.coordinate_tensor.clone(), x.features, x.offsets)
    with raises(NotImplementedError, match="no such kernel"):
        spatially_sparse_conv(fresh, weight, 3, fwd_algo="cutlass_implicit_gemm")


@mark.usefixtures("warp_state")
@mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_wrong_candidate_is_never_picked(dtype, scene, randn, monkeypatch, caplog):
    """Off by a hundredth, it is left out with a warning; where nothing else may run, an error."""
    from warpconvnet.nn.functional import sparse_conv

    real = sparse_conv.passes.run_forward
    wrong = vg.functional.filters_of("implicit_gemm")[0]

    def run_forward(x, weight, bias, map, how):
        out = real(x, weight, bias, map, how)
        return out * 1.05 if how.filters[0] == wrong else out

    monkeypatch.setattr(sparse_conv.passes, "run_forward", run_forward)
    monkeypatch.setattr(_tuning, "BUDGET", 60.0)
    monkeypatch.setattr(_tuning, "REPEATS", 1)
    x, weight = scene(8, dtype=dtype).to("cpu"), randn(27, 8, 8, dtype=dtype).cpu()
    found = spatially_sparse_conv(x, weight, 3, fwd_algo=["implicit_gemm", "explicit_gemm"])
    told = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(told) == 1 and "implicit_gemm fwd_block_size" in told[0]
    fresh = Voxels(x.coordinate_tensor.clone(), x.features, x.offsets)
    same = spatially_sparse_conv(fresh, weight, 3, fwd_algo="explicit_gemm")
    assert torch.equal(found.features, same.features)
    with raises(RuntimeError, match="not those of explicit_gemm"):
        spatially_sparse_conv(fresh, weight, 3, fwd_algo="implicit_gemm")


@mark.usefixtures("warp_state")
@mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_compile_whole_where_maps_are_known(backend, scene, device):
    """Forward and backward of two layers; of new coordinates with breaks. Whole numbers: exact."""
    conv = modules.SparseConv3d(4, 4, 3).to(device)
    down = modules.SparseConv3d(4, 6, 2, stride=2).to(device)
    with torch.no_grad():
        for parameter in (*conv.parameters(), *down.parameters()):
            parameter.copy_((parameter * 20).round())
    x = scene(4)
    features = x.features.round().requires_grad_()
    x = x.replace(batched_features=features)
    leaves = (features, *conv.parameters(), *down.parameters())

    def net(x):
        return down(conv(x)).feature_tensor

    expected = net(x)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    found = compiled(x)
    assert torch.equal(found, expected)
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), wanted, strict=True):
        assert torch.equal(a, b)
    if backend == "aot_eager":
        fresh = Voxels(x.coordinate_tensor.clone(), x.features, x.offsets)
        assert torch.equal(torch.compile(net, backend=backend)(fresh), expected)
