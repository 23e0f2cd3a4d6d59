#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Eager maps and training steps beside spconv's on one host, in turns, microseconds.

    python bench/beside_spconv.py
    python bench/beside_spconv.py --json times.jsonl

Small clouds are bound by the host, and hosts differ by two times and more: only what ran in one
process can be compared. Each contender runs bursts of 40 calls between two CUDA events, after a
rest and ten untimed calls, one contender after the other; of nine rounds the lowest, the median and
the highest. A map: ours with the schedules of a training step's three passes, and alone; spconv's
pairs for training (MaskImplicitGemm). A step: forward and both gradients in f16 on a map that is
there, without bias; `linear` is torch's own, of the same rows. Needs a CUDA device and spconv.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from voxgemm import bench, bench_cuda
from voxgemm.functional import filters_of
from voxgemm.machine import write_rows
from voxgemm.table import table

ROUNDS = 9
CALLS = 40
REST_SECONDS = 0.03
# Resolution of a shell and channels, of maps; of steps those of at most so many channels.
LAYERS = ((64, 1024), (64, 128), (128, 512), (128, 64), (256, 256), (256, 32), (512, 128))
MOST_STEP_CHANNELS = 128


def burst(work: Callable[[], Any]) -> float:
    time.sleep(REST_SECONDS)
    for _ in range(CALLS // 4):
        work()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        work()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / CALLS


def in_turns(problem: str, voxels: int, works: dict[str, Callable[[], Any]]) -> list[dict]:
    for work in works.values():
        for _ in range(3):
            work()
    laps: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            laps[name].append(burst(work))
    return [{"problem": problem, "voxels": voxels, "of": n, "us": us} for n, us in laps.items()]


def maps(sparse: Any, resolution: int, channels: int, options: bench.Options) -> list[dict]:
    problem = bench.parse(f"map f16 subm3 {channels}->{channels} shell:{resolution}")
    coords = bench.coords_of(problem.cloud).to(options.device)
    box, three = [resolution + 1] * 3, [3] * 3
    ones, zeros = [1] * 3, [0] * 3

    def pairs() -> Any:
        return sparse.ops.get_indice_pairs_implicit_gemm(
            *(coords, 1, box, sparse.ConvAlgo.MaskImplicitGemm, three, ones, ones, ones, zeros),
            subm=True,
            is_train=True,
        )

    works = {
        "map and schedules": functools.partial(bench_cuda._build, problem, coords, options),
        "map alone": functools.partial(bench.build_map, problem, coords),
        "spconv": pairs,
    }
    return in_turns(problem.text, len(coords), works)


def steps(sparse: Any, resolution: int, channels: int, options: bench.Options) -> list[dict]:
    problem = bench.parse(f"step f16 subm3 {channels}->{channels} shell:{resolution}")
    coords = bench.coords_of(problem.cloud).to(options.device)
    layer = bench_cuda.Layer(problem, bench.build_map(problem, coords), options.filters)
    algorithm = sparse.ConvAlgo.MaskImplicitGemm
    conv = sparse.SubMConv3d(channels, channels, 3, bias=False, indice_key="map", algo=algorithm)
    conv = conv.to(options.device).half()
    rows = layer.x.detach().clone().requires_grad_()
    weight = torch.randn_like(rows[:channels]).requires_grad_()
    theirs = sparse.SparseConvTensor(rows, coords, [resolution + 1] * 3, 1)
    works = {
        "ours": bench_cuda._step(layer),
        "spconv": lambda: torch.autograd.grad(conv(theirs).features, (rows, conv.weight), layer.dy),
        "linear": lambda: torch.autograd.grad(F.linear(rows, weight), (rows, weight), layer.dy),
    }
    return in_turns(problem.text, len(coords), works)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="also write the times here, a line for each contender")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU, expected one")
    try:
        import spconv.pytorch as sparse
    except ImportError as error:
        sys.exit(f"spconv is not there ({error}), expected the package of a CUDA 12")
    device = torch.device("cuda")
    options = bench.Options([1], ROUNDS, filters_of(None), device=device)
    found = []
    for resolution, channels in LAYERS:
        found += maps(sparse, resolution, channels, options)
        if channels <= MOST_STEP_CHANNELS:
            found += steps(sparse, resolution, channels, options)
    write_rows(arguments.json, found, device)
    header = ["problem", "voxels", "of", "least", "median", "most"]
    lines = [
        [row["problem"], f"{row['voxels']:,}", row["of"]]
        + [f"{of(row['us']):.1f}" for of in (min, statistics.median, max)]
        for row in found
    ]
    print(table(header, lines))


if __name__ == "__main__":
    main()
