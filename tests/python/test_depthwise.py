# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution against float64 sums over the taps, and against torch's dense one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import voxgemm as vg
from voxgemm.depthwise import depthwise_conv3d, grouped_conv3d
from voxgemm.functional import Geometry, strided_map, submanifold_map

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GEOMETRIES = {
    "submanifold": Geometry.submanifold((3, 3, 3), (1, 1, 1)),
    "even": Geometry.submanifold((2, 4, 1), (1, 2, 1)),
    "wide": Geometry.submanifold((5, 1, 3), (1, 1, 1)),
    "down": Geometry((3, 3, 3), (2, 2, 2), (1, 1, 1)),
}


def make_map(kind, coords):
    geometry = GEOMETRIES[kind.removeprefix("inverse ")]
    if geometry.stride == (1, 1, 1):
        return submanifold_map(coords, geometry)
    map = strided_map(coords, vg.output_coords(coords, geometry), geometry)
    return map.transposed() if kind.startswith("inverse") else map


def looped(x, weight, bias, neighbours):
    """A loop over taps in plain torch, which is differentiable."""
    y = x.new_zeros(neighbours.shape[1], x.shape[1]) + (0 if bias is None else bias)
    for tap, rows in enumerate(neighbours.cpu().long()):
        out = (rows >= 0).nonzero()[:, 0]
        y = y.index_add(0, out, x[rows[out]] * weight[tap])
    return y


def operands(map, channels, dtype, device, seed=3):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((map.n_in, channels), (map.taps, channels), (channels,))
    return [torch.randn(shape, generator=draw).to(dtype).to(device) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["submanifold", "even", "wide", "down", "inverse down"])
@pytest.mark.parametrize("channels", [1, 7, 16, 96])
def test_passes(clouds, device, against, dtype, kind, channels):
    map = make_map(kind, clouds.random(170))
    terms = max(map.n_in, map.n_out, map.taps) + 1
    against(
        lambda x, w, b: depthwise_conv3d(x, w, b, map),
        lambda x, w, b: looped(x, w, b, map.neighbours),
        operands(map, channels, dtype, device),
        terms,
    )
    x, weight, _ = operands(map, channels, dtype, device)
    against(
        lambda x, w, b: depthwise_conv3d(x, w, b, map),
        lambda x, w, b: looped(x, w, b, map.neighbours),
        [x, weight, None],
        terms,
    )


def test_many_rows(clouds, device, against):
    """More rows than a slice of the weight gradient has."""
    map = make_map("submanifold", clouds.random(3000, extent=16))
    against(
        lambda x, w, b: depthwise_conv3d(x, w, b, map),
        lambda x, w, b: looped(x, w, b, map.neighbours),
        operands(map, 24, torch.float32, device),
        3001,
    )


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_large_cloud_in_raster_order(clouds, device, against, dtype):
    """Enough rows for the kernel of sm_90, in no order from some row on."""
    if device.type != "cuda":
        pytest.skip("the CPU has one kernel for all")
    coords = clouds.grid(1, (95, 95, 95))
    distance = (coords[:, 1:].double() - 47).norm(dim=1)
    coords = coords[(distance >= 46.25) & (distance <= 47.5)]
    draw = torch.Generator().manual_seed(5)
    order = torch.randperm(5000, generator=draw, device="cpu").to(device)
    coords[-5000:] = coords[-5000:][order]
    assert len(coords) > 34000
    map = make_map("submanifold", coords)
    against(
        lambda x, w, b: depthwise_conv3d(x, w, b, map),
        lambda x, w, b: looped(x, w, b, map.neighbours),
        operands(map, 64, dtype, device),
        len(coords) + 1,
    )


def test_a_full_grid_is_the_dense_one(clouds, device, within):
    coords = clouds.grid(2, (4, 5, 6))
    map = make_map("submanifold", coords)
    x, _, bias = operands(map, 6, torch.float32, device)
    weight = torch.randn(6, 3, 3, 3, 1, device=device)
    y = depthwise_conv3d(x, weight, bias, map)

    def dense(x, weight, bias):
        x, weight, bias = (t.cpu().double() for t in (x, weight, bias))
        grid = x.reshape(2, 4, 5, 6, 6).permute(0, 4, 1, 2, 3)
        out = F.conv3d(grid, weight.permute(0, 4, 1, 2, 3), bias, padding=1, groups=6)
        return out.permute(0, 2, 3, 4, 1).reshape(-1, 6)

    within(y, dense(x, weight, bias), dense(x.abs(), weight.abs(), bias.abs()), 28)
    flat = weight.reshape(6, 27).t()
    assert torch.equal(y, depthwise_conv3d(x, flat, bias, map))


@pytest.mark.parametrize("kind", ["submanifold", "down"])
def test_repeated_voxels_and_derivatives(clouds, device, kind):
    coords = clouds.random(30, extent=4)
    map = make_map(kind, torch.cat([coords, coords[:9]]))
    leaves = [t.requires_grad_() for t in operands(map, 2, torch.float64, device)]
    assert torch.autograd.gradcheck(lambda *a: depthwise_conv3d(*a, map), leaves)
    assert torch.autograd.gradgradcheck(lambda *a: depthwise_conv3d(*a, map), leaves)


def test_absent_neighbours_are_never_read(clouds, device):
    """An infinite weight of a tap that no row has, and NaN in rows that nobody reads."""
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32, device=device)
    map = make_map("submanifold", coords)
    x = torch.ones(2, 8, device=device, requires_grad=True)
    weight = torch.full((27, 8), float("inf"), device=device)
    weight[12:15] = 1.0
    weight.requires_grad_()
    y = depthwise_conv3d(x, weight, None, map)
    assert y.tolist() == [[2.0] * 8] * 2
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.tolist() == [[2.0] * 8] * 2
    assert dw[:, 0].tolist() == [0.0] * 12 + [1.0, 2.0, 1.0] + [0.0] * 12


def test_same_bits_for_any_number_of_threads(clouds, threads):
    map = make_map("submanifold", clouds.random(2000, extent=16))
    x, weight, bias = (t.requires_grad_() for t in operands(map, 20, torch.bfloat16, clouds.device))
    first = None
    for count in (1, 3):
        threads(count)
        y = depthwise_conv3d(x, weight, bias, map)
        found = (y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y)))
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_unwanted_gradients_are_not_computed(clouds, device):
    map = make_map("submanifold", clouds.random(20))
    x, weight, bias = operands(map, 4, torch.float32, device)
    for wanted in (x, weight, bias):
        wanted.requires_grad_()
        y = depthwise_conv3d(x, weight, bias, map)
        assert torch.autograd.grad(y.sum(), wanted)[0].shape == wanted.shape
        wanted.requires_grad_(False)
    assert not depthwise_conv3d(x, weight, bias, map).requires_grad


def test_no_rows(device):
    map = make_map("submanifold", torch.empty(0, 4, dtype=torch.int32, device=device))
    x, weight, bias = (t.requires_grad_() for t in operands(map, 4, torch.float32, device))
    y = depthwise_conv3d(x, weight, bias, map)
    assert y.shape == (0, 4)
    dx, dw, db = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == (0, 4) and not dw.any() and not db.any()


def test_wrong_arguments_are_said(clouds, device):
    map = make_map("submanifold", clouds.random(20))
    x, weight, bias = operands(map, 4, torch.float32, device)
    for call, message in (
        (lambda: depthwise_conv3d(x[:7], weight, bias, map), "x is 7 x 4, expected 20 x 4"),
        (lambda: depthwise_conv3d(x, weight[:9], bias, map), "weights is 9 x 4, expected 27 x 4"),
        (lambda: depthwise_conv3d(x, weight.double(), bias, map), "weights has dtype f64"),
        (lambda: depthwise_conv3d(x, weight, bias[:2], map), "bias is 1 x 2"),
        (lambda: depthwise_conv3d(x, bias, bias, map), r"weight is \[4\]"),
        (
            lambda: depthwise_conv3d(x, torch.ones(4, 1, 3, 9, 1, device=device), bias, map),
            r"kernel of \(1, 3, 9\), the map of \(3, 3, 3\)",
        ),
    ):
        with pytest.raises(vg.ArgumentError, match=message):
            call()


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["submanifold", "down"])
def test_groups_are_a_block_diagonal_convolution(clouds, device, against, groups, kind):
    map = make_map(kind, clouds.random(100))
    c_in, c_out = 8, 16 if groups < 8 else 8
    draw = torch.Generator().manual_seed(4)
    shapes = ((100, c_in), (c_out, 3, 3, 3, c_in // groups), (c_out,))
    leaves = [torch.randn(shape, generator=draw).to(device) for shape in shapes]

    def reference(x, weight, bias):
        y = bias.expand(map.n_out, -1)
        wide = weight.new_zeros(c_out, 27, c_in)
        for g in range(groups):
            rows = slice(g * c_out // groups, (g + 1) * c_out // groups)
            cols = slice(g * c_in // groups, (g + 1) * c_in // groups)
            wide[rows, :, cols] = weight[rows].flatten(1, 3)
        for tap, numbers in enumerate(map.neighbours.cpu().long()):
            out = (numbers >= 0).nonzero()[:, 0]
            y = y.index_add(0, out, x[numbers[out]] @ wide[:, tap].t())
        return y

    terms = 27 * c_in + 100
    against(lambda *a: grouped_conv3d(*a, map, groups), reference, leaves, terms)


def test_groups_must_fit(clouds, device):
    map = make_map("submanifold", clouds.random(20))
    x, weight = torch.ones(20, 6, device=device), torch.ones(4, 3, 3, 3, 3, device=device)
    for groups, message in (
        (4, "groups is 4 for 6 -> 4 channels, expected a divisor of both"),
        (0, "groups is 0"),
        (1, r"weight is \[4, 3, 3, 3, 3\], expected \[c_out, Kx, Ky, Kz, 6\]"),
    ):
        with pytest.raises(vg.ArgumentError, match=message):
            grouped_conv3d(x, weight, None, map, groups)
    assert grouped_conv3d(x, weight, None, map, 2).shape == (20, 4)


def test_a_table_may_be_exchanged(clouds, device):
    """What calls before have kept of a map is not read any more."""
    coords = clouds.random(50)
    map = vg.build_map(coords, 3)
    x, weight = torch.randn(50, 8, device=device), torch.randn(27, 8, device=device)
    assert depthwise_conv3d(x, weight, None, map).any()
    map.neighbours = torch.full_like(map.neighbours, -1)
    assert not depthwise_conv3d(x, weight, None, map).any()
