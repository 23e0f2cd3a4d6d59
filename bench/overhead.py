#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a call costs on the host, in microseconds, beside torch.nn.functional.linear.

    python bench/overhead.py                     CPU, and CUDA where there is a device
    python bench/overhead.py --json times.jsonl

On the CPU the cloud is so small that computing it takes next to nothing, and what is counted is CPU
time, in which other programs do not show. On a GPU it has 1,000 voxels, and what is timed is how
long the host takes to queue the work, not the device to do it. With `graph` a CUDA graph of twenty
calls is replayed. Of several rounds the median is given and, behind it, the lowest. `calls` counts
the library's operators in one call, or one forward and backward. Where the drop-ins are installed,
the last lines say what each of their calls adds to the library's own that does the same; both run
the kernels of the model's choice.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import voxgemm as vg
from voxgemm import passes

ROUNDS = 15
# Long enough for the clock, short enough for the queue of a GPU (1,024 kernels) to take them all.
SECONDS = 0.02
QUEUED = 100
CHANNELS = 16
GRAPHED = 20
# The aim for one layer in eager mode: this many times the cost of linear, and so many microseconds.
FACTOR, EXTRA = 1.5, 15.0
# What a call of a drop-in may add to that of the library's function, forward, and again backward.
ADDED = 5.0


class Operators(TorchDispatchMode):
    """Counts the library's operators."""

    def __init__(self):
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.namespace == "voxgemm":
            self.names[operator.__name__.partition(".")[0]] += 1
        return operator(*arguments, **(keywords or {}))


def operators(function: Callable[[], object]) -> int:
    with Operators() as seen:
        function()
    return sum(seen.names.values())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds(function: Callable[[], object], device: torch.device) -> list[float]:
    """Microseconds a call, of each round."""
    for _ in range(20):
        function()
    wait(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    for _ in range(20):
        function()
    calls = max(10, int(SECONDS * 20 / (clock() - begin)))
    if device.type == "cuda":
        calls = min(calls, QUEUED)
    found = []
    for _ in range(ROUNDS):
        wait(device)
        begin = clock()
        for _ in range(calls):
            function()
        found.append(1e6 * (clock() - begin) / calls)
    wait(device)
    return found


def cloud(device: torch.device) -> torch.Tensor:
    """Coordinates of 8 voxels, or on a GPU of 1,000."""
    every = torch.cartesian_prod(*[torch.arange(2 if device.type == "cpu" else 10)] * 3)
    return F.pad(every, (1, 0)).int().to(device)


class Empty(torch.autograd.Function):
    """What autograd takes for a layer of two operands that computes nothing."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def step(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward; the incoming gradient is made once."""
    dy = torch.ones_like(function())
    return lambda: torch.autograd.grad(function(), leaves, dy)


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    torch.manual_seed(0)
    coords = cloud(device)
    x = torch.randn(len(coords), CHANNELS, device=device)
    dense = torch.nn.Linear(CHANNELS, CHANNELS).to(device)
    layer = vg.nn.SubmConv3d(CHANNELS, CHANNELS, 3).to(device)
    map = vg.build_map(coords, 3)
    leaf = x.clone().requires_grad_()
    tensor, traced = vg.SparseTensor(x, coords), vg.SparseTensor(leaf, coords)
    plain, own = list(dense.parameters()), list(layer.parameters())
    outputs = vg.output_coords(coords, vg.Geometry((2, 2, 2), (2, 2, 2)))
    frozen = [p.detach() for p in (*plain, *own)]

    yield "mm", lambda: torch.mm(x, frozen[0])
    yield "linear, no gradient", lambda: F.linear(x, *frozen[:2])
    yield "linear, forward", lambda: F.linear(leaf, *plain)
    yield "linear, forward and backward", step(lambda: F.linear(leaf, *plain), [leaf, *plain])
    yield (
        "empty Function, forward and backward",
        step(lambda: Empty.apply(leaf, own[0]), [leaf, own[0]]),
    )
    how = passes.How(vg.functional.filters_of(None), vg.functional.precision_of(None, x))
    given = x, frozen[2]
    yield "operator, forward", lambda: passes.run_forward(*given, None, map, how)
    yield "operator, gradient of the input", lambda: passes.grad_input(*given, map, how)
    conv3d = vg.functional.conv3d
    yield "conv3d, no gradient", lambda: conv3d(x, *frozen[2:], map)
    yield "conv3d, forward", lambda: conv3d(leaf, *own, map)
    yield "conv3d, forward and backward", step(lambda: conv3d(leaf, *own, map), [leaf, *own])
    yield "nn.Linear, forward", lambda: dense(leaf)
    yield "nn.SubmConv3d, forward", lambda: layer(traced)
    yield "SparseTensor", lambda: vg.SparseTensor(x, coords)
    yield "build_map", lambda: vg.build_map(coords, 3)
    yield "build_map and conv3d", lambda: conv3d(x, *frozen[2:], vg.build_map(coords, 3))
    yield "build_map, strided", lambda: vg.build_map(coords, 2, out_coords=outputs, stride=2)
    with torch.no_grad():
        layer(tensor)
    if device.type == "cuda":
        with torch.no_grad():
            for name, function in (
                ("linear", lambda: F.linear(x, *frozen[:2])),
                ("conv3d", lambda: conv3d(x, *frozen[2:], map)),
            ):
                yield f"{name}, no gradient, graph", replay(function)


Case = tuple[str, Callable[[], torch.Tensor], list[torch.Tensor]]  # and what wants a gradient


def flex_gemm_cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """The library's call, and flex_gemm's that does the same."""
    from flex_gemm.ops import spconv
    from flex_gemm.ops.grid_sample import grid_sample_3d

    coords, *leaves = operands(device)
    x, weight, bias = leaves
    box = (coords.amax(0) + 1).tolist()
    shape = (1, CHANNELS, *box[1:])
    subm, down = spconv.sparse_submanifold_conv3d, spconv.sparse_conv3d
    _, cache = subm(x, coords, shape, weight, bias)
    config, map = cache.freeze(algorithm="implicit_gemm"), vg.build_map(coords, 3)
    two = (2, 2, 2)
    _, rows, strided = down(x, coords, shape, weight, bias, stride=two)
    half = vg.build_map(coords, 3, out_coords=rows, stride=2)
    points = torch.rand(1, 8, 3, device=device) * box[1]
    before = spconv.ALGORITHM
    spconv.set_algorithm("implicit_gemm")  # as the model chooses for conv3d
    for name, on, theirs in (
        ("sparse_submanifold_conv3d", map, lambda: subm(x, coords, shape, weight, bias, cache)[0]),
        ("with a config", map, lambda: subm(x, weight=weight, bias=bias, config=config)),
        (
            "sparse_conv3d",
            half,
            lambda: down(x, coords, shape, weight, bias, strided, None, two)[0],
        ),
    ):
        own = functools.partial(vg.functional.conv3d, x, weight, bias, on)
        yield ("conv3d", own, leaves), (name, theirs, leaves)
    spconv.set_algorithm(before)
    yield (
        ("sample", lambda: vg.sampling.sample(x, coords, points.view(-1, 3)), [x]),
        ("grid_sample_3d", lambda: grid_sample_3d(x, coords, shape, points), [x]),
    )


def warpconvnet_cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """The library's call, and warpconvnet's that does the same."""
    from warpconvnet import constants
    from warpconvnet.geometry.types.voxels import Voxels
    from warpconvnet.nn import functional, modules

    constants.WARPCONVNET_BENCHMARK_CACHE_DIR = tempfile.mkdtemp()
    coords, x, *_ = operands(device)
    sparse = vg.SparseTensor(x, coords)
    voxels = Voxels(coords[:, 1:].contiguous(), x, [0, len(coords)])
    width = (CHANNELS, CHANNELS)
    for own, theirs in (
        (vg.nn.SubmConv3d(*width, 3), modules.SparseConv3d(*width, 3)),
        (vg.nn.SparseConv3d(*width, 2, stride=2), modules.SparseConv3d(*width, 2, stride=2)),
    ):
        own.to(device), theirs.to(device)
        name = f"SparseConv3d of {tuple(own.kernel_size)}"
        yield (
            (type(own).__name__, lambda own=own: own(sparse).features, [x, *own.parameters()]),
            (name, lambda theirs=theirs: theirs(voxels).feature_tensor, [x, *theirs.parameters()]),
        )
    own = vg.nn.SubmConv3d(*width, 3).to(device)
    given = [torch.randn(n, device=device, requires_grad=True) for n in ((27, *width), CHANNELS)]
    conv = functional.spatially_sparse_conv
    yield (
        ("SubmConv3d", lambda: own(sparse).features, [x, *own.parameters()]),
        (
            "spatially_sparse_conv",
            lambda: conv(voxels, given[0], 3, bias=given[1]).feature_tensor,
            [x, *given],
        ),
    )
    taps = torch.randn(27, CHANNELS, device=device, requires_grad=True)
    pairs = functional.generate_output_coords_and_kernel_map(voxels, 3, 1, 1)[2]
    map, by_tap = vg.build_map(coords, 3), functional.spatially_sparse_depthwise_conv
    yield (
        (
            "depthwise_conv3d",
            lambda: vg.depthwise.depthwise_conv3d(x, taps, None, map),
            [x, taps],
        ),
        (
            "spatially_sparse_depthwise_conv",
            lambda: by_tap(x, taps, pairs, len(coords)),
            [x, taps],
        ),
    )


def operands(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Coordinates, features, weight and bias; all but the first want a gradient."""
    coords = cloud(device)
    shapes = (len(coords), CHANNELS), (CHANNELS, 3, 3, 3, CHANNELS), (CHANNELS,)
    return coords, *(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)


def added(device: torch.device) -> Iterator[dict[str, object]]:
    """What each call of a drop-in adds to the library's, forward, and forward and backward."""
    for package, cases_of in (("flex_gemm", flex_gemm_cases), ("warpconvnet", warpconvnet_cases)):
        if importlib.util.find_spec(package) is None:
            continue
        for (of, own, own_leaves), (name, theirs, leaves) in cases_of(device):
            # Where sums must repeat, warpconvnet measures nothing: the model chooses on both sides,
            # and what it chose stays with the map.
            torch.use_deterministic_algorithms(True)
            try:
                steps = step(own, own_leaves), step(theirs, leaves)
                steps[1]()
            finally:
                torch.use_deterministic_algorithms(False)
            yield {
                "device": device.type,
                "name": f"{package}: {name}",
                "of": of,
                "added_us": difference(own, theirs, device),
                "added_twice_us": difference(*steps, device),
            }


def difference(
    library: Callable[[], object], theirs: Callable[[], object], device: torch.device
) -> float:
    """Microseconds between the lowest rounds, the two taking turns."""
    found = [rounds(function, device) for _ in range(2) for function in (library, theirs)]
    return min(found[1] + found[3]) - min(found[0] + found[2])


def replay(function: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPHED):
            function()
    return graph.replay


def measure(device: torch.device) -> Iterator[dict[str, object]]:
    for name, function in cases(device):
        share = GRAPHED if name.endswith("graph") else 1
        found = [us / share for us in rounds(function, device)]
        yield {
            "device": device.type,
            "name": name,
            "us": statistics.median(found),
            "lowest_us": min(found),
            "calls": operators(function),
        }


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"{'':34s}{'us':>9s}{'lowest':>9s}{'calls':>7s}"]
    for row in rows:
        lines.append(f"{row['name']:34s}{row['us']:9.1f}{row['lowest_us']:9.1f}{row['calls']:7d}")
    time_of = {row["name"]: row["us"] for row in rows}
    for kind in ("no gradient", "forward"):
        limit = FACTOR * time_of[f"linear, {kind}"] + EXTRA
        layer = time_of[f"conv3d, {kind}"]
        lines.append(
            f"conv3d, {kind}: {layer:.1f} us; {FACTOR} x linear + {EXTRA:.0f} us = {limit:.1f} us: "
            f"{'within' if layer <= limit else 'over'}"
        )
    return "\n".join(lines)


def table_of_added(rows: list[dict[str, object]]) -> str:
    lines = [f"{'added to the library by':45s}{'forward':>9s}{'and backward':>14s}"]
    for row in rows:
        kept = row["added_us"] <= ADDED and row["added_twice_us"] <= 2 * ADDED
        lines.append(
            f"{row['name']:45s}{row['added_us']:9.1f}{row['added_twice_us']:14.1f}"
            f"  over {row['of']}: {'within' if kept else 'over'}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), action="append")
    parser.add_argument("--json", metavar="PATH", help="a line a case")
    options = parser.parse_args(arguments)
    devices = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    every = []
    try:
        for kind in devices:
            device = torch.device(kind)
            rows = list(measure(device))
            name = "CPU" if kind == "cpu" else torch.cuda.get_device_name(device)
            voxels = len(cloud(device))
            print(f"{name}, torch {torch.__version__}, {voxels} voxels, {CHANNELS} channels")
            print(table(rows), flush=True)
            every += rows
            if more := list(added(device)):
                print(table_of_added(more), flush=True)
                every += more
    finally:
        torch.set_num_threads(threads)
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps({**row, "torch": torch.__version__}) + "\n" for row in every)
    return every


if __name__ == "__main__":
    main()
