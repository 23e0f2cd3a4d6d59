# SPDX-License-Identifier: Apache-2.0
"""What a map on a CUDA device tells the host."""

from __future__ import annotations

import pytest
import torch

import voxgemm as vg
from voxgemm.status import Status

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


def cloud() -> torch.Tensor:
    axes = [torch.arange(extent) for extent in (1, 10, 6, 5)]
    return torch.cartesian_prod(*axes).int().cuda()


def test_it_is_read_whenever_it_is_wanted():
    coords = cloud()
    slots = []
    for _ in range(3):
        maps = [vg.build_map(coords, 3) for _ in range(20)]
        torch.cuda.synchronize()
        for map in maps[::2]:  # the others are never asked
            map.settle(wait=False)
            assert len(map.in_first) == 0
        del map, maps
        slots.append(len(Status._free) + len(Status._left))
    assert slots[0] == slots[2] >= 20


def test_it_is_waited_for_in_any_stream():
    coords = cloud().repeat(500, 1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        map = vg.build_map(coords, 3)
    map.settle(wait=False)
    assert map._status is not None
    back = map.transposed()
    map.settle(wait=True)
    assert map._status is None and len(map.in_first) == 500 * 300
    back.settle(wait=True)
    assert back._status is None and len(back.out_first) == 500 * 300
