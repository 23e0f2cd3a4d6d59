# SPDX-License-Identifier: Apache-2.0
"""What the migration pages say: conversions of weights, and the library's names for theirs."""

from __future__ import annotations

import functools
import pathlib
import re
import textwrap

import torch
from pytest import mark

import voxgemm as vg
import warpconvnet.nn.modules as warp
from flex_gemm.ops import grid_sample, serialize, spconv
from warpconvnet.geometry.types.voxels import Voxels
from warpconvnet.nn.functional import (
    generate_output_coords_and_kernel_map,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
)

pytestmark = mark.usefixtures("flex_state", "warp_state")
DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
PAGES = ("migration-flex_gemm.md", "migration-warpconvnet.md")
F64 = torch.float64


def indented(page: str, word: str) -> str:
    """The indented block of a page that has a word in it."""
    blocks = re.findall(r"(?:^    .*\n)+", (DOCS / page).read_text(), re.M)
    (found,) = [block for block in blocks if word in block]
    return textwrap.dedent(found)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Of float64, summed in another order."""
    torch.testing.assert_close(actual, expected)


@mark.parametrize("page", PAGES)
def test_the_librarys_names_exist(page):
    text = (DOCS / page).read_text()
    names = set(re.findall(r"\b(?:vg|voxgemm)\.([a-zA-Z_.0-9]+[a-zA-Z_0-9])", text))
    assert len(names) >= 5
    for name in names:
        functools.reduce(getattr, name.split("."), vg)


def test_flex_gemms_weights_are_ours(layer):
    feats, coords, shape, weight, bias = layer(60, dtype=F64)
    out, _ = spconv.sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    space = {"voxgemm": vg, "Ci": 4, "Co": 5, "flex_weight": weight, "flex_bias": bias}
    code = indented(PAGES[0], "load_state_dict").replace("(Ci, Co, 3)", "(Ci, Co, 3).double()")
    exec(code, space)
    ours = space["layer"].to(feats.device)(vg.SparseTensor(feats, coords, shape[2:], shape[0]))
    close(ours.features, out)
    grid = ours.replace(feats).dense().cpu()
    kernel = weight.permute(0, 4, 1, 2, 3).cpu()
    dense = torch.nn.functional.conv3d(grid, kernel, bias.cpu(), padding=1)
    close(out.cpu(), dense.permute(0, 2, 3, 4, 1)[tuple(coords.cpu().long().T)])


def test_flex_gemms_calls_in_our_words(layer, randn):
    feats, coords, shape, weight, bias = layer(60, dtype=F64)
    out, _ = spconv.sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    map = vg.build_map(coords, 3)
    close(vg.functional.conv3d(feats, weight, bias, map), out)
    steps = {"stride": (2, 2, 2), "padding": (1, 1, 1)}
    out, at, _ = spconv.sparse_conv3d(feats, coords, shape, weight, bias, **steps)
    geometry = vg.Geometry((3, 3, 3), *steps.values())
    ours = vg.output_coords(coords, geometry, spatial_shape=shape[2:])
    map = vg.build_map(coords, 3, out_coords=ours, stride=2, padding=1)
    assert torch.equal(ours, at)
    close(vg.functional.conv3d(feats, weight, bias, map), out)
    points = randn(2, 50, 3, dtype=F64).abs() * 4
    found = grid_sample.grid_sample_3d(feats, coords, shape, points)
    close(vg.sampling.sample(feats, coords, points, spatial_shape=shape[2:]), found)
    codes = serialize.encode_seq(coords, shape)
    bits = vg.serialization.code_bits(shape[2:], shape[0])
    assert torch.equal(vg.serialization.encode(coords, bits), codes)


@mark.parametrize("size, stride", [(3, 1), (2, 2), (3, 2)])
def test_warpconvnets_weights_become_ours(size, stride, scene):
    x = scene(4, dtype=F64)
    conv = warp.SparseConv3d(4, 6, size, stride=stride).to(x.device, F64)
    space = dict.fromkeys(("Kx", "Ky", "Kz"), size)
    space |= {"C_in": 4, "C_out": 6, "theirs": conv.weight.detach()}
    exec(indented(PAGES[1], "theirs.reshape"), space)
    padding = (size - 1) // 2 if size % 2 else 0
    if stride == 1:
        layer = vg.nn.SubmConv3d(4, 6, size)
    else:
        layer = vg.nn.SparseConv3d(4, 6, size, stride, padding, output_rule="floor")
    layer = layer.to(x.device, F64)
    layer.load_state_dict({"weight": space["ours"], "bias": conv.bias})
    sparse = vg.SparseTensor(x.features, x.coords)
    ours, theirs = layer(sparse), conv(x)
    assert torch.equal(ours.coords, theirs.coords)
    close(ours.features, theirs.features)
    if stride > 1:
        up = warp.SparseConv3d(6, 4, size, stride=stride, transposed=True).to(x.device, F64)
        back = vg.nn.SparseInverseConv3d(6, 4, size).to(x.device, F64)
        space |= {"C_in": 6, "C_out": 4, "theirs": up.weight.detach()}
        exec(indented(PAGES[1], "theirs.reshape"), space)
        back.load_state_dict({"weight": space["ours"], "bias": up.bias})
        close(back(ours).features, up(theirs, x).features)


def test_minkowskis_taps_are_counted_backwards(scene, randn):
    """There y[u] = sum over taps of x[u - offset] @ weights[tap], of an odd kernel."""
    x, weights = scene(3, dtype=F64), randn(27, 3, 4, dtype=F64)
    rows = {tuple(at): i for i, at in enumerate(x.coords.tolist())}
    expected = torch.zeros(len(x), 4, dtype=F64)
    for (batch, *at), row in rows.items():
        for tap in range(27):
            step = (tap // 9 - 1, tap // 3 % 3 - 1, tap % 3 - 1)
            there = (batch, *(a - s for a, s in zip(at, step, strict=True)))
            if there in rows:
                expected[row] += (x.features[rows[there]] @ weights[tap]).cpu()
    close(spatially_sparse_conv(x, weights.flip(0), 3).features.cpu(), expected)


def test_depthwise_in_our_words(scene, randn):
    x, weight = scene(6, dtype=F64), randn(27, 6, dtype=F64)
    pairs = generate_output_coords_and_kernel_map(x, 3, 1, 1)[2]
    theirs = spatially_sparse_depthwise_conv(x.features, weight, pairs, len(x))
    map = vg.build_map(x.coords, 3)
    close(vg.depthwise.depthwise_conv3d(x.features, weight, None, map), theirs)


def test_repeated_voxels_as_the_pages_say(device):
    """Of neighbours the first row counts; only flex_gemm's rows are their own centres."""
    coords = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.int32, device=device)
    feats = torch.tensor([[1.0], [10.0]], device=device)
    weight = torch.zeros(1, 3, 3, 3, 1, device=device)
    weight[0, 1, 1, 1] = 1
    out, _ = spconv.sparse_submanifold_conv3d(feats, coords, (1, 1, 4, 4, 4), weight, None)
    assert out.flatten().tolist() == [1, 10]
    x = Voxels(coords[:, 1:].contiguous(), feats, [0, 2])
    assert spatially_sparse_conv(x, weight.view(27, 1, 1), 3).features.flatten().tolist() == [1, 1]
