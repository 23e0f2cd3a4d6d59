# SPDX-License-Identifier: Apache-2.0
"""Pooling and segments against float64 arithmetic of torch on lists of rows."""

from __future__ import annotations

import pytest
import torch

import voxgemm as vg
from voxgemm.functional import Geometry, strided_map, submanifold_map
from voxgemm.pooling import (
    REDUCTIONS,
    global_pool,
    max_pool_rows,
    pool,
    segment_reduce,
    unpool,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def make_map(kind, coords):
    if kind == "submanifold":
        return submanifold_map(coords, Geometry.submanifold((3, 3, 3), (1, 1, 1)))
    geometry = Geometry((2, 2, 2), (2, 2, 2)) if kind == "down" else Geometry((3, 1, 2), (2, 1, 1))
    return strided_map(coords, vg.output_coords(coords, geometry), geometry)


def lists_of(map):
    """The input rows of every output row, taps ascending."""
    table = map.neighbours.cpu().T.tolist()
    return [[row for row in rows if row >= 0] for rows in table]


def reduce_list(rows, reduction):
    """Of rows float64 [k, c]; autograd picks the first of equals through argmax."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1])
    if reduction in ("sum", "mean"):
        return rows.sum(0) / (len(rows) if reduction == "mean" else 1)
    order = rows if reduction == "max" else -rows
    best = torch.stack([(column == column.max()).nonzero()[0, 0] for column in order.detach().T])
    return rows.gather(0, best[None])[0]


def reference(features, lists, reduction, dy, absolute=False):
    x = features.cpu().double()
    x = (x.abs() if absolute else x).requires_grad_()
    empty = x[:0]
    y = torch.stack([reduce_list(x[rows] if rows else empty, reduction) for rows in lists])
    dy = dy.cpu().double()
    (dx,) = torch.autograd.grad(y, x, dy.abs() if absolute else dy)
    return y.detach(), dx


def check(within, function, features, lists, reduction):
    x = features.clone().requires_grad_()
    y = function(x)
    assert y.dtype == features.dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype).to(y.device)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = reference(features, lists, reduction, dy)
    if reduction in ("max", "min"):
        assert torch.equal(y.detach().cpu().double(), expected[0])
        sizes = dx.cpu().double().abs() * 30 + 30  # at most 27 gradients of a few units meet
        within(dx, expected[1], sizes, 27)
        return
    sizes = reference(features, lists, reduction, dy, absolute=True)
    # One term more: a mean divides.
    terms = max([len(rows) for rows in lists] + [27]) + 1
    for actual, wanted, size in zip((y.detach(), dx), expected, sizes, strict=True):
        within(actual, wanted, size, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["submanifold", "down", "uneven"])
@pytest.mark.parametrize("channels", [5, 16])
def test_pooling_of_a_map(clouds, device, within, dtype, reduction, kind, channels):
    map = make_map(kind, clouds.random(150))
    draw = torch.Generator().manual_seed(1)
    # Small whole numbers: many are equal.
    x = torch.randint(-3, 4, (150, channels), generator=draw).to(dtype).to(device)
    check(within, lambda t: pool(t, map, reduction), x, lists_of(map), reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_voxels(clouds, device, within, reduction):
    """Every repeated row has the result of its voxel; the gradient goes to the lowest row."""
    coords = clouds.random(60, extent=4)
    coords = torch.cat([coords, coords[:20]])
    map = make_map("submanifold", coords)
    x = torch.randn(80, 4, dtype=torch.float64).to(device)
    check(within, lambda t: pool(t, map, reduction), x, lists_of(map), reduction)


def test_the_row_that_won(device):
    coords = torch.tensor([[0, 0, 0, z] for z in (0, 1, 2, 9)], dtype=torch.int32, device=device)
    map = strided_map(coords, vg.output_coords(coords, DOWN), DOWN)
    x = torch.tensor([[1.0, 5.0], [1.0, 7.0], [float("nan"), 2.0], [-3.0, -4.0]], device=device)
    y, rows = max_pool_rows(x, map)
    assert rows.tolist() == [[0, 1], [2, 2], [3, 3]]
    assert y[0].tolist() == [1.0, 7.0] and y[1, 0].isnan() and y[2].tolist() == [-3.0, -4.0]
    assert max_pool_rows(x, map, "min")[1].tolist() == [[0, 0], [2, 2], [3, 3]]


DOWN = Geometry((1, 1, 2), (1, 1, 2))


def test_rows_without_inputs(device):
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    away = torch.full((2, 4), 50, dtype=torch.int32, device=device)
    map = strided_map(coords, away, DOWN)
    x = torch.ones(1, 3, device=device, requires_grad=True)
    for reduction in REDUCTIONS:
        y = pool(x, map, reduction)
        assert y.tolist() == [[0.0] * 3] * 2
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0.0] * 3]
    assert max_pool_rows(x, map)[1].tolist() == [[-1] * 3] * 2


def test_no_rows(device):
    none = torch.empty(0, 4, dtype=torch.int32, device=device)
    map = submanifold_map(none, Geometry.submanifold((3, 3, 3), (1, 1, 1)))
    x = torch.empty(0, 3, device=device, requires_grad=True)
    for reduction in REDUCTIONS:
        y = pool(x, map, reduction)
        assert y.shape == (0, 3)
        assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 3)


def test_unpooling_gives_children_their_parent(clouds, device):
    coords = clouds.random(100)
    geometry = Geometry((2, 2, 2), (2, 2, 2))
    outputs = vg.output_coords(coords, geometry)
    map = strided_map(coords, outputs, geometry)
    parents = torch.randn(len(outputs), 3, device=device)
    down = torch.cat([coords[:, :1], coords[:, 1:] // 2], 1)
    row = {tuple(voxel): r for r, voxel in enumerate(outputs.tolist())}
    rows = torch.tensor([row[tuple(voxel)] for voxel in down.tolist()], device=device)
    assert torch.equal(unpool(parents, map), parents[rows])
    assert torch.equal(unpool(parents, map, "max"), parents[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("channels", [3, 16])
def test_segments(device, within, dtype, reduction, channels):
    """One of thousands of rows, some of a few, one of none; rows outside are left out."""
    draw = torch.Generator().manual_seed(2)
    segments = torch.cat([torch.full((9000,), 3), torch.randint(-2, 9, (300,), generator=draw)])
    segments[segments == 5] = 4
    segments = segments[torch.randperm(len(segments), generator=draw)].to(device)
    x = torch.randint(-9, 10, (len(segments), channels), generator=draw).to(dtype).to(device)
    lists = [(segments.cpu() == s).nonzero()[:, 0].tolist() for s in range(7)]
    check(within, lambda t: segment_reduce(t, segments, 7, reduction), x, lists, reduction)


def test_global_pooling(clouds, device):
    coords = clouds.random(90)
    x = torch.ones(90, 2, device=device)
    counts = torch.bincount(coords[:, 0].cpu(), minlength=3)[:, None].expand(3, 2).float()
    assert torch.equal(global_pool(x, coords, 3, "sum").cpu(), counts)
    assert global_pool(x, coords, 3)[:, 0].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(clouds, device, reduction):
    coords = clouds.random(40, extent=4)
    map = make_map("down", coords)
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(40, 2, dtype=torch.float64, generator=draw).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: pool(t, map, reduction), x)
    assert torch.autograd.gradgradcheck(lambda t: pool(t, map, reduction), x)
    # Rows outside on both sides, and segments 1 and 5 without any.
    segments = torch.randint(-2, 9, (40,), generator=draw)
    segments[(segments == 1) | (segments == 5)] = 6
    segments = segments.to(device)
    for function in (
        lambda t: segment_reduce(t, segments, 7, reduction),
        lambda t: segment_reduce(t, segments, 0, reduction),
        lambda t: global_pool(t, coords, 4, reduction),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
        assert torch.autograd.gradgradcheck(lambda t, f=function: gradient(f, t), x)


def gradient(function, x):
    return torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)[0]


def test_segments_beyond_32_bits_are_left_out(device):
    segments = torch.tensor([2**32, 0, -(2**32) + 1, 2**63 - 1], device=device)
    assert segment_reduce(torch.ones(4, 1, device=device), segments, 2).tolist() == [[1], [0]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_channels(clouds, device, reduction):
    coords = clouds.random(20)
    x = torch.zeros(20, 0, device=device, requires_grad=True)
    for kind in ("subm", "down"):
        map = make_map(kind, coords)
        y = pool(x, map, reduction)
        assert y.shape == (map.n_out, 0)
        assert torch.autograd.grad(y.sum(), x)[0].shape == (20, 0)
    y = segment_reduce(x, coords[:, 0], 5, reduction)
    assert y.shape == (5, 0) and torch.autograd.grad(y.sum(), x)[0].shape == (20, 0)


def test_wrong_arguments_are_said(clouds, device):
    map = make_map("down", clouds.random(40))
    x = torch.ones(40, 2, device=device)
    for call, message in (
        (lambda: pool(x, map, "median"), "reduction is 'median'"),
        (lambda: pool(x[:30], map), "x has 30 rows, the map 40"),
        (lambda: pool(x.int(), map), "x has dtype i32"),
        (lambda: segment_reduce(x, torch.zeros(3, device=device).int(), 2), "segments is 3 x 1"),
        (lambda: segment_reduce(x, torch.zeros(40, device=device).int(), -1), "count is -1"),
        (lambda: segment_reduce(x, x[:, 0], 2), r"segments is torch.float32 \[40\]"),
    ):
        with pytest.raises(vg.ArgumentError, match=message):
            call()
