# SPDX-License-Identifier: Apache-2.0
"""Rows by coordinates, by another name."""

from __future__ import annotations

from torch import Tensor

from .torch_hashmap import TorchHashTable


class PackedHashTable(TorchHashTable):
    """As TorchHashTable; any int32 coordinates."""

    @classmethod
    def from_coords(cls, coords: Tensor) -> PackedHashTable:
        return cls.from_keys(coords)
