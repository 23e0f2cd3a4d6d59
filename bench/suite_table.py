#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/h200-suite.md, of files that `voxgemm bench --suite h200 --json` wrote, or
`--suite maps`.

    python bench/suite_table.py first.jsonl second.jsonl
    python bench/suite_table.py maps.jsonl

A line for each problem of the first file: what to reach, the times of every file (eager, compiled
where it has such steps, and as a graph, ms), how many times as long each peer takes as the faster
of eager and graph in the first file, the share of a dense product's rate, and the largest error
where the file has it (`--check`). Of a file of maps alone: voxels, and bytes of map and schedules a
voxel for inference and training.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

PEERS = ("FlexGEMM", "spconv", "WarpConvNet", "torchsparse")


def read(path: str) -> dict[str, dict[str, Any]]:
    """Rows by problem; of one that was measured again the last."""
    rows = map(json.loads, pathlib.Path(path).read_text().splitlines())
    return {row["problem"]: row for row in rows}


def best(row: dict[str, Any]) -> float:
    return float(min(row["ms"], row.get("graph_ms", row["ms"])))


def times(run: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Those that a file has: key by what the table calls them."""
    every = {"eager": "ms", "compiled": "compiled_ms", "graph": "graph_ms"}
    if not any("compiled_ms" in row for row in run.values()):
        del every["compiled"]
    return every


def cells(runs: list[dict[str, dict[str, Any]]], problem: str) -> list[str]:
    row = runs[0][problem]

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    line = [f"`{problem}`", number(row.get("target_ms"), ".3f")]
    for run in runs:
        found = run.get(problem, {})
        line += [number(found.get(key), ".3f") for key in times(run).values()]
    peers = row.get("peers_ms", {})
    line += [number(peers[name] / best(row) if name in peers else None, ".2f") for name in PEERS]
    line.append(number(row.get("of_dense"), ".0%"))
    errors = row.get("max_error")
    return [*line, number(max(errors.values()) if errors else None, ".0e")]


def table(runs: list[dict[str, dict[str, Any]]]) -> str:
    header = ["problem", "reach"]
    header += [f"{how} {k}" for k, run in enumerate(runs, 1) for how in times(run)]
    header += [f"{name} over ours" for name in PEERS] + ["of dense", "largest error"]
    lines = [header, ["---"] * len(header), *(cells(runs, problem) for problem in runs[0])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def map_table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["problem", "voxels", "reach", "best peer", "eager", "graph"]
    lines = [[*header, "bytes: inference", "training"]]
    lines.append(["---"] * len(lines[0]))
    for problem, row in rows.items():
        times = [row.get(key) for key in ("target_ms", "peer_ms", "ms", "graph_ms")]
        memory = [row[f"bytes_a_voxel_{use}"] for use in ("inference", "training")]
        shown = ["-" if time is None else f"{time:.3f}" for time in times]
        lines.append([f"`{problem}`", f"{row['voxels']:,}", *shown, *(f"{b:.0f}" for b in memory)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    runs = [read(path) for path in sys.argv[1:]]
    only_maps = all(problem.startswith("map ") for run in runs for problem in run)
    print(map_table(runs[0]) if only_maps else table(runs))
