#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""By how much the first call of a layer's shape takes longer than the second, in milliseconds.

    python bench/first_calls.py --device cuda
    python bench/first_calls.py --device cpu --threads 1 --json first_calls.jsonl

Random shapes (channels, dtype, kernel size and stride) follow each other in one process, each for
the first time, after one layer of one channel has run. Every call has a map of its own, made before
the clock starts, as every step of a training has: what a map's first use costs is in both calls.
Timed is what a caller waits for, the device's work included (on the CPU: CPU time, in which other
programs do not show): forward without gradients, then, of the same shape, forward and backward.

On the CPU the process has had some memory before. Pages that it touches for the first time cost
0.3 ms a MB, whatever wants them: --cold-memory leaves that in.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import voxgemm as vg
from voxgemm import bench

CLOUDS = {"cpu": "shell:12", "cuda": "shell:96"}
WIDTHS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
DTYPES = {"cpu": ("f32", "bf16", "f16"), "cuda": ("f16", "bf16", "f32", "tf32", "bf16x3")}
OPERATIONS = ("subm3", "subm3", "subm3", "conv3s2p1", "conv2s2", "subm5", "subm1")
# What a first call may take beyond the second.
MOST_MS = 2.0


def shapes(device: str, count: int) -> list[str]:
    draw = random.Random(0)
    found: list[str] = []
    while len(found) < count:
        c_in, c_out = draw.choice(WIDTHS), draw.choice(WIDTHS)
        layer = f"{draw.choice(OPERATIONS)} {c_in}->{c_out}"
        text = f"step {draw.choice(DTYPES[device])} {layer} {CLOUDS[device]}"
        if text not in found:
            found.append(text)
    return found


class Shape:
    """A layer's operands, and calls of it with a map of their own."""

    def __init__(self, text: str, coords: torch.Tensor):
        self.problem, self.coords = bench.parse(text), coords
        self.filters = bench.filters(None, None)
        one = bench.build_map(self.problem, coords)
        layer = bench.Layer(self.problem, one, self.filters)
        self.x, self.weight, self.dy = layer.x, layer.weight, layer.dy

    def forward(self, map: vg.KernelMap) -> None:
        with torch.no_grad():
            self._call(map)

    def step(self, map: vg.KernelMap) -> None:
        leaves = (self.x.requires_grad_(), self.weight.requires_grad_())
        torch.autograd.grad(self._call(map), leaves, self.dy)

    def _call(self, map: vg.KernelMap) -> torch.Tensor:
        how = vg.passes.How(self.filters, self.problem.precision)
        return vg.passes.Forward.apply(self.x, self.weight, None, map, how)

    def milliseconds(self, call: Callable[[Any], None]) -> float:
        map = bench.build_map(self.problem, self.coords)
        map.settle(wait=True)
        clock = time.perf_counter if self.coords.is_cuda else time.process_time
        wait(self.coords.device)
        start = clock()
        call(map)
        wait(self.coords.device)
        return 1e3 * (clock() - start)

    def kernels(self) -> list[str]:
        map = bench.build_map(self.problem, self.coords)
        asked = [bench.asked_of(self.problem, self.filters, work) for work in bench.PASSES]
        return [map.choice(each).kernel for each in asked]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def grow_memory(megabytes: int = 512) -> None:
    """Has the C library keep so much memory of what it gave and got back."""
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    for parameter in (trim_threshold, mmap_threshold):
        ctypes.CDLL(None).mallopt(parameter, 1 << 30)
    torch.ones(megabytes << 20, dtype=torch.uint8)


def warm_up(coords: torch.Tensor) -> None:
    shape = Shape("step f32 subm1 1->1 warm-up", coords[:2])
    shape.milliseconds(shape.forward)
    shape.milliseconds(shape.step)


def measured(texts: list[str], device: torch.device) -> list[dict[str, Any]]:
    coords = bench.coords_of(CLOUDS[device.type]).to(device)
    start = time.perf_counter()
    warm_up(coords)
    print(f"the very first layer: {1e3 * (time.perf_counter() - start):.0f} ms")
    seen: set[str] = set()
    rows = []
    for text in texts:
        shape = Shape(text, coords)
        row: dict[str, Any] = {"shape": text}
        for name, call in (("forward", shape.forward), ("step", shape.step)):
            first, second = shape.milliseconds(call), shape.milliseconds(call)
            row[name] = {"first_ms": first, "second_ms": second, "more_ms": first - second}
        row["new_kernels"] = [k for k in dict.fromkeys(shape.kernels()) if k not in seen]
        seen.update(row["new_kernels"])
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    print("| | shapes | median | p95 | worst | above 2 ms |\n|---|---|---|---|---|---|")
    for name in ("forward", "step"):
        more = sorted(row[name]["more_ms"] for row in rows)
        above = sum(ms > MOST_MS for ms in more)
        numbers = (statistics.median(more), more[round(0.95 * (len(more) - 1))], more[-1])
        words = " | ".join(f"{number:.2f}" for number in numbers)
        print(f"| {name} | {len(more)} | {words} | {above} |")
    for name in ("forward", "step"):
        for row in sorted(rows, key=lambda row: -row[name]["more_ms"])[:5]:
            found = row[name]
            times = f"{found['first_ms']:.2f} ms, then {found['second_ms']:.2f}"
            print(f"{name}: {times}: {row['shape']}; new: {', '.join(row['new_kernels']) or '-'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; default: torch's")
    parser.add_argument("--cold-memory", action="store_true")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu" and not options.cold_memory:
        grow_memory()
    rows = measured(shapes(options.device, options.shapes), torch.device(options.device))
    report(rows)
    if options.json:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path(options.json).write_text(lines)


if __name__ == "__main__":
    sys.exit(main())
