# SPDX-License-Identifier: Apache-2.0
"""What a CUDA device tells the host of a map that it builds, without the host waiting."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

_NOT_THERE = -(2**63)


class Slot(NamedTuple):
    """Pinned memory for three numbers, of which each is there once the device has written it."""

    tensor: Tensor  # int64 [3]
    numbers: ctypes.Array[ctypes.c_int64]  # the same memory

    @property
    def is_full(self) -> bool:
        return _NOT_THERE not in self.numbers[:]


class Status:
    """The answer of kernel_map.h for one map; it serves the transposed map, too."""

    _free: ClassVar[list[Slot]] = []
    # Nobody reads them, but a device may yet write there; of some that is never to be seen.
    _left: ClassVar[deque[Slot]] = deque()

    def __init__(self, device: torch.device):
        self.is_transposed = False  # the map that was asked
        self.numbers: list[int] = []  # once they are read
        self._device = device
        self._slot = self._take()

    @property
    def address(self) -> int:
        """For the operator that builds the map."""
        return self._slot.tensor.data_ptr()

    @classmethod
    def _take(cls) -> Slot:
        try:
            if not cls._free:
                # More come free than are left behind, and a map looks at no more of them.
                for _ in range(min(2, len(cls._left))):
                    slot = cls._left.popleft()
                    (cls._free if slot.is_full else cls._left).append(slot)
            slot = cls._free.pop()
        except IndexError:  # there is none, or another thread had the last
            tensor = torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=True)
            slot = Slot(tensor, (ctypes.c_int64 * 3).from_address(tensor.data_ptr()))
        slot.numbers[:] = [_NOT_THERE] * 3
        return slot

    def __del__(self) -> None:
        if not self.numbers:
            self._left.append(self._slot)

    def arrived(self, wait: bool) -> bool:
        if torch.cuda.is_current_stream_capturing():
            return False
        if wait and not self._read():
            torch.cuda.current_stream(self._device).synchronize()
            if not self._read():  # built in another stream
                torch.cuda.synchronize(self._device)
        return self._read()

    def _read(self) -> bool:
        if not self.numbers and self._slot.is_full:
            self.numbers = self._slot.numbers[:]
            self._free.append(self._slot)
        return bool(self.numbers)


def status_of(coords: Tensor) -> Status | None:
    """Of a map of them that is yet to be built, where it is on a device that will answer."""
    if torch.compiler.is_compiling() or type(coords) is not Tensor or not coords.is_cuda:
        return None
    return None if torch.cuda.is_current_stream_capturing() else Status(coords.device)
