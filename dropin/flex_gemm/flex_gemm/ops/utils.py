# SPDX-License-Identifier: Apache-2.0
"""Empty hash tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from voxgemm import hashmap

from ..errors import expect, speaking


@speaking
def init_hashmap(
    spatial_size: Sequence[int],
    hashmap_size: int,
    device: torch.device | str,
    with_values: bool = True,
) -> tuple[Tensor, Tensor] | Tensor:
    """Keys [hashmap_size] for the voxels of a box (N, C, W, H, D), and values.

    Keys are uint32 below 2^32 voxels, else uint64, all ones; values are uint32.
    """
    voxels = math.prod(int(n) for n in (spatial_size[0], *spatial_size[-3:]))
    expect(voxels < 2**64, f"a box of {tuple(spatial_size)} has {voxels} voxels, expected < 2^64")
    dtype = torch.uint32 if voxels < 2**32 else torch.uint64
    keys, values = hashmap.make_table(int(hashmap_size), dtype, torch.uint32, device)
    return (keys, values) if with_values else keys
