# SPDX-License-Identifier: Apache-2.0
"""Every bad input: its type, its sentence with both values, nothing on stderr, nothing changed."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch

import voxgemm as vg
from voxgemm import passes
from voxgemm.functional import Geometry, conv3d


@pytest.fixture
def operands(clouds, layer):
    return layer(clouds.random(20), 3, 4, torch.float32)


@pytest.fixture(autouse=True)
def silent(capfd, request):
    yield
    # Torch up to 2.11 itself tells stderr when an allocation fails.
    assert request.node.name == "test_memory_that_no_machine_has" or capfd.readouterr().err == ""


def refuse(sentence, function, *arguments, kind=vg.ArgumentError):
    """function(*arguments) raises with the sentence in its message; tensors stay as they are."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    with pytest.raises(kind) as caught:
        function(*arguments)
    assert sentence in str(caught.value)
    assert "[voxgemm" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    return caught.value


def test_argument_errors_are_value_errors():
    assert issubclass(vg.ArgumentError, ValueError)


# features, coords, arguments, sentence
FEATURES = torch.zeros(5, 3)
COORDS = torch.zeros(5, 4, dtype=torch.int32)
NAN = torch.zeros(5, 4)
NAN[3, 2] = float("nan")
INPUTS = {
    "int64": (FEATURES, COORDS.long(), {}, "coords is int64 [5, 4], expected int32 [n, 4]"),
    "float": (FEATURES, COORDS.float(), {}, "coords is float32 [5, 4], expected int32 [n, 4]"),
    "nan": (FEATURES, NAN, {}, "coords is float32 [5, 4] with NaN in row 3, expected int32 [n, 4]"),
    "three columns": (FEATURES, COORDS[:, :3], {}, "coords is int32 [5, 3], expected int32 [n, 4]"),
    "flat": (FEATURES, COORDS.flatten(), {}, "coords is int32 [20], expected int32 [n, 4]"),
    "rows": (FEATURES[:4], COORDS, {}, "features has 4 rows, coords 5"),
    "vector": (
        FEATURES[:, 0],
        COORDS,
        {},
        "features is float32 [5], expected floats [n, channels]",
    ),
    "ints": (COORDS, COORDS, {}, "features is int32 [5, 4], expected floats [n, channels]"),
    "device": (FEATURES.to("meta"), COORDS, {}, "features is on meta, coords on cpu"),
    "list": (FEATURES, [[0, 0, 0, 0]] * 5, {}, "coords is a list, expected a torch.Tensor"),
    "negative batch size": (FEATURES[:0], COORDS[:0], {"batch_size": -1}, "batch_size is -1"),
    "negative shape": (
        FEATURES[:0],
        COORDS[:0],
        {"spatial_shape": (4, -1, 4)},
        "the spatial shape is (4, -1, 4), expected extents >= 0",
    ),
    "shape": (
        FEATURES,
        COORDS,
        {"spatial_shape": (4, 4)},
        "spatial_shape is (4, 4), expected an int or three",
    ),
}


@pytest.mark.parametrize("case", INPUTS, ids=str)
def test_sparse_tensor_refuses(case):
    features, coords, options, sentence = INPUTS[case]
    with pytest.raises(vg.ArgumentError) as caught:
        vg.SparseTensor(features, coords, **options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "column, value", [(0, 2), (0, -1), (1, 8), (2, -1), (3, 8), (3, 2**31 - 1)]
)
def test_out_of_range_coordinates_name_the_row(column, value, clouds):
    coords = clouds.random(20)
    coords[7, column] = value
    features = torch.zeros(20, 1, device=coords.device)
    error = refuse("7", lambda c: vg.SparseTensor(features, c, (8, 8, 8), 2), coords)
    assert str(value) in str(error)


def test_extreme_coordinates_are_legal_without_a_shape():
    coords = torch.tensor(
        [[0, -(2**31), 0, 0], [0, -(2**31) + 1, 0, 0], [0, 0, 0, 0]], dtype=torch.int32
    )
    x = vg.SparseTensor(torch.ones(3, 1), coords)
    assert vg.build_map(x.coords, 3).pairs == 5


def test_extents_that_no_key_holds():
    lowest, highest = -(2**31), 2**31 - 1  # the lowest batch number is that of padding
    coords = torch.tensor([[lowest + 1, lowest, lowest, lowest], [highest] * 4], dtype=torch.int32)
    refuse("2^63 bricks", lambda c: vg.build_map(c, 3), coords)


def test_non_contiguous_inputs_are_taken(clouds):
    coords = clouds.random(20)
    wide = torch.cat([coords, coords], 1)[:, :4]
    features = torch.randn(3, 20, device=coords.device).T
    conv = vg.nn.SubmConv3d(3, 4, 3, device=coords.device)
    expected = conv(vg.SparseTensor(features.contiguous(), coords)).features
    assert not wide.is_contiguous() and not features.is_contiguous()
    assert torch.equal(conv(vg.SparseTensor(features, wide)).features, expected)


@pytest.mark.parametrize(
    "function", [vg.unique, lambda c: vg.build_map(c, 3)], ids=["unique", "map"]
)
@pytest.mark.parametrize(
    "coords", [COORDS.long(), COORDS[:, :3], COORDS.float(), COORDS[0]], ids=str
)
def test_coordinate_functions_refuse(function, coords):
    refuse("coord", function, coords)


def test_mismatched_channels(operands):
    x, weight, bias, map = operands
    refuse("x is 20 x 2, expected 20 x 3", conv3d, x[:, :2], weight, bias, map)
    refuse("the bias is 1 x 3, expected 1 x 4", conv3d, x, weight, bias[:3], map)


def test_mismatched_rows(operands):
    x, weight, bias, map = operands
    refuse("x is 19 x 3, expected 20 x 3", conv3d, x[:19], weight, bias, map)


def test_mismatched_kernel(operands):
    x, weight, bias, map = operands
    refuse("3x3x1 kernel, the map a 3x3x3 one", conv3d, x, weight[:, :, :, :1], bias, map)
    refuse("weight has 3 dimensions, expected 5", conv3d, x, weight[:, 0, 0], bias, map)


def test_mixed_dtypes(operands):
    x, weight, bias, map = operands
    refuse("x has dtype bf16, expected f32", conv3d, x.bfloat16(), weight, bias, map)
    refuse("the bias has dtype f64, expected f32", conv3d, x, weight, bias.double(), map)
    refuse("dtype", conv3d, x, weight.int(), bias, map)
    refuse("Byte", conv3d, x.byte(), weight, bias, map)


def test_geometry(operands, clouds):
    refuse("kernel_size is (3, 3), expected an int or three", vg.build_map, COORDS, (3, 3))
    refuse("stride is 2", lambda c: vg.build_map(c, 3, stride=2), COORDS)
    refuse("geometry is 3, expected a Geometry", vg.output_coords, COORDS, 3)
    refuse("0", lambda c: vg.output_coords(c, Geometry((3, 3, 3), (0, 1, 1))), COORDS)
    refuse("-1", lambda c: vg.output_coords(c, Geometry((3, 3, 3), padding=(-1, 0, 0))), COORDS)
    refuse("4096", lambda c: vg.build_map(c, 17), COORDS)


def test_layers_refuse():
    for arguments, sentence in (
        ((4, 4, 3, 2), "stride is 2"),
        ((4, 4, 3, 1, 0), "padding is 0, expected 'same' or (1, 1, 1)"),
        ((0, 4, 3), "in_channels is 0"),
        ((4, 4, 0), "kernel_size (0, 0, 0)"),
    ):
        refuse(sentence, vg.nn.SubmConv3d, *arguments)
    refuse(
        "output_rule is 'nearest', expected one of reached, floor",
        lambda: vg.nn.SparseConv3d(4, 4, 3, output_rule="nearest"),
    )
    refuse("groups is 3 for 4 -> 6 channels", lambda: vg.nn.SubmConv3d(4, 6, 3, groups=3))
    refuse("got a Tensor, expected a SparseTensor", vg.nn.SubmConv3d(4, 4, 3), FEATURES)


@pytest.mark.parametrize(
    "algorithm",
    [
        "fast",
        "",
        3,
        [],
        ["fast"],
        ["auto", "fast"],
        ["implicit_gemm", 3],
        {"forward": "fast"},
        {"backward": ["fast"]},
        {"back": "auto"},
        {"backward": "auto", "grad_input": "auto"},
        {"forward": {"forward": "auto"}},
    ],
    ids=str,
)
def test_unknown_algorithm(algorithm):
    error = refuse("algorithm", lambda: vg.nn.SubmConv3d(4, 4, 3, algorithm=algorithm))
    assert "implicit_gemm" in str(error) or "grad_input" in str(error)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_no_kernel_inside_the_filter_shows_the_table(operands):
    x, weight, bias, map = operands
    name = vg._library.version_and_kernels()[1]["bf16"][0]
    error = refuse(
        "no kernel can run", conv3d, x, weight, bias, map, name, kind=NotImplementedError
    )
    assert name in str(error) and "takes bf16" in str(error)


def test_replace(clouds):
    coords = clouds.random(20)
    x = vg.SparseTensor(torch.zeros(20, 3, device=coords.device), coords)
    refuse("features is float32 [19, 3], expected [20, channels]", x.replace, torch.zeros(19, 3))


def test_what_is_no_tensor_is_said(clouds):
    x = vg.SparseTensor(torch.zeros(5, 2), clouds.random(5).cpu())
    refuse("features is a list", lambda: x.replace([1]))
    refuse("features is a NoneType", lambda: x.apply(lambda features: None))
    refuse("which is a list, expected bool [5] or int64 [k]", lambda: x.select([0]))
    for join in (vg.cat, vg.collate):
        refuse("got a generator, expected a list", lambda: join(each for each in (x, x)))  # noqa: B023
    refuse("cat got a SparseTensor, expected a list", vg.cat, x)


def test_dense_of_negative_coordinates():
    coords = torch.tensor([[0, -1, 0, 0]], dtype=torch.int32)
    refuse("-1", vg.SparseTensor(torch.ones(1, 1), coords).dense)


def test_memory_that_no_machine_has(layer):
    """The weight gradient of 2^24 x 2^24 channels is larger than 2^47 bytes of addresses."""
    *_, map = layer(torch.zeros(0, 4, dtype=torch.int32))
    x = torch.zeros(0, 2**24)
    refuse(
        "memory",
        lambda: passes.GradWeight.apply(x, x, [True, False], map, passes.How(((), (), ()), 0)),
        kind=torch.OutOfMemoryError,
    )


def test_errors_in_a_backward_keep_their_type(operands, device):
    x, weight, bias, map = operands
    name = "naive_cuda/bf16" if device.type == "cuda" else "explicit_gemm_cpu/bf16/portable"
    y = conv3d(x.requires_grad_(), weight, bias, map, {"grad_input": name})
    with pytest.raises(NotImplementedError, match="no kernel can run"):
        y.sum().backward()


def test_an_error_keeps_no_argument_alive():
    def refused():
        coords = torch.zeros(1, 3, dtype=torch.int32)
        with pytest.raises(vg.ArgumentError):
            vg.build_map(coords, 3)
        return weakref.ref(coords)

    gc.collect()
    gc.disable()
    try:
        assert refused()() is None
    finally:
        gc.enable()


def run(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_missing_library_is_named(tmp_path):
    found = run("import voxgemm", VOXGEMM_LIB_DIR=str(tmp_path))
    assert f"no libvoxgemm_torch_cpu.so in {tmp_path}" in found.stderr


def test_a_broken_library_says_why(tmp_path):
    (tmp_path / "libvoxgemm_torch_cpu.so").write_bytes(b"not a library")
    found = run("import voxgemm", VOXGEMM_LIB_DIR=str(tmp_path))
    assert "cannot load" in found.stderr and "file too short" in found.stderr


def test_an_old_torch_is_refused():
    found = run("import torch; torch.__version__ = '2.9.1'; import voxgemm")
    assert "voxgemm needs torch 2.10 or newer, found 2.9.1" in found.stderr
