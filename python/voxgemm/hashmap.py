# SPDX-License-Identifier: Apache-2.0
"""Hash maps of whole numbers in two tensors of the caller: keys [slots] and values [slots].

Keys and values have 32 or 64 bits: int32, uint32, int64 or uint64, whose bits are taken as
unsigned. All ones (-1) marks an empty slot, cannot be a key, and is what a look-up gives for a
missing one. What else the tensors hold is private to `insert` and `lookup`. Nothing depends on
timing, any load up to 100 % works alike, and nothing loops on a full table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import call, ops
from .algorithms import index_in
from .columns import as_bits, may_wait
from .errors import ArgumentError
from .geometry import Triple, triple

__all__ = [
    "HashMap",
    "insert",
    "lookup",
    "make_table",
    "voxel_keys",
]
DTYPES = (torch.int32, torch.int64, torch.uint32, torch.uint64)


def make_table(
    slots: int,
    key_dtype: torch.dtype = torch.int64,
    value_dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Empty keys [slots] and values [slots] on a device.

    key_dtype and value_dtype: int32, uint32, int64 or uint64; ArgumentError else.

    >>> keys, values = vg.hashmap.make_table(8, torch.int32, torch.uint32)
    >>> keys.shape, values.dtype
    (torch.Size([8]), torch.uint32)
    """
    columns = []
    for name, dtype in (("key_dtype", key_dtype), ("value_dtype", value_dtype)):
        index_in(DTYPES, dtype, name)
        signed = torch.int32 if dtype.itemsize == 4 else torch.int64
        columns.append(torch.full((slots,), -1, dtype=signed, device=device).view(dtype))
    return columns[0], columns[1]


def insert(
    table_keys: Tensor,
    table_values: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    skip_empty: bool = False,
    check: bool = True,
) -> None:
    """Adds keys [n] with values [n], or with their row numbers, to the table, in place.

    table_keys and table_values are `make_table`'s, or any two such columns; keys and values have
    their dtypes, int32 or int64 (signed or not). Of equal keys the lowest row counts; a key that is
    there already gets the new value. More distinct keys than slots, or a key of all ones (passed
    over with `skip_empty`), leave the table as it was and are an `ArgumentError`; on CUDA that
    check waits for the device. Without `check`, or while a graph is captured or traced, there is
    none.

    >>> keys, values = vg.hashmap.make_table(8)
    >>> vg.hashmap.insert(keys, values, torch.tensor([5, 3]), torch.tensor([50, 30]))
    >>> vg.hashmap.lookup(keys, values, torch.tensor([3, 5, 9]))
    tensor([30, 50, -1])
    """
    _same_width("keys", keys, table_keys)
    if values is not None:
        _same_width("values", values, table_values)
        values = as_bits(values)
    table = as_bits(table_keys), as_bits(table_values)
    status = call(ops._hash_insert.default, *table, as_bits(keys), values, skip_empty)
    if check and may_wait(table_keys):
        call(ops._check_hash_insert.default, *table, status)


def lookup(table_keys: Tensor, table_values: Tensor, keys: Tensor) -> Tensor:
    """The values [m] of keys [m] in table_keys and table_values, all ones where there is no such
    key.

    ArgumentError where the keys' dtype, int32 or int64 (signed or not), has not the table's width.

    >>> keys, values = vg.hashmap.make_table(4, torch.int32, torch.int32)
    >>> vg.hashmap.lookup(keys, values, torch.tensor([7], dtype=torch.int32))
    tensor([-1], dtype=torch.int32)
    """
    _same_width("keys", keys, table_keys)
    found = call(
        ops._hash_lookup.default, as_bits(table_keys), as_bits(table_values), as_bits(keys)
    )
    return found.view(table_values.dtype)


def voxel_keys(coords: Tensor, spatial_shape: Triple, dtype: torch.dtype = torch.int64) -> Tensor:
    """Keys [n] of coords int32 [n, 4]: ((batch * X + x) * Y + y) * Z + z for a spatial_shape
    (X, Y, Z).

    All ones outside the shape, and where the number does not fit the dtype.

    >>> coords = torch.tensor([[1, 2, 3, 4], [0, 9, 0, 0]], dtype=torch.int32)
    >>> vg.hashmap.voxel_keys(coords, (8, 8, 8))
    tensor([668,  -1])

    Raises ArgumentError: coordinates or a dtype of another kind.
    """
    index_in(DTYPES, dtype, "dtype")
    shape = list(triple(spatial_shape, "spatial_shape"))
    return call(ops._voxel_keys.default, coords, shape, dtype.itemsize == 8).view(dtype)


class HashMap:
    """A table with its two functions.

    >>> map = HashMap(100)
    >>> map.insert(torch.tensor([7, 9, 7]))  # values are row numbers
    >>> map.lookup(torch.tensor([9, 8, 7]))
    tensor([ 1, -1,  0])
    """

    def __init__(
        self,
        slots: int,
        key_dtype: torch.dtype = torch.int64,
        value_dtype: torch.dtype = torch.int64,
        device: torch.device | str | None = None,
    ):
        self.keys, self.values = make_table(slots, key_dtype, value_dtype, device)

    def insert(self, keys: Tensor, values: Tensor | None = None, **options: bool) -> None:
        """Adds keys [n] with values [n] or their row numbers: see `hashmap.insert`."""
        insert(self.keys, self.values, keys, values, **options)

    def lookup(self, keys: Tensor) -> Tensor:
        """The values [m] of keys [m]: see `hashmap.lookup`."""
        return lookup(self.keys, self.values, keys)

    def __len__(self) -> int:
        """Distinct keys. Waits for a CUDA device."""
        return int((as_bits(self.keys) != -1).sum())


def _same_width(name: str, column: Tensor, table: Tensor) -> None:
    if as_bits(column).dtype != as_bits(table).dtype:
        raise ArgumentError(f"{name} are {column.dtype}, expected the table's {table.dtype}")


@torch.library.register_fake("voxgemm::_hash_insert")
def _(table_keys, table_values, keys, values, skip_empty):
    return table_keys.new_empty((2,), dtype=torch.int64)


@torch.library.register_fake("voxgemm::_check_hash_insert")
def _(table_keys, table_values, status):
    return table_keys.new_empty((1,), dtype=torch.int64)


@torch.library.register_fake("voxgemm::_hash_lookup")
def _(table_keys, table_values, keys):
    return table_values.new_empty(keys.shape)


@torch.library.register_fake("voxgemm::_voxel_keys")
def _(coords, shape, wide):
    return coords.new_empty((coords.shape[0],), dtype=torch.int64 if wide else torch.int32)
