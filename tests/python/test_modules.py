# SPDX-License-Identifier: Apache-2.0
"""SparseTensor and the layers on it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import voxgemm as vg
from voxgemm import kernel_map

README = Path(__file__).parents[2] / "README.md"
LAYERS = (vg.nn.SubmConv3d, vg.nn.SparseConv3d, vg.nn.SparseInverseConv3d)


@pytest.fixture(autouse=True)
def default_device(device):
    """Layers and tensors are made where torch's default device says."""
    with device:
        yield


@pytest.fixture
def x(clouds):
    torch.manual_seed(0)
    return vg.SparseTensor(torch.randn(80, 4), clouds.random(80), spatial_shape=(8, 8, 8))


@pytest.fixture
def built(monkeypatch):
    """The names of the map operators that ran."""
    names = []
    for name in ("submanifold_map", "strided_map", "output_coords"):
        original = getattr(kernel_map, name)

        def counted(*args, name=name, original=original):
            names.append(name)
            return original(*args)

        monkeypatch.setattr(kernel_map, name, counted)
    return names


def test_the_example_of_the_readme(x, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    values = {"features": x.features, "coords": x.coords}
    exec(code, values)
    net, y = values["net"], values["y"]
    assert y.coords is x.coords and y.features.shape == (80, 32) and y.stride == (1, 1, 1)
    assert all(p.grad is not None for p in net.parameters())
    table = capsys.readouterr().out
    for name in vg.functional.PASSES:
        assert f"{name} f32 subm3 4->32" in table
    assert table.count("picked") == 3


@pytest.mark.parametrize("kind", LAYERS)
def test_constructors_have_the_order_of_torch(kind):
    ours = list(inspect.signature(kind).parameters)
    torchs = [
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "bias",
    ]
    assert ours[: len(torchs)] == torchs
    assert set(torchs) <= set(inspect.signature(torch.nn.Conv3d).parameters)


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters(kind):
    torch.manual_seed(0)
    conv = kind(5, 7, (3, 1, 3))
    assert conv.weight.shape == (7, 3, 1, 3, 5) and conv.bias.shape == (7,)
    assert kind(5, 7, 3, bias=False).bias is None
    bound = 1 / (5 * 9) ** 0.5
    for parameter in (conv.weight, conv.bias):
        assert float(parameter.detach().abs().max()) <= bound
    assert float(conv.weight.detach().abs().max()) > 0.9 * bound
    assert kind(5, 7, 3, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_state_of_a_layer_round_trips(x):
    conv, other = vg.nn.SubmConv3d(4, 6, 3), vg.nn.SubmConv3d(4, 6, 3)
    file = io.BytesIO()
    torch.save(conv.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(conv(x).features, other(x).features)
    assert torch.equal(conv(x).features, copy.deepcopy(conv)(x).features)


def test_maps_are_built_once(x, built):
    net = vg.nn.Sequential(
        vg.nn.SubmConv3d(4, 4, 3),
        vg.nn.SubmConv3d(4, 4, 3, bias=False),
        vg.nn.SparseConv3d(4, 4, 2, stride=2),
        vg.nn.SubmConv3d(4, 4, 3),
        vg.nn.SparseInverseConv3d(4, 4, 2),
        vg.nn.SubmConv3d(4, 4, 3),
    )
    net(x)
    once = ["submanifold_map", "output_coords", "strided_map", "submanifold_map"]
    assert built == once
    net(x.replace(x.features * 2)).features.sum().backward()
    assert built == once
    vg.nn.SubmConv3d(4, 4, 3, dilation=2)(x)
    assert built == [*once, "submanifold_map"]


class Slow(list):
    """A list that two threads change at once: none goes on before both have."""

    both = threading.Barrier(2)

    def append(self, item):
        super().append(item)
        self.both.wait(timeout=60)


def at_once(layers, x):
    with ThreadPoolExecutor(2) as threads:
        return [each.result() for each in [threads.submit(layer, x) for layer in layers]]


def test_threads_that_add_sets_at_once(x):
    layers = [vg.nn.SparseConv3d(4, 4, 2, 2), vg.nn.SparseConv3d(4, 4, 3, 2)]
    expected = [layer(vg.SparseTensor(x.features, x.coords, (8, 8, 8))) for layer in layers]
    x.maps.sets = Slow(x.maps.sets)
    for y, alone in zip(at_once(layers, x), expected, strict=True):
        assert torch.equal(y.coords, alone.coords) and torch.equal(y.features, alone.features)


def test_threads_that_ask_for_the_same_map_at_once(x, monkeypatch):
    both, build = threading.Barrier(2), kernel_map.strided_map

    def built(*arguments):
        map = build(*arguments)
        both.wait(timeout=60)
        return map

    monkeypatch.setattr(kernel_map, "strided_map", built)
    layer = vg.nn.SparseConv3d(4, 4, 2, 2)
    a, b = at_once([layer, layer], x)
    assert a.shares_coords(b) and layer(x).shares_coords(a)


def test_two_branches_to_the_same_coordinates_can_be_added(x):
    a, b = vg.nn.SparseConv3d(4, 6, 3, 2, 1), vg.nn.SparseConv3d(4, 6, 3, 2, 1)
    assert a(x).coords is b(x).coords
    assert a(x).replace(a(x).features + b(x).features).stride == (2, 2, 2)


def test_strided_layer(x):
    y = vg.nn.SparseConv3d(4, 6, 3, stride=2, padding=1)(x)
    assert y.spatial_shape == (4, 4, 4) and y.stride == (2, 2, 2)
    assert bool((y.coords[:, 1:] < 4).all())
    z = vg.nn.SparseConv3d(6, 6, 2, stride=(2, 1, 2), output_rule="floor")(y)
    assert z.spatial_shape == (2, 4, 2) and z.stride == (4, 2, 4)


def test_inverse_goes_back_level_by_level(x):
    down1, down2 = vg.nn.SparseConv3d(4, 8, 2, 2), vg.nn.SparseConv3d(8, 8, 3, 2, 1)
    up2, up1 = vg.nn.SparseInverseConv3d(8, 8, 3), vg.nn.SparseInverseConv3d(8, 4, 2)
    middle = down1(x)
    back = up2(down2(middle))
    assert back.coords is middle.coords and back.stride == (2, 2, 2)
    assert up1(back).coords is x.coords


def test_inverse_chooses_by_geometry(clouds):
    every = clouds.grid(1, (4, 4, 4))
    x = vg.SparseTensor(torch.randn(64, 2), every, (4, 4, 4))
    down = vg.nn.SparseConv3d(2, 2, 2, 2)(x)
    assert vg.nn.SparseInverseConv3d(2, 2, 2, stride=2)(down).coords is x.coords
    with pytest.raises(vg.ArgumentError, match=r"stride=\(3, 3, 3\).*stride=\(2, 2, 2\)"):
        vg.nn.SparseInverseConv3d(2, 2, 2, stride=3)(down)


def test_inverse_without_a_way_back(x):
    with pytest.raises(vg.ArgumentError, match="came from none"):
        vg.nn.SparseInverseConv3d(4, 4, 2)(x)
    down = vg.nn.SparseConv3d(4, 4, 2, 2)(x)
    with pytest.raises(vg.ArgumentError, match=r"kernel_size=\(3, 3, 3\).*kernel_size=\(2, 2, 2\)"):
        vg.nn.SparseInverseConv3d(4, 4, 3)(down)


def test_sequential_passes_tensors_on():
    assert vg.nn.Sequential(torch.nn.ReLU())(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]


def test_dense(x):
    grid = x.dense()
    assert grid.shape == (2, 4, 8, 8, 8)
    at = tuple(x.coords.long().T)
    assert torch.equal(grid.permute(0, 2, 3, 4, 1)[at], x.features)
    assert int((grid != 0).any(1).sum()) == 80
    repeated = vg.SparseTensor(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 4, dtype=torch.int32))
    assert repeated.dense().flatten().tolist() == [1]


def test_dense_of_nothing():
    empty = vg.SparseTensor(torch.zeros(0, 3), torch.zeros(0, 4, dtype=torch.int32))
    assert empty.batch_size == 0 and empty.dense().shape == (0, 3, 0, 0, 0)
    shaped = vg.SparseTensor(empty.features, empty.coords, (2, 3, 4), batch_size=2)
    assert torch.equal(shaped.dense(), torch.zeros(2, 3, 2, 3, 4))


def test_empty_batch_item(clouds):
    """An item without voxels changes nothing for the others, and is there in the dense grid."""
    coords = clouds.random(30, batch=1)
    coords[:, 0] = 2
    x = vg.SparseTensor(torch.randn(30, 4), coords, (8, 8, 8), batch_size=4)
    conv = vg.nn.SubmConv3d(4, 4, 3)
    alone = coords.clone()
    alone[:, 0] = 0
    expected = conv(vg.SparseTensor(x.features, alone, (8, 8, 8))).dense()[0]
    grid = conv(x).dense()
    assert grid.shape[0] == 4 and torch.equal(grid[2], expected)
    assert not grid[[0, 1, 3]].any()


def test_a_network_on_nothing():
    x = vg.SparseTensor(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int32))
    net = vg.nn.Sequential(
        vg.nn.SubmConv3d(4, 8, 3),
        vg.nn.SparseConv3d(8, 8, 2, 2),
        vg.nn.SparseInverseConv3d(8, 5, 2),
    )
    y = net(x)
    assert y.features.shape == (0, 5)
    y.features.sum().backward()
    for parameter in net.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_to(x):
    assert x.to(torch.float32).features is x.features
    half = x.to(torch.bfloat16)
    assert half.features.dtype == torch.bfloat16 and half.maps is x.maps
    away = x.to("meta")
    assert away.coords.device.type == "meta" and away.maps is not x.maps
    assert away.spatial_shape == x.spatial_shape


def test_pickle(x):
    vg.nn.SubmConv3d(4, 4, 3)(x)
    back = pickle.loads(pickle.dumps(x))
    assert torch.equal(back.coords, x.coords) and torch.equal(back.features, x.features)
    assert back.spatial_shape == x.spatial_shape


def test_copies_of_maps_know_that_no_voxel_repeats(x):
    """Also those made before a device has answered, which never hear of it."""
    outputs = vg.output_coords(x.coords, vg.Geometry((2, 2, 2), (2, 2, 2)))
    for out_coords in (None, outputs):
        for copied in (copy.copy, copy.deepcopy, lambda map: pickle.loads(pickle.dumps(map))):
            map = vg.build_map(x.coords, 3, out_coords=out_coords)
            back = map if out_coords is None else map.transposed()
            for other in (copied(map), copied(back)):
                assert len(other.in_first) == len(other.out_first) == 0


def test_texts(x):
    assert repr(x) == (
        f"SparseTensor(80 voxels, 4 channels, torch.float32, {x.coords.device}, stride=(1, 1, 1), "
        "spatial_shape=(8, 8, 8))"
    )
    assert repr(vg.nn.SparseConv3d(4, 8, 3, 2, 1, bias=False)) == (
        "SparseConv3d(4, 8, kernel_size=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1), bias=False)"
    )
    assert repr(vg.nn.SubmConv3d(4, 8, 3, algorithm="implicit_gemm")) == (
        "SubmConv3d(4, 8, kernel_size=(3, 3, 3), algorithm='implicit_gemm')"
    )
    map = vg.build_map(x.coords, 3)
    assert repr(map) == (
        "KernelMap(submanifold, kernel_size=(3, 3, 3), stride=(1, 1, 1), n_in=80, n_out=80)"
    )


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize(
    "algorithm",
    [
        "auto",
        "implicit_gemm",
        vg.Algorithm.explicit_gemm,
        ["implicit_gemm", "masked_implicit_gemm"],
        {"forward": "masked_implicit_gemm", "grad_weight": "auto"},
    ],
    ids=str,
)
def test_algorithm_selects_the_search_space(algorithm, x):
    conv = vg.nn.SubmConv3d(4, 16, 3, algorithm=algorithm)
    conv(x).features.sum().backward()
    wanted = algorithm["forward"] if isinstance(algorithm, dict) else algorithm
    names = [wanted] if isinstance(wanted, str) else wanted
    picked = next(line for line in vg.explain(conv, x).splitlines() if line.startswith(" > "))
    assert wanted == "auto" or picked.split()[1].partition("_cpu/")[0] in names


def test_a_kernel_can_be_named(x):
    table = vg.explain(vg.nn.SubmConv3d(4, 16, 3), x).partition("\ngrad_input")[0]
    name = [line[3:].split()[0] for line in table.splitlines()[1:] if "no: " not in line][-1]
    assert name in vg._library.version_and_kernels()[1]["f32"]
    conv = vg.nn.SubmConv3d(4, 16, 3, algorithm={"forward": name})
    conv(x)
    assert f" > {name} " in vg.explain(conv, x)


def test_info():
    info = vg.info()
    assert info["voxgemm"] == vg.__version__
    assert info["threads"] == torch.get_num_threads()
    assert set(info["engines"]) == {"f16", "bf16", "f32", "f64"}
    assert all("reference_cpu" in names for names in info["engines"].values())


def unet(max_voxels=None, dtype=torch.float32):
    torch.manual_seed(0)
    return vg.nn.Sequential(
        vg.nn.SubmConv3d(4, 8, 3, dtype=dtype),
        torch.nn.ReLU(),
        vg.nn.SparseConv3d(8, 8, 3, 2, 1, dtype=dtype, max_voxels=max_voxels),
        vg.nn.SubmConv3d(8, 8, 3, dtype=dtype),
        torch.nn.ReLU(),
        vg.nn.SparseInverseConv3d(8, 4, 3, dtype=dtype),
    )


def test_max_voxels_changes_nothing_but_the_rows(x):
    """Padding takes no part in forward or backward."""
    gradients = []
    for room in (None, 500):
        net = unet(room)
        y = net(vg.SparseTensor(x.features, x.coords))
        y.features.square().sum().backward()
        gradients.append([y.features.detach(), *(p.grad for p in net.parameters())])
        y.maps.settle()
        coarse = y.maps.sets[1].coords
        rows = (coarse[:, 0] != vg.PADDING_BATCH).sum()
        assert len(coarse) == (room or rows) and rows < 500
    for plain, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, plain)


def test_padded_rows_are_no_voxels(x):
    more = 7
    padding = torch.zeros(more, 4, dtype=torch.int32, device=x.coords.device)
    padding[:, 0] = vg.PADDING_BATCH
    features = torch.cat([x.features, x.features[:more]])
    padded = vg.SparseTensor(features, torch.cat([x.coords, padding]), (8, 8, 8), x.batch_size)
    conv = vg.nn.SubmConv3d(4, 4, 3)
    assert torch.equal(conv(padded).features[-more:], conv.bias.expand(more, -1))
    assert torch.equal(padded.dense(), x.dense())


def test_too_many_voxels_for_max_voxels(x):
    net = unet(3)
    with pytest.raises(vg.ArgumentError, match=r"output_coords found .* voxels, max_voxels is 3"):
        net(x).maps.settle()


def test_a_map_counts_its_memory(x):
    outputs = vg.output_coords(x.coords, vg.Geometry((2, 2, 2), (2, 2, 2)))
    map = vg.build_map(x.coords, 2, out_coords=outputs, stride=2)
    own = sum(t.untyped_storage().nbytes() for t in {id(t): t for t in map.tensors()}.values())
    assert map.nbytes >= own >= 4 * map.taps * map.n_out
    back = map.transposed()
    assert map.nbytes >= own + 4 * back.taps * back.n_out
