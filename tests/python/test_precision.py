# SPDX-License-Identifier: Apache-2.0
"""Who decides in which precision a layer computes: autocast, torch's switches, the caller."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import voxgemm as vg
from voxgemm.algorithms import PRECISIONS, precision_of
from voxgemm.functional import conv3d

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def cloud(clouds, device):
    def make(rows=80):
        draw = torch.Generator().manual_seed(rows)
        return torch.randn(rows, 4, generator=draw).to(device), clouds.random(rows, seed=rows)

    return make


def network(device, norm=True):
    return vg.nn.Sequential(
        vg.nn.SubmConv3d(4, 8, 3),
        nn.BatchNorm1d(8) if norm else nn.Identity(),
        nn.ReLU(),
        vg.nn.SparseConv3d(8, 8, 2, stride=2),
        nn.ReLU(),
        vg.nn.SparseInverseConv3d(8, 4, 2, bias=False),
    ).to(device)


def gradients(net, features, coords):
    leaf = features.clone().requires_grad_()
    y = net(vg.SparseTensor(leaf, coords)).features
    return y, torch.autograd.grad(y.float().square().sum(), [leaf, *net.parameters()])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_is_the_network_in_that_dtype(dtype, cloud, device):
    """Results in the dtype, gradients of float32 tensors in float32; the numbers are the same."""
    features, coords = cloud()
    net = network(device, norm=False)
    low = copy.deepcopy(net).to(dtype)
    with torch.autocast(device.type, dtype):
        y, found = gradients(net, features, coords)
    expected_y, expected = gradients(low, features.to(dtype), coords)
    assert y.dtype == dtype and torch.equal(y, expected_y)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, wanted.float())


@pytest.mark.parametrize("kind", [vg.nn.SubmConv3d, vg.nn.SparseConv3d])
def test_autocast_takes_operands_of_every_dtype(kind, cloud, device):
    features, coords = cloud()
    layer = kind(4, 4, 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        expected = layer(vg.SparseTensor(features.bfloat16(), coords)).features
        for dtype in (torch.float32, torch.float16):
            # Both round to bfloat16, from values that have no more bits.
            x = vg.SparseTensor(features.bfloat16().to(dtype), coords)
            assert torch.equal(layer(x).features, expected)
        with torch.autocast(device.type, enabled=False):
            assert layer(vg.SparseTensor(features, coords)).features.dtype == torch.float32
        with torch.autocast(device.type, torch.float16):
            assert layer(vg.SparseTensor(features, coords)).features.dtype == torch.float16
        double = layer.double()(vg.SparseTensor(features.double(), coords)).features
        assert double.dtype == torch.float64


def test_autocast_of_another_device_is_not_ours(cloud, device):
    other = "cpu" if device.type == "cuda" else "cuda"
    features, coords = cloud()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a machine without that device
        region = torch.autocast(other, torch.bfloat16)
    with region:
        y = network(device)(vg.SparseTensor(features, coords))
    assert y.features.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_master_weights_learn(dtype, cloud, device):
    """Parameters stay float32 and move by less than the low precision could show."""
    features, coords = cloud()
    target = torch.tanh(2 * features)
    net = network(device)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    before = [p.detach().clone() for p in net.parameters()]
    losses = []
    for _ in range(20):
        with torch.autocast(device.type, dtype):
            y = net(vg.SparseTensor(features, coords)).features
        loss = (y.float() - target).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for parameter, old in zip(net.parameters(), before, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter, parameter.to(dtype).float())
        assert not torch.equal(parameter, old)


def test_an_overflow_reaches_the_scaler(cloud, device):
    """Infinite gradients are not lost on absent neighbours: the step is left out."""
    features, coords = cloud()
    net = network(device, norm=False)
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**30)
    before = copy.deepcopy(net.state_dict())
    with torch.autocast(device.type, torch.float16):
        y = net(vg.SparseTensor(features, coords)).features
    scaler.scale(y.float().square().sum()).backward()
    assert not any(bool(p.grad.isfinite().all()) for p in net.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**29
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.fixture
def switches():
    """torch's own, which come back as they were."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


def test_the_precision_asked_for(switches):
    """Of float32 on CUDA alone torch's switch decides, under either of its names."""
    with FakeTensorMode():
        there = {
            dtype: torch.empty(1, 1, dtype=dtype, device="cuda") for dtype in vg.functional.DTYPES
        }
        here = torch.empty(1, 1)
    names = [
        (lambda: setattr(switches, "fp32_precision", "ieee"), "ieee"),
        (lambda: setattr(switches, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(switches, "fp32_precision", "none"), "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
        (lambda: setattr(switches, "allow_tf32", True), "tf32"),
        (lambda: setattr(switches, "allow_tf32", False), "ieee"),
    ]
    for switch, expected in names:
        switch()
        for dtype, tensor in there.items():
            found = PRECISIONS[precision_of(None, tensor)]
            assert found == (expected if dtype == torch.float32 else "ieee")
        assert PRECISIONS[precision_of(None, here)] == "ieee"
        assert PRECISIONS[precision_of("bf16x3", there[torch.float32])] == "bf16x3"
    with pytest.raises(vg.ArgumentError, match="precision is 'high', expected one of ieee, tf32"):
        precision_of("high", here)


def test_a_graph_follows_the_switch(switches):
    """It is made anew; both of torch's names work while it is traced."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def asked(x):
        return x + vg.algorithms.torch_takes_tf32()

    x = torch.zeros(1)
    for value in ("ieee", "tf32", "ieee"):
        switches.fp32_precision = value
        assert bool(asked(x)) == (value == "tf32")
    for value in ("high", "highest"):
        torch.set_float32_matmul_precision(value)
        assert bool(asked(x)) == (value == "high")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_compiled_layers_follow_the_switch(clouds, layer, switches):
    x, weight, bias, map = layer(clouds.random(300), 32, 32, torch.float32)
    fast = torch.compile(conv3d, fullgraph=True, backend="aot_eager")
    for value in ("ieee", "tf32", "ieee"):
        expected = conv3d(x, weight, bias, map, precision=value)
        switches.fp32_precision = value
        assert torch.equal(conv3d(x, weight, bias, map), expected)
        assert torch.equal(fast(x, weight, bias, map), expected)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_deterministic_algorithms(dtype, cloud, device, threads, deterministic):
    """Nothing refuses them or warns; bits are the same again, and for any number of threads."""
    features, coords = cloud(300)
    coords, features = torch.cat([coords, coords[:40]]), torch.cat([features, features[:40]])
    net = network(device, norm=False)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1, 2, 2):
            threads(count)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y, grads = gradients(net, features, coords)
            x = vg.SparseTensor(features, coords)
            results.append([y, *grads, x.dense(), x.unique().features])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
