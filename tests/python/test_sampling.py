# SPDX-License-Identifier: Apache-2.0
"""Sampling and weighted sums against dense float64 arithmetic of torch."""

from __future__ import annotations

import pytest
import torch

import voxgemm as vg
from voxgemm.sampling import sample, sample_map, weighted_sum, weighted_sum_grad_features

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def draw_points(device, rows, low=-3.0, high=11.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(rows, 3, generator=generator, dtype=torch.float64, device="cpu")
    return (low + (high - low) * unit).to(dtype).to(device)


def look_up(coords):
    table = {}
    for row, voxel in enumerate(coords.tolist()):
        table.setdefault(tuple(voxel), row)
    return table


def reference_map(coords, points, batch, mode, rounding="floor", shape=None):
    """Rows and float64 weights, one corner at a time; weights are differentiable in points."""
    table = look_up(coords)
    points = points.cpu().double()
    batch = batch.cpu().tolist()
    taps = 8 if mode == "trilinear" else 1
    if mode == "trilinear":
        base = (points.detach() - 0.5).floor()
    else:
        base = points.detach().floor() if rounding == "floor" else points.detach().trunc()
    rows = torch.full((len(points), taps), -1, dtype=torch.int64)
    shares = []
    for c in range(taps):
        corner = base + torch.tensor([c & 1, c >> 1 & 1, c >> 2])
        for p, voxel in enumerate(corner.int().tolist()):
            inside = shape is None or all(0 <= v < s for v, s in zip(voxel, shape, strict=True))
            rows[p, c] = table.get((batch[p], *voxel), -1) if inside else -1
        near = (1 - (points - corner - 0.5).abs()).prod(1)
        shares.append(near if mode == "trilinear" else torch.ones_like(near))
    weights = torch.stack(shares, 1) * (rows >= 0)
    return rows, weights / weights.sum(1, keepdim=True).clamp(min=1e-12)


def dense_sum(features, rows, weights):
    """weighted_sum in plain torch."""
    picked = features[rows.clamp(min=0)] * (rows >= 0)[..., None]
    return (picked * weights[..., None]).sum(1)


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
@pytest.mark.parametrize("shape", [None, (8, 5, 7)])
def test_which_voxels_a_point_reads(clouds, device, mode, shape):
    coords = clouds.random(300)
    coords = torch.cat([coords, coords[:40]])  # repeated voxels
    points = draw_points(device, 400)
    batch = torch.arange(400, device=device).int() % 3
    rows, weights = sample_map(coords, points, mode, batch=batch, spatial_shape=shape)
    expected_rows, expected = reference_map(coords, points, batch, mode, shape=shape)
    assert torch.equal(rows.cpu().long(), expected_rows)
    # A share is a product of three differences that are rounded once each, then of a division by
    # the sum of eight: 20 roundings do for both.
    share = expected * expected.count_nonzero(1).clamp(min=1)[:, None]
    error = (weights.cpu().double() - expected).abs()
    assert bool((error <= 20 * 2.0**-24 * (share + 1)).all())
    assert 0 < int((rows >= 0).sum()) < rows.numel()


def test_rounding_of_the_nearest_voxel(device):
    coords = torch.tensor([[0, 0, 0, 0], [0, -1, 0, 0]], dtype=torch.int32, device=device)
    points = torch.tensor([[-0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [-1.5, 0.2, 0.9]], device=device)
    assert sample_map(coords, points, "nearest").rows.tolist() == [[1], [0], [-1]]
    truncated = sample_map(coords, points, "nearest", rounding="truncate")
    assert truncated.rows.tolist() == [[0], [0], [1]]


def test_points_by_batch(clouds, device):
    coords = clouds.random(200)
    features = torch.randn(200, 5, device=device)
    points = draw_points(device, 60).reshape(2, 30, 3)
    y = sample(features, coords, points)
    assert y.shape == (2, 30, 5)
    batch = torch.arange(60, device=device).int() // 30
    flat = sample(features, coords, points.reshape(-1, 3), batch=batch)
    assert torch.equal(y.reshape(60, 5), flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 64])
@pytest.mark.parametrize("taps", [1, 8, 13])
def test_weighted_sums_and_gradients(device, within, dtype, channels, taps):
    generator = torch.Generator().manual_seed(taps)
    n, m = 50, 700  # every row is read many times
    features = torch.randn(n, channels, generator=generator).to(dtype).to(device)
    weights = torch.randn(m, taps, generator=generator)
    weights = (weights.double() if dtype == torch.float64 else weights).to(device)
    rows = torch.randint(-20, n, (m, taps), generator=generator).clamp(min=-1).to(device)
    dy = torch.randn(m, channels, generator=generator).to(dtype).to(device)
    x, w = features.clone().requires_grad_(), weights.clone().requires_grad_()
    y = weighted_sum(x, rows, w)
    assert y.dtype == dtype
    dx, dw = torch.autograd.grad(y, (x, w), dy)

    def reference(function):
        a = function(features.cpu().double()).requires_grad_()
        b = function(weights.cpu().double()).requires_grad_()
        out = dense_sum(a, rows.cpu(), b)
        return out.detach(), *torch.autograd.grad(out, (a, b), function(dy.cpu().double()))

    exact, sizes = reference(lambda t: t), reference(torch.abs)
    most = int(torch.bincount(rows[rows >= 0].cpu(), minlength=n).max())
    for actual, expected, size, terms in zip(
        (y, dx, dw), exact, sizes, (taps, most, channels), strict=True
    ):
        within(actual.detach(), expected, size, terms)
    assert torch.equal(dx, weighted_sum_grad_features(dy, rows, weights, n))


def test_absent_rows_are_never_read(device):
    features = torch.full((4, 8), float("nan"), device=device)
    features[1] = 2.0
    weights = torch.ones(3, 2, device=device)
    absent = torch.tensor([[1, -1], [-1, -1], [1, 1]], device=device)
    unsigned = absent.int().view(torch.uint32)
    for rows in (absent, absent % 2**32, unsigned):
        x = features.clone().requires_grad_()
        w = weights.clone().requires_grad_()
        y = weighted_sum(x, rows, w)
        assert y[:, 0].tolist() == [2.0, 0.0, 4.0]
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
        assert dx[:, 0].tolist() == [0.0, 3.0, 0.0, 0.0]
        assert dw.tolist() == [[16.0, 0.0], [0.0, 0.0], [16.0, 16.0]]


def test_derivatives(clouds, device):
    """Of any order in features and weights, of the first in points."""
    coords = clouds.random(60, extent=4)
    features = torch.randn(60, 3, dtype=torch.float64, device=device, requires_grad=True)
    points = draw_points(device, 12, 0.0, 4.0, torch.float64, seed=3).requires_grad_()
    batch = torch.arange(12, device=device).int() % 2
    assert torch.autograd.gradcheck(
        lambda f, p: sample(f, coords, p, batch=batch), (features, points)
    )
    rows, weights = sample_map(coords, points.detach(), batch=batch)
    weights = weights.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda f, w: weighted_sum(f, rows, w), (features, weights))


def test_gradients_have_the_same_bits_and_graphs_are_used_twice(clouds, device, threads):
    coords = clouds.random(500)
    features = torch.randn(500, 17, device=device, requires_grad=True)
    points = draw_points(device, 20000, 0.0, 8.0).requires_grad_()
    first = None
    for count in (1, 3):
        threads(count)
        y = sample(features, coords, points)
        for _ in range(2):
            found = torch.autograd.grad(
                y, (features, points), torch.ones_like(y), retain_graph=True
            )
            first = first or (y, *found)
            assert all(torch.equal(a, b) for a, b in zip((y, *found), first, strict=True))


def test_long_and_empty_lists_of_places(device, within):
    """Row 3 is read by all points but one, most rows by none."""
    n, m = 9000, 5000
    rows = torch.full((m, 1), 3, device=device)
    rows[777] = 8999
    dy = torch.randn(m, 6, device=device)
    weights = torch.randn(m, 1, device=device)
    dx = weighted_sum_grad_features(dy, rows, weights, n)
    expected, sizes = (
        torch.zeros(n, 6, dtype=torch.float64).index_add_(0, rows[:, 0].cpu(), values)
        for values in (
            (dy * 1.0).cpu().double() * weights.cpu().double(),
            dy.abs().cpu().double() * weights.abs().cpu().double(),
        )
    )
    within(dx, expected, sizes, m)


def test_nothing_to_read_and_nowhere_to_read(device):
    none = torch.empty(0, 4, dtype=torch.int32, device=device)
    points = torch.rand(5, 3, device=device, requires_grad=True)
    features = torch.empty(0, 2, device=device, requires_grad=True)
    y = sample(features, none, points)
    assert y.tolist() == [[0.0, 0.0]] * 5
    dx, dp = torch.autograd.grad(y.sum(), (features, points))
    assert dx.shape == (0, 2) and dp.tolist() == [[0.0] * 3] * 5
    some = torch.zeros(1, 4, dtype=torch.int32, device=device)
    x = torch.ones(1, 2, device=device, requires_grad=True)
    y = sample(x, some, points[:0])
    assert y.shape == (0, 2)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0.0, 0.0]]
    wild = torch.tensor([[float("nan"), 0, 0], [float("inf"), 0, 0], [1e30, 0, 0]], device=device)
    for mode in ("nearest", "trilinear"):
        assert sample(x, some, wild, mode).tolist() == [[0.0, 0.0]] * 3


def test_numbers_beyond_32_bits_are_absent(device):
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    x = torch.ones(1, 2, device=device, requires_grad=True)
    far = torch.tensor([0, 2**32, -(2**32)], device=device)
    points = torch.full((3, 3), 0.5, device=device)
    for mode in ("nearest", "trilinear"):
        assert sample(x, coords, points, mode, batch=far)[:, 0].tolist() == [1, 0, 0]
    y = weighted_sum(x, far[:, None], points[:, :1])
    assert y[:, 0].tolist() == [0.5, 0, 0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0.5, 0.5]]


def test_no_channels(clouds, device):
    coords = clouds.random(10)
    x = torch.zeros(10, 0, device=device, requires_grad=True)
    points = torch.rand(5, 3, device=device).requires_grad_()
    y = sample(x, coords, points)
    assert y.shape == (5, 0)
    dx, dpoints = torch.autograd.grad(y.sum(), (x, points))
    assert dx.shape == (10, 0) and not bool(dpoints.any())


def test_wrong_arguments_are_said(clouds, device):
    coords = clouds.random(10)
    x = torch.ones(10, 2, device=device)
    points = torch.rand(5, 3, device=device)
    for call, message in (
        (lambda: sample(x[:9], coords, points), "features has 9 rows, coords 10"),
        (lambda: sample(x, coords, points.long()), r"points is torch.int64 \[5, 3\]"),
        (lambda: sample(x, coords, points, "cubic"), "mode is 'cubic'"),
        (lambda: sample(x, coords, points[None], batch=coords[:, 0]), "batch is given"),
        (lambda: sample(x, coords, points, batch=points[:, 0]), "batch is torch.float32"),
        (lambda: weighted_sum(x, points, points), "rows is torch.float32"),
        (lambda: weighted_sum(x, torch.zeros(5, 2, device=device).int(), points), "weights is 5 x"),
    ):
        with pytest.raises(vg.ArgumentError, match=message):
            call()
