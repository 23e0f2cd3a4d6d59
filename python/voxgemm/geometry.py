# SPDX-License-Identifier: Apache-2.0
"""The geometry of a convolution: what its kernel reaches along each axis."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from .errors import ArgumentError

Triple = tuple[int, int, int]


def whole(value: Any) -> int | None:
    """An int, also numpy's and that of a tensor; None of what is none."""
    if isinstance(value, int):
        return value
    if isinstance(value, tuple | list):  # torch 2.10 cannot trace the error
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def triple(value: int | Iterable[int], what: str) -> Triple:
    one = whole(value)
    if one is not None:
        return one, one, one
    try:
        x, y, z = map(whole, cast(Iterable[int], value))
    except (TypeError, ValueError):
        x = y = z = None
    if x is None or y is None or z is None:
        raise ArgumentError(f"{what} is {value!r}, expected an int or three")
    return x, y, z


class Geometry(NamedTuple):
    """Per axis (x, y, z): in = out * stride - padding + tap * dilation, with 0 <= tap < size.

    >>> vg.Geometry((3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1)).out_shape((9, 8, 7))
    (5, 4, 4)
    """

    size: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)

    @staticmethod
    def submanifold(size: Triple, dilation: Triple) -> Geometry:
        """Stride 1 and the padding under which tap size // 2 reads the output's own voxel."""
        (x, y, z), (dx, dy, dz) = size, dilation
        return Geometry(size, (1, 1, 1), (x // 2 * dx, y // 2 * dy, z // 2 * dz), dilation)

    def numbers(self) -> list[int]:
        """The twelve numbers, axis by axis, as C++ takes them."""
        return [*self.size, *self.stride, *self.padding, *self.dilation]

    def out_shape(self, shape: Triple) -> Triple:
        """As torch's Conv3d; 0 where the kernel does not fit."""
        axes = zip(shape, *self, strict=True)
        return three((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    def in_shape(self, shape: Triple, output_padding: Triple = (0, 0, 0)) -> Triple:
        """As torch's ConvTranspose3d: what a transposed convolution makes of a shape."""
        axes = zip(shape, *self, output_padding, strict=True)
        return three((n - 1) * s - 2 * p + d * (k - 1) + 1 + o for n, k, s, p, d, o in axes)


def three(values: Iterable[int]) -> Triple:
    x, y, z = (max(value, 0) for value in values)
    return x, y, z
