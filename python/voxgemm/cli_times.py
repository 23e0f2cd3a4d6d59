# SPDX-License-Identifier: Apache-2.0
"""The commands of choices and measured times: explain, tune, calibrate, cache."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import tuning
from .clouds import InputError
from .table import table


def check_writable(*paths: str | None, picture: str | None = None) -> None:
    """Before the work, not after it. A file that this makes is removed again."""
    if picture:
        from .picture import formats

        suffix = Path(picture).suffix.lstrip(".").lower()
        if suffix not in formats():
            raise InputError(
                f"picture {picture!r} has the suffix {suffix!r}, expected one of "
                f"{', '.join(formats())}"
            )
    for path in (*paths, picture):
        if not path or path == "-":
            continue
        there = os.path.exists(path)
        with open(path, "ab"):
            pass
        if not there:
            os.remove(path)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not 0 < float(text) <= 86400:
        raise argparse.ArgumentTypeError(f"budget is {text!r}, expected seconds up to 86400")
    return float(text)


def add_commands(commands: Any, device: Callable[[str], str], example: str) -> None:
    """`device` reads the name of one; `example` is a problem."""
    explain = commands.add_parser(
        "explain",
        help="which kernel a problem gets, and why",
        description=f"Every kernel for a problem such as {example}: its predicted and measured time"
        " or why it cannot run, which one is picked, and by whom: the filter, measured times or the"
        " cost model.",
    )
    add = explain.add_argument
    add("problem", metavar="PROBLEM")
    add("--device", type=device, default="cpu")
    add("--algorithm", metavar="NAME[,NAME]", help="these algorithms only")
    add("--json", metavar="PATH", help="one object; - is stdout")
    add("--plot", metavar="PICTURE", help="the times as a picture")

    tune = commands.add_parser(
        "tune",
        help="measure the kernels of problems, and keep the times",
        description=f"Measures what the cost model may misjudge of problems such as {example} (or"
        " step: all three passes), and keeps the times: layers of that kind and size use them.",
    )
    add = tune.add_argument
    add("problems", nargs="*", metavar="PROBLEM")
    add(
        "--suite", choices=("cpu", "h200", "random"), help="those of `bench --suite`, or 200 others"
    )
    add("--device", type=device, help="default: cpu, of --suite h200 cuda")
    add("--budget", type=_seconds, default=1.0, metavar="SECONDS", help="of each pass (default 1)")
    add("--algorithm", metavar="NAME[,NAME]", help="these algorithms only")
    add("--exhaustive", action="store_true", help="every kernel that can run")
    add("--again", action="store_true", help="also what was measured before")
    add("--out", metavar="PATH", help="also write the records, to be shipped as a prior")
    add("--json", metavar="PATH", help="one line of JSON per pass; - is stdout")

    calibrate = commands.add_parser(
        "calibrate",
        help="correct the cost models on this device",
        description="Times every kernel on small made-up problems; the ratios correct the cost"
        " models' predictions on devices that they were not fitted on.",
    )
    calibrate.add_argument("--device", type=device, default="cpu")
    calibrate.add_argument("--budget", type=_seconds, default=20.0, metavar="SECONDS")

    cache = commands.add_parser("cache", help="the files of measured times")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("show", help="files, devices, numbers").add_argument(
        "--json", action="store_true"
    )
    export = actions.add_parser("export", help="the records that count, as lines of JSON")
    export.add_argument("file", nargs="?", default="-", help="default: stdout")
    export.add_argument("--model", default="", metavar="NAME", help="of this model of device only")
    actions.add_parser("import", help="take over what export wrote").add_argument(
        "file", help="- is stdin"
    )
    actions.add_parser("clear", help="remove the files")


def _write(path: str | None, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
    elif path:
        Path(path).write_text(text, encoding="utf-8")


def run_explain(arguments: argparse.Namespace) -> None:
    from . import bench

    check_writable(arguments.json, picture=arguments.plot)
    problem = bench.parse(arguments.problem)
    if not problem.passes:
        raise InputError(f"{problem.text!r} runs no kernel, expected a pass or step")
    coords = bench.coords_of(problem.cloud).to(arguments.device)
    map = bench.build_map(problem, coords)
    filters = bench.filters(None, arguments.algorithm)
    asked = [bench.asked_of(problem, filters, work) for work in problem.passes]
    found = [tuning.explanation(map, each) for each in asked]
    if arguments.json != "-":
        print("\n".join(tuning.table(map, each) for each in asked), end="")
    _write(arguments.json, json.dumps(found if len(found) > 1 else found[0], indent=2) + "\n")
    if arguments.plot:
        tuning.plot(found, arguments.plot)


def _problems(arguments: argparse.Namespace) -> tuple[list[str], str]:
    from . import bench, targets

    if bool(arguments.problems) == bool(arguments.suite):
        raise InputError("expected either problems or --suite")
    device = arguments.device or ("cuda" if arguments.suite == "h200" else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, but torch finds no GPU")
    texts = arguments.problems
    if arguments.suite == "random":
        texts = bench.random_problems(device=device)
    elif arguments.suite:
        texts = targets.suite() if arguments.suite == "h200" else bench.suite()
    return [text for text in texts if not text.startswith("map ")], device


def is_reference(kernel: str) -> bool:
    return kernel == "reference_cpu" or kernel.startswith("naive_cuda/")


def run_tune(arguments: argparse.Namespace) -> None:
    from . import bench

    check_writable(arguments.json, arguments.out)
    texts, device = _problems(arguments)
    problems = [bench.parse(text) for text in texts]
    filters = bench.filters(None, arguments.algorithm)
    words = sys.stderr if arguments.json == "-" else sys.stdout
    lines, records, rows = [], [], []
    work = [(problem, name) for problem in problems for name in problem.passes]
    for problem, name in tuning.progress(work, len(work) > 1):
        map = bench.build_map(problem, bench.coords_of(problem.cloud).to(device))
        asked = bench.asked_of(problem, filters, name)
        found = tuning.measure(map, asked, arguments.budget, arguments.exhaustive, arguments.again)
        now = tuning.explanation(map, asked)
        times = {c["kernel"]: c["measured_ms"] for c in now["candidates"] if c["measured_ms"]}
        able = [c for c in now["candidates"] if c["reason"] is None]
        favourite = min(able, key=lambda c: c["predicted_ms"])["kernel"]
        # What the model alone would have cost, where that is known.
        ratio = times[favourite] / min(times.values()) if favourite in times else None
        line = {
            "problem": f"{found.problem} {problem.cloud}".strip(),
            "measured": found.candidates,
            "seconds": found.seconds,
            "picked": now["picked"],
            "picked_by": now["picked_by"],
            "picked_ms": times.get(now["picked"]),
            "model": favourite,
            "model_over_best": ratio,
            "known": len(times),
            "able": sum(not is_reference(c["kernel"]) for c in able),
        }
        lines.append(json.dumps(line))
        records.append(found.records)
        shown = "-" if line["picked_ms"] is None else f"{line['picked_ms']:.4f}"
        rows.append(
            [line["problem"], str(found.candidates), shown, f"{ratio:.2f}" if ratio else "-"]
            + [now["picked"]]
        )
    print(table(("problem", "measured", "ms", "model / best", "picked"), rows), file=words)
    _write(arguments.json, "".join(f"{line}\n" for line in lines))
    _write(arguments.out, "".join(records))


def run_calibrate(arguments: argparse.Namespace) -> None:
    found = tuning.calibrate(arguments.device, arguments.budget)
    print(f"{found.candidates} kernels and passes in {found.seconds:.1f} s")


def run_cache(arguments: argparse.Namespace) -> None:
    if arguments.action == "show":
        files = tuning.times_files()
        if arguments.json:
            print(json.dumps([file._asdict() for file in files], indent=2))
            return
        rows = [[f.device or "several", *map(str, f[2:]), f.path] for f in files]
        header = ("device", "records", "problems", "superseded", "foreign lines", "file")
        print(table(header, rows) if rows else "no measured times")
    elif arguments.action == "export":
        _write(arguments.file, tuning.export_times(arguments.model))
    elif arguments.action == "import":
        stdin = arguments.file == "-"
        text = sys.stdin.read() if stdin else Path(arguments.file).read_text(encoding="utf-8")
        print(f"{tuning.import_times(text)} records")
    else:
        print(f"{tuning.clear_times()} files removed")


RUN = {"explain": run_explain, "tune": run_tune, "calibrate": run_calibrate, "cache": run_cache}
