#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""By how much the first call of a layer's shape takes longer than the second, in milliseconds.

    python bench/first_calls.py --device cuda
    python bench/first_calls.py --device cpu --threads 1 --processes 5 --json first_calls.jsonl

Random shapes (channels, dtype, kernel size and stride) follow each other in one process, each for
the first time, after one layer of one channel has run. Every call has a map of its own, made before
the clock starts, as every step of a training has: what a map's first use costs is in both calls.
Timed is what a caller waits for, the device's work included (on the CPU: CPU time, in which other
programs do not show): forward without gradients, then, of the same shape, forward and backward.

Both calls have the same memory. On the CPU that is memory which the process has had before; with
--cold-memory all that is free goes back to the system before either call, and both pay for their
pages anew. One process tells a shape's first call from the machine's noise badly: --processes runs
several and takes the median of each figure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
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

    def __init__(self, text: str, coords: torch.Tensor, cold_memory: bool = False):
        self.problem, self.coords, self.cold_memory = bench.parse(text), coords, cold_memory
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
        if self.cold_memory:
            ctypes.CDLL(None).malloc_trim(0)
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


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of this process, a row for each shape."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu" and not options.cold_memory:
        grow_memory()
    coords = bench.coords_of(CLOUDS[options.device]).to(options.device)
    start = time.perf_counter()
    warm_up(coords)
    print(f"the very first layer: {1e3 * (time.perf_counter() - start):.0f} ms")
    seen: set[str] = set()
    rows = []
    for text in shapes(options.device, options.shapes):
        shape = Shape(text, coords, options.cold_memory)
        row: dict[str, Any] = {"shape": text}
        for name, call in (("forward", shape.forward), ("step", shape.step)):
            first, second = shape.milliseconds(call), shape.milliseconds(call)
            row[name] = {"first_ms": first, "second_ms": second}
        row["new_kernels"] = [k for k in dict.fromkeys(shape.kernels()) if k not in seen]
        seen.update(row["new_kernels"])
        rows.append(row)
    return rows


def more(row: dict[str, Any], name: str) -> float:
    return float(row[name]["first_ms"] - row[name]["second_ms"])


def medians(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each shape the run whose first call has the median difference to its second."""
    rows = []
    for same in zip(*runs, strict=True):
        row = dict(same[0])
        for name in ("forward", "step"):
            row[name] = sorted(same, key=lambda each: more(each, name))[len(same) // 2][name]
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    print("| | shapes | median | p95 | worst | above 2 ms |\n|---|---|---|---|---|---|")
    for name in ("forward", "step"):
        found = sorted(more(row, name) for row in rows)
        numbers = (statistics.median(found), found[round(0.95 * (len(found) - 1))], found[-1])
        words = " | ".join(f"{number:.2f}" for number in numbers)
        print(f"| {name} | {len(found)} | {words} | {sum(ms > MOST_MS for ms in found)} |")
    for name in ("forward", "step"):
        for row in sorted(rows, key=lambda row: -more(row, name))[:5]:
            times = f"{row[name]['first_ms']:.2f} ms, then {row[name]['second_ms']:.2f}"
            print(f"{name}: {times}: {row['shape']}; new: {', '.join(row['new_kernels']) or '-'}")


def of_processes(count: int, arguments: list[str]) -> list[dict[str, Any]]:
    from tqdm import tqdm

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        for _ in tqdm(range(count), "processes"):
            again = [*arguments, "--processes", "1", "--json", str(path)]
            command = [sys.executable, __file__, *again]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            runs.append([json.loads(line) for line in path.read_text().splitlines()])
    return medians(runs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; default: torch's")
    parser.add_argument("--cold-memory", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", help="a file for all figures")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    one = options.processes == 1
    rows = measured(options) if one else of_processes(options.processes, arguments)
    report(rows)
    if options.json:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path(options.json).write_text(lines)


if __name__ == "__main__":
    sys.exit(main())
