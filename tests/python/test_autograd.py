# SPDX-License-Identifier: Apache-2.0
"""Derivatives of any order, and the ways torch asks for them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import voxgemm as vg
from voxgemm.functional import Geometry, conv3d, inverse_conv3d

DOWN = Geometry((2, 2, 2), (2, 2, 2))


@pytest.fixture(params=["submanifold", "even", "strided", "inverse", "repeated"])
def problem(request, clouds, layer):
    """(function of x, weight, bias; these three in float64)."""
    coords = clouds.random(9, extent=3, batch=1)
    if request.param == "repeated":
        coords = torch.cat([coords, coords[:4]])
    function, geometry, outputs = conv3d, None, None
    if request.param == "even":
        geometry = Geometry.submanifold((2, 1, 2), (1, 1, 1))
    if request.param in ("strided", "inverse"):
        geometry, outputs = DOWN, vg.output_coords(coords, DOWN)
    x, weight, bias, map = layer(coords, 2, 3, geometry=geometry, out_coords=outputs)
    if request.param == "inverse":
        function, x = inverse_conv3d, x[: len(outputs)]
    tensors = [t.clone().requires_grad_() for t in (x, weight, bias)]
    return (lambda x, w, b: function(x, w, b, map)), tensors


def test_gradcheck(problem):
    assert gradcheck(*problem)


def test_gradgradcheck(problem):
    assert gradgradcheck(*problem)


def test_gradgradcheck_without_bias(problem):
    function, (x, weight, _) = problem
    assert gradgradcheck(lambda x, w: function(x, w, None), (x, weight))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_operands(problem, frozen):
    function, tensors = problem
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    thawed = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    function(*thawed).square().sum().backward()
    for i, (leaf, wanted) in enumerate(zip(thawed, expected, strict=True)):
        assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_what_is_kept_for_the_backward(problem, wanted):
    """x for the weights' gradient, the weights for x's, nothing for the bias's."""
    function, tensors = problem
    x, weight, bias = (t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(x, weight, bias)
    expected = ([x] if 1 in wanted else []) + ([weight] if 0 in wanted else [])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in expected}


def test_a_recorded_backward_computes_the_same(problem):
    function, tensors = problem
    y = function(*tensors).square().sum()
    plain = torch.autograd.grad(y, tensors, retain_graph=True)
    recorded = torch.autograd.grad(y, tensors, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert all(g.requires_grad for g in recorded) and not any(g.requires_grad for g in plain)


def test_a_retained_graph_gives_its_gradients_again(problem):
    function, tensors = problem
    y = function(*tensors).square().sum()
    y.backward(retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    y.backward()
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(tensors, once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_derivatives_of_torch_func(problem):
    """torch.func.grad and vjp, and the one inside the other."""
    function, tensors = problem
    plain = [t.detach() for t in tensors]
    every = (0, 1, 2)

    def loss(x, weight, bias):
        return function(x, weight, bias).pow(3).sum()

    def squares(gradients):
        return sum(g.square().sum() for g in gradients)

    gradients = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    second = torch.autograd.grad(squares(gradients), tensors)
    found = torch.func.grad(loss, every)(*plain)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    found = torch.func.grad(lambda *t: squares(torch.func.grad(loss, every)(*t)), every)(*plain)
    assert all(torch.equal(a, b) for a, b in zip(found, second, strict=True))
    y, pullback = torch.func.vjp(function, *plain)
    expected = torch.autograd.grad(function(*tensors), tensors, y)
    assert all(torch.equal(a, b) for a, b in zip(pullback(y), expected, strict=True))


def test_functional_call(clouds, device):
    """A module with parameters from outside, which alone get gradients."""
    torch.manual_seed(0)
    net = vg.nn.Sequential(vg.nn.SubmConv3d(4, 6, 3), torch.nn.ReLU(), vg.nn.SparseConv3d(6, 5, 2))
    net.to(device).double()
    x = vg.SparseTensor(torch.randn(40, 4, device=device).double(), clouds.random(40))
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in net.named_parameters()}
    y = torch.func.functional_call(net, other, x)
    y.features.sum().backward()
    assert all(p.grad is None for p in net.parameters())
    net.load_state_dict(other)
    expected = net(x)
    assert torch.equal(y.features, expected.features)
    expected.features.sum().backward()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, other[name].grad)

    def loss(parameters):
        return torch.func.functional_call(net, parameters, x).features.sum()

    found = torch.func.grad(loss)({name: p.detach() for name, p in other.items()})
    assert all(torch.equal(found[name], other[name].grad) for name in other)


def test_bias_of_a_frozen_layer_has_a_second_derivative(problem):
    function, (x, weight, bias) = problem
    frozen = x.detach(), weight.detach()
    (g,) = torch.autograd.grad(function(*frozen, bias).pow(3).sum(), bias, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), bias)
    y = function(*frozen, bias).detach()
    torch.testing.assert_close(gg, 6 * y.sum(0))


def test_incoming_gradients_of_any_layout(clouds, layer, problem):
    function, tensors = problem
    y = function(*tensors)
    plain = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    plain = plain.to(y.device)
    wide = torch.cat([plain, plain], 1)
    ones = torch.ones_like(plain)
    layouts = {
        "transposed": (plain, plain.T.contiguous().T),
        "columns of a wider matrix": (plain, wide[:, : plain.shape[1]]),
        "every other row": (plain, torch.repeat_interleave(plain, 2, 0)[::2]),
        "expanded scalar": (ones, torch.ones_like(y[0, 0]).expand_as(y)),
        "expanded row": (plain[:1].repeat(len(y), 1), plain[:1].expand_as(y)),
        "expanded column": (plain[:, :1].repeat(1, y.shape[1]), plain[:, :1].expand_as(y)),
    }
    for name, (copy, view) in layouts.items():
        expected = torch.autograd.grad(y, tensors, copy, retain_graph=True)
        found = torch.autograd.grad(y, tensors, view, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


def test_operands_of_any_layout(problem):
    function, (x, weight, bias) = problem
    with torch.no_grad():
        expected = function(x, weight, bias)
        as_torch = weight.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
        taps_first = weight.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3)
        spread = torch.stack([weight, weight], -1)[..., 0]
        reversed_axes = weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
        for view in (as_torch, taps_first, spread, reversed_axes):
            assert not view.is_contiguous() and torch.equal(view, weight)
            assert torch.equal(function(x, view, bias), expected)
        for view in (x.T.contiguous().T, torch.cat([x, x], 1)[:, : x.shape[1]]):
            assert torch.equal(function(view, weight, bias), expected)
        assert torch.equal(function(x, weight, torch.stack([bias, bias], 1)[:, 0]), expected)


def test_inference_mode(problem):
    function, tensors = problem
    expected = function(*tensors).detach()
    with torch.inference_mode():
        y = function(*tensors)
    assert y.is_inference() and torch.equal(y, expected)


def test_maps_of_inference_serve_training(clouds, device):
    net = vg.nn.Sequential(vg.nn.SparseConv3d(2, 3, 2, 2), vg.nn.SparseInverseConv3d(3, 2, 2))
    net.to(device)
    x = vg.SparseTensor(torch.randn(30, 2, device=device), clouds.random(30))
    with torch.inference_mode():
        expected = net(x).features
    y = net(x).features
    assert torch.equal(y.detach(), expected)
    y.sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, clouds, device):
    conv = vg.nn.SubmConv3d(4, 8, 3, device=device)
    features = torch.randn(50, 4, requires_grad=True, device=device)
    x = vg.SparseTensor(features, clouds.random(50))
    with torch.autocast(device.type, dtype):
        y = conv(x).features
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.features.grad.dtype == conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32
    half = vg.nn.SubmConv3d(4, 8, 3, dtype=dtype, device=device)
    half.load_state_dict(conv.state_dict())
    assert torch.equal(y, half(x.to(dtype)).features)


def test_autocast_leaves_float64(clouds, device):
    conv = vg.nn.SubmConv3d(4, 8, 3, dtype=torch.float64, device=device)
    features = torch.randn(50, 4, dtype=torch.float64, device=device)
    x = vg.SparseTensor(features, clouds.random(50))
    with torch.autocast(device.type, torch.bfloat16):
        assert conv(x).features.dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(problem, reentrant):
    function, tensors = problem
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    y = checkpoint(function, *tensors, use_reentrant=reentrant)
    y.square().sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip(tensors, expected, strict=True))


def test_checkpoint_of_modules(clouds, device):
    """The network runs twice, builds its maps once, and random masks come back the same."""
    torch.manual_seed(0)
    net = vg.nn.Sequential(
        vg.nn.SubmConv3d(4, 6, 3), torch.nn.Dropout(0.5), vg.nn.SparseConv3d(6, 5, 2, 2)
    ).to(device)
    features = torch.randn(40, 4, device=device, requires_grad=True)
    x = vg.SparseTensor(features, clouds.random(40))
    leaves = [features, *net.parameters()]
    runs, found = [], []
    net[0].register_forward_hook(lambda module, inputs, output: runs.append(output))
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        torch.manual_seed(1)
        y = run(x)
        found.append(torch.autograd.grad(y.features.square().sum(), leaves))
    assert len(runs) == 3 and len(x.maps.sets) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
