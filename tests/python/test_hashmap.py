# SPDX-License-Identifier: Apache-2.0
"""Hash maps against dicts."""

from __future__ import annotations

import itertools

import pytest
import torch

import voxgemm as vg
from voxgemm import hashmap

PAIRS = list(itertools.product(hashmap.DTYPES, hashmap.DTYPES))


def words(count, dtype, device, seed):
    """Distinct numbers over the whole range, without all ones, and none of them twice."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randperm(count, generator=draw, device="cpu") * 2654435761 + 12345
    return spread.to(torch.int32 if dtype.itemsize == 4 else torch.int64).to(device).view(dtype)


@pytest.mark.parametrize("key_dtype, value_dtype", PAIRS)
@pytest.mark.parametrize("load", [0.5, 0.95, 1.0])
def test_what_is_inserted_is_found(device, key_dtype, value_dtype, load):
    slots = 4096
    count = int(slots * load)
    keys, values = words(count, key_dtype, device, 1), words(count, value_dtype, device, 2)
    table = hashmap.make_table(slots, key_dtype, value_dtype, device)
    for part in range(3):
        hashmap.insert(*table, keys[part::3].clone(), values[part::3].clone())
    found = hashmap.lookup(*table, keys)
    assert found.dtype == value_dtype
    assert found.tolist() == values.tolist()
    missing = words(2 * slots, key_dtype, device, 3)
    missing = torch.tensor(
        sorted(set(missing.tolist()) - set(keys.tolist())), device=device, dtype=key_dtype
    )
    assert len(missing)
    none = torch.full((1,), -1, dtype=torch.int64).view(torch.uint64).tolist()[0]
    empty = {torch.uint32: 2**32 - 1, torch.uint64: none}.get(value_dtype, -1)
    assert set(hashmap.lookup(*table, missing).tolist()) == {empty}


def test_of_equal_keys_the_lowest_row_counts_and_later_calls_replace(device):
    map = hashmap.HashMap(5, device=device)
    map.insert(torch.tensor([7, 9, 7, 9, 8], device=device))
    wanted = torch.tensor([9, 8, 7, 6, -1], device=device)
    assert map.lookup(wanted).tolist() == [1, 4, 0, -1, -1]
    map.insert(torch.tensor([6, 8], device=device), torch.tensor([60, 80], device=device))
    assert map.lookup(wanted).tolist() == [1, 80, 0, 60, -1]
    assert len(map) == 4


def test_a_full_table_is_an_error_and_stays_as_it_was(device):
    map = hashmap.HashMap(1000, torch.int32, torch.int32, device=device)
    map.insert(words(1000, torch.int32, device, 0))
    before = map.keys.clone(), map.values.clone()
    with pytest.raises(vg.ArgumentError, match="1000 slots for 1001 distinct keys"):
        map.insert(words(1001, torch.int32, device, 0))
    map.insert(words(1001, torch.int32, device, 0), check=False)
    assert torch.equal(map.keys, before[0]) and torch.equal(map.values, before[1])


def test_the_empty_mark_is_no_key(device):
    map = hashmap.HashMap(4, device=device)
    keys = torch.tensor([3, -1, -1, 4], device=device)
    with pytest.raises(vg.ArgumentError, match="row 1 is all ones"):
        map.insert(keys)
    assert len(map) == 0
    map.insert(keys, skip_empty=True)
    assert map.lookup(keys).tolist() == [0, -1, -1, 3]


def test_nothing_and_no_slots(device):
    map = hashmap.HashMap(0, device=device)
    map.insert(torch.empty(0, dtype=torch.int64, device=device))
    assert map.lookup(torch.tensor([1, -1], device=device)).tolist() == [-1, -1]
    with pytest.raises(vg.ArgumentError, match="0 slots for 1 distinct"):
        map.insert(torch.tensor([1], device=device))


def test_dtypes_must_be_the_tables(device):
    map = hashmap.HashMap(4, torch.int32, device=device)
    with pytest.raises(vg.ArgumentError, match=r"keys are torch.int64, expected .*torch.int32"):
        map.insert(torch.tensor([1], device=device))
    with pytest.raises(vg.ArgumentError, match="key_dtype is torch.float32"):
        hashmap.make_table(4, torch.float32)


@pytest.mark.parametrize("dtype", hashmap.DTYPES)
def test_keys_of_voxels(clouds, device, dtype):
    coords = clouds.random(200, extent=9, batch=3)
    keys = hashmap.voxel_keys(coords, (9, 8, 7), dtype)
    b, x, y, z = coords.long().T
    inside = (y < 8) & (z < 7)
    expected = torch.where(inside, ((b * 9 + x) * 8 + y) * 7 + z, -1)
    assert keys.dtype == dtype
    assert torch.equal(vg.columns.as_bits(keys).long(), expected)
    assert 0 < int(inside.sum()) < len(coords)
