# SPDX-License-Identifier: Apache-2.0
"""What the drop-ins' tests share: the library's own fixtures, the documents of the originals."""

from __future__ import annotations

import importlib.util
import itertools
import math
import pathlib
import re
import tempfile

import pytest
import torch
from pytest import fixture

import flex_gemm
import voxgemm as vg
import warpconvnet
from flex_gemm.ops import spconv
from warpconvnet import _tuning
from warpconvnet.geometry.types.voxels import Voxels

# Tests keep out of the user's files.
flex_gemm.AUTOTUNE_CACHE_PATH = str(pathlib.Path(tempfile.mkdtemp(), "tuning.json"))
warpconvnet.constants.WARPCONVNET_BENCHMARK_CACHE_DIR = tempfile.mkdtemp()

HERE = pathlib.Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("voxgemm_tests", HERE.parent / "python/conftest.py")
_library = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_library)
device, clouds, dense = _library.device, _library.clouds, _library.dense
within, against, threads = _library.within, _library.against, _library.threads

# Where the originals' documents are kept beside a checkout; the library does not need them.
DOCUMENTS = HERE.parents[2] / "shared" / "seeds"

FLEX_ALGORITHMS = [name for key, name in vars(spconv.Algorithm).items() if key.isupper()]


def blocks_of(name: str, language: str) -> list[str]:
    """The code blocks of a document, in order; none where it is not at hand."""
    path = DOCUMENTS / name
    if not path.is_file():
        return []
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


@fixture
def document(request):
    """blocks(name, language) of a document, or a skip that says where it was sought."""

    def blocks(name: str, language: str = "python") -> list[str]:
        found = blocks_of(name, language)
        if not found:
            pytest.skip(f"{DOCUMENTS / name} is not at hand")
        return found

    return blocks


@fixture
def terms():
    """terms(map, channels): the most products in one sum of any pass, and one for the bias."""

    def count(size, channels: int, rows: int) -> int:
        return max(math.prod(size) * channels, rows) + 1

    return count


@fixture
def randn(device):
    """randn(*shape, dtype) on the device; the same numbers on every device."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(dtype).to(device)

    return draw


@fixture
def reference(dense):
    """reference(geometry, coords, out_coords) -> the dense convolution of (x, weight, bias)."""

    def make(geometry: vg.Geometry, coords, out_coords=None):
        sides = (coords, coords if out_coords is None else out_coords)
        return lambda x, weight, bias: dense.conv(x, weight, bias, geometry, sides)

    return make


@fixture
def flex_state():
    """Programs assign the module's variables; every test begins with the defaults."""
    names = [name for name in vars(spconv) if name.isupper() and not name.startswith("_")]
    before = {name: getattr(spconv, name) for name in names}
    yield
    for name, value in before.items():
        setattr(spconv, name, value)
    vars(flex_gemm.kernels.triton.spconv.config).pop("allow_tf32", None)


@fixture(params=FLEX_ALGORITHMS)
def algorithm(request, flex_state):
    spconv.set_algorithm(request.param)
    return request.param


@fixture
def layer(clouds, randn):
    """make(rows, size, Ci, Co, dtype) -> feats, coords, shape, weight, bias."""

    def make(rows=60, size=3, c_in=4, c_out=5, dtype=torch.float32, extent=8):
        size = (size,) * 3 if isinstance(size, int) else size
        coords = clouds.random(rows, extent)
        shape = torch.Size((2, c_in, extent, extent, extent))
        weight = randn(c_out, *size, c_in, dtype=dtype)
        return randn(rows, c_in, dtype=dtype), coords, shape, weight, randn(c_out, dtype=dtype)

    return make


@fixture
def warp_state(tmp_path, monkeypatch):
    """An empty folder and memory of measured times, and little time to measure."""
    monkeypatch.setattr(warpconvnet.constants, "WARPCONVNET_BENCHMARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_tuning, "times", _tuning.Times())
    monkeypatch.setattr(_tuning, "BUDGET", 0.0)
    monkeypatch.setattr(_tuning, "_LEFT_OUT", {})
    yield
    _tuning.times.save()


@fixture
def scene(device):
    """make(channels, axes, dtype, samples) -> Voxels with negative coordinates, in any order."""

    def make(
        channels=4, axes=3, dtype=torch.float32, samples=(30, 0, 25), extent=4, seed=0
    ) -> Voxels:
        draw = torch.Generator().manual_seed(seed)
        every = torch.cartesian_prod(*[torch.arange(-extent, extent)] * axes).int()
        coords = [every[torch.randperm(len(every), generator=draw)[:n]] for n in samples]
        features = [torch.randn(n, channels, generator=draw).to(dtype) for n in samples]
        return Voxels([c.to(device) for c in coords], [f.to(device) for f in features])

    return make


def _offsets(size, dilation) -> list[tuple[int, ...]]:
    axes = [
        [(k - ((n - 1) // 2 if n % 2 else 0)) * d for k in range(n)]
        for n, d in zip(size, dilation, strict=True)
    ]
    return list(itertools.product(*axes))


def _oracle(fine, coarse, size, stride, dilation, transposed=False) -> torch.Tensor:
    """[outputs, taps, inputs]: 1 where fine = stride * coarse + offset; the first row counts."""
    first: dict[tuple[int, ...], int] = {}
    for row, at in enumerate(fine.tolist()):
        first.setdefault(tuple(at), row)
    taps = _offsets(size, dilation)
    matrix = torch.zeros(len(coarse), len(taps), len(fine), dtype=torch.float64)
    for row, (batch, *at) in enumerate(coarse.tolist()):
        for tap, step in enumerate(taps):
            there = tuple(s * u + d for s, u, d in zip(stride, at, step, strict=True))
            if (batch, *there) in first:
                matrix[row, tap, first[(batch, *there)]] = 1
    return matrix.permute(2, 1, 0) if transposed else matrix


@fixture(scope="session")
def offsets_by_hand():
    """The offsets of a kernel's taps."""
    return _offsets


@fixture(scope="session")
def oracle():
    """The pairs of a convolution, as a matrix."""
    return _oracle
