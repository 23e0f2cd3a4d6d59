# SPDX-License-Identifier: Apache-2.0
"""Whose schedules the operators keep, so that those of traced graphs find them."""

from __future__ import annotations

import collections
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._library import ops


class Owned:
    """The table of a map of which C++ keeps schedules (torch/kept.h) while this lives.

    For a table that an operator made with `owned`, as it is to be where owns() says so.
    """

    _late: ClassVar[collections.deque[Tensor]] = collections.deque()  # yet to be forgotten

    def __init__(self, neighbours: Tensor):
        self._neighbours = neighbours
        while self._late:
            try:
                ops._forget.default(self._late.pop())
            except IndexError:  # another thread had the last
                break

    def __del__(
        self, forget: Any = ops._forget.default, is_finalizing: Any = sys.is_finalizing
    ) -> None:
        if is_finalizing():  # then torch may be gone
            return
        # A garbage collection comes at any time, also while a graph is traced.
        if _may_call():
            forget(self._neighbours)
        else:
            self._late.append(self._neighbours)


def owns(tensor: Tensor) -> bool:
    """Whether a map that is now made of a tensor is to be owned: none of a graph is."""
    if type(tensor) is not Tensor or not _may_call():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _may_call() -> bool:
    """Whether an operator would do what it does instead of being traced or transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )
