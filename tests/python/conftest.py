# SPDX-License-Identifier: Apache-2.0
"""Clouds, torch's dense convolutions as reference, and the error bound of the arithmetic.

A test that asks for `device`, `clouds` or `layer` runs on the CPU and on a CUDA device, where there
is one. References are always computed on the CPU.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
import torch
from pytest import fixture
from torch.nn import functional as F

# Before the library reads them: no times and no wishes of whoever runs the tests.
os.environ["VOXGEMM_CACHE_DIR"] = tempfile.mkdtemp(prefix="voxgemm-tests-")
atexit.register(shutil.rmtree, os.environ["VOXGEMM_CACHE_DIR"], ignore_errors=True)
for name in ("VOXGEMM_TUNE", "VOXGEMM_ALGORITHM"):
    os.environ.pop(name, None)

import voxgemm as vg  # noqa: E402


class Clouds:
    """Coordinates int32 [n, 4] on a device, all distinct unless said otherwise."""

    def __init__(self, device: torch.device):
        self.device = device

    def grid(self, batch: int, shape: tuple[int, int, int]) -> torch.Tensor:
        axes = [torch.arange(extent, device="cpu") for extent in (batch, *shape)]
        return torch.cartesian_prod(*axes).int().to(self.device)

    def random(self, rows: int, extent: int = 8, batch: int = 2, seed: int = 0) -> torch.Tensor:
        every = self.grid(batch, (extent,) * 3)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(every), generator=generator, device="cpu")
        return every[order[:rows].to(self.device)]


def parts(coords: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(coords.long().T)


def to_grid(rows: torch.Tensor, coords: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """[batch, channels, X, Y, Z], as large as the coordinates and the others' batches need."""
    shape = (coords.amax(0) + 1).tolist() if len(coords) else [1] * 4
    shape[0] = max([shape[0], *(int(other[:, 0].max()) + 1 for other in others if len(other))])
    grid = rows.new_zeros((*shape, rows.shape[1])).index_put(parts(coords), rows)
    return grid.permute(0, 4, 1, 2, 3)


class Dense:
    """Torch's dense convolutions between the sides (coords, out_coords), and so their gradients."""

    @staticmethod
    def conv(x, weight, bias, geometry, sides):
        """The rows at out_coords for the rows x at coords; all coordinates >= 0."""
        coords, out_coords = (side.cpu() for side in sides)
        grid = to_grid(x, coords, out_coords)
        margins = []
        for axis in (2, 1, 0):
            k, s, p, d = (values[axis] for values in geometry)
            last = int(out_coords[:, 1 + axis].max()) if len(out_coords) else 0
            margins += [p, max(last * s + (k - 1) * d - p + 1 - grid.shape[2 + axis], 0)]
        y = F.conv3d(
            F.pad(grid, margins),
            weight.permute(0, 4, 1, 2, 3),
            bias,
            stride=geometry.stride,
            dilation=geometry.dilation,
        )
        return y.permute(0, 2, 3, 4, 1)[parts(out_coords)]

    @staticmethod
    def transposed(x, weight, bias, geometry, sides):
        coords, out_coords = (side.cpu() for side in sides)
        y = F.conv_transpose3d(
            to_grid(x, coords, out_coords),
            weight.permute(4, 0, 1, 2, 3),
            stride=geometry.stride,
            dilation=geometry.dilation,
        )
        # Without padding the result begins `padding` voxels early; past its end nothing arrives.
        at = out_coords.long().clone()
        at[:, 1:] += torch.tensor(geometry.padding, device="cpu")
        margins = [0] * 6
        for axis in range(3):
            margins[5 - 2 * axis] = max(int(at[:, 1 + axis].max()) + 1 - y.shape[2 + axis], 0)
        y = F.pad(y, margins).permute(0, 2, 3, 4, 1)[tuple(at.T)]
        return y if bias is None else y + bias


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def split_products(precision: str) -> tuple[float, int]:
    """Of float32 operands that are rounded or split: the relative error of a product, its products.

    tf32 has 11 significant bits. Of k pieces of bfloat16 the rest is below 2^-8k of the operand;
    what bf16x3 and bf16x6 leave out is one, or two and a smaller, product of that size.
    """
    bits, left_out, products = {
        "ieee": (0, 0, 1),
        "tf32": (11, 0, 1),
        "bf16x3": (16, 1, 3),
        "bf16x6": (24, 2.01, 6),
    }[precision]
    rest = 2.0**-bits if bits else 0.0
    return (1 + rest) ** 2 - 1 + left_out * rest, products


def assert_within(actual, expected, magnitude, terms: int, precision: str = "ieee") -> None:
    """|actual - expected| is at most what rounding can do to sums of products.

    expected and magnitude, the sum of the products' absolute values, are float64. A sum of `terms`
    products, added in any order in precision u, is off by at most terms * u / (1 - terms * u) *
    magnitude; the library adds in float32 (float64 for float64) and rounds the result once to its
    dtype; the reference was added in float64.
    """
    actual, dtype = actual.cpu(), actual.dtype
    assert expected.dtype == magnitude.dtype == torch.float64
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    error, products = split_products(precision)
    terms *= products
    u = unit(torch.float64 if dtype == torch.float64 else torch.float32)
    gamma, of_reference = (terms * v / (1 - terms * v) for v in (u, unit(torch.float64)))
    added = (gamma + error + gamma * error + of_reference) * magnitude
    # Below the smallest normal number roundings are absolute, in accumulators too.
    tiny = torch.finfo(dtype).tiny + terms * torch.finfo(torch.float32).tiny
    bound = added + unit(dtype) * (expected.abs() + added) + tiny
    error = (actual.double() - expected).abs()
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"off by {error.flatten()[worst]:.3e} at element {worst} of {list(actual.shape)} {dtype}, "
        f"the bound is {bound.flatten()[worst]:.3e}"
    )


def gradients(function, operands, dy):
    """function(*operands) and the gradients of its product with dy, None where an operand is."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    y = function(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, present, dy))
    return y.detach(), [None if leaf is None else next(found) for leaf in leaves]


def check_against(
    actual_function, reference_function, operands, terms: int, precision: str = "ieee"
) -> None:
    """actual_function(x, weight, bias) and its gradients against those of the float64 reference."""
    generator = torch.Generator().manual_seed(1)
    exact = [None if t is None else t.cpu().double() for t in operands]
    dy = torch.randn(reference_function(*exact).shape, generator=generator).to(operands[0].dtype)
    y, found = gradients(actual_function, operands, dy.to(operands[0].device))
    expected_y, expected = gradients(reference_function, exact, dy.double())
    absolute = [None if t is None else t.abs() for t in exact]
    magnitude_y, magnitudes = gradients(reference_function, absolute, dy.double().abs())
    assert_within(y, expected_y, magnitude_y, terms, precision)
    for actual, wanted, magnitude in zip(found, expected, magnitudes, strict=True):
        if actual is not None:
            assert_within(actual, wanted, magnitude, terms, precision)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request):
    yield torch.device(request.param)
    if request.param == "cuda":
        torch.cuda.synchronize()  # what went wrong there fails this test, not the next


@fixture
def clouds(device) -> Clouds:
    return Clouds(device)


@fixture(scope="session")
def dense() -> type[Dense]:
    return Dense


@fixture(scope="session")
def within():
    return assert_within


@fixture(scope="session")
def against():
    return check_against


@fixture
def layer():
    """make(coords, c_in, c_out, ...) -> (x, weight, bias, map) of random numbers, repeatable.

    They are the same on every device; all are where the coordinates are.
    """

    def make(coords, c_in=3, c_out=4, dtype=torch.float64, geometry=None, out_coords=None):
        draw = {"generator": torch.Generator().manual_seed(2), "device": "cpu"}
        geometry = geometry or vg.Geometry.submanifold((3, 3, 3), (1, 1, 1))
        if out_coords is None:
            map = vg.functional.submanifold_map(coords, geometry)
        else:
            map = vg.functional.strided_map(coords, out_coords, geometry)
        x = torch.randn(len(coords), c_in, **draw)
        weight = torch.randn(c_out, *geometry.size, c_in, **draw)
        bias = torch.randn(c_out, **draw)
        return *(t.to(dtype).to(coords.device) for t in (x, weight, bias)), map

    return make


@fixture
def threads():
    """Calls with a number of threads; the number before comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
