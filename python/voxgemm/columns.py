# SPDX-License-Identifier: Apache-2.0
"""Columns of whole numbers as the operators take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ArgumentError

_SIGNED = {torch.uint32: torch.int32, torch.uint64: torch.int64}


def as_bits(column: Tensor) -> Tensor:
    """uint32 and uint64 as int32 and int64 of the same bits and the same memory."""
    signed = _SIGNED.get(column.dtype)
    return column if signed is None else column.view(signed)


def as_int32(column: Tensor, what: str, absent: int = -1) -> Tensor:
    """Whole numbers of any width; `absent` where int32 does not hold them."""
    bits = as_bits(column)
    if bits.is_floating_point() or bits.is_complex():
        raise ArgumentError(
            f"{what} is {column.dtype} {list(column.shape)}, expected whole numbers"
        )
    narrow = bits.to(torch.int32)
    return narrow if bits.dtype != torch.int64 else torch.where(narrow == bits, narrow, absent)


def narrow(rows: Tensor, what: str) -> Tensor:
    """Whole numbers [n, k] of any width as int32; a row that it does not hold is an ArgumentError.

    Without that check, and cut to their low bits, while a graph is traced or captured.
    """
    if rows.is_floating_point() or rows.is_complex() or rows.ndim != 2:
        raise ArgumentError(f"{what} is {rows.dtype} {list(rows.shape)}, expected integers [n, k]")
    bits = as_bits(rows)
    numbers = bits.to(torch.int32)
    unsigned = bits.dtype != rows.dtype
    if (unsigned or bits.dtype == torch.int64) and may_wait(rows):
        fits = (numbers == bits) & (numbers >= 0) if unsigned else numbers == bits
        if not bool(fits.all()):
            row = int((~fits).any(1).nonzero()[0])
            raise ArgumentError(
                f"row {row} of {what} is {rows[row].tolist()}, expected numbers of 32 bits"
            )
    return numbers


def may_wait(tensor: Tensor) -> bool:
    """Whether a check may look at the values: not while a graph is traced or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
