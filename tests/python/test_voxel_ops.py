# SPDX-License-Identifier: Apache-2.0
"""The operators beside convolution under torch's own checks, and in traced graphs."""

from __future__ import annotations

import pytest
import torch

from voxgemm import hashmap, serialization

CURVE = [1, 4, 0, 1, 2, 0, 0, 0]

OPERATORS = (
    "_curve_encode",
    "_curve_decode",
    "_sort_codes",
    "_hash_insert",
    "_check_hash_insert",
    "_hash_lookup",
    "_voxel_keys",
)


@pytest.fixture
def calls(clouds, device):
    """An example call of every operator."""
    coords = clouds.random(50)
    codes = serialization.encode(coords, 4)
    table = hashmap.make_table(64, torch.int64, torch.int32, device)
    status = torch.tensor([50, -1], device=device)
    return {
        "_curve_encode": (coords, CURVE, True),
        "_curve_decode": (codes, CURVE),
        "_sort_codes": (codes,),
        "_hash_insert": (*table, codes, None, False),
        "_check_hash_insert": (*table, status),
        "_hash_lookup": (*table, codes),
        "_voxel_keys": (coords, [8, 8, 8], False),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, calls):
    torch.library.opcheck(getattr(torch.ops.voxgemm, name).default, calls[name])


def test_a_traced_graph_encodes_and_looks_up(clouds):
    def find(coords, keys):
        codes = serialization.encode(coords, 4, curve="hilbert")
        table = hashmap.make_table(64, torch.int64, torch.int32, coords.device)
        hashmap.insert(*table, codes)
        return hashmap.lookup(*table, keys), serialization.decode(codes, 4, curve="hilbert")

    coords = clouds.random(50)
    keys = torch.arange(1 << 13, device=coords.device)
    torch._dynamo.reset()
    traced = torch.compile(find, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(traced(coords, keys), find(coords, keys), strict=True):
        assert torch.equal(actual, expected)
