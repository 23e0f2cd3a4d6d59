# SPDX-License-Identifier: Apache-2.0
"""The command `voxgemm`: demo, bench and info.

Input that cannot be used ends in one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from . import cli_times
from .clouds import InputError
from .clouds.shapes import FORMS
from .errors import ArgumentError
from .table import table
from .tasks import NAMES as TASKS

_DTYPES = ("f32", "bf16", "f16", "f64")
_EXAMPLE = '"forward f32 subm3 64->64 shell:128"'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _whole(name: str, low: int, high: int) -> Callable[[str], int]:
    def value(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(
                f"{name} is {text!r}, expected a whole number from {low} to {high}"
            )
        return int(text)

    return value


_threads = _whole("threads", 1, 1024)


def _thread_list(text: str) -> list[int]:
    return [_threads(part) for part in text.split(",")]


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"device is {text!r}, expected cpu, cuda or cuda:N")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"device is {text!r}, but torch finds no GPU")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="voxgemm", description="Sparse-voxel convolution.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train a sparse U-Net on a point cloud or mesh",
        description="Trains a small sparse U-Net on one cloud or mesh and draws what it learned.",
    )
    add = demo.add_argument
    add("file", nargs="?", help="las laz ply pcd obj stl glb bin npy npz csv; without: a street")
    add("--voxel", help="size in the file's unit, or a grid such as 256grid (default: by the file)")
    add("--task", choices=("auto", *TASKS), default="auto")
    add("--steps", type=_whole("steps", 1, 100_000), default=60)
    add("--channels", type=_whole("channels", 1, 512), default=16, help="at full resolution")
    add("--dtype", choices=_DTYPES, default="f32")
    add("--device", type=_device, default="cpu")
    add("--threads", type=_threads, help="default: torch's")
    add("--columns", type=int, choices=(4, 5, 6), help="float32 per point of a .bin file")
    add("--seed", type=_whole("seed", 0, 2**32 - 1), default=0)
    add("--out", metavar="PICTURE", help="default: demo-NAME.png")
    add("--json", metavar="PATH", help="the numbers as one object; - is stdout")

    bench = commands.add_parser(
        "bench",
        help="time convolutions and maps",
        description=f"Times problems such as {_EXAMPLE} beside torch.mm in the same rounds."
        " Passes: forward, grad_input, grad_weight, step (all three), map."
        f" Clouds: {', '.join(FORMS)}; shuffled:CLOUD has its rows in random order.",
    )
    add = bench.add_argument
    add("problems", nargs="*", metavar="PROBLEM", help="without: --suite cpu, on a GPU h200")
    suites = "a list of problems, beside the figures to reach; maps: of every geometry on a GPU"
    add("--suite", choices=("cpu", "h200", "maps"), help=suites)
    add("--device", type=_device, help="default: cpu, of --suite h200 and maps cuda")
    add("--threads", type=_thread_list, metavar="N[,N]", help="of the CPU; default: torch's")
    add("--repeat", type=_whole("repeat", 1, 1000), default=5, help="rounds; the median counts")
    add("--kernel", metavar="NAME", help="this kernel only, by its full name")
    add("--algorithm", metavar="NAME[,NAME]", help="these algorithms only")
    add("--check", action="store_true", help="also compare with the double-precision reference")
    add("--json", metavar="PATH", help="one JSON object per line; - is stdout")

    cli_times.add_commands(commands, _device, _EXAMPLE)

    info = commands.add_parser("info", help="versions, CPU, threads, GPUs, cache")
    info.add_argument("--json", action="store_true")
    return parser


def _write_json(path: str | None, text: str, mode: str = "w") -> None:
    if path == "-":
        print(text)
    elif path:
        with open(path, mode, encoding="utf-8") as file:
            print(text, file=file)


def _demo_table(result: dict[str, Any]) -> str:
    def ms(part: str) -> str:
        return f"{result[f'ms_{part}']:,.1f} ms"

    dropped = f" ({result['dropped']:,} without a place dropped)" if result["dropped"] else ""
    rows = [
        ("points", f"{result['points']:,}{dropped}"),
        ("voxels", f"{result['voxels']:,}"),
        ("pairs of the 3^3 submanifold map", f"{result['pairs']:,}"),
        ("one step", ms("step")),
        *((f"  {part}", ms(part)) for part in ("map", "forward", "backward", "optimizer")),
        ("useful GFLOP a step", f"{result['gflop_step']:,.2f}"),
        ("useful GFLOP/s", f"{result['gflops']:,.1f}"),
        ("loss before the first step", f"{result['loss_first']:.4f}"),
        ("loss after the last step", f"{result['loss_last']:.4f}"),
        ("prediction", result["score"]),
        (f"largest error of {result['max_error_layer']}", f"{result['max_error']:.2e}"),
        ("picture", result["picture"]),
    ]
    return table((result["task"], result["file"]), rows)


def _run_demo(arguments: argparse.Namespace) -> None:
    from . import demo

    given = {key: value for key, value in vars(arguments).items() if key not in ("command", "json")}
    options = demo.Options(**given)
    cli_times.check_writable(arguments.json, picture=options.picture_path())
    words = sys.stderr if arguments.json == "-" else sys.stdout
    result = demo.run(options, lambda text: print(text, file=words, flush=True))
    print(_demo_table(result), file=words)
    _write_json(arguments.json, json.dumps(result, indent=2))


def _bench_device(arguments: argparse.Namespace) -> torch.device:
    on_gpu = arguments.suite in ("h200", "maps")
    if on_gpu and arguments.device == "cpu":
        raise InputError(f"--suite {arguments.suite} is of a GPU, but device is 'cpu'")
    if arguments.suite == "cpu" and arguments.device not in (None, "cpu"):
        raise InputError(f"--suite cpu is of the CPU, but device is {arguments.device!r}")
    try:
        device = arguments.device or _device("cuda" if on_gpu else "cpu")
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--suite {arguments.suite}: {error}") from error
    if device != "cpu" and arguments.threads:
        raise InputError(f"--threads is of the CPU, but device is {device!r}")
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def _run_bench(arguments: argparse.Namespace) -> None:
    from . import bench

    if arguments.problems and arguments.suite:
        raise InputError(f"got both problems and --suite {arguments.suite}, expected one of them")
    if arguments.kernel and arguments.algorithm:
        raise InputError("got both --kernel and --algorithm, expected one of them")
    device = _bench_device(arguments)
    cli_times.check_writable(arguments.json)
    options = bench.Options(
        threads=arguments.threads or [torch.get_num_threads()],
        rounds=arguments.repeat,
        filters=bench.filters(arguments.kernel, arguments.algorithm),
        check=arguments.check,
        device=device,
    )
    words = sys.stderr if arguments.json == "-" else sys.stdout
    if device.type == "cuda":
        from . import bench_cuda, targets

        suite = targets.map_suite() if arguments.suite == "maps" else targets.suite()
        found = bench.run(arguments.problems or suite, options, bench_cuda.measure)
        summary = bench_cuda.summary
    else:
        found, summary = bench.run(arguments.problems or bench.suite(), options), bench.summary
    rows: list[dict[str, Any]] = []
    # Row by row: what was measured before an error is kept.
    for row in found:
        _write_json(arguments.json, json.dumps(row), "a" if rows else "w")
        rows.append(row)
    print(summary(rows, options), file=words)


def _run_info(arguments: argparse.Namespace) -> None:
    from . import machine

    facts = machine.facts()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    rows = [(name.replace("_", " "), machine.in_words(value)) for name, value in facts.items()]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))


def _sentence(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f'the package {error.name} is missing: pip install "voxgemm[demo]"'
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    commands = {"demo": _run_demo, "bench": _run_bench, "info": _run_info, **cli_times.RUN}
    try:
        commands[parsed.command](parsed)
        return 0
    except (InputError, ArgumentError, ModuleNotFoundError, NotImplementedError, OSError) as error:
        problem = _sentence(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        problem = f"memory ran out: {_sentence(error)}"
    except RuntimeError as error:
        # What torch says on the CPU instead of its OutOfMemoryError.
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        problem = f"memory ran out: {_sentence(error)}"
    except KeyboardInterrupt:
        return 130
    print(f"voxgemm {parsed.command}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
