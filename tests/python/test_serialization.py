# SPDX-License-Identifier: Apache-2.0
"""Codes of voxels against numpy, one bit at a time; the curves themselves are judged in C++."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import voxgemm as vg
from voxgemm.serialization import AXES, CURVES, CodeBits, code_bits, curve_order, decode, encode


def voxels(device, rows=500, extent=64, batch=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    coords = torch.randint(0, extent, (rows, 4), generator=draw, dtype=torch.int32, device="cpu")
    coords[:, 0] %= batch
    return coords.to(device)


def interleaved(coords, bits, axes):
    columns = coords.cpu().numpy().astype(object)
    codes = columns[:, 0].copy()
    for bit in reversed(range(bits)):
        for axis in axes:
            codes = codes * 2 + (columns[:, 1 + "xyz".index(axis)] // 2**bit) % 2
    return codes


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_z_order_interleaves_bits(device, axes, dtype):
    coords = voxels(device)
    codes = encode(coords, 6, axes=axes, dtype=dtype)
    assert codes.dtype == dtype
    assert codes.tolist() == list(interleaved(coords, 6, axes))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("size", [1, 2, 3, 64, 1000, 1024, 2048])
def test_codes_decode(device, curve, size):
    bits = code_bits((size, 1, 2), 5)
    assert bits == CodeBits((max(size, 2) - 1).bit_length(), 3)
    coords = voxels(device, extent=size, batch=5)
    codes = encode(coords, bits, curve=curve)
    assert codes.dtype == (torch.int32 if bits.total <= 31 else torch.int64)
    assert torch.equal(decode(codes, bits, curve=curve), coords)
    # Codes sort batches, and within one as the curve does.
    batches = coords[torch.argsort(codes, stable=True).long(), 0]
    assert torch.equal(batches, batches.sort().values)


def test_unsigned_codes_are_written_in_place(device):
    coords = voxels(device, extent=1024, batch=4)
    for dtype in (torch.int32, torch.uint32, torch.int64, torch.uint64):
        out = torch.zeros(len(coords), dtype=dtype, device=device)
        assert encode(coords, 10, out=out) is out
        assert torch.equal(decode(out, 10), coords)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("axes", ["xyz", "zxy"])
def test_order_of_coordinates_anywhere(device, curve, axes):
    """A curve does not depend on where the box is; its order on nothing but the codes."""
    coords = voxels(device)
    away = coords + torch.tensor([7, -1000, 2**31 - 80, -(2**31)], device=device).int()
    order = curve_order(away, curve=curve, axes=axes)
    assert torch.equal(order.codes, curve_order(coords, 6, curve=curve, axes=axes).codes)
    codes = order.codes.cpu().numpy()
    assert order.permutation.cpu().numpy().tolist() == np.argsort(codes, kind="stable").tolist()
    rows = torch.arange(len(coords), device=device)
    assert torch.equal(order.permutation[order.inverse], rows)
    if curve == "rows" and axes == "xyz":
        listed = away[order.permutation].tolist()
        assert listed == sorted(listed)


def test_no_rows(device):
    coords = torch.empty(0, 4, dtype=torch.int32, device=device)
    assert encode(coords, 5).shape == (0,)
    assert decode(encode(coords, 5), 5).shape == (0, 4)
    assert [part.shape for part in curve_order(coords)] == [(0,)] * 3


def test_what_does_not_fit_is_said(device):
    coords = voxels(device, rows=3, extent=4)
    coords[1, 2] = 4
    with pytest.raises(vg.ArgumentError, match=r"row 1 of the coordinates is .*y 4"):
        encode(coords, 2)
    coords[1] = torch.tensor([2, 0, 0, 0])
    with pytest.raises(vg.ArgumentError, match="row 1 of the coordinates is .batch 2"):
        encode(coords, CodeBits(2, 1))
    with pytest.raises(vg.ArgumentError, match="11 bits an axis, expected 0 to 10"):
        encode(coords, 11, dtype=torch.int32)
    with pytest.raises(vg.ArgumentError, match=r"\(4194304, 1, 1\) with batch size 1"):
        code_bits((2**22, 1, 1))
    with pytest.raises(vg.ArgumentError, match="curve is 'peano'"):
        encode(coords, 5, curve="peano")
    for out in (torch.zeros(1), torch.zeros(4)):
        with pytest.raises(vg.ArgumentError, match=rf"out is \[{len(out)}\], expected \[3\]"):
            encode(coords, 5, out=out.long().to(device))
    for wrong, sentence in (
        (coords[:, :3], "3 columns"),
        (coords.long(), "i64"),
        (coords[0], "1 d"),
    ):
        with pytest.raises(vg.ArgumentError, match=sentence):
            curve_order(wrong)
    with pytest.raises(vg.ArgumentError, match="axes is 'xxy'"):
        encode(coords, 5, axes="xxy")
    with pytest.raises(vg.ArgumentError, match="got 4294967299, expected a number of 32 bits"):
        encode(coords, 2**32 + 3)


def test_batches_that_int32_does_not_hold(device):
    """Of a code with fewer bits an axis than it was made with, say; they came back as another's."""
    most = 2**31 - 1
    codes = torch.tensor([most << 6, 2**38, -1], device=device)
    assert decode(codes[:1], 2).tolist() == [[most, 0, 0, 0]]
    with pytest.raises(vg.ArgumentError, match="code 274877906944 in row 1 is of batch 4294967296"):
        decode(codes, 2)
    whole = f"code {2**64 - 1} in row 0 is of batch {2**58 - 1}, expected at most {most}"
    with pytest.raises(vg.ArgumentError, match=whole):
        decode(codes[2:], 2)
    with pytest.raises(vg.ArgumentError, match=f"in row 0 is of batch {2**32 - 1}, "):
        decode(codes[2:].int(), 0)
    assert decode(codes[1:2], 2, check=False).tolist() == [[0, 0, 0, 0]]
    assert decode(codes[2:].int(), 1).tolist() == [[2**29 - 1, 1, 1, 1]]
