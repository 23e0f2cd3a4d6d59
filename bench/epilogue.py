#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times forward passes with a residual and ReLU in their kernel, and behind it.

    python bench/epilogue.py
    python bench/epilogue.py --device cpu "forward f32 subm3 64->64 shell:64"

us a call, medians of rounds in which the four take turns: the convolution alone, with `add_` and
`relu_` behind it, with ReLU in its kernel, and with both there. On a GPU each is a replayed graph
of ten calls.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from voxgemm import bench, passes

PROBLEMS = [
    *(f"forward f16 subm3 {c}->{c} street:0.05" for c in (32, 64, 96)),
    "forward f16 subm3 128->128 shell:64",
    "forward f16 subm3 512->512 shell:128",
    "forward bf16x3 subm3 256->256 shell:128",
]
CALLS, ROUNDS = 10, 9


def repeated(work: Callable[[], Any], device: torch.device) -> bench.Contender:
    def calls() -> None:
        for _ in range(CALLS):
            work()

    work()
    wait = bench.waiting(device)
    if device.type == "cpu":
        return bench.Contender(calls, 0.0, wait=wait)
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return bench.Contender(graph.replay, 0.0, wait=wait)


def microseconds(text: str, device: torch.device) -> list[float]:
    problem = bench.parse(text)
    map = bench.build_map(problem, bench.coords_of(problem.cloud).to(device))
    layer = bench.Layer(problem, map, bench.filters(None, None))
    how = passes.How(layer.filters, problem.precision)
    residual = torch.randn_like(layer.dy)

    def run(*epilogue: Any) -> torch.Tensor:
        return passes.run_forward(layer.x, layer.weight, None, map, how, *epilogue)

    works: list[Callable[[], Any]] = [
        run,
        lambda: run().add_(residual).relu_(),
        lambda: run(None, True),
        lambda: run(residual, True),
    ]
    contenders = [repeated(work, device) for work in works]
    laps: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS):
        for times, contender in zip(laps, contenders, strict=True):
            times.append(contender.seconds())
    return [1e6 / CALLS * statistics.median(times) for times in laps]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", default=PROBLEMS, help="as in voxgemm bench")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    with torch.no_grad():
        for text in options.problems:
            times = microseconds(text, torch.device(options.device))
            print(text, *(f"{us:.1f}" for us in times), flush=True)


if __name__ == "__main__":
    main()
