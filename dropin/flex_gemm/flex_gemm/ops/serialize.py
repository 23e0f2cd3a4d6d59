# SPDX-License-Identifier: Apache-2.0
"""Voxels as numbers along a curve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from voxgemm import serialization
from voxgemm.columns import narrow

from ..errors import expect, speaking
from .spconv.submanifold_conv3d import box


def _bits(shape: Sequence[int], mode: str) -> serialization.CodeBits:
    expect(mode in ("z_order", "hilbert"), f"Unknown encoding mode: {mode}")
    return serialization.code_bits(box(shape), int(shape[0]))


@speaking
def encode_seq(coords: Tensor, shape: Sequence[int], mode: str = "z_order") -> Tensor:
    """The codes [N] of coords [N, 4] in a box (N, C, W, H, D): int32 up to 31 bits, int64 up to 63.

    Ascending codes are along the curve, sample by sample; mode is 'z_order' or 'hilbert'.
    """
    if coords.is_floating_point():
        raise TypeError(f"coords is {coords.dtype}, expected integers")
    return serialization.encode(narrow(coords, "coords"), _bits(shape, mode), curve=mode)


@speaking
def decode_seq(code: Tensor, shape: Sequence[int], mode: str = "z_order") -> Tensor:
    """The coordinates int32 [N, 4] of encode_seq's codes."""
    return serialization.decode(code, _bits(shape, mode), curve=mode)
