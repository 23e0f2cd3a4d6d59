# SPDX-License-Identifier: Apache-2.0
"""Residual sums and ReLU in a convolution's kernel, and batch norms in its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import voxgemm as vg
from voxgemm.functional import conv3d
from voxgemm.unet import ConvNorm, UNet


def operands(clouds, dtype, c_in=7, c_out=12):
    coords = clouds.random(150)
    map = vg.build_map(coords, 3)
    draw = torch.Generator().manual_seed(3)

    def whole(*shape):
        return torch.randint(-3, 4, shape, generator=draw).to(coords.device, dtype)

    x, weight, bias = whole(150, c_in), whole(c_out, 3, 3, 3, c_in), whole(c_out)
    return map, x, weight, bias, whole(150, c_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(7, 12), (16, 64), (32, 33)])
def test_equals_what_follows_the_convolution(clouds, dtype, channels):
    """Small whole numbers: sums are exact, and one rounding comes at the end of each."""
    map, x, weight, bias, residual = operands(clouds, dtype, *channels)
    exact = conv3d(x.double(), weight.double(), bias.double(), map)
    for added in (None, residual):
        for relu in (False, True):
            expected = exact if added is None else exact + added
            expected = expected.relu() if relu else expected
            found = conv3d(x, weight, bias, map, residual=added, relu=relu)
            assert found.dtype == dtype
            assert torch.equal(found, expected.to(dtype))


def test_a_residual_of_any_layout(clouds):
    map, x, weight, bias, residual = operands(clouds, torch.float32)
    expected = conv3d(x, weight, bias, map, residual=residual)
    wide = torch.full((150, 40), float("nan"), device=x.device)
    for first in (0, 1, 4):
        wide[:, first : first + 12] = residual
        view = wide[:, first : first + 12]
        assert torch.equal(conv3d(x, weight, bias, map, residual=view), expected)
    assert torch.equal(conv3d(x, weight, bias, map, residual=residual.T.contiguous().T), expected)


def test_nan_and_infinities_stay(clouds):
    map, x, weight, bias, residual = operands(clouds, torch.float32)
    residual[3, 4], residual[5, 6], residual[7, 8] = float("nan"), float("inf"), -float("inf")
    found = conv3d(x, weight, bias, map, residual=residual, relu=True)
    assert found[3, 4].isnan() and found[5, 6] == float("inf") and found[7, 8] == 0
    assert found.isnan().sum() == 1 and found.isinf().sum() == 1
    weight[2, 0, 0, 0, 0] = float("inf")  # only where the tap has a neighbour
    found = conv3d(x, weight, bias, map, residual=residual, relu=True)
    expected = (conv3d(x, weight, bias, map) + residual).relu()
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("relu", [False, True])
def test_derivatives(clouds, relu):
    map, *rest = operands(clouds, torch.float64, 2, 3)
    inputs = [t.requires_grad_() for t in rest]

    def fused(x, weight, bias, residual):
        # Half off whole numbers: ReLU has no derivative at 0.
        return conv3d(x, weight, bias, map, residual=residual + 0.5, relu=relu)

    def plain(x, weight, bias, residual):
        y = conv3d(x, weight, bias, map) + (residual + 0.5)
        return y.relu() if relu else y

    dy = torch.ones_like(inputs[3])
    for found, expected in zip(
        torch.autograd.grad(fused(*inputs), inputs, dy),
        torch.autograd.grad(plain(*inputs), inputs, dy),
        strict=True,
    ):
        assert torch.equal(found, expected)
    few = vg.build_map(clouds.random(6, extent=2), 3)
    draw = torch.Generator().manual_seed(1)
    small = [
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dy.device).requires_grad_()
        for shape in ((6, 2), (2, 3, 3, 3, 2), (2,), (6, 2))
    ]

    def function(x, weight, bias, residual):
        return conv3d(x, weight, bias, few, residual=residual, relu=relu)

    assert gradcheck(function, small)
    assert gradgradcheck(function, small)


def test_inside_functional_transforms(clouds):
    map, x, weight, bias, residual = operands(clouds, torch.float64)

    def loss(weight):
        return conv3d(x, weight, bias, map, residual=residual, relu=True).sum()

    expected = torch.autograd.grad(loss(weight.requires_grad_()), weight)[0]
    assert torch.equal(torch.func.grad(loss)(weight.detach()), expected)


def test_compiled(clouds):
    map, x, weight, bias, residual = operands(clouds, torch.float32)
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def function(x, weight, bias, residual):
        return conv3d(x, weight, bias, map, residual=residual, relu=True)

    dy = torch.ones_like(residual)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(*inputs)
    found = compiled(*inputs)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_errors_name_both_values(clouds):
    map, x, weight, bias, residual = operands(clouds, torch.float32)
    with pytest.raises(vg.ArgumentError, match="the residual is 150 x 5, expected 150 x 12"):
        conv3d(x, weight, bias, map, residual=residual[:, :5])
    with pytest.raises(vg.ArgumentError, match="the residual has dtype f16, expected f32"):
        conv3d(x, weight, bias, map, residual=residual.half())
    coords = clouds.random(9, extent=3)
    a = vg.SparseTensor(torch.ones(9, 2, device=coords.device), coords)
    b = vg.SparseTensor(torch.ones(9, 4, device=coords.device), coords.clone())
    layer = vg.nn.SubmConv3d(2, 4, 3, device=coords.device)
    with pytest.raises(vg.ArgumentError, match="the residual stands on other coordinates"):
        layer(a, residual=b)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layers(clouds, groups):
    coords = clouds.random(80)
    x = vg.SparseTensor(torch.randn(80, 4, device=coords.device), coords)
    layer = vg.nn.SubmConv3d(4, 4, 3, groups=groups, device=coords.device)
    expected = (layer(x) + x).apply(torch.relu)
    torch.testing.assert_close(layer(x, residual=x, relu=True).features, expected.features)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_a_batch_norm(clouds, affine, bias):
    coords = clouds.random(80)
    conv = vg.nn.SubmConv3d(4, 6, 3, bias=bias).double().to(coords.device)
    norm = nn.BatchNorm1d(6, affine=affine).double().to(coords.device)
    with torch.no_grad():
        for values in (norm.running_mean, norm.running_var, *norm.parameters()):
            values.uniform_(0.5, 2)
    norm.eval()
    x = vg.SparseTensor(torch.randn(80, 4, device=coords.device).double(), coords)
    folded = vg.nn.fold_batch_norm(conv, norm)
    assert conv.bias is None or folded.bias is not conv.bias
    torch.testing.assert_close(folded(x).features, norm(conv(x).features))
    with pytest.raises(vg.ArgumentError, match="has 5 channels, the convolution 6"):
        vg.nn.fold_batch_norm(conv, nn.BatchNorm1d(5))
    with pytest.raises(vg.ArgumentError, match="keeps no running statistics"):
        vg.nn.fold_batch_norm(conv, nn.BatchNorm1d(6, track_running_stats=False))


def test_a_folded_network(clouds):
    coords = clouds.random(300, extent=12)
    torch.manual_seed(0)
    net = UNet(3, 5).to(coords.device)
    x = vg.SparseTensor(torch.randn(300, 3, device=coords.device), coords)
    net(x).sum().backward()  # running statistics
    net.eval()
    expected = net(x)
    for module in list(net.modules()):
        if isinstance(module, ConvNorm):
            module.fold()
    assert not any(isinstance(module, nn.BatchNorm1d) for module in net.modules())
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
