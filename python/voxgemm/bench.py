# SPDX-License-Identifier: Apache-2.0
"""Times problems (their text form) beside torch.mm, in interleaved rounds; here: on the CPU.

A round times, one after the other: ours, the ceiling (a torch.mm whose operands fit the caches, of
the same dtype) and a torch.mm of the same FLOPs. On a machine that has other work only ratios
inside a round are steady, so ratios are medians over rounds, not ratios of medians.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import functional, passes
from ._library import call, ops, text_of, text_tensor
from .clouds import cloud
from .functional import DTYPES, OPERATIONS, PASSES, Asked, Filters, Geometry, KernelMap
from .machine import provenance
from .table import table

# What to reach in `--suite cpu` with one thread: useful FLOPs as a share of the ceiling,
# c_in = c_out: f32 forward, f32 step, bf16 forward.
_SHARES = {
    16: (0.40, 0.35, 0.06),
    32: (0.60, 0.55, 0.15),
    64: (0.78, 0.72, 0.30),
    128: (0.88, 0.82, 0.45),
    256: (0.95, 0.90, 0.60),
}
_SHARE_COLUMNS = (("f32", "forward"), ("f32", "step"), ("bf16", "forward"))
# Milliseconds of a 3^3 submanifold map with one thread; with shuffled rows _SHUFFLED times that.
_MAP_MS = {"shell:64": 1.5, "shell:128": 6.0, "shell:256": 28.0, "shell:512": 130.0}
_SHUFFLED = 1.3
_SUITE = (
    ("shell:64", (64, 128, 256)),
    ("shell:128", (32, 64)),
    ("shell:256", (16, 32)),
    ("street", (16, 32, 64)),
)
_CEILING = (4096, 256, 256)
CPU = torch.device("cpu")
# Calls are repeated inside a round until they take this long: far above the jitter of a call.
_BLOCK_SECONDS = 0.02
# Rows of a result that --check compares.
_CHECKED_ROWS = 2048
# Operands of the product of the same FLOPs; above it a part is timed and scaled.
_MAX_MM_BYTES = 1 << 30


@dataclass
class Options:
    threads: list[int]
    rounds: int
    filters: Filters
    check: bool = False
    device: torch.device = CPU


@dataclass
class Problem:
    text: str
    work: str  # one of PASSES, "step" or "map"
    dtype: torch.dtype
    precision: int  # of PRECISIONS
    operation: str  # of OPERATIONS
    geometry: Geometry
    c_in: int
    c_out: int
    cloud: str

    @property
    def passes(self) -> tuple[str, ...]:
        return {"step": PASSES, "map": ()}.get(self.work, (self.work,))


def parse(text: str) -> Problem:
    """The library reads the problem; step and map, which are no passes of one kernel, are ours."""
    words = text.split()
    work = words[0] if words and words[0] in ("step", "map") else ""
    inner = " ".join(["forward", *words[1:]]) if work else text
    numbers, where = call(ops._parse_problem.default, text_tensor(inner))
    values = numbers.tolist()
    triples = [tuple(values[i : i + 3]) for i in range(4, 16, 3)]
    return Problem(
        " ".join(words),
        work or PASSES[values[0]],
        DTYPES[values[1]],
        values[2],
        OPERATIONS[values[3]],
        Geometry(*triples),
        values[16],
        values[17],
        text_of(where),
    )


def filters(kernel: str | None, algorithm: str | None) -> Filters:
    if kernel:
        return ((-1, *kernel.encode()),) * 3
    return functional.filters_of(algorithm.split(",") if algorithm else None)


def suite() -> list[str]:
    """The problems of `--suite cpu`."""
    problems = [
        f"{work} {dtype} subm3 {c}->{c} {where}"
        for where, channels in _SUITE
        for c in channels
        for dtype in ("f32", "bf16")
        for work in ("forward", "step")
    ]
    for where in _MAP_MS:
        problems += [f"map f32 subm3 1->1 {where}", f"map f32 subm3 1->1 shuffled:{where}"]
    return problems


# Clouds of random problems and about how many voxels they have.
_CLOUDS = {
    **{f"shell:{res}": round(3.9 * res**2) for res in (12, 24, 48, 96, 160, 256, 400)},
    "street": 56_000,
    "street:0.05": 97_000,
    "room:128": 50_000,
    "room:400": 500_000,
    "random:3000:24": 3000,
    "random:20000:64": 20_000,
    "random:200000:512": 200_000,
    "full:20": 8000,
    "full:48": 111_000,
}
_OPERATIONS = (*("subm3",) * 5, "subm5", "subm3d2", "subm1")
_OPERATIONS += ("conv3s2p1", "conv2s2", "inv2s2", "inv3s2p1")
_WIDTHS = (3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def random_problems(count: int = 200, device: str = "cuda") -> list[str]:
    """The same ones each time, those of one cloud after each other, none of which takes long."""
    draw = random.Random(0)
    dtypes = ("f16", "bf16", "f16", "bf16", "f32", "tf32", "bf16x3", "bf16x6")
    most_flops = 1e12
    if device == "cpu":
        dtypes, most_flops = ("f32", "f32", "bf16", "f16"), 4e9
    clouds = list(_CLOUDS)
    problems: list[str] = []
    while len(problems) < count:
        where = clouds[len(problems) * len(clouds) // count]
        operation, c_in, c_out = (
            draw.choice(_OPERATIONS),
            draw.choice(_WIDTHS),
            draw.choice(_WIDTHS),
        )
        text = f"{draw.choice(PASSES)} {draw.choice(dtypes)} {operation} {c_in}->{c_out} {where}"
        # Of a surface a row has 1.5 k^2 of k^3 taps.
        pairs = 1.5 * int(operation.lstrip("submconvi")[0]) ** 2
        if text not in problems and 2 * _CLOUDS[where] * pairs * c_in * c_out <= most_flops:
            problems.append(text)
    return problems


def _target(problem: Problem) -> tuple[str, float] | None:
    """What one thread should reach: ("share", of the ceiling) or ("ms", milliseconds)."""
    if problem.operation != "submanifold" or problem.geometry.size != (3, 3, 3):
        return None
    if problem.work == "map":
        plain = problem.cloud.removeprefix("shuffled:")
        slack = 1 if plain == problem.cloud else _SHUFFLED
        return ("ms", _MAP_MS[plain] * slack) if plain in _MAP_MS else None
    column = (_dtype_name(problem.dtype), problem.work)
    if problem.c_in != problem.c_out or column not in _SHARE_COLUMNS:
        return None
    shares = _SHARES.get(problem.c_in)
    return ("share", shares[_SHARE_COLUMNS.index(column)]) if shares else None


def _dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f64")


@functools.lru_cache(maxsize=1)
def coords_of(where: str) -> torch.Tensor:
    """int32 [n, 4]; the last cloud is kept, as problems come sorted by it."""
    plain = where.removeprefix("shuffled:")
    rows = cloud(plain)
    if plain != where:
        rows = rows[np.random.RandomState(0).permutation(len(rows))]
    return torch.from_numpy(np.ascontiguousarray(rows))


def build_map(problem: Problem, coords: torch.Tensor, max_voxels: int | None = None) -> KernelMap:
    """As a layer builds it: output coordinates included, of an inverse convolution both ways."""
    if problem.operation == "submanifold":
        return functional.submanifold_map(coords, problem.geometry)
    out_coords = functional.output_coords(coords, problem.geometry, max_voxels=max_voxels)
    map = functional.strided_map(coords, out_coords, problem.geometry)
    return map.transposed() if problem.operation == "inverse" else map


def asked_of(problem: Problem, filters: Filters, work: str) -> Asked:
    p, number = problem, PASSES.index(work)
    return Asked(number, p.c_in, p.c_out, p.dtype, p.precision, filters[number])


class Layer:
    """Random operands of a problem, and its passes as the operators that the layers call."""

    def __init__(self, problem: Problem, map: KernelMap, filters: Filters):
        device = map.neighbours.device
        draw = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw, device=device).to(problem.dtype)

        self.problem, self.map, self.filters = problem, map, filters
        map.settle(wait=True)
        self.x = random(map.n_in, problem.c_in)
        self.dy = random(map.n_out, problem.c_out)
        shape = (problem.c_out, *problem.geometry.size, problem.c_in)
        self.weight = random(*shape) / (map.taps * problem.c_in) ** 0.5
        if "grad_input" in problem.passes:
            map.backward_tensors()  # built once and kept, like the map

    def run(self, work: str) -> torch.Tensor:
        how = passes.How(self.filters, self.problem.precision)
        if work == "grad_input":
            return passes.grad_input(self.dy, self.weight, self.map, how)
        if work == "forward":
            return passes.run_forward(self.x, self.weight, None, self.map, how)
        return passes.grad_weight(self.x, self.dy, [True, False], self.map, how)[0]

    def error(self, work: str) -> float:
        """Largest difference from sums in float64, over their largest value: of rows spread over
        the result, all where they are few; of a weight gradient of the first, middle and last tap.
        """
        found = self.run(work).double()
        shape = (self.problem.c_out, self.map.taps, self.problem.c_in)
        if work == "grad_weight":
            picked = torch.tensor(sorted({0, self.map.taps // 2, self.map.taps - 1}))
            found = found.view(shape)[:, picked.to(found.device)]
            expected = torch.stack([self._tap_product(int(tap)) for tap in picked], 1)
        else:
            count = min(len(found), _CHECKED_ROWS)
            picked = torch.linspace(0, max(0, len(found) - 1), count).long().to(found.device)
            found = found[picked]
            expected = self._row_sums(work, picked, self.weight.double().view(shape))
        if not expected.numel():
            return 0.0
        return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))

    def _tap_product(self, tap: int) -> torch.Tensor:
        """[c_out, c_in]: of the weight gradient."""
        rows = self.map.neighbours[tap]
        out = (rows >= 0).nonzero().squeeze(1)
        return self.dy[out].double().T @ self.x[rows[out].long()].double()

    def _row_sums(self, work: str, picked: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """These rows of y or dx, tap by tap from the map's table."""
        forward = work == "forward"
        source, width = (self.x, weight.shape[0]) if forward else (self.dy, weight.shape[2])
        sums = source.new_zeros(len(picked), width, dtype=torch.float64)
        if not forward:
            place = torch.full((self.map.n_in,), -1, device=picked.device)
            place[picked] = torch.arange(len(picked), device=picked.device)
        for tap in range(self.map.taps):
            rows = self.map.neighbours[tap].long()
            if forward:
                to = (rows[picked] >= 0).nonzero().squeeze(1)
                sums[to] += source[rows[picked[to]]].double() @ weight[:, tap].T
            else:
                out = (torch.where(rows >= 0, place[rows], -1) >= 0).nonzero().squeeze(1)
                sums.index_add_(0, place[rows[out]], source[out].double() @ weight[:, tap])
        return sums


def product(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[], Any]:
    rows, inner, cols = sizes
    draw = torch.Generator(device).manual_seed(1)
    a = torch.randn(rows, inner, generator=draw, device=device).to(dtype)
    b = torch.randn(inner, cols, generator=draw, device=device).to(dtype)
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=out)


@dataclass
class Contender:
    work: Callable[[], Any]
    flops: float  # of one call of work
    calls: int = 1
    wait: Callable[[], Any] = lambda: None  # for the device that works
    rest: float = 0.0  # seconds before a lap in which nothing runs

    def seconds(self) -> float:
        self.wait()
        if self.rest:
            time.sleep(self.rest)
            # A host that slept takes a while to be fast again.
            for _ in range(max(1, self.calls // 4)):
                self.work()
            self.wait()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.work()
        self.wait()
        return (time.perf_counter() - start) / self.calls

    def warm_up(self) -> None:
        """The first call pays for pages and choices. The second says how many to time, and blocks
        of these again: the first calls after a rest take a host several times as long.
        """
        self.calls = 1
        self.seconds()
        for _ in range(3):
            calls = max(1, min(1000, round(_BLOCK_SECONDS / max(self.seconds(), 1e-9))))
            settled = calls < 2 * self.calls
            self.calls = calls
            if settled:
                return


def waiting(device: torch.device) -> Callable[[], Any]:
    """What waits for a device: for the CPU nothing."""
    if device.type == "cpu":
        return lambda: None
    return functools.partial(torch.cuda.synchronize, device)


def median_seconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Of a call of work alone, without contenders."""
    alone = Contender(work, 0.0, wait=waiting(device))
    alone.warm_up()
    return statistics.median(alone.seconds() for _ in range(rounds))


def same_work(problem: Problem, pairs: int, device: torch.device) -> Contender:
    """A dense product of the problem's FLOPs, or the part of it that memory is spent on."""
    c_in, c_out = problem.c_in, problem.c_out
    limit = _MAX_MM_BYTES // (problem.dtype.itemsize * (c_in + c_out))
    rows = max(1, min(pairs, limit))
    work = product((rows, c_in, c_out), problem.dtype, device)
    return Contender(work, 2.0 * rows * c_in * c_out)


def _contenders(problem: Problem, map: KernelMap, layer: Layer) -> dict[str, Contender]:
    pairs, c_in, c_out = map.pairs, problem.c_in, problem.c_out

    def ours() -> None:
        for work in problem.passes:
            layer.run(work)

    m, k, n = _CEILING
    return {
        "ours": Contender(ours, 2.0 * pairs * c_in * c_out * len(problem.passes)),
        "ceiling": Contender(product(_CEILING, problem.dtype, CPU), 2.0 * m * k * n),
        "mm": same_work(problem, pairs, CPU),
    }


def times_of(
    contenders: dict[str, Contender], options: Options
) -> dict[tuple[int, str], list[float]]:
    """Seconds of every round by (threads, contender)."""
    seconds: dict[tuple[int, str], list[float]] = {}
    for warm in range(options.rounds + 1):
        for threads in options.threads:
            torch.set_num_threads(threads)
            for name, contender in contenders.items():
                if warm == 0:
                    contender.warm_up()
                else:
                    seconds.setdefault((threads, name), []).append(contender.seconds())
    return seconds


def kernels_of(problem: Problem, layer: Layer) -> list[str]:
    """The kernel of each pass that is run."""
    asked = [asked_of(problem, layer.filters, work) for work in problem.passes]
    return [layer.map.choice(each).kernel for each in asked]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of the ratio inside a round, in which both had the same machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure(problem: Problem, options: Options) -> list[dict[str, Any]]:
    """One row per number of threads."""
    coords = coords_of(problem.cloud)
    map = build_map(problem, coords)
    errors, kernels = {}, []
    if problem.work == "map":
        contenders = {"ours": Contender(lambda: build_map(problem, coords), 0.0)}
    else:
        layer = Layer(problem, map, options.filters)
        contenders, kernels = _contenders(problem, map, layer), kernels_of(problem, layer)
        if options.check:
            errors = {work: layer.error(work) for work in problem.passes}
    seconds = times_of(contenders, options)
    target = _target(problem)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        ms = 1e3 * statistics.median(seconds[threads, "ours"])
        row = {
            "problem": problem.text,
            "voxels": len(coords),
            "rows_in": map.n_in,
            "rows_out": map.n_out,
            "pairs": map.pairs,
            "ms": ms,
            "ms_all": [1e3 * s for s in seconds[threads, "ours"]],
            "speed_up": rows[0]["ms"] / ms if rows else 1.0,
        }
        if problem.work != "map":
            rates = {
                name: [contender.flops / s / 1e9 for s in seconds[threads, name]]
                for name, contender in contenders.items()
            }
            row |= {
                "gflops": statistics.median(rates["ours"]),
                "ceiling_gflops": statistics.median(rates["ceiling"]),
                "of_ceiling": ratio(rates["ours"], rates["ceiling"]),
                "mm_gflops": statistics.median(rates["mm"]),
                "of_mm": ratio(rates["ours"], rates["mm"]),
                "kernels": kernels,
            }
        if errors:
            row["max_error"] = errors
        if target and threads == 1:
            row[f"target_{target[0]}"] = target[1]
        rows.append(row | provenance(CPU))
    return rows


def run(
    texts: Sequence[str], options: Options, one: Callable[..., list[dict[str, Any]]] = measure
) -> Iterator[dict[str, Any]]:
    """Row by row. `one`: what measures a problem, on the CPU or (bench_cuda.measure) on a GPU."""
    # All of them are read before the first is timed: a misspelt last one costs no time.
    problems = [parse(text) for text in texts]
    threads = torch.get_num_threads()
    try:
        for problem in _progress(problems):
            yield from one(problem, options)
    finally:
        torch.set_num_threads(threads)


def _progress(problems: list[Problem]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return problems
    return tqdm(problems, desc="bench", unit="problem", disable=len(problems) < 2)


def summary(rows: list[dict[str, Any]], options: Options) -> str:
    """The table of what `run` gave."""
    header = ["problem", "threads", "pairs", "ms", "GFLOP/s", "ceiling", "of it", "of mm"]
    many = len(options.threads) > 1
    header += ["speed-up"] * many + ["reach", "max error"]

    def cell(row: dict[str, Any], name: str, form: str) -> str:
        return format(row[name], form) if name in row else "-"

    lines = []
    for row in rows:
        line = [row["problem"], str(row["threads"]), f"{row['pairs']:,}", f"{row['ms']:.3f}"]
        line += [cell(row, "gflops", ",.1f"), cell(row, "ceiling_gflops", ",.1f")]
        line += [cell(row, "of_ceiling", ".2f"), cell(row, "of_mm", ".2f")]
        line += [f"{row['speed_up']:.2f}"] * many
        reach = cell(row, "target_share", ".2f")
        line.append(f"{row['target_ms']:.1f} ms" if "target_ms" in row else reach)
        line.append(f"{max(row['max_error'].values()):.1e}" if "max_error" in row else "-")
        lines.append(line)
    # A column that nothing fills is left out.
    used = [c for c in range(len(header)) if any(line[c] != "-" for line in lines)]
    note = (
        f"{rows[0]['device']}, torch {rows[0]['torch']}, voxgemm {rows[0]['voxgemm']},"
        f" {rows[0]['date']}; medians of {options.rounds} rounds; ceiling: torch.mm"
        f" {'x'.join(map(str, _CEILING))}; mm: torch.mm of the same FLOPs"
    )
    body = table([header[c] for c in used], [[line[c] for c in used] for line in lines])
    return f"{body}\n{note}"
