# SPDX-License-Identifier: Apache-2.0
"""Rows by coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from voxgemm import kernel_map
from voxgemm.geometry import Geometry

from ..._rows import to_rows


class TorchHashTable:
    """search(queries [M, 1 + D]) gives the first row with those coordinates, or -1: int32 [M]."""

    def __init__(self, rows: Tensor):
        self._rows = rows

    @classmethod
    def from_keys(cls, keys: Tensor) -> TorchHashTable:
        return cls(to_rows(keys))

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def search(self, queries: Tensor) -> Tensor:
        map = kernel_map.strided_map(self._rows, to_rows(queries), Geometry((1, 1, 1)))
        map.settle(wait=True)
        return map.neighbours[0]
