# SPDX-License-Identifier: Apache-2.0
"""Times problems on a CUDA device, in the same interleaved rounds as bench.py does on the CPU.

Every figure is wall time of a burst of calls between two waits for the device, operands in whatever
cache the call before left them in. Before a burst the device rests: under lasting load its clock
falls by a tenth or two, and the peers' figures are of bursts. A quarter of the burst goes ahead of
it, untimed, since a host that rested is slow at first. `sustained_ms` is the last half of a
long burst, of eager or graph, whichever is faster.

`ms` is eager: a step is conv3d and its backward through autograd, a pass its operator, a map the
map (output voxels included) and the schedules of the three passes of its dtype and channels.
`graph_ms` is the same work captured and replayed, of a map with its number of output voxels as
`max_voxels`. `compiled_ms`, of steps of small clouds, is the eager step with its conv3d under
torch.compile (fullgraph=True), a function of features, weights and map: shown, not judged.
`compile_s`, in none of the times, is what the first two of these steps took. A graph that was
traced picks kernels in every call, which eager keeps with the map. The ceiling is torch.mm 8192^3
of the same dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import bench, functional, passes, targets
from .bench import Contender, Layer, Options, Problem
from .functional import PASSES, PRECISIONS, KernelMap
from .machine import provenance
from .table import table

_CEILING = (8192, 8192, 8192)
_REST_SECONDS = 0.05
# A device takes some tens of milliseconds to lower its clock.
_SUSTAINED_SECONDS = 0.2
# Up to here a step is bound by the host (H200, 64 thousand voxels of 64 channels: 0.38 ms eager,
# 0.115 as a graph), which is what a compiler could change; each one compiled costs seconds.
_MOST_COMPILED_VOXELS = 100_000
# The compiler's errors have pages.
_LONGEST_ERROR = 300


@functools.lru_cache(maxsize=1)
def _coords(where: str, device: torch.device) -> torch.Tensor:
    return bench.coords_of(where).to(device)


def _build(
    problem: Problem, coords: torch.Tensor, options: Options, max_voxels: int | None = None
) -> KernelMap:
    """What a training step needs before its first pass."""
    map = bench.build_map(problem, coords, max_voxels)
    map.choices([bench.asked_of(problem, options.filters, work) for work in PASSES])
    return map


def _bytes(map: KernelMap, works: tuple[str, ...], problem: Problem, options: Options) -> int:
    """Of the map and of what the choices of these passes keep, each tensor once."""
    tensors = map.tensors() if map._masks is None else [*map.tensors(), map._masks]
    for work in works:
        tensors += map.choice(bench.asked_of(problem, options.filters, work)).schedule
    if "grad_input" in works:
        tensors += map.backward_tensors()[1]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _step(layer: Layer) -> Callable[[], Any]:
    x, weight = layer.x.requires_grad_(), layer.weight.requires_grad_()
    how = passes.How(layer.filters, layer.problem.precision)

    def step() -> tuple[torch.Tensor, ...]:
        y = passes.Forward.apply(x, weight, None, layer.map, how)
        return torch.autograd.grad(y, (x, weight), layer.dy)

    return step


def _replayed(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The work as a graph; it has run before, so that what is built once is there."""
    torch.cuda.synchronize(device)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.append(work())

    def replay() -> list[Any]:
        graph.replay()
        return kept

    return replay


def _is_compiled(problem: Problem, voxels: int, options: Options) -> bool:
    """A filter is none of conv3d's arguments: there eager and graph must do."""
    small = problem.work == "step" and voxels <= _MOST_COMPILED_VOXELS
    return small and options.filters == functional.filters_of(None)


def _compiled_step(layer: Layer) -> Callable[[], Any]:
    """Its first call compiles."""
    x, weight = layer.x.requires_grad_(), layer.weight.requires_grad_()
    precision = PRECISIONS[layer.problem.precision]
    # After another problem the sizes of this one would be traced as unknown ones.
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def conv(x: torch.Tensor, weight: torch.Tensor, map: KernelMap) -> torch.Tensor:
        return functional.conv3d(x, weight, None, map, precision=precision)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(conv(x, weight, layer.map), (x, weight), layer.dy)

    return step


def _compiled(layer: Layer, eager: Contender, row: dict[str, Any]) -> dict[str, Contender]:
    """None where the compiler fails; how long it took, or what it said, is for the row."""
    try:
        from torch._inductor import config

        step = _compiled_step(layer)
        start = time.perf_counter()
        # Both graphs are calls of operators: processes that wait for kernels to compile would only
        # disturb the times. A second step compiles nothing, or else what would not last.
        with config.patch(compile_threads=1):
            step()
            step()
        eager.wait()
        row["compile_s"] = time.perf_counter() - start
    except Exception as error:  # of which a compiler has many
        row["compiled_error"] = textwrap.shorten(str(error), _LONGEST_ERROR)
        return {}
    return {"compiled": dataclasses.replace(eager, work=step)}


@contextmanager
def _products_like(precision: int) -> Iterator[None]:
    """torch.mm in TF32 where the problem is."""
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    flags.fp32_precision = "tf32" if PRECISIONS[precision] == "tf32" else "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before


@functools.lru_cache(maxsize=1)
def _warm_up(device: torch.device) -> None:
    """What the first backward of a process brings along belongs to no layer."""
    x = torch.ones(2, 1, device=device, requires_grad=True)
    map = functional.build_map(torch.zeros(2, 4, dtype=torch.int32, device=device), 1)
    weight = torch.ones(1, 1, 1, 1, 1, device=device, requires_grad=True)
    functional.conv3d(x, weight, None, map).sum().backward()


def _first_call_ms(work: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """By how much the first call of a layer's shape takes longer than the second."""
    laps = []
    for _ in range(2):
        wait()
        start = time.perf_counter()
        work()
        wait()
        laps.append(time.perf_counter() - start)
    return 1e3 * (laps[0] - laps[1])


def measure(problem: Problem, options: Options) -> list[dict[str, Any]]:
    """One row."""
    device = options.device
    with torch.cuda.device(device), _products_like(problem.precision):
        return [_measure(problem, options, device)]


def _measure(problem: Problem, options: Options, device: torch.device) -> dict[str, Any]:
    _warm_up(device)
    coords = _coords(problem.cloud, device)
    map = bench.build_map(problem, coords)
    pairs = map.pairs

    wait = bench.waiting(device)

    row = {
        "problem": problem.text,
        "voxels": len(coords),
        "rows_in": map.n_in,
        "rows_out": map.n_out,
        "pairs": pairs,
    }
    layer = None
    flops = 2.0 * pairs * problem.c_in * problem.c_out * len(problem.passes)
    if problem.work == "map":
        work = functools.partial(_build, problem, coords, options)
        room = map.n_in if problem.operation == "inverse" else map.n_out
        in_graph = functools.partial(_build, problem, coords, options, room)
    else:
        layer = Layer(problem, map, options.filters)
        if options.check:
            row["max_error"] = {work: layer.error(work) for work in problem.passes}
        work = (
            _step(layer) if problem.work == "step" else functools.partial(layer.run, problem.work)
        )
        in_graph = work
    row["first_call_ms"] = _first_call_ms(work, wait)
    contenders = {"ours": Contender(work, flops, wait=wait)}
    try:
        contenders["graph"] = Contender(_replayed(in_graph, device), flops, wait=wait)
    except (RuntimeError, ValueError) as error:
        row["graph_error"] = " ".join(str(error).split())
    if _is_compiled(problem, len(coords), options):
        contenders |= _compiled(layer, contenders["ours"], row)
    if layer is None:
        built = _build(problem, coords, options)
        for name, works in (("inference", PASSES[:1]), ("training", PASSES)):
            row[f"bytes_a_voxel_{name}"] = _bytes(built, works, problem, options) / len(coords)
    else:
        m, k, n = _CEILING
        ceiling = bench.product(_CEILING, problem.dtype, device)
        contenders["ceiling"] = Contender(ceiling, 2.0 * m * k * n, wait=wait)
        contenders["mm"] = bench.same_work(problem, pairs, device)
        contenders["mm"].wait = wait
        row["kernels"] = bench.kernels_of(problem, layer)
    for contender in contenders.values():
        contender.rest = _REST_SECONDS
    seconds = bench.times_of(contenders, options)
    times = {name: laps for (_, name), laps in seconds.items()}
    row |= _figures(problem, contenders, times)
    if layer is not None:
        row["sustained_ms"] = _sustained_ms(contenders["ours" if _eager_is_best(row) else "graph"])
    return row | provenance(device)


def _eager_is_best(row: dict[str, Any]) -> bool:
    return row["ms"] <= row.get("graph_ms", row["ms"])


def _sustained_ms(contender: Contender) -> float:
    """Of one call, once the device has worked without a pause for a while."""
    half = dataclasses.replace(contender, rest=0.0)
    half.calls = max(1, round(_SUSTAINED_SECONDS / 2 / half.seconds()))
    half.seconds()
    return 1e3 * half.seconds()


def _figures(
    problem: Problem, contenders: dict[str, Contender], times: dict[str, list[float]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in (("ours", "ms"), ("graph", "graph_ms"), ("compiled", "compiled_ms")):
        if name in times:
            found[key] = 1e3 * statistics.median(times[name])
            found[f"{key}_all"] = [1e3 * s for s in times[name]]
    if problem.work != "map":
        rates = {
            name: [contender.flops / s / 1e12 for s in times[name]]
            for name, contender in contenders.items()
        }
        best = "ours" if _eager_is_best(found) else "graph"
        found["tflops"] = statistics.median(rates[best])
        found["of_dense"] = found["tflops"] / targets.DENSE_TFLOPS
        for name in ("ceiling", "mm"):
            found[f"{name}_tflops"] = statistics.median(rates[name])
            found[f"of_{name}"] = bench.ratio(rates[best], rates[name])
    wanted = targets.figures(problem.text)
    if wanted:
        found["target_ms"] = wanted.reach
        if wanted.stretch:
            found["stretch_ms"] = wanted.stretch
        if wanted.peers:
            peer = min(wanted.peers, key=wanted.peers.__getitem__)
            found |= {"peer": peer, "peer_ms": wanted.peers[peer], "peers_ms": wanted.peers}
            found["peer_over_ms"] = wanted.peers[peer] / found["ms"]
            if "graph_ms" in found:
                found["peer_over_graph_ms"] = wanted.peers[peer] / found["graph_ms"]
    return found


_COLUMNS = {  # header: (key, format)
    "problem": ("problem", ""),
    "voxels": ("voxels", ",d"),
    "ms": ("ms", ".4f"),
    "compiled": ("compiled_ms", ".4f"),
    "graph": ("graph_ms", ".4f"),
    "sustained": ("sustained_ms", ".4f"),
    "reach": ("target_ms", ".4f"),
    "peer": ("peer", ""),
    "ms of it": ("peer_ms", ".3f"),
    "x peer": ("peer_over_ms", ".2f"),
    "graph x peer": ("peer_over_graph_ms", ".2f"),
    "TFLOP/s": ("tflops", ".1f"),
    f"% of {targets.DENSE_TFLOPS:.0f}": ("of_dense", ".1%"),
    "of ceiling": ("of_ceiling", ".2f"),
    "of mm": ("of_mm", ".2f"),
    "first +ms": ("first_call_ms", ".2f"),
    "B/voxel": ("bytes_a_voxel_training", ".0f"),
}


def _mean_of_steps(rows: list[dict[str, Any]], key: str) -> str:
    """The geometric mean over the shells' 16-bit steps."""
    steps = [r for r in rows if r["problem"].startswith(("step f16 subm3", "step bf16 subm3"))]
    ratios = [r[key] for r in steps if key in r]
    return f"{statistics.geometric_mean(ratios):.2f} ({len(ratios)} shells)" if ratios else "-"


def summary(rows: list[dict[str, Any]], options: Options) -> str:
    """The table of what `bench.run` gave with `measure`."""
    lines = []
    for row in rows:
        line = [format(row[key], form) if key in row else "-" for key, form in _COLUMNS.values()]
        line.append(f"{max(row['max_error'].values()):.1e}" if "max_error" in row else "-")
        lines.append(line)
    header = [*_COLUMNS, "max error"]
    used = [c for c in range(len(header)) if any(line[c] != "-" for line in lines)]
    text = [table([header[c] for c in used], [[line[c] for c in used] for line in lines])]
    judged = [row for row in rows if "target_ms" in row]
    if judged:
        best = [min(row["ms"], row.get("graph_ms", row["ms"])) for row in judged]
        reached = sum(ms <= row["target_ms"] for ms, row in zip(best, judged, strict=True))
        ahead = [row for row in rows if "peer_ms" in row]
        faster = sum(min(r["ms"], r.get("graph_ms", r["ms"])) <= r["peer_ms"] for r in ahead)
        text.append(
            f"reached (eager or graph): {reached} of {len(judged)}; at least equal to the best "
            f"peer: {faster} of {len(ahead)}; 16-bit steps against the best peer, geometric mean: "
            f"{_mean_of_steps(rows, 'peer_over_ms')} eager, "
            f"{_mean_of_steps(rows, 'peer_over_graph_ms')} as graphs"
        )
    failed = [
        f"{what} of {row['problem']}: {row[key]}"
        for what, key in (("no graph", "graph_error"), ("nothing compiled", "compiled_error"))
        for row in rows
        if key in row
    ]
    first = rows[0]
    text += failed + [
        f"{first['device']}, CUDA {first['cuda']}, torch {first['torch']}, voxgemm"
        f" {first['voxgemm']}, {first['date']}; medians of {options.rounds} rounds; ceiling:"
        f" torch.mm {'x'.join(map(str, _CEILING))}; mm: torch.mm of the same FLOPs; peers and"
        " reach: one H200, 2026-11"
    ]
    return "\n".join(text)
