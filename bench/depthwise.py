#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times depthwise convolution of 3^3 taps beside copying.

    python bench/depthwise.py
    python bench/depthwise.py --device cpu --cloud shell:48 --json depthwise.jsonl

us of each pass, medians, for rows in raster order, in Morton order and in none. `copy` is how long
moving as many bytes takes as a pass must: x, y and the table of the map once; `of copy` is that
over the time of the forward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

import voxgemm
from voxgemm import bench, depthwise, serialization
from voxgemm.machine import write_rows
from voxgemm.table import table

PASSES = ("forward", "grad_input", "grad_weight")
LAYERS = (
    *((torch.float16, channels) for channels in (16, 32, 64, 128, 256)),
    *((torch.float32, channels) for channels in (64, 128)),
)


def orders(cloud: str, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    coords = bench.coords_of(cloud).to(device)
    yield "raster", coords
    yield "morton", coords[serialization.curve_order(coords).permutation]
    draw = torch.Generator().manual_seed(0)
    yield "none", coords[torch.randperm(len(coords), generator=draw).to(device)]


def rows(cloud: str, device: torch.device) -> Iterator[dict[str, Any]]:
    def microseconds(work: Callable[[], Any]) -> float:
        return 1e6 * bench.median_seconds(work, device, rounds=5)

    for order, coords in orders(cloud, device):
        map = voxgemm.build_map(coords, 3)
        for dtype, channels in LAYERS:
            x = torch.randn(len(coords), channels, device=device).to(dtype)
            weight = torch.randn(map.taps, channels, device=device).to(dtype)
            dy = torch.randn_like(x)
            works: tuple[Callable[[], Any], ...] = (
                lambda: depthwise.forward_rows(x, weight, None, map),  # noqa: B023
                lambda: depthwise.input_gradient(dy, weight, map),  # noqa: B023
                lambda: depthwise.weight_gradient(x, dy, map),  # noqa: B023
            )
            # Copying reads as much as it writes.
            half = torch.empty((2 * x.nbytes + map.neighbours.nbytes) // 2, dtype=torch.uint8)
            half = half.to(device)
            other = torch.empty_like(half)
            yield {
                "order": order,
                "dtype": str(dtype).removeprefix("torch."),
                "channels": channels,
                "voxels": len(coords),
                **{name: microseconds(work) for name, work in zip(PASSES, works, strict=True)},
                "copy": microseconds(lambda: other.copy_(half)),  # noqa: B023
            }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cloud", default="shell:512", help="as in voxgemm bench")
    parser.add_argument("--json", help="also write the times here, a line for each layer")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    found = list(rows(options.cloud, device))
    write_rows(options.json, found, device)
    lines = [
        [f"{row['order']} {row['dtype']} {row['channels']}"]
        + [f"{row[name]:.1f}" for name in (*PASSES, "copy")]
        + [f"{row['copy'] / row['forward']:.2f}"]
        for row in found
    ]
    print(table(["layer", *PASSES, "copy", "of copy"], lines))


if __name__ == "__main__":
    main()
