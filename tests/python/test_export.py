# SPDX-License-Identifier: Apache-2.0
"""torch.export for any number of voxels, and packages that AOTInductor makes of it."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import nn
from torch.export import Dim

import voxgemm as vg
from voxgemm.functional import conv3d, inverse_conv3d
from voxgemm.unet import UNet

DOWN = vg.Geometry((2, 2, 2), (2, 2, 2))


def settled(map: vg.KernelMap) -> vg.KernelMap:
    """That no voxel repeats is part of a graph; of a CUDA map it is known when the device says."""
    map.settle(wait=True)
    return map


class Inside(nn.Module):
    """Tensors in and out; the maps are built in between."""

    def __init__(self):
        super().__init__()
        self.net = vg.nn.Sequential(
            vg.nn.SubmConv3d(4, 8, 3),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            vg.nn.SparseConv3d(8, 8, 2, stride=2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            vg.nn.SubmConv3d(8, 8, 3),
            vg.nn.SparseInverseConv3d(8, 4, 2),
        )

    def forward(self, features, coords):
        return self.net(vg.SparseTensor(features, coords)).features

    @staticmethod
    def arguments(features, coords):
        return features, coords

    @staticmethod
    def sizes(rows):
        return {0: rows}, {0: rows}


class Given(nn.Module):
    """The maps are arguments."""

    def __init__(self):
        super().__init__()
        self.stem = vg.nn.SubmConv3d(4, 8, 3)
        self.down = vg.nn.SparseConv3d(8, 8, 2, 2)
        self.up = vg.nn.SparseInverseConv3d(8, 4, 2)

    def forward(self, features, same, down):
        y = torch.relu(conv3d(features, self.stem.weight, self.stem.bias, same))
        y = torch.relu(conv3d(y, self.down.weight, self.down.bias, down))
        return inverse_conv3d(y, self.up.weight, self.up.bias, down)

    @staticmethod
    def arguments(features, coords):
        down = vg.functional.strided_map(coords, vg.output_coords(coords, DOWN), DOWN)
        return features, settled(vg.build_map(coords, 3)), settled(down)

    @staticmethod
    def sizes(rows):
        # Of a map: neighbours, pairs_per_tap, in_first, out_first and n_in.
        return {0: rows}, *[[{1: rows}, None, None, None, rows]] * 2


class Tables(nn.Module):
    """The map's tensors are arguments; torch's packages take no number of changing value."""

    def __init__(self):
        super().__init__()
        self.stem = vg.nn.SubmConv3d(4, 8, 3)

    def forward(self, features, *tensors):
        rows = features.shape[0]
        map = vg.KernelMap(*tensors, rows, self.stem.geometry, 0, True, False)
        return conv3d(features, self.stem.weight, self.stem.bias, map)

    @staticmethod
    def arguments(features, coords):
        return features, *settled(vg.build_map(coords, 3)).tensors()

    @staticmethod
    def sizes(rows):
        return {0: rows}, ({1: rows}, None, None, None)


@pytest.fixture
def cloud(clouds, device):
    def make(rows):
        draw = torch.Generator().manual_seed(rows)
        return torch.randn(rows, 4, generator=draw).to(device), clouds.random(rows, seed=rows)

    return make


def exported(module, arguments, strict=True):
    sizes = module.sizes(Dim.DYNAMIC)
    with torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=sizes, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [Inside, Given])
def test_any_number_of_voxels(kind, strict, cloud, device):
    """Also after a way through a file."""
    torch.manual_seed(0)
    module = kind().to(device).eval()
    program = exported(module, module.arguments(*cloud(40)), strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (33, 2, 120):
        arguments = module.arguments(*cloud(rows))
        torch.testing.assert_close(loaded(*arguments), module(*arguments))


def test_sparse_tensors_as_arguments(cloud, device):
    """And as results: torch sees their features and coordinates."""
    torch.manual_seed(0)
    net = Inside().net.to(device).eval()
    sizes = ([{0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}],)
    with torch.no_grad():
        program = torch.export.export(
            net, (vg.SparseTensor(*cloud(40)),), dynamic_shapes=sizes, strict=False
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = vg.SparseTensor(*cloud(90))
    y, expected = torch.export.load(file).module()(x), net(x)
    assert isinstance(y, vg.SparseTensor) and torch.equal(y.coords, expected.coords)
    torch.testing.assert_close(y.features, expected.features)


def test_a_cloud_without_voxels(cloud, device):
    module = Inside().to(device).eval()
    loaded = exported(module, cloud(40)).module()
    for rows in (1, 0):
        torch.testing.assert_close(loaded(*cloud(rows)), module(*cloud(rows)))


def test_one_call_a_layer(cloud, device):
    """The graph has an operator for every layer and for every map, and no other of the library."""
    module = Given().to(device).eval()
    program = exported(module, module.arguments(*cloud(40))).run_decompositions()
    names = [
        node.target.__name__.partition(".")[0]
        for node in program.graph.nodes
        if getattr(node.target, "namespace", "") == "voxgemm"
    ]
    assert sorted(names) == ["_forward"] * 3 + ["_transpose"]


def test_the_unet(cloud, device):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = UNet(4, 3, 4, 3)

        def forward(self, features, coords):
            return self.net(vg.SparseTensor(features, coords))

        sizes = staticmethod(Inside.sizes)

    module = Whole().to(device).eval()
    program = exported(module, cloud(40), strict=False).module()
    torch.testing.assert_close(program(*cloud(90)), module(*cloud(90)))


# A package of torch alone: what torch's own AOTInductor must be able to do on a device for anybody.
PLAIN = """
import sys
import torch

class Dense(torch.nn.Module):
    def forward(self, x):
        return torch.mm(x, x.T)

device, path = sys.argv[1:]
x = torch.randn(5, 4, device=device)
with torch.no_grad():
    program = torch.export.export(Dense(), (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=path)
    run = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(run(x), x @ x.T)
"""


@functools.cache
def plain_packages(kind_of_device):
    """What is wrong with them, in a process of their own, since loading may crash: or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PLAIN, kind_of_device, f"{folder}/plain.pt2"]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode and f"exit status {done.returncode}: {done.stderr.strip()[-200:]}"


@pytest.mark.parametrize("kind", [Inside, Tables])
def test_packages_of_aotinductor(kind, cloud, device, tmp_path):
    if wrong := plain_packages(device.type):
        pytest.skip(f"torch {torch.__version__} cannot run a package of torch.mm here: {wrong}")
    torch.manual_seed(0)
    module = kind().to(device).eval()
    program = exported(module, module.arguments(*cloud(40)))
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for rows in (40, 77, 3):
            arguments = module.arguments(*cloud(rows))
            torch.testing.assert_close(run(*arguments), module(*arguments))
