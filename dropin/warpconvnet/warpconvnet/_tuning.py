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
    """The best of a few runs, after one that does not count."""
    run()
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


_LEFT_OUT: set[Hashable] = set()


def fastest(
    key: str,
    space: Sequence[Candidate],
    run: Callable[[Candidate], tuple[Hashable, Callable[[], Any]]],
    device: torch.device,
) -> tuple[Candidate | None, bool]:
    """The fastest known candidate of a space, and whether the whole space is known.

    What is not known is measured first, for BUDGET seconds at most; the rest by later calls. Each
    run(candidate) gives what it runs and a call of it: candidates that run the same share a time.
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
                    shared[what] = seconds_of(action, device)
                except NotImplementedError as error:
                    _leave_out(key, candidate, error)
                    continue
            found[candidate.text] = shared[what]
        if found:
            times.add(key, found)
    known = times.of(key)
    left = [c for c in space if c.text in known]
    complete = all(c.text in known or (key, c.text) in _LEFT_OUT for c in space)
    return (min(left, key=lambda c: known[c.text]) if left else None), complete


def _leave_out(key: str, candidate: Candidate, reason: Exception) -> None:
    if candidate.algorithm not in {name for _, name in _LEFT_OUT}:
        first = str(reason).partition("\n")[0]
        LOG.warning("%s is left out: %s", candidate.text, first)
        _LEFT_OUT.add(("", candidate.algorithm))
    _LEFT_OUT.add((key, candidate.text))
