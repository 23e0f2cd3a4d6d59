#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times pooling, segments and weighted sums, forward and backward, beside copying.

    python bench/row_operators.py
    python bench/row_operators.py --device cpu --cloud shell:48 --json operators.jsonl

us of each, medians, in rows of raster order. `floor` is how long copying takes that moves as many
bytes as the operator must: what it reads and what it writes, once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import voxgemm
from voxgemm import bench, pooling, sampling
from voxgemm.machine import write_rows
from voxgemm.table import table

LAYERS = (
    *((torch.float16, channels) for channels in (16, 64, 256)),
    *((torch.float32, channels) for channels in (16, 64)),
)
SEGMENTS = 5000
NEAR = 8  # rows of a weighted sum, as of a trilinear sample


def pass_back(y: Tensor, x: Tensor) -> Callable[[], Any]:
    dy = torch.randn_like(y)
    return partial(torch.autograd.grad, y, x, dy, retain_graph=True)


def operators(
    coords: Tensor, dtype: torch.dtype, channels: int
) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, work and bytes moved at least of every operator."""
    device, n = coords.device, len(coords)
    x = torch.randn(n, channels, device=device).to(dtype).requires_grad_()
    around = voxgemm.build_map(coords, 3)
    half = voxgemm.output_coords(coords, voxgemm.Geometry((2, 2, 2), (2, 2, 2)))
    down = voxgemm.build_map(coords, 2, out_coords=half, stride=2)
    for name, map in (("3^3", around), ("2^3 by 2", down)):
        for reduction in ("max", "mean"):
            y = pooling.pool(x, map, reduction)
            winners = y.numel() * 4 if reduction == "max" else 0
            moved = x.nbytes + y.nbytes + map.neighbours.nbytes + winners
            yield f"pool {name} {reduction}", partial(pooling.pool, x, map, reduction), moved
            yield f"pool {name} {reduction} back", pass_back(y, x), moved
    small = torch.randn(len(half), channels, device=device).to(dtype)
    moved = x.nbytes + small.nbytes + down.neighbours.nbytes
    yield "unpool 2^3 by 2", partial(pooling.unpool, small, down), moved
    draw = torch.Generator().manual_seed(0)
    segments = torch.randint(SEGMENTS, (n,), generator=draw).to(device)
    for name, column, count in (
        ("one segment", torch.zeros_like(segments), 1),
        (f"{SEGMENTS} segments", segments, SEGMENTS),
    ):
        for reduction in ("max", "mean"):
            work = partial(pooling.segment_reduce, x, column, count, reduction)
            yield f"{name} {reduction}", work, x.nbytes + column.nbytes
    near = torch.arange(n, device=device)[:, None] + torch.arange(NEAR, device=device)
    near = near.clamp(max=n - 1).int()
    weights = torch.rand(n, NEAR, device=device, requires_grad=True)
    moved = 2 * x.nbytes + near.nbytes + weights.nbytes
    yield "weighted sum", partial(sampling.weighted_sum, x, near, weights), moved
    y = sampling.weighted_sum(x, near, weights.detach())
    yield "weighted sum back to rows", pass_back(y, x), moved
    y = sampling.weighted_sum(x.detach(), near, weights)
    yield "weighted sum back to weights", pass_back(y, weights), moved


def rows(cloud: str, device: torch.device) -> Iterator[dict[str, Any]]:
    def microseconds(work: Callable[[], Any]) -> float:
        return 1e6 * bench.median_seconds(work, device, rounds=5)

    coords = bench.coords_of(cloud).to(device)
    # Copying reads as much as it writes.
    half = torch.empty(32 << 20, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    for dtype, channels in LAYERS:
        for name, work, moved in operators(coords, dtype, channels):
            copy = microseconds(lambda: other.copy_(half))
            yield {
                "operator": name,
                "dtype": str(dtype).removeprefix("torch."),
                "channels": channels,
                "voxels": len(coords),
                "us": microseconds(work),
                "floor": copy * moved / (half.nbytes + other.nbytes),
            }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cloud", default="shell:512", help="as in voxgemm bench")
    parser.add_argument("--json", help="also write the times here, a line for each")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    found = list(rows(options.cloud, device))
    write_rows(options.json, found, device)
    lines = [
        [row["operator"], f"{row['dtype']} {row['channels']}"]
        + [f"{row['us']:.1f}", f"{row['floor']:.1f}", f"{row['floor'] / row['us']:.2f}"]
        for row in found
    ]
    print(table(["operator", "rows", "us", "floor", "of floor"], lines))


if __name__ == "__main__":
    main()
