# SPDX-License-Identifier: Apache-2.0
"""Columns of whole numbers as the operators take them."""

from __future__ import annotations

import torch
from torch import Tensor

_SIGNED = {torch.uint32: torch.int32, torch.uint64: torch.int64}


def as_bits(column: Tensor) -> Tensor:
    """uint32 and uint64 as int32 and int64 of the same bits and the same memory."""
    signed = _SIGNED.get(column.dtype)
    return column if signed is None else column.view(signed)


def may_wait(tensor: Tensor) -> bool:
    """Whether a check may look at the values: not while a graph is traced or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
