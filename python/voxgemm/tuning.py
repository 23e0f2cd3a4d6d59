# SPDX-License-Identifier: Apache-2.0
"""Measured times: tuning a model's layers, the files that keep them, what explains a choice."""

from __future__ import annotations

import contextvars
import itertools
import json
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ._library import call, ops, text_of, text_tensor
from .algorithms import PASSES, Filters, index_in
from .errors import ArgumentError
from .kernel_map import Asked, KernelMap

__all__ = [
    "Measured",
    "TimesFile",
    "calibrate",
    "clear_times",
    "export_times",
    "import_times",
    "plot",
    "times_files",
    "tune",
]


class Layer(NamedTuple):
    """What a convolution was asked for."""

    map: KernelMap
    c_in: int
    c_out: int
    dtype: torch.dtype
    precision: int
    filters: Filters

    def asked(self, number: int) -> Asked:
        return Asked(
            number, self.c_in, self.c_out, self.dtype, self.precision, self.filters[number]
        )


_SEEN: contextvars.ContextVar[list[Layer] | None] = contextvars.ContextVar("seen", default=None)


def see(map: KernelMap, layer: tuple[int, int, torch.dtype], how: Any) -> None:
    """Called by every forward; notes it where somebody wants to know."""
    seen = _SEEN.get()
    if seen is not None:
        seen.append(Layer(map, *layer, how.precision, how.filters))


@contextmanager
def _watching() -> Iterator[list[Layer]]:
    seen: list[Layer] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


class Measured(NamedTuple):
    """What tuning a pass of a layer found.

    >>> measured = vg.tuning.Measured("forward f32 subm3 4->8", 5, 0.25, "implicit_gemm_cpu/f32/v4")
    >>> str(measured)
    'forward f32 subm3 4->8: 5 measured in 0.25 s, implicit_gemm_cpu/f32/v4'
    """

    problem: str
    candidates: int  # that were measured now
    seconds: float  # that it took
    picked: str  # from now on
    records: str = ""

    def __str__(self) -> str:
        return f"{self.problem}: {self.candidates} measured in {self.seconds:.2f} s, {self.picked}"


def _measured(text: str, problem: str, picked: str) -> Measured:
    counts, not_written, wrong, records = text.split("\n", 3)
    candidates, seconds = counts.split()
    if not_written:
        warnings.warn(f"measured times are not kept: {not_written}", stacklevel=3)
    if wrong:
        message = f"wrong results, which are never picked from now on: {wrong} ({problem})"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return Measured(problem, int(candidates), float(seconds), picked, records)


def measure(
    map: KernelMap,
    asked: Asked,
    budget_seconds: float = 1.0,
    exhaustive: bool = False,
    again: bool = False,
    judged: bool = True,
) -> Measured:
    """Times the kernels of a pass that its filter admits and that were not measured before.

    What is found is kept; where it cannot be written, this process knows it and a warning says so.
    A kernel whose results differ from the reference's is never picked, and a warning names it,
    unless `judged` is False: then nothing is compared.
    """
    map.settle(wait=True)
    back = asked.number == 1 and not map.symmetric
    layer = map.layer(asked.precision, filter=asked.filter)
    how = [round(1e6 * budget_seconds), int(exhaustive), int(again), int(judged)]
    transposed = map.transposed().tensors() if back else []
    found = call(ops._tune.default, map.tensors(), transposed, layer, asked.numbers(), how)
    map.forget_choices()
    now = explanation(map, asked)
    return _measured(text_of(found), now["problem"], now["picked"])


def table(map: KernelMap, asked: Asked) -> str:
    """One pass in words."""
    layer = map.layer(asked.precision, filter=asked.filter)
    return text_of(call(ops._explain.default, map.tensors(), layer, asked.numbers(), False))


def explanation(map: KernelMap, asked: Asked) -> dict[str, Any]:
    """One pass: problem, rows, pairs, device, picked, picked_by and every candidate."""
    layer = map.layer(asked.precision, filter=asked.filter)
    text = call(ops._explain.default, map.tensors(), layer, asked.numbers(), True)
    return json.loads(text_of(text))


def _layers(model: Callable[..., Any], inputs: Sequence[Any]) -> list[Layer]:
    """The convolutions of one forward in evaluation mode, each kind once."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad(), _watching() as seen:
            model(*inputs)
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    kinds = {(id(layer.map), *layer[1:]): layer for layer in seen}
    return list(kinds.values())


def _share(records: list[tuple[str, str]], group: Any) -> list[tuple[str, str]]:
    boxed = [records]
    torch.distributed.broadcast_object_list(
        boxed, torch.distributed.get_global_rank(group, 0) if group is not None else 0, group=group
    )
    return boxed[0]


def progress(work: list[Any], shown: bool) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return work
    return tqdm(work, desc="tune", unit="pass", disable=not shown)


def tune(
    model: Callable[..., Any],
    inputs: Any,
    budget_seconds: float = 60.0,
    exhaustive: bool = False,
    *,
    again: bool = False,
    passes: Sequence[str] = PASSES,
    show_progress: bool = True,
    all_ranks: bool = False,
    group: Any = None,
) -> list[Measured]:
    """Measures the kernels of a model's convolutions on these inputs, and keeps the times.

    The model runs once, in evaluation mode and without gradients, to see its layers; then each pass
    of each distinct layer is timed on random operands: the candidates that the cost model may have
    misjudged or, if exhaustive, all inside the layer's filter. Only what is missing is measured
    unless `again`. budget_seconds are of the whole model and shared evenly; each pass gets at least
    the time of the model's favourite.

    inputs: the model's argument or a tuple of them. passes: 'forward' alone for inference.
    show_progress: with tqdm, where it is installed. all_ranks: every rank of a torch.distributed
    job calls it; rank 0 of the group measures, and all use its times from then on. Without, a rank
    measures for itself.

    >>> x = vg.SparseTensor(torch.ones(1, 2), torch.zeros(1, 4, dtype=torch.int32))
    >>> found = vg.tune(vg.nn.SubmConv3d(2, 2, 1), x, 0.01, show_progress=False)
    >>> [each.problem for each in found]
    ['forward f32 subm1 2->2', 'grad_input f32 subm1 2->2', 'grad_weight f32 subm1 2->2']

    Raises ArgumentError: an unknown pass, no budget. Warns of kernels whose results are wrong.
    """
    numbers = [index_in(PASSES, name, "a pass of passes") for name in passes]
    if not budget_seconds > 0:
        raise ArgumentError(f"budget_seconds is {budget_seconds}, expected more than 0")
    layers = _layers(model, inputs if isinstance(inputs, tuple) else (inputs,))
    work = list(itertools.product(layers, numbers))
    measures = not all_ranks or torch.distributed.get_rank(group) == 0
    found: list[Measured] = []
    end = time.perf_counter() + budget_seconds
    for place, (layer, number) in enumerate(progress(work, show_progress and measures)):
        if measures:
            share = max(end - time.perf_counter(), 1e-3) / (len(work) - place)
            found.append(measure(layer.map, layer.asked(number), share, exhaustive, again))
    if all_ranks:
        # Of those that did not measure, an empty list.
        kinds = [layer.map.neighbours.device.type for layer, _ in work][: len(found)]
        records = [(kind, each.records) for kind, each in zip(kinds, found, strict=True)]
        for kind, text in _share(records, group):
            maps = (layer.map for layer in layers)
            on = next(map.neighbours for map in maps if map.neighbours.device.type == kind)
            call(ops._learn.default, on, list(text.encode()))
        for layer in layers:
            layer.map.forget_choices()
    return found


def calibrate(device: torch.device | str = "cpu", budget_seconds: float = 20.0) -> Measured:
    """Corrects the cost models of a device by what its kernels take on small made-up problems.

    device: 'cpu' or a CUDA device. At least one problem is measured, however few budget_seconds
    there are. What is found is kept as `tune`'s.

    >>> vg.calibrate("cpu", budget_seconds=0.001).problem
    'calibration of cpu'

    Raises ArgumentError: no budget.
    """
    if not budget_seconds > 0:
        raise ArgumentError(f"budget_seconds is {budget_seconds}, expected more than 0")
    on = torch.empty(0, device=device)
    found = call(ops._calibrate.default, on, round(1e6 * budget_seconds))
    return _measured(text_of(found), f"calibration of {device}", "")


class TimesFile(NamedTuple):
    """A file of the cache folder.

    >>> vg.tuning.TimesFile("h200.jsonl", "NVIDIA H200", 12, 3, 0, 0).problems
    3
    """

    path: str
    device: str  # '' if it has records of several
    records: int  # the last of each problem and kernel
    problems: int
    superseded: int  # records that a later one replaces
    foreign: int  # lines that are none


def times_files() -> list[TimesFile]:
    """The files of the cache folder.

    >>> all(file.records >= 0 for file in vg.tuning.times_files())
    True
    """
    lines = text_of(call(ops._times_files.default)).splitlines()
    parts = [line.split("\t", 5) for line in lines]
    return [TimesFile(path, device, *map(int, counts)) for device, *counts, path in parts]


def export_times(device: str = "") -> str:
    """The records of all devices, or of one, as lines of JSON.

    >>> len(vg.tuning.export_times("no such device"))
    0
    """
    return text_of(call(ops._export_times.default, text_tensor(device)))


def import_times(text: str) -> int:
    """Adds the records of a text, as `export_times` gives it, to the cache folder, for processes
    that start from now on; their number.

    >>> vg.tuning.import_times("")
    0
    """
    return call(ops._import_times.default, text_tensor(text)).item()


def clear_times() -> int:
    """Removes the cache folder's files; their number.

    >>> vg.tuning.clear_times() >= 0
    True
    """
    return call(ops._clear_times.default).item()


def plot(explanations: Sequence[dict[str, Any]], path: str | pathlib.Path) -> None:
    """A picture at path: every candidate of the explanations that can run, predicted and measured.

    >>> import tempfile
    >>> x = vg.SparseTensor(torch.ones(1, 2), torch.zeros(1, 4, dtype=torch.int32))
    >>> explanations = vg.explanations(vg.nn.SubmConv3d(2, 2, 1), x)
    >>> vg.tuning.plot(explanations, tempfile.mkdtemp() + "/kernels.png")

    Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = []
    for of_pass in explanations:
        able = [c for c in of_pass["candidates"] if c["reason"] is None]
        shown.append(sorted(able, key=lambda c: c["measured_ms"] or c["predicted_ms"]))
    longest = max(map(len, shown), default=1)
    figure = Figure(figsize=(7.5 * max(len(shown), 1), 1.5 + 0.24 * longest), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (of_pass, able) in enumerate(zip(explanations, shown, strict=True)):
        axes = figure.add_subplot(1, len(shown), panel + 1)
        rows = range(len(able))
        axes.plot([c["predicted_ms"] for c in able], rows, "o", mfc="none", label="predicted")
        measured = [(c["measured_ms"], row) for row, c in enumerate(able) if c["measured_ms"]]
        if measured:
            axes.plot(*zip(*measured, strict=True), "o", label="measured")
        axes.set_yticks(rows, [c["kernel"] for c in able], fontsize=7)
        for label, c in zip(axes.get_yticklabels(), able, strict=True):
            label.set_fontweight("bold" if c["kernel"] == of_pass["picked"] else "normal")
        axes.set(xscale="log", xlabel="ms", ylim=(longest - 0.5, -0.5))
        axes.set_title(f"{of_pass['problem']}\npicked by the {of_pass['picked_by']}", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)
