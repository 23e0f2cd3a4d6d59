# SPDX-License-Identifier: Apache-2.0
"""Sparse convolutions against torch's dense ones: results and all three gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import voxgemm as vg
from voxgemm.functional import Geometry, conv3d
from voxgemm.kernel_map import triple

KERNELS = (1, 2, 3, 4, 5, (1, 3, 5), (2, 1, 4))
STRIDES = (1, 2, 3, (1, 2, 3))
PADDINGS = (0, 1, (2, 0, 1))
DILATIONS = (1, 2)
BATCH, SHAPE = 2, (6, 7, 5)
GRID = [
    Geometry(*(triple(value, "") for value in values))
    for values in itertools.product(KERNELS, STRIDES, PADDINGS, DILATIONS)
]


def terms_of(geometry: Geometry, channels: int, rows: int) -> int:
    """The most products in one sum of any pass, and one for the bias."""
    return max(math.prod(geometry.size) * channels, rows) + 1


def text(geometry: Geometry) -> str:
    return "k{}s{}p{}d{}".format(*("x".join(map(str, values)) for values in geometry))


def reached(dense, coords, geometry):
    """Torch's output voxels that read an active input, with ascending coordinates."""
    shape = geometry.out_shape(SHAPE)
    outputs = torch.cartesian_prod(*[torch.arange(n) for n in (BATCH, *shape)]).int()
    if not len(outputs):
        return outputs.to(coords.device)
    ones = torch.ones(len(coords), 1, dtype=torch.float64)
    weight = torch.ones(1, *geometry.size, 1, dtype=torch.float64)
    found = dense.conv(ones, weight, None, geometry, (coords, outputs))
    return outputs[found[:, 0] > 0].to(coords.device)


@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
def test_the_bound_notices_a_small_error(dtype, within):
    """One product of 1.5 takes at most three roundings: its sum's, the reference's and the last."""
    exact = torch.full((4,), 1.5, dtype=torch.float64)
    within(exact.to(dtype), exact, exact, 1)
    wrong = exact.to(dtype, copy=True)
    wrong[2] += 3 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="element 2"):
        within(wrong, exact, exact, 1)


@pytest.mark.parametrize("geometry", GRID, ids=text)
def test_full_grid_equals_torch(geometry, clouds, dense, layer, against):
    coords = clouds.grid(BATCH, SHAPE)
    outputs = vg.output_coords(coords, geometry, spatial_shape=SHAPE)
    assert torch.equal(outputs, reached(dense, coords, geometry))
    x, weight, bias, map = layer(coords, geometry=geometry, out_coords=outputs)
    against(
        lambda x, w, b: conv3d(x, w, b, map),
        lambda x, w, b: dense.conv(x, w, b, geometry, (coords, outputs)),
        (x, weight, bias),
        terms_of(geometry, 4, len(coords)),
    )


@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_full_grid_submanifold(kernel, dilation, clouds, dense, layer, against):
    geometry = Geometry.submanifold(triple(kernel, ""), triple(dilation, ""))
    coords = clouds.grid(BATCH, SHAPE)
    x, weight, bias, map = layer(coords, geometry=geometry)
    against(
        lambda x, w, b: conv3d(x, w, b, map),
        lambda x, w, b: dense.conv(x, w, b, geometry, (coords, coords)),
        (x, weight, bias),
        terms_of(geometry, 4, len(coords)),
    )


@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
@pytest.mark.parametrize("kernel", (1, 2, 3, 5, (1, 3, 5)), ids=str)
def test_random_cloud_submanifold(kernel, dtype, clouds, dense, layer, against):
    geometry = Geometry.submanifold(triple(kernel, ""), (1, 1, 1))
    coords = clouds.random(300)
    x, weight, bias, map = layer(coords, 17, 33, dtype, geometry)
    against(
        lambda x, w, b: conv3d(x, w, b, map),
        lambda x, w, b: dense.conv(x, w, b, geometry, (coords, coords)),
        (x, weight, bias),
        terms_of(geometry, 33, len(coords)),
    )


@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GRID[::7], ids=text)
def test_random_cloud_strided(geometry, dtype, clouds, dense, layer, against):
    coords = clouds.random(60, extent=5)
    outputs = vg.output_coords(coords, geometry, spatial_shape=SHAPE)
    assert torch.equal(outputs, reached(dense, coords, geometry))
    x, weight, bias, map = layer(coords, 8, 16, dtype, geometry, outputs)
    against(
        lambda x, w, b: conv3d(x, w, b, map),
        lambda x, w, b: dense.conv(x, w, b, geometry, (coords, outputs)),
        (x, weight, bias),
        terms_of(geometry, 16, len(coords)),
    )


@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GRID[::7], ids=text)
def test_inverse_equals_conv_transpose(geometry, dtype, clouds, dense, layer, against):
    coords = clouds.random(60, extent=5)
    outputs = vg.output_coords(coords, geometry, spatial_shape=SHAPE)
    _, weight, bias, down = layer(coords, 8, 16, dtype, geometry, outputs)
    x = torch.randn(len(outputs), 8, generator=torch.Generator().manual_seed(4))
    x = x.to(dtype).to(coords.device)
    against(
        lambda x, w, b: vg.functional.inverse_conv3d(x, w, b, down),
        lambda x, w, b: dense.transposed(x, w, b, geometry, (outputs, coords)),
        (x, weight, bias),
        terms_of(geometry, 16, len(coords)),
    )


@pytest.mark.parametrize("algorithm", list(vg.Algorithm))
@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
def test_every_algorithm(algorithm, dtype, clouds, dense, layer, against):
    geometry = Geometry.submanifold((3, 3, 3), (1, 1, 1))
    coords = clouds.random(400)
    x, weight, bias, map = layer(coords, 24, 40, dtype, geometry)
    # The slices of an algorithm are of forward and grad_input only; grad_weight has its own.
    names = {"forward": algorithm, "grad_input": algorithm}
    against(
        lambda x, w, b: conv3d(x, w, b, map, names),
        lambda x, w, b: dense.conv(x, w, b, geometry, (coords, coords)),
        (x, weight, bias),
        terms_of(geometry, 40, len(coords)),
    )


def test_floor_rule_keeps_every_halved_voxel(clouds):
    coords = clouds.random(100) - 4
    geometry = Geometry((2, 2, 2), (2, 2, 2))
    coarse = vg.output_coords(coords, geometry, "floor")
    halved = coords.clone()
    halved[:, 1:] = halved[:, 1:] >> 1
    assert torch.equal(coarse, halved.unique(dim=0))


def test_without_a_shape_every_reached_voxel_counts(device):
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    outputs = vg.output_coords(coords, Geometry((3, 3, 3)))
    assert outputs[:, 1:].amin() == -2 and len(outputs) == 27
    inside = vg.output_coords(coords, Geometry((3, 3, 3)), spatial_shape=(3, 3, 3))
    assert inside.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [300, 3000])
def test_thread_counts_give_the_same_bits(rows, dtype, clouds, layer, threads):
    results = []
    for count in (1, 2, 7):
        threads(count)
        coords = clouds.random(rows, extent=16)
        outputs = vg.output_coords(coords, Geometry((2, 2, 2), (2, 2, 2)))
        for out_coords in (None, outputs):
            geometry = None if out_coords is None else Geometry((2, 2, 2), (2, 2, 2))
            x, weight, bias, map = layer(coords, 16, 24, dtype, geometry, out_coords)
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            y = conv3d(*leaves, map)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for again in (results[2:4], results[4:6]):
        for first, other in zip(results[:2], again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rows", (0, 1))
@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
def test_empty_input(rows, dtype, device, layer):
    """No output row, or (1 row, far from any output) no pair: shapes, dtypes and zero gradients."""
    coords = torch.full((rows, 4), 9, dtype=torch.int32, device=device)
    outputs = torch.zeros(3 * rows, 4, dtype=torch.int32, device=device)
    x, weight, bias, map = layer(coords, 3, 5, dtype, Geometry((2, 2, 2), (2, 2, 2)), outputs)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = conv3d(*leaves, map)
    assert y.shape == (3 * rows, 5) and y.dtype == dtype
    assert torch.equal(y, bias.expand_as(y))
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == dtype
        assert torch.equal(gradient, torch.full_like(gradient, 3.0 * rows if leaf is bias else 0))


def test_repeated_voxels(clouds, layer):
    """Look-ups find the lowest row, every row has its own output, gradients are the adjoint."""
    coords = clouds.random(40, extent=4).repeat(2, 1)
    x, weight, bias, map = layer(coords)
    y = conv3d(x, weight, bias, map)
    once = vg.build_map(coords[:40], 3)
    assert torch.equal(y[:40], conv3d(x[:40], weight, bias, once))
    assert torch.equal(y[40:], y[:40])
    leaf = x.clone().requires_grad_()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype).to(
        y.device
    )
    (dx,) = torch.autograd.grad(conv3d(leaf, weight, None, map), leaf, dy)
    assert torch.equal(dx[40:], torch.zeros_like(dx[40:]))
    direct = (conv3d(x, weight, None, map) * dy).sum()
    bound = float(bound_of_dot(x, weight, dy))
    assert math.isclose(float(direct), float((dx * x).sum()), rel_tol=0, abs_tol=bound)


@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
def test_rows_of_padding_take_no_part(dtype, clouds, dense, layer, against):
    """Wherever they stand, and though another batch number would make them voxels that repeat."""
    coords, more = clouds.random(80), 7
    geometry = Geometry.submanifold((3, 3, 3), (1, 1, 1))
    x, weight, bias, _ = layer(coords, 4, 6, dtype, geometry)
    padding = coords[:more].clone()
    padding[:, 0] = vg.PADDING_BATCH
    order = torch.randperm(80 + more, generator=torch.Generator().manual_seed(6)).to(coords.device)
    voxels = order.argsort()[:80]
    map = vg.build_map(torch.cat([coords, padding])[order], 3)
    against(
        lambda x, w, b: conv3d(torch.cat([x, x[-more:]])[order], w, b, map)[voxels],
        lambda x, w, b: dense.conv(x, w, b, geometry, (coords, coords)),
        (x, weight, bias),
        terms_of(geometry, 6, 80),
    )


def bound_of_dot(x, weight, dy):
    """Rounding of <conv(x), dy> and <dx, x> together, every product counted at its largest."""
    taps, terms = weight[0, ..., 0].numel(), x.numel() * weight.numel()
    largest = x.abs().max() * weight.abs().max() * dy.abs().max()
    return 2 * terms * torch.finfo(x.dtype).eps * largest * taps * dy.numel() * x.shape[1]
