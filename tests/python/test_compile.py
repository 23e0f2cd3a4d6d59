# SPDX-License-Identifier: Apache-2.0
"""torch.compile: one graph for whatever eager does, with the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import voxgemm as vg
from voxgemm.functional import Geometry, conv3d, inverse_conv3d
from voxgemm.norm import BatchNorm
from voxgemm.unet import UNet

DOWN = Geometry((2, 2, 2), (2, 2, 2))
ROWS = (40, 60, 75)


@pytest.fixture(autouse=True)
def from_scratch():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def inputs(clouds, device):
    """make(rows) -> features [rows, 4] that want a gradient, coordinates [rows, 4]."""

    def make(rows):
        draw = torch.Generator().manual_seed(rows)
        features = torch.randn(rows, 4, generator=draw).to(device)
        return features.requires_grad_(), clouds.random(rows, seed=rows)

    return make


def compiled(function, backend="aot_eager", dynamic=None):
    """(what it compiles to, a counter of its graphs); a graph break is an error."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def run(leaves, function, *arguments):
    """The result and the gradients of the sum of its squares in the leaves."""
    y = function(*arguments)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def on_tensors(net):
    """The network as a function of features and coordinates."""

    def function(features, coords):
        y = net(vg.SparseTensor(features, coords))
        return y.features if isinstance(y, vg.SparseTensor) else y

    return function


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def features_of(net, x):
    return net(x).features


def layers(device):
    net = vg.nn.Sequential(
        vg.nn.SubmConv3d(4, 8, 3),
        nn.ReLU(),
        vg.nn.SparseConv3d(8, 8, 2, stride=2),
        nn.ReLU(),
        vg.nn.SubmConv3d(8, 8, 3, bias=False),
        vg.nn.SparseInverseConv3d(8, 4, 2),
    )
    return net.to(device)


@pytest.mark.parametrize("dynamic", [None, True])
def test_given_maps(dynamic, inputs, layer):
    """Maps are inputs of the graph; sizes that change make at most a second one."""
    _, coords = inputs(9)
    _, w1, bias, _ = layer(coords, 4, 6, torch.float32)
    _, w2, _, _ = layer(coords, 6, 6, torch.float32, DOWN, vg.output_coords(coords, DOWN))
    weights = [t.requires_grad_() for t in (w1, w2, bias)]

    def network(x, maps, w1, w2, bias):
        same, down = maps
        y = torch.relu(conv3d(x, w1, bias, same))
        y = torch.relu(conv3d(y, w2, None, down))
        return inverse_conv3d(y, w2, bias, down)

    fast, counter = compiled(network, "inductor", dynamic)
    for rows in ROWS:
        x, coords = inputs(rows)
        down = vg.functional.strided_map(coords, vg.output_coords(coords, DOWN), DOWN)
        arguments = (x, (vg.build_map(coords, 3), down), *weights)
        expected = run([x, *weights], network, *arguments)
        assert_same(run([x, *weights], fast, *arguments), expected)
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [None, True])
def test_maps_built_inside(dynamic, inputs, device):
    net = layers(device)
    fast, counter = compiled(on_tensors(net), "inductor", dynamic)
    for rows in ROWS:
        x, coords = inputs(rows)
        leaves = [x, *net.parameters()]
        expected = run(leaves, on_tensors(net), x, coords)
        assert_same(run(leaves, fast, x, coords), expected)
    assert counter.frame_count == (1 if dynamic else 2)


def test_static_sizes(inputs, device):
    net = layers(device)
    fast, counter = compiled(on_tensors(net), dynamic=False)
    for rows in (40, 40, 60):
        x, coords = inputs(rows)
        leaves = [x, *net.parameters()]
        expected = run(leaves, on_tensors(net), x, coords)
        assert_same(run(leaves, fast, x, coords), expected)
    assert counter.frame_count == 2


def test_a_module_of_sparse_tensors(inputs, device):
    """Tensors go in and out; the maps that the graph made are kept, those there are used."""
    net = layers(device)
    fast, counter = compiled(net, dynamic=True)
    for rows in ROWS:
        x, coords = inputs(rows)
        eager, traced = (vg.SparseTensor(x, coords) for _ in range(2))
        leaves = [x, *net.parameters()]
        expected = run(leaves, features_of, net, eager)
        for tensor in (traced, traced, eager):
            assert_same(run(leaves, features_of, fast, tensor), expected)
        assert len(traced.maps.sets) == 2
    # One for tensors without maps, one for those with maps that a graph made, which know no better
    # on a GPU than that voxels may repeat, and there one for those that eager's backward settled.
    assert counter.frame_count == (2 if device.type == "cpu" else 3)


def test_a_map_that_comes_again(inputs, layer):
    """The first call leaves the transposed map with it, the others have one."""
    x, coords = inputs(40)
    _, weight, _, map = layer(coords, 4, 6, torch.float32, DOWN, vg.output_coords(coords, DOWN))
    weight.requires_grad_()
    fast, counter = compiled(conv3d)
    # The copy shares what is on its way from a GPU: the map is traced while it is.
    expected = run([x, weight], conv3d, x, weight, None, map._copy())
    for _ in range(4):
        assert_same(run([x, weight], fast, x, weight, None, map), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_behind_a_strided_layer(train, inputs, device):
    """Coordinates decide how many rows it has."""
    net = vg.nn.Sequential(
        vg.nn.SparseConv3d(4, 8, 2, 2),
        nn.BatchNorm1d(8, momentum=None if train else 0.1),
        nn.ReLU(),
        BatchNorm(8, affine=False),
        vg.nn.SparseInverseConv3d(8, 4, 2),
    )
    net.to(device).train(train)
    traced = copy.deepcopy(net)
    fast, counter = compiled(on_tensors(traced), dynamic=True)
    for rows in ROWS:
        x, coords = inputs(rows)
        expected = run([x, *net.parameters()], on_tensors(net), x, coords)
        found = run([x, *traced.parameters()], fast, x, coords)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close([*traced.buffers()], [*net.buffers()])
    assert counter.frame_count == 1


def test_batch_norm_of_any_number_of_rows(device):
    """More, one, none: as in eager, whose rule for one row is the class's own."""
    # In double: the gradient of two rows' squares is a difference of nearly equal numbers.
    norms = [BatchNorm(3).to(device, torch.float64) for _ in range(2)]
    fast, _ = compiled(norms[1])
    for rows in (5, 1, 0, 2):
        x = torch.randn(rows, 3, device=device, dtype=torch.float64, requires_grad=True)
        expected, found = (run([x], f, x) for f in (norms[0], fast))
        torch.testing.assert_close(found, expected)
        for name in ("running_mean", "running_var"):
            ours, theirs = (getattr(norm, name) for norm in norms)
            torch.testing.assert_close(ours, theirs)
    assert norms[0].num_batches_tracked >= norms[1].num_batches_tracked == 2


def test_one_row_that_torchs_batch_norm_refuses_is_refused(device):
    net = vg.nn.Sequential(vg.nn.SparseConv3d(2, 2, 2, 2), nn.BatchNorm1d(2)).to(device)
    x = torch.randn(2, 2, device=device)
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32, device=device)
    fast, _ = compiled(lambda: net(vg.SparseTensor(x, coords)).features)
    with pytest.raises(ValueError, match="more than 1 value"):
        net(vg.SparseTensor(x, coords))
    with pytest.raises(RuntimeError, match=r"1|one row"):
        fast()


@pytest.mark.parametrize("train", [True, False])
def test_the_unet(train, inputs, device):
    nets = [UNet(4, 3, 4, 2).to(device).train(train) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fast, counter = compiled(on_tensors(nets[1]), dynamic=True)
    for rows in (75, 40):
        x, coords = inputs(rows)
        expected = run([x, *nets[0].parameters()], on_tensors(nets[0]), x, coords)
        found = run([x, *nets[1].parameters()], fast, x, coords)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close([*nets[1].buffers()], [*nets[0].buffers()])
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, inputs, device):
    """Around the compiled function and inside it."""
    net = layers(device)
    x, coords = inputs(40)

    def plain():
        return net(vg.SparseTensor(x, coords)).features

    def cast():
        with torch.autocast(device.type, dtype):
            return plain()

    leaves = [x, *net.parameters()]
    expected = run(leaves, lambda: cast().float())
    inside, _ = compiled(cast)
    around, _ = compiled(plain)
    with torch.autocast(device.type, dtype):
        assert around().dtype == dtype
        found = around().float().detach()
    assert torch.equal(found, expected[0])
    assert inside().dtype == dtype
    assert_same(run(leaves, lambda: inside().float()), expected)


def test_errors_are_loud(clouds, layer):
    x, weight, bias, map = layer(clouds.random(20), 3, 4)
    fast, _ = compiled(conv3d)
    with pytest.raises(RuntimeError, match="weights have 3 input channels|x is 20 x 2"):
        fast(x[:, :2].contiguous(), weight, bias, map)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_coordinates_are_checked(backend, device):
    def build(features, coords):
        x = vg.SparseTensor(features, coords, (4, 4, 4), 1)
        return vg.build_map(x.coords, 3).neighbours

    fast, _ = compiled(build, backend)
    features = torch.zeros(2, 3, device=device)
    coords = torch.zeros(2, 4, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="expected batch 0 to 0"):
        fast(features, coords + 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graphs_of_a_device(inputs, layer, device):
    """mode="reduce-overhead" replays CUDA graphs; the map's tensors are among their inputs."""
    x, coords = inputs(60)
    _, weight, bias, map = layer(coords, 4, 8, torch.float32)
    fast = torch.compile(conv3d, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):
        features = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed)).to(device)
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(
                fast(features, weight, bias, map), conv3d(features, weight, bias, map)
            )
