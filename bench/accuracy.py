#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The error against float64 of every kernel that runs on a device, in each arithmetic.

    python bench/accuracy.py
    python bench/accuracy.py --device cuda --json accuracy.jsonl

A line for each kernel and arithmetic: how many of the layers below it runs, and the largest
difference from sums in float64 of any of them, over their largest value, pass by pass. Features are
normal, weights as large as they are in a network. Then a table: the largest error of the kernels of
an algorithm in each arithmetic, of all passes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import voxgemm
from voxgemm import _library, bench
from voxgemm.errors import Unsupported
from voxgemm.functional import PASSES, KernelMap
from voxgemm.machine import write_rows
from voxgemm.table import table

# Channels in and out: one step of the matrix instructions, odd ones, the widths of all tiles.
WIDTHS = ((3, 5), (16, 16), (32, 32), (48, 33), (64, 64), (128, 128), (256, 256))
CLOUD = "shell:12"


def largest_errors(kernel: str, arithmetic: str, map: KernelMap) -> dict[str, Any]:
    """Of the layers that the kernel runs, by pass; `layers` is how many these are."""
    filters = bench.filters(kernel, None)
    errors: dict[str, Any] = {}
    layers = set()
    for work in PASSES:
        for c_in, c_out in WIDTHS:
            problem = bench.parse(f"{work} {arithmetic} subm3 {c_in}->{c_out} {CLOUD}")
            layer = bench.Layer(problem, map, filters)
            try:
                error = layer.error(work)
            except Unsupported:  # a layer for other kernels
                continue
            layers.add((c_in, c_out))
            errors[work] = max(error, errors.get(work, 0.0))
    return errors | {"layers": len(layers)}


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    map = voxgemm.build_map(bench.coords_of(CLOUD).to(device), 3)
    for dtype, kernels in sorted(_library.version_and_kernels()[1].items()):
        for kernel in sorted(kernels):
            if ("_cpu" in kernel) == (device.type == "cpu"):
                arithmetic = [*kernel.split("/"), dtype][1]
                found = largest_errors(kernel, arithmetic, map)
                yield {"kernel": kernel, "arithmetic": arithmetic} | found


def largest_of_families(found: list[dict[str, Any]]) -> str:
    """A table of the largest errors: a row for each algorithm, a column for each arithmetic."""
    largest: dict[str, dict[str, float]] = {}
    for row in found:
        errors = largest.setdefault(row["kernel"].split("/")[0], {})
        for work in PASSES:
            name = row["arithmetic"]
            errors[name] = max(row.get(work, 0.0), errors.get(name, 0.0))
    arithmetics = sorted({row["arithmetic"] for row in found})
    lines = [
        [family] + [f"{errors[name]:.1e}" if name in errors else "-" for name in arithmetics]
        for family, errors in sorted(largest.items())
    ]
    return table(["algorithm", *arithmetics], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the errors here, a line for each kernel")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found = list(rows(device))
    write_rows(arguments.json, found, device)

    def number(row: dict[str, Any], work: str) -> str:
        return f"{row[work]:.1e}" if work in row else "-"

    header = ["kernel", "arithmetic", "layers", *PASSES]
    lines = [
        [row["kernel"], row["arithmetic"], str(row["layers"])]
        + [number(row, work) for work in PASSES]
        for row in found
    ]
    print(table(header, lines))
    print()
    print(largest_of_families(found))


if __name__ == "__main__":
    main()
