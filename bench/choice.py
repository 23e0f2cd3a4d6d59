#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How good the cost model's picks are.

choice.py measure LINES.jsonl  times every kernel of a suite's problems, a line each; what the file
                               already has is not measured again, so it can be interrupted
choice.py show LINES.jsonl...  the time of the model's pick over the fastest kernel's, as a
                               distribution, all and by pass, and the worst problems
choice.py fit LINES.jsonl...   what corrects the cost model on that device, from the measured times
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Line = dict[str, Any]
_LIKELY = 5.0


def read(paths: Sequence[str]) -> list[Line]:
    """Whole lines only: the last one of a run that was stopped may be torn."""
    lines = []
    for path in paths:
        text = pathlib.Path(path).read_text() if pathlib.Path(path).exists() else ""
        lines += [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return lines


def likely(able: dict[str, float]) -> list[str]:
    """Those that are timed in any case: the reference is not, nor what the model gives many times
    the time of its favourite."""
    kernels = [kernel for kernel in able if not is_reference(kernel)]
    return [k for k in kernels if able[k] <= _LIKELY * min(able[other] for other in kernels)]


def is_reference(kernel: str) -> bool:
    return kernel == "reference_cpu" or kernel.startswith("naive_cuda/")


def problems_of(suite: str, device: str) -> list[str]:
    """One pass each, in an order of which any beginning is a fair part."""
    from voxgemm import bench, targets

    texts = []
    if suite in ("all", "targets"):
        texts += targets.suite() if device == "cuda" else bench.suite()
    if suite in ("all", "random"):
        texts += bench.random_problems(200, device)
    passes = [
        f"{name} {text.split(' ', 1)[1]}" for text in texts for name in bench.parse(text).passes
    ]
    passes = list(dict.fromkeys(passes))
    random.Random(0).shuffle(passes)
    # It takes seconds to make its coordinates.
    return sorted(passes, key=lambda text: text.endswith("shell:1024"))


def measured(device_type: str, text: str, budget: float) -> tuple[Line, float]:
    """What the times of a problem's kernels are, and the seconds that timing took."""
    import torch

    from voxgemm import bench, machine, tuning

    on_gpu = device_type == "cuda"
    problem = bench.parse(text)
    map = bench.build_map(problem, coords_on(problem.cloud, device_type))
    asked = bench.asked_of(problem, bench.filters(None, None), problem.work)
    before = tuning.explanation(map, asked)
    able = {c["kernel"]: c["predicted_ms"] for c in before["candidates"] if not c["reason"]}
    # Room for a lap of every one, and all laps of those that may be the fastest.
    every = 1e-3 * sum(able[kernel] for kernel in able if not is_reference(kernel))
    budget = max(budget, 4 * every, 16e-3 * sum(able[kernel] for kernel in likely(able)))
    found = tuning.measure(map, asked, budget, True, True, False)
    records = [json.loads(line) for line in found.records.splitlines()]
    line = {
        "problem": text,
        "rows_in": before["rows_in"],
        "rows_out": before["rows_out"],
        "pairs": map.pairs,
        "device": torch.cuda.get_device_name() if on_gpu else machine.cpu_name(),
        "architecture": 10 * torch.cuda.get_device_capability()[0] if on_gpu else 0,
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "able": able,
        "seconds": {record["kernel"]: record["seconds"] for record in records},
    }
    return line, found.seconds


@functools.cache
def coords_on(cloud: str, device_type: str) -> torch.Tensor:
    from voxgemm import bench

    return bench.coords_of(cloud).to(device_type)


def measure_some(options: argparse.Namespace, texts: Sequence[str], turn: Any, end: float) -> None:
    """Takes problems in turn with other processes, as long as there is time."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    timing = 0.0
    with open(options.lines, "a", encoding="utf-8") as file:
        while True:
            with turn.get_lock():
                place, turn.value = turn.value, turn.value + 1
            if place >= len(texts):
                break
            try:
                line, seconds = measured(options.device, texts[place], options.budget)
                timing += seconds
            except RuntimeError as error:
                # A kernel that failed may have left the device unusable: the next run goes on.
                line, end = {"problem": texts[place], "failed": str(error)}, 0
            # One write of a whole line.
            print(json.dumps(line), file=file, flush=True)
            if time.monotonic() > end:
                break
    print(f"{timing:.1f} s of timing")


def measure_on(cpu: int, *arguments: Any) -> None:
    os.sched_setaffinity(0, {cpu})
    measure_some(*arguments)


def measure(options: argparse.Namespace) -> None:
    context = multiprocessing.get_context("fork")
    cpus = sorted(os.sched_getaffinity(0))
    if options.processes > (1 if options.device == "cuda" else len(cpus)):
        sys.exit(f"{options.processes} processes on {len(cpus)} CPUs or a GPU disturb each other")
    end = time.monotonic() + options.seconds
    # Times of a store are no part of what the model would pick.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VOXGEMM_CACHE_DIR"] = folder
        have = {line["problem"] for line in read([options.lines])}
        every = problems_of(options.suite, options.device)
        texts = [text for text in every if text not in have]
        arguments = (options, texts, context.Value("q", 0), end)
        if options.processes == 1:
            measure_some(*arguments)
        else:
            # They share what is imported here.
            import voxgemm.tuning  # noqa: F401

            others = cpus[-options.processes :]
            workers = [context.Process(target=measure_on, args=(cpu, *arguments)) for cpu in others]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    have = {line["problem"] for line in read([options.lines])}
    print(f"{len(have.intersection(every))} of {len(every)} problems")


def formulas(lines: Sequence[Line], program: str) -> list[dict[str, Any]]:
    """What the library's formulas say of the lines' problems: sizes, and seconds by kernel."""
    asked = []
    for line in lines:
        kind, pairs = ("cuda", -1) if line["architecture"] else ("cpu", line["pairs"])
        words = (kind, line["architecture"], line["threads"], line["rows_in"], line["rows_out"])
        asked.append(" ".join(map(str, (*words, pairs, line["problem"]))))
    found = subprocess.run(
        [program], input="\n".join(asked), stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in found.stdout.splitlines()]


class Times:
    """Measured times beside the formulas' and what identifies their corrections, an entry each."""

    def __init__(self, lines: Sequence[Line], said: Sequence[dict[str, Any]]):
        self.lines = lines
        entries = []
        for place, (line, formula) in enumerate(zip(lines, said, strict=True)):
            times = {
                k: s for k, s in line["seconds"].items() if s < 1e8 and k in formula["kernels"]
            }
            for kernel, seconds in times.items():
                entries.append((place, kernel, seconds, formula["kernels"][kernel]))
        self.problem = np.array([entry[0] for entry in entries])
        self.kernel = [entry[1] for entry in entries]
        self.seconds = np.array([entry[2] for entry in entries])
        self.formula = np.array([entry[3] for entry in entries])
        self.sizes = np.array([formula["sizes"] for formula in said])[self.problem]
        self.best = np.full(len(lines), np.inf)
        np.minimum.at(self.best, self.problem, self.seconds)
        passes = [line["problem"].split()[0] for line in lines]
        of = ["grad_weight" if name == "grad_weight" else "forward" for name in passes]
        self.group = [(of[p], k) for p, k in zip(self.problem, self.kernel, strict=True)]

    def regret(self, predicted: np.ndarray) -> np.ndarray:
        """By problem, the time of the one with the lowest prediction over the fastest's."""
        ratios = np.full(len(self.lines), np.nan)
        order = np.lexsort((predicted, self.problem))
        first = np.ones(len(order), dtype=bool)
        first[1:] = np.diff(self.problem[order]) != 0
        chosen = order[first]
        ratios[self.problem[chosen]] = self.seconds[chosen] / self.best[self.problem[chosen]]
        return ratios


# By how much a correction may differ, in doublings, from that of kernels like it: of one tile or
# instruction set in any arithmetic, of one arithmetic in any tile, of its own.
_LEVELS = (1.0, 0.5, 0.5)
# Of what a doubling of a size does to it, against what is constant.
_SLOPE = 0.05
# How much of what all kernels of a problem have in common is left out: it changes no choice, but a
# prediction.
_COMMON = 0.9


def levels(group: tuple[str, str]) -> tuple[tuple[str, ...], ...]:
    of_pass, kernel = group
    family, dtype, *tile = kernel.split("/")
    return (of_pass, family, "", *tile), (of_pass, family, dtype), (of_pass, family, dtype, *tile)


def fit(times: Times, use: np.ndarray, noise: float) -> dict[tuple[str, str], np.ndarray]:
    """The corrections by pass and kernel, from the problems that are to be used."""
    of_pass = np.array([group[0] for group in times.group])
    found = {}
    for name in sorted(set(of_pass)):
        found |= fit_pass(times, np.flatnonzero(of_pass == name), use, noise)
    return found


def fit_pass(
    times: Times, mine: np.ndarray, use: np.ndarray, noise: float
) -> dict[tuple[str, str], np.ndarray]:
    """Ridge regression of log2(measured / formula) on the sizes, the corrections of like kernels
    being alike. Kernels near the fastest count most: the others need no more than to be known as
    slow."""
    terms = times.sizes.shape[1]
    groups = [times.group[entry] for entry in mine]
    names: dict[tuple[Any, ...], int] = {}
    places = []
    for group in groups:
        keys = enumerate(levels(group))
        places.append([names.setdefault((level, *key), len(names)) for level, key in keys])
    at = np.array(places)  # [entries, levels]
    scales = np.array([1.0] + [_SLOPE] * (terms - 1))
    a = np.zeros((len(at), len(names) * terms))
    for level, spread in enumerate(_LEVELS):
        for term in range(terms):
            column = at[:, level] * terms + term
            a[np.arange(len(at)), column] = spread * scales[term] * times.sizes[mine, term]
    problems = times.problem[mine]
    target = np.log2(times.seconds[mine] / times.formula[mine])
    weight = times.best[problems] / times.seconds[mine]
    entries = np.flatnonzero(use[problems])
    both = np.column_stack([a, target])[entries] * weight[entries, None]
    for problem in np.unique(problems[entries]):
        of = problems[entries] == problem
        share = weight[entries][of]
        both[of] -= _COMMON * np.outer(share, share @ both[of] / (share @ share))
    rows, wanted = both[:, :-1], both[:, -1]
    normal = rows.T @ rows + noise**2 * np.eye(rows.shape[1])
    solved = np.linalg.solve(normal, rows.T @ wanted)
    found = {}
    for group in set(groups):
        total = np.zeros(terms)
        for level, (key, spread) in enumerate(zip(levels(group), _LEVELS, strict=True)):
            first = names[(level, *key)] * terms
            total += spread * scales * solved[first : first + terms]
        found[group] = total
    return found


def corrected(times: Times, found: dict[tuple[str, str], np.ndarray]) -> np.ndarray:
    powers = [found[group] @ sizes for group, sizes in zip(times.group, times.sizes, strict=True)]
    return times.formula * np.exp2(powers)


_FOLDS = 5
# How far times are from any such rule. Of those that do about as well as the best on what was held
# out, by half a percent, the least is taken: it follows the problems at hand closest.
_NOISES = (0.2, 0.3, 0.4, 0.6, 0.8)
_ABOUT = 0.005


def held_out(times: Times, noise: float) -> np.ndarray:
    """The regret of each problem with corrections that were fitted without it and without the
    other passes and dtypes of its layer."""
    ratios = np.full(len(times.lines), np.nan)
    layers = [line["problem"].split(" ", 2)[2] for line in times.lines]
    number_of = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    folds = np.random.RandomState(0).permutation(len(number_of)) % _FOLDS
    fold = folds[[number_of[layer] for layer in layers]]
    for number in range(_FOLDS):
        found = fit(times, fold != number, noise)
        ratios[fold == number] = times.regret(corrected(times, found))[fold == number]
    return ratios


_HEADER = "| | problems | median | p95 | worst |\n|---|---|---|---|---|"


def row(name: str, ratios: np.ndarray) -> str:
    numbers = (np.median(ratios), np.quantile(ratios, 0.95), ratios.max())
    return f"| {name} | {len(ratios)} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |"


def usable(paths: Sequence[str]) -> list[Line]:
    """Those whose likely kernels were all timed, and more than one; the last of each problem."""
    last = {line["problem"]: line for line in read(paths) if "failed" not in line}
    lines = list(last.values())
    whole = [line for line in lines if set(likely(line["able"])) <= set(line["seconds"])]
    return [line for line in whole if len(line["seconds"]) > 1]


def fit_command(options: argparse.Namespace) -> None:
    lines = usable(options.lines)
    times = Times(lines, formulas(lines, options.model))
    out = {noise: held_out(times, noise) for noise in _NOISES}
    means = {n: float(np.mean(np.log(out[n]))) for n in _NOISES}
    noise = min(n for n in _NOISES if means[n] <= min(means.values()) + _ABOUT)
    found = fit(times, np.ones(len(lines), dtype=bool), noise)
    print(_HEADER)
    print(row("formulas alone", times.regret(times.formula)))
    for n in _NOISES:
        print(row(f"corrections fitted without the layer, noise {n}", out[n]))
    shipped = times.regret(corrected(times, found))
    print(row("corrections fitted with all", shipped))
    passes = np.array([line["problem"].split()[0] for line in lines])
    for name in sorted(set(passes)):
        print(row(f"{name} of these", shipped[passes == name]))
    if options.out:
        text = ""
        for (of_pass, kernel), numbers in sorted(found.items()):
            words = " ".join(f"{number:.3f}" for number in numbers)
            text += f"{of_pass} {kernel} {words}\n"
        pathlib.Path(options.out).write_text(text)
    if options.plot:
        curves = {
            "formulas alone": times.regret(times.formula),
            "with corrections, of layers they were not fitted to": out[noise],
            "with corrections fitted with all": shipped,
        }
        draw(curves, options.plot)


def show_command(options: argparse.Namespace) -> None:
    lines = usable(options.lines)
    if options.model:
        for line, said in zip(lines, formulas(lines, options.model), strict=True):
            line["able"] = said["corrected"]
            line["seconds"] = {k: s for k, s in line["seconds"].items() if k in line["able"]}
    ratios = []
    for line in lines:
        # The reference, which is among those that can run, is never timed.
        favourite = min(line["seconds"], key=lambda kernel: line["able"][kernel])
        ratios.append(line["seconds"][favourite] / min(line["seconds"].values()))
    groups: dict[str, list[float]] = {"all": ratios}
    for line, ratio in zip(lines, ratios, strict=True):
        first, dtype, _ = line["problem"].split(" ", 2)
        for name in (first, dtype):
            groups.setdefault(name, []).append(ratio)
    print(_HEADER)
    for name, group in groups.items():
        print(row(name, np.array(group)))
    for ratio, line in sorted(zip(ratios, lines, strict=True), key=lambda pair: -pair[0])[:10]:
        fastest = min(line["seconds"], key=lambda kernel: line["seconds"][kernel])
        favourite = min(line["seconds"], key=lambda kernel: line["able"][kernel])
        print(f"{ratio:.2f}  {line['problem']}: {favourite}, not {fastest}")
    if options.plot:
        draw({"model's pick": np.array(ratios)}, options.plot)


def draw(curves: dict[str, np.ndarray], path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, ratios in curves.items():
        share = np.arange(1, len(ratios) + 1) / len(ratios)
        axes.plot(np.sort(ratios), share, drawstyle="steps-post", label=name)
    most = max(float(np.quantile(ratios, 0.99)) for ratios in curves.values())
    axes.set(xlabel="time of the model's pick over that of the fastest kernel", xlim=(1, most))
    axes.set(ylabel="share of problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("measure").add_argument
    add("lines")
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--suite", default="all", choices=("all", "targets", "random"))
    add("--seconds", type=float, default=3600.0, help="after which no further problem is begun")
    add("--budget", type=float, default=0.25, help="seconds for the kernels of a problem")
    add("--threads", type=int, default=0, help="of the CPU; default: torch's")
    add("--processes", type=int, default=1, help="on the last CPUs, one each")
    add = commands.add_parser("fit").add_argument
    add("lines", nargs="+")
    add("--model", default="build/bench/choice_model", help="the program")
    add("--out", help="a file of src/conv/machines")
    add("--plot", help="a picture of the distribution")
    add = commands.add_parser("show").add_argument
    add("lines", nargs="+")
    add("--model", help="the program: its predictions, not those of when it was measured")
    add("--plot", help="a picture of the distribution")
    options = parser.parse_args()
    {"measure": measure, "fit": fit_command, "show": show_command}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
