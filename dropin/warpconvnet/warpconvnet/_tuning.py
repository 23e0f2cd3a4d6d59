# SPDX-License-Identifier: Apache-2.0
"""Measured times of candidates: all of them kept, in memory and in a file that processes share.

The file is JSON lines, one configuration's new times each, written by one append: the last line
about a candidate counts, and what is torn or foreign is passed over.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import constants
from ._search import Candidate

LOG = logging.getLogger("warpconvnet")
FILE = "voxgemm-times.jsonl"
FORMAT = 1
# Seconds of measuring in one call, of one configuration and pass.
BUDGET = 1.0
REPEATS = 3


class Times:
    """Seconds by configuration and candidate."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, float]] = {}
        self.measured = 0  # candidates measured by this process
        self._read: set[str] = set()
        self._lines: queue.Queue[tuple[str, str]] = queue.Queue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._warned = False

    def of(self, key: str) -> dict[str, float]:
        """What is known of a configuration, the folder's file read once."""
        folder = constants.WARPCONVNET_BENCHMARK_CACHE_DIR
        if folder not in self._read:
            with self._lock:
                if folder not in self._read:
                    self._load(os.path.join(folder, FILE))
                    self._read.add(folder)
        return self.known.setdefault(key, {})

    def _load(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.readlines()
        except OSError:
            return
        for line in lines:
            try:
                record = json.loads(line)
                if record["format"] != FORMAT:
                    continue
                times = {str(c): float(s) for c, s in record["seconds"].items()}
                self.known.setdefault(record["key"], {}).update(times)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue

    def add(self, key: str, times: dict[str, float]) -> None:
        """Keeps the times; a thread writes them."""
        self.of(key).update(times)
        self.measured += len(times)
        line = json.dumps({"format": FORMAT, "key": key, "seconds": times}) + "\n"
        self._lines.put((constants.WARPCONVNET_BENCHMARK_CACHE_DIR, line))
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, daemon=True)
                self._writer.start()
                atexit.register(self.save)

    def _write(self) -> None:
        while True:
            folder, line = self._lines.get()
            try:
                os.makedirs(folder, exist_ok=True)
                place = os.path.join(folder, FILE)
                file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(file, line.encode())
                finally:
                    os.close(file)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    LOG.warning("measured times stay in memory, %s: %s", folder, error)
            finally:
                self._lines.task_done()

    def save(self) -> None:
        """Waits until everything known is written."""
        self._lines.join()


times = Times()


def may_measure() -> bool:
    """Not while a graph is captured or traced, where sums must repeat, or among ranks."""
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """The best of a few runs; one that does not count went before."""
    best = float("inf")
    for _ in range(REPEATS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - before)
    return best


WRONG = "its results are not those of explicit_gemm"
# By configuration and candidate, and once by algorithm, why.
_LEFT_OUT: dict[tuple[str, str], str] = {}


def fastest(
    key: str,
    space: Sequence[Candidate],
    run: Callable[[Candidate], tuple[Hashable, Callable[[], Any]]],
    device: torch.device,
    agrees: Callable[[Any], bool],
) -> tuple[Candidate | None, bool]:
    """The fastest known candidate of a space, and whether the whole space is known.

    What is not known is measured first, for BUDGET seconds at most; the rest by later calls. Each
    run(candidate) gives what it runs and a call of it: candidates that run the same share a time.
    One whose result does not agree with what is expected can never be picked.
    """
    known = times.of(key)
    missing = [c for c in space if c.text not in known and (key, c.text) not in _LEFT_OUT]
    if missing and may_measure():
        found: dict[str, float] = {}
        shared = {run(c)[0]: known[c.text] for c in space if c.text in known}
        end = time.perf_counter() + BUDGET
        for candidate in missing:
            what, action = run(candidate)
            if what not in shared:
                if found and time.perf_counter() > end:
                    continue
                try:
                    right = agrees(action())
                except NotImplementedError as error:
                    _leave_out(key, candidate, str(error).partition("\n")[0])
                    continue
                if not right:
                    _leave_out(key, candidate, WRONG)
                    continue
                shared[what] = seconds_of(action, device)
            found[candidate.text] = shared[what]
        if found:
            times.add(key, found)
    known = times.of(key)
    left = [c for c in space if c.text in known]
    complete = all(c.text in known or (key, c.text) in _LEFT_OUT for c in space)
    if not left and any(_LEFT_OUT.get((key, c.text)) == WRONG for c in space):
        raise RuntimeError(f"{space[0].text} and what else may be chosen: {WRONG} ({key})")
    return (min(left, key=lambda c: known[c.text]) if left else None), complete


def _leave_out(key: str, candidate: Candidate, reason: str) -> None:
    if candidate.algorithm not in {name for of, name in _LEFT_OUT if not of}:
        LOG.warning("%s is left out: %s", candidate.text, reason)
        _LEFT_OUT["", candidate.algorithm] = reason
    _LEFT_OUT[key, candidate.text] = reason


def agreement(
    expected: Callable[[], Any], magnitude: Callable[[], Tensor], terms: int, precision: int
) -> Callable[[Any], bool]:
    """Whether results are the expected one within what rounding can do to sums of `terms` products.

    magnitude() is at least the sum of each element's products without signs, or of its row's.
    """
    known: list[tuple[Tensor, Tensor] | None] = []

    def agrees(result: Any) -> bool:
        if not known:
            try:
                known.append((_one(expected()), magnitude()))
            except NotImplementedError:  # nothing to compare with
                known.append(None)
        if known[0] is None:
            return True
        found, (wanted, most) = _one(result), known[0]
        dtype = wanted.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # As many roundings as there are terms, one of the result, and of tf32's operands.
        each = terms * torch.finfo(wide).eps / 2
        each = each / (1 - each) if each < 0.5 else 1.0
        each += (1 + 2.0**-11) ** 2 - 1 if precision else 0.0
        of_result = torch.finfo(dtype).eps / 2
        found, wanted = found.double(), wanted.double()
        bound = 2 * each * (1 + of_result) * most.double()
        bound = bound + of_result * (found.abs() + wanted.abs()) + torch.finfo(dtype).tiny
        # Of operands that are not finite nothing can be said.
        return not bool(wanted.isfinite().all()) or bool(((found - wanted).abs() <= bound).all())

    return agrees


def _one(result: Any) -> Tensor:
    """The tensor itself, or the one of several results that there is."""
    if isinstance(result, Tensor):
        return result
    return next(part for part in result if part is not None)
