# SPDX-License-Identifier: Apache-2.0
"""Layers beside those of torch: conversion, transposed convolution, what people do with modules.

Values are small integers in float64, so that every sum is exact and results are equal bit for bit.
"""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
from torch import nn

import voxgemm as vg


@pytest.fixture(autouse=True)
def default_device(device):
    torch.manual_seed(0)
    with device:
        yield


def whole(*shape):
    return torch.randint(-3, 4, shape).double()


@pytest.fixture
def x(clouds):
    return vg.SparseTensor(whole(60, 4), clouds.random(60, extent=6), (6, 6, 6), batch_size=2)


def with_whole_numbers(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(whole(*parameter.shape))
    return module.double()


def rows_of(grid, coords):
    return grid.permute(0, 2, 3, 4, 1)[tuple(coords.long().T)]


KERNELS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1, 5), "padding": (1, 0, 2), "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": (2, 3, 1), "stride": (2, 3, 1), "padding": (0, 1, 0)},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 2, "stride": 2, "groups": 4, "bias": False},
]


@pytest.mark.parametrize("options", KERNELS, ids=str)
def test_of_a_dense_convolution_and_back(options, x):
    dense = with_whole_numbers(nn.Conv3d(4, 8, **options))
    kinds = [vg.nn.SparseConv3d] + ([] if "stride" in options else [vg.nn.SubmConv3d])
    for kind in kinds:
        layer = kind.from_torch(dense)
        y = layer(x)
        assert torch.equal(y.features, rows_of(dense(x.dense()), y.coords))
        back = layer.to_torch()
        assert torch.equal(back(x.dense()), dense(x.dense()))
        back.weight.data.zero_()
        dense.weight.data.add_(1)
        assert torch.equal(layer(x).features, y.features)
        dense.weight.data.sub_(1)


@pytest.mark.parametrize("options", KERNELS, ids=str)
def test_transposed_convolution(options, x):
    options = dict(options, output_padding=1) if "stride" in options else options
    if options.get("stride") == (2, 3, 1):
        options["output_padding"] = (1, 2, 0)
    dense = with_whole_numbers(nn.ConvTranspose3d(4, 8, **options))
    layer = vg.nn.SparseConvTranspose3d.from_torch(dense)
    y = layer(x)
    expected = dense(x.dense())
    assert y.spatial_shape == expected.shape[2:] and y.channels == 8
    assert torch.equal(y.features, rows_of(expected, y.coords))
    # Nowhere else is anything but the bias.
    bias = 0 if dense.bias is None else dense.bias[:, None, None, None]
    there = y.replace(torch.ones_like(y.features)).dense() > 0
    assert not bool((expected - bias)[~there].any())
    assert torch.equal(layer.to_torch()(x.dense()), expected)
    places = y.coords.tolist()
    assert places == sorted(places) and len({*map(tuple, places)}) == len(places)


def test_gradients_of_transposed_convolution(clouds):
    coords = clouds.random(6, extent=3)
    layer = vg.nn.SparseConvTranspose3d(2, 3, 2, stride=2, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def function(features, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, vg.SparseTensor(features, coords)).features

    features = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (features, *layer.parameters()))


def test_transposed_convolution_beyond_the_first_voxels(x):
    up = vg.nn.SparseConvTranspose3d(4, 4, 2, stride=2, dtype=torch.float64)
    fine = up(x)
    assert fine.stride == (0.5, 0.5, 0.5) and fine.spatial_shape == (12, 12, 12)
    assert fine.voxels == 8 * x.voxels
    finer = vg.nn.SparseConvTranspose3d(4, 4, (1, 1, 4), (1, 1, 4), dtype=torch.float64)(fine)
    assert finer.stride == (0.5, 0.5, 0.125)
    # There and back: the coordinates are those of before, and so are the maps.
    down = vg.nn.SparseInverseConv3d(4, 3, 2, dtype=torch.float64)(fine)
    assert down.coords is x.coords and down.stride == (1, 1, 1)
    assert (up(x) + fine).coords is fine.coords
    coarse = vg.nn.SparseConv3d(4, 4, 2, stride=2, dtype=torch.float64)(x)
    again = vg.nn.SparseConvTranspose3d(4, 4, 2, stride=2, dtype=torch.float64)(coarse)
    assert again.stride == (1, 1, 1) and not again.shares_coords(x)
    assert {*map(tuple, x.coords.tolist())} <= {*map(tuple, again.coords.tolist())}


def test_transposed_convolution_without_a_shape(clouds):
    coords = clouds.random(9)
    coords[:, 1:] -= 4
    layer = vg.nn.SparseConvTranspose3d(2, 2, 3, stride=2, padding=1)
    y = layer(vg.SparseTensor(torch.randn(9, 2), coords))
    reached = {
        (b, 2 * i - 1 + p, 2 * j - 1 + q, 2 * k - 1 + r)
        for b, i, j, k in coords.tolist()
        for p in range(3)
        for q in range(3)
        for r in range(3)
    }
    assert {*map(tuple, y.coords.tolist())} == reached and y.spatial_shape is None
    nothing = vg.SparseTensor(torch.zeros(0, 2), torch.zeros(0, 4, dtype=torch.int32))
    assert layer(nothing).features.shape == (0, 2)
    far = torch.tensor([[0, 2**30, 0, 0]], dtype=torch.int32)
    with pytest.raises(vg.ArgumentError, match="coordinates that int32 does not hold"):
        layer(vg.SparseTensor(torch.zeros(1, 2), far))
    far[0, 0] = vg.functional.PADDING_BATCH
    padded = layer(
        vg.SparseTensor(torch.cat([torch.randn(9, 2), torch.zeros(1, 2)]), torch.cat([coords, far]))
    )
    assert torch.equal(padded.coords, y.coords)


def test_inverse_convolution_of_a_dense_one(x):
    down = vg.nn.SparseConv3d(4, 4, 2, 2, dtype=torch.float64)(x)
    coarse = down.replace(whole(down.voxels, 4))
    dense = with_whole_numbers(nn.ConvTranspose3d(4, 3, 2, stride=2))
    layer = vg.nn.SparseInverseConv3d.from_torch(dense)
    y = layer(coarse)
    assert torch.equal(y.features, rows_of(dense(coarse.dense()), x.coords))
    assert torch.equal(layer.to_torch()(coarse.dense()), dense(coarse.dense()))
    with pytest.raises(vg.ArgumentError, match="without stride, padding, dilation"):
        vg.nn.SparseInverseConv3d(4, 3, 2).to_torch()


@pytest.mark.parametrize("kind", [vg.nn.SubmConv3d, vg.nn.SparseConv3d])
def test_a_depthwise_layer(kind, x):
    dense = with_whole_numbers(nn.Conv3d(4, 4, 3, padding=1, groups=4))
    layer = kind.from_torch(dense)
    assert layer.weight.shape == (4, 3, 3, 3, 1) and "groups=4" in repr(layer)
    y = layer(x)
    assert torch.equal(y.features, rows_of(dense(x.dense()), y.coords))
    y.features.sum().backward()
    dense(x.dense()).permute(0, 2, 3, 4, 1)[tuple(y.coords.long().T)].sum().backward()
    assert torch.equal(layer.weight.grad, dense.weight.grad.permute(0, 2, 3, 4, 1))
    torch.manual_seed(0)
    bound = float(kind(64, 64, 3, groups=64).weight.detach().abs().max())
    assert 0.9 / 27**0.5 < bound <= 1 / 27**0.5


POOLS = [(2, None, 0), (3, 2, 1), ((1, 2, 3), (1, 2, 2), (0, 1, 0))]


@pytest.mark.parametrize("size, stride, padding", POOLS)
def test_max_pool(size, stride, padding, x):
    """Of positive numbers the grid's zeros do not show: torch's own pool."""
    x = x.apply(lambda f: f.abs() + 1)
    y = vg.nn.SparseMaxPool3d(size, stride, padding)(x)
    dense = nn.functional.max_pool3d(x.dense(), size, stride, padding)
    assert torch.equal(y.features, rows_of(dense, y.coords))
    assert y.spatial_shape == dense.shape[2:] and int((dense > 0).all(1).sum()) == y.voxels


@pytest.mark.parametrize("size, stride, padding", POOLS)
def test_average_pool(size, stride, padding, x):
    y = vg.nn.SparseAvgPool3d(size, stride, padding)(x)
    grids = x.dense(), x.replace(torch.ones_like(x.features)).dense()
    sums, counts = (nn.functional.avg_pool3d(g, size, stride, padding) for g in grids)
    torch.testing.assert_close(y.features, rows_of(sums / counts, y.coords))


def test_pools_share_maps_with_convolutions(x):
    pool, conv = vg.nn.SparseMaxPool3d(2), vg.nn.SparseConv3d(4, 4, 2, 2, dtype=torch.float64)
    assert pool(x).shares_coords(conv(x)) and pool(x).stride == (2, 2, 2)
    back = vg.nn.SparseInverseConv3d(4, 3, 2, dtype=torch.float64)(pool(x))
    assert back.shares_coords(x)
    negative = x.apply(lambda f: -f.abs() - 1)
    assert float(pool(negative).features.max()) < 0


def test_unpool(x):
    coarse = vg.nn.SparseAvgPool3d(2)(x)
    fine = vg.nn.SparseUnpool3d(2)(coarse)
    assert fine.shares_coords(x)
    rows = {tuple(c): f for c, f in zip(coarse.coords.tolist(), coarse.features, strict=True)}
    for (b, *place), row in zip(x.coords.tolist(), fine.features, strict=True):
        assert torch.equal(row, rows[(b, *(i // 2 for i in place))])
    with pytest.raises(vg.ArgumentError, match=r"kernel_size=\(3, 3, 3\)"):
        vg.nn.SparseUnpool3d(3)(coarse)


@pytest.mark.parametrize("reduction", ["max", "min", "sum", "mean"])
def test_global_pool(reduction, x):
    found = vg.nn.Sequential(vg.nn.SparseGlobalPool(reduction), nn.Identity())(x)
    reduce = {"max": torch.amax, "min": torch.amin, "sum": torch.sum, "mean": torch.mean}[reduction]
    expected = torch.stack([reduce(item.features, 0) for item in x])
    torch.testing.assert_close(found, expected)
    with pytest.raises(vg.ArgumentError, match="reduction is 'median'"):
        vg.nn.SparseGlobalPool("median")


def test_gradients_of_pools(clouds):
    coords = clouds.random(8, extent=3)
    features = torch.randperm(16).double().view(8, 2).requires_grad_()
    for layer in (vg.nn.SparseMaxPool3d(2), vg.nn.SparseAvgPool3d(3, 2, 1)):
        up = vg.nn.Sequential(layer, vg.nn.SparseUnpool3d(layer.geometry.size))
        for net in (layer, up):
            assert torch.autograd.gradcheck(
                lambda f, net=net: net(vg.SparseTensor(f, coords)).features, features
            )
    pool = vg.nn.SparseGlobalPool("mean")
    assert torch.autograd.gradcheck(lambda f: pool(vg.SparseTensor(f, coords)), features)


REFUSED = {
    "kind": (nn.ConvTranspose3d(2, 2, 3), "SubmConv3d is made of a Conv3d, got a ConvTranspose3d"),
    "stride": (nn.Conv3d(2, 2, 3, 2, 1), r"stride is \(2, 2, 2\)"),
    "padding": (nn.Conv3d(2, 2, 3), r"padding is \(0, 0, 0\), expected 'same' or \(1, 1, 1\)"),
    "mode": (nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode is 'circular'"),
    "even": (nn.Conv3d(2, 2, 2, padding="same"), "off its centre"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dense_layers_that_have_no_counterpart(case):
    dense, sentence = REFUSED[case]
    with pytest.raises(vg.ArgumentError, match=sentence):
        vg.nn.SubmConv3d.from_torch(dense)


def test_output_padding_is_checked():
    with pytest.raises(vg.ArgumentError, match=r"output_padding is \(2, 2, 2\), expected less"):
        vg.nn.SparseConvTranspose3d(2, 2, 3, stride=2, output_padding=2)
    assert "output_padding=(1, 1, 1)" in repr(vg.nn.SparseConvTranspose3d(2, 2, 3, 2, 1, 1))


def test_same_padding_of_odd_kernels_is_centred(x):
    dense = with_whole_numbers(nn.Conv3d(4, 2, (3, 5, 1), padding="same", dilation=2))
    layer = vg.nn.SubmConv3d.from_torch(dense)
    assert torch.equal(layer(x).features, rows_of(dense(x.dense()), x.coords))


LAYERS = [
    vg.nn.SubmConv3d,
    vg.nn.SparseConv3d,
    vg.nn.SparseInverseConv3d,
    vg.nn.SparseConvTranspose3d,
]


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_state(kind):
    layer = kind(3, 4, 2)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    other = kind(3, 4, 2)
    other.load_state_dict(layer.state_dict())
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
        other,
    ):
        assert repr(copied) == repr(layer) and type(copied) is kind
        assert {k: v.shape for k, v in copied.state_dict().items()} == {
            "weight": (4, 2, 2, 2, 3),
            "bias": (4,),
        }
        for name, value in layer.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value)
            assert copied.state_dict()[name].data_ptr() != value.data_ptr()


def test_networks_are_copied_and_stored(x, tmp_path):
    """A Sequential of every layer and of plain modules, whole and as a state."""
    nn = vg.nn

    def made():
        return nn.Sequential(
            collections.OrderedDict(
                stem=nn.SubmConv3d(x.channels, 8, 3),
                norm=torch.nn.BatchNorm1d(8),
                down=nn.Sequential(nn.SparseConv3d(8, 8, 2, stride=2), nn.BatchNorm(8)),
                act=torch.nn.ReLU(),
                up=nn.SparseInverseConv3d(8, 8, 2),
                pool=nn.SparseMaxPool3d(2),
                back=nn.SparseUnpool3d(2),
                drop=torch.nn.Dropout(0.5),
                grow=nn.SparseConvTranspose3d(8, 4, 2, stride=2),
                all=nn.SparseGlobalPool("max"),
            )
        ).to(x.device, x.dtype)

    net = made()
    net(x)  # running statistics that are not those of a new network
    net.eval()
    expected = net(x)
    torch.save(net, tmp_path / "net.pt")
    torch.save(net.state_dict(), tmp_path / "state.pt")
    other = made().eval()
    assert not torch.equal(other(x), expected)
    assert not other.load_state_dict(torch.load(tmp_path / "state.pt")).missing_keys
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded, other):
        assert repr(copied) == repr(net) and torch.equal(copied(x), expected)
    assert type(net[1:3]) is nn.Sequential and list(net[1:3]._modules) == ["norm", "down"]
    assert torch.equal(net[3:](net[:3](x)), expected)
    narrow = copy.deepcopy(net).half()
    assert narrow(x.replace(x.features.half())).dtype == torch.float16
    assert {t.dtype for t in narrow.state_dict().values()} == {torch.float16, torch.int64}


@pytest.mark.parametrize("kind", LAYERS)
def test_state_of_another_shape_is_refused(kind):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        kind(3, 4, 3).load_state_dict(kind(3, 4, 2).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        kind(3, 4, 2).load_state_dict(kind(3, 4, 2, bias=False).state_dict())


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_parameters(kind):
    layer = kind(3, 4, 3)
    before = copy.deepcopy(layer.state_dict())
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    assert all(bool((layer.state_dict()[k] != v).any()) for k, v in before.items())
    again = kind(3, 4, 3)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("method", ["half", "bfloat16", "double", "float"])
def test_dtypes_of_modules(method, x):
    layer = vg.nn.SubmConv3d(4, 4, 3)
    converted = getattr(copy.deepcopy(layer), method)()
    y = converted(getattr(x, method)())
    assert y.dtype == converted.weight.dtype == getattr(x, method)().dtype
    moved = copy.deepcopy(layer).to(converted.weight.dtype)
    assert torch.equal(moved(getattr(x, method)()).features, y.features)
    meta = layer.to("meta")
    assert meta.weight.device.type == "meta"
    assert meta.to_empty(device=x.device).weight.device == x.device


def test_layers_without_memory():
    with torch.device("meta"):
        net = vg.nn.Sequential(vg.nn.SubmConv3d(4, 4, 3), vg.nn.SparseConvTranspose3d(4, 4, 2, 2))
    assert all(p.device.type == "meta" for p in net.parameters())


PLAIN = {
    "linear": lambda: nn.Linear(4, 7),
    "layer norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "rms norm": lambda: nn.RMSNorm(4),
    "gelu": lambda: nn.GELU(),
    "silu": lambda: nn.SiLU(inplace=False),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "dropout": lambda: nn.Dropout(0.5),
    "identity": lambda: nn.Identity(),
    "network": lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("training", [True, False])
def test_plain_modules_act_on_the_features(name, training, x):
    module = PLAIN[name]().double().train(training)
    net = vg.nn.Sequential(module, vg.nn.Sequential(nn.Tanh()))
    state = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    y = net(x)
    module.load_state_dict(state)
    torch.manual_seed(3)
    assert torch.equal(y.features, module(x.features).tanh()) and y.coords is x.coords


def test_blocks_of_a_user_are_given_the_sparse_tensor(x):
    """A module that is none of ours but has one inside; and one that says so itself."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = vg.nn.SubmConv3d(4, 4, 3, dtype=torch.float64)

        def forward(self, x):
            return x + self.conv(x)

    class Counts(vg.nn.SparseModule):
        def forward(self, x):
            return x * x.voxels

    block = Residual()
    y = vg.nn.Sequential(block, nn.ReLU(), Counts())(x)
    assert torch.equal(y.features, 60 * (x.features + block.conv(x).features).relu())


def test_parametrized_layers(x):
    layer = vg.nn.SubmConv3d(4, 4, 3, dtype=torch.float64)
    expected = layer(x).features
    nn.utils.parametrizations.weight_norm(layer)
    y = layer(x).features
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_layers_in_one_graph(clouds, device):
    """Blocks, groups, pools and arithmetic are traced whole, for any number of voxels."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = vg.nn.SubmConv3d(4, 4, 3, groups=4)
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = (x + self.conv(x).apply(self.linear)) / 2
            return vg.cat([y, x * 2]).apply(torch.relu)

    net = vg.nn.Sequential(
        Block(),
        nn.Sequential(nn.Linear(8, 8), nn.GELU()),
        vg.nn.SparseMaxPool3d(2),
        vg.nn.SubmConv3d(8, 8, 3, groups=2),
        vg.nn.SparseUnpool3d(2),
        vg.nn.SparseConvTranspose3d(8, 4, 2, stride=2),
        vg.nn.SparseGlobalPool("mean"),
    )

    def run(features, coords):
        return net(vg.SparseTensor(features, coords, batch_size=2))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (30, 50, 41):
        arguments = torch.randn(rows, 4), clouds.random(rows, extent=5)
        expected, found = run(*arguments), compiled(*arguments)
        assert torch.equal(found, expected)
        expected, found = (
            torch.autograd.grad(y.square().sum(), net.parameters()) for y in (expected, found)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
