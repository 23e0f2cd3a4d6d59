# SPDX-License-Identifier: Apache-2.0
"""Voxels as numbers along a curve, back, and rows sorted by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import call, ops
from .algorithms import index_in
from .columns import as_bits, may_wait
from .errors import ArgumentError
from .geometry import Triple, triple

__all__ = [
    "AXES",
    "CURVES",
    "CodeBits",
    "CurveOrder",
    "code_bits",
    "curve_order",
    "decode",
    "encode",
    "sort_codes",
]
CURVES = ("z_order", "hilbert", "rows")
AXES = ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")
DTYPES = (torch.int32, torch.int64)
_MOST_BITS = (10, 21)  # of an axis, by dtype


class CodeBits(NamedTuple):
    """How many bits an axis and the batch take.

    >>> vg.serialization.CodeBits(10, 2).total, vg.serialization.CodeBits(10).dtype
    (32, torch.int32)
    """

    bits: int
    batch_bits: int = 0

    @property
    def total(self) -> int:
        """Of a code: three axes and the batch."""
        return 3 * self.bits + self.batch_bits

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest whose signed order is the curve's."""
        return torch.int32 if self.total <= 31 else torch.int64


class CurveOrder(NamedTuple):
    """Rows along a curve.

    >>> order = vg.serialization.curve_order(torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).int())
    >>> order.codes.tolist(), order.permutation.tolist(), order.inverse.tolist()
    ([4, 1], [1, 0], [1, 0])
    """

    codes: Tensor  # int64 [n]
    permutation: Tensor  # int64 [n]: rows by ascending code, ties by row
    inverse: Tensor  # int64 [n]: permutation[inverse] = 0, 1, 2, ...


def code_bits(spatial_shape: Triple, batch_size: int = 1) -> CodeBits:
    """The bits that every voxel of a spatial_shape (X, Y, Z) and a batch_size needs.

    All axes have as many as the longest; more than 63 in all are an `ArgumentError`.

    >>> vg.serialization.code_bits((100, 256, 30), batch_size=4)
    CodeBits(bits=8, batch_bits=2)
    """
    shape = triple(spatial_shape, "spatial_shape")
    bits = CodeBits(max(max(shape) - 1, 0).bit_length(), max(batch_size - 1, 0).bit_length())
    if bits.total > 63:
        raise ArgumentError(
            f"spatial_shape {tuple(shape)} with batch size {batch_size} needs 3 * {bits.bits} + "
            f"{bits.batch_bits} bits, expected at most 63"
        )
    return bits


def _curve(curve: str, axes: str, bits: int, origin: Triple = (0, 0, 0)) -> list[int]:
    number = index_in(CURVES, curve, "curve")
    index_in(AXES, axes, "axes")
    return [number, bits, *("xyz".index(axis) for axis in axes), *origin]


def _bits_of(bits: int | CodeBits) -> int:
    value = bits.bits if isinstance(bits, CodeBits) else bits
    if not isinstance(value, int):
        raise ArgumentError(f"bits is {bits!r}, expected an int or CodeBits")
    return value


def encode(
    coords: Tensor,
    bits: int | CodeBits,
    *,
    curve: str = "z_order",
    axes: str = "xyz",
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """The codes [n] of coords int32 [n, 4]: batch * 2^(3 * bits) + place on the curve.

    'z_order' interleaves the bits of the axes, the first letter of `axes` most significant;
    'hilbert' visits neighbours one after the other; 'rows' is the lexicographic order. `bits` is
    the bits of an axis, at most 10 in int32 codes and 21 in int64 ones. The dtype is `out`'s,
    `dtype`, that of the `CodeBits`, or int64. `out` (int32 or int64 [n]) is written and returned.
    With `check`, coordinates outside [0, 2^bits) or a batch that does not fit are an
    `ArgumentError` that names the row (on CUDA this waits for the device); without, or while a
    graph is captured or traced, bits that do not fit are dropped. No rows give no codes.

    >>> coords = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.int32)
    >>> vg.serialization.encode(coords, 1)
    tensor([ 4, 11])
    """
    width = _bits_of(bits)
    if dtype is None:
        dtype = bits.dtype if isinstance(bits, CodeBits) else torch.int64
    if out is not None:
        dtype = as_bits(out).dtype
    wide = bool(index_in(DTYPES, dtype, "dtype"))
    numbers = _curve(curve, axes, width)
    if check and may_wait(coords) and 0 <= width <= _MOST_BITS[wide]:
        room = bits.batch_bits if isinstance(bits, CodeBits) else (64 if wide else 32) - 3 * width
        most = 1 << min(max(room, 0), 32)
        call(ops._check_coords.default, coords, [1 << width] * 3, most)
    codes = call(ops._curve_encode.default, coords, numbers, wide)
    if out is None:
        return codes
    if out.shape != codes.shape:
        raise ArgumentError(f"out is {list(out.shape)}, expected {list(codes.shape)}")
    return out.copy_(codes.view(out.dtype))


def decode(
    codes: Tensor,
    bits: int | CodeBits,
    *,
    curve: str = "z_order",
    axes: str = "xyz",
    check: bool = True,
) -> Tensor:
    """The coordinates int32 [n, 4] of codes [n] (int32 or int64, read as unsigned) of `encode`.

    bits, curve and axes are those that it was given. With `check`, a code whose batch int32 does
    not hold is an `ArgumentError` that names the row (where the dtype has the room, on CUDA this
    waits for the device); without, or while a graph is captured or traced, its high bits are
    dropped.

    >>> vg.serialization.decode(torch.tensor([4, 11]), 1).tolist()
    [[0, 1, 0, 0], [1, 0, 1, 1]]

    Raises ArgumentError: an unknown curve or axes, too many bits.
    """
    width, column = _bits_of(bits), as_bits(codes)
    coords = call(ops._curve_decode.default, column, _curve(curve, axes, width))
    past = 3 * width + 31
    if check and past < 8 * column.itemsize and may_wait(column):
        wide = (column >> past) != 0  # a code that reads as negative keeps its sign
        if bool(wide.any()):
            row = int(wide.nonzero()[0])
            code = int(column[row]) % (1 << 8 * column.itemsize)
            raise ArgumentError(
                f"code {code} in row {row} is of batch {code >> 3 * width}, expected at most "
                f"{(1 << 31) - 1}"
            )
    return coords


def sort_codes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by ascending code [n] (unsigned, ties by row) and the inverse, both int64 [n].

    >>> vg.serialization.sort_codes(torch.tensor([7, 3, 5]))
    (tensor([1, 2, 0]), tensor([2, 0, 1]))

    Raises ArgumentError: codes that are not int32 or int64 [n].
    """
    return call(ops._sort_codes.default, as_bits(codes))


def curve_order(
    coords: Tensor,
    bits: int | CodeBits | None = None,
    *,
    curve: str = "z_order",
    axes: str = "xyz",
) -> CurveOrder:
    """Rows of coords int32 [n, 4] in the order of a curve, batch by batch; axes as in
    `encode`.

    Without `bits` the curve fills the coordinates' own box, which may be anywhere (this waits for
    a CUDA device); one that needs more than 63 bits with the batch is an `ArgumentError`.

    >>> coords = torch.tensor([[0, -5, 7, 0], [0, -6, 7, 0]], dtype=torch.int32)
    >>> vg.serialization.curve_order(coords, curve="hilbert").permutation
    tensor([1, 0])
    """
    if bits is not None:
        codes = encode(coords, bits, curve=curve, axes=axes, dtype=torch.int64)
        return CurveOrder(codes, *sort_codes(codes))
    call(ops._check_coords.default, coords, None, None)
    low = high = [0, 0, 0, 0]
    if len(coords):
        low, high = coords.amin(0).tolist(), coords.amax(0).tolist()
    extents = [last - first + 1 for first, last in zip(low, high, strict=True)]
    width = code_bits((extents[1], extents[2], extents[3]), extents[0]).bits
    shifted = coords - coords.new_tensor([low[0], 0, 0, 0])
    numbers = _curve(curve, axes, width, (low[1], low[2], low[3]))
    codes = call(ops._curve_encode.default, shifted, numbers, True)
    return CurveOrder(codes, *sort_codes(codes))


@torch.library.register_fake("voxgemm::_curve_encode")
def _(coords, curve, wide):
    return coords.new_empty((coords.shape[0],), dtype=DTYPES[wide])


@torch.library.register_fake("voxgemm::_curve_decode")
def _(codes, curve):
    return codes.new_empty((codes.shape[0], 4), dtype=torch.int32)


@torch.library.register_fake("voxgemm::_sort_codes")
def _(codes):
    rows = codes.new_empty((codes.shape[0],), dtype=torch.int64)
    return rows, torch.empty_like(rows)
