# SPDX-License-Identifier: Apache-2.0
"""bench/first_calls.py: its shapes, and what it prints. Times are not judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from voxgemm import bench

SCRIPT = Path(__file__).parents[2] / "bench" / "first_calls.py"


@pytest.fixture
def first_calls():
    spec = importlib.util.spec_from_file_location("first_calls", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_of_several_processes_the_median_difference_counts(first_calls):
    def run(*pairs):
        both = [{"first_ms": first, "second_ms": second} for first, second in pairs]
        return [{"shape": "a", "forward": both[0], "step": both[1], "new_kernels": []}]

    runs = [run((9.0, 1.0), (5.0, 5.0)), run((2.0, 1.0), (4.0, 1.0)), run((3.0, 3.0), (6.0, 5.0))]
    (row,) = first_calls.medians(runs)
    assert row["forward"] == {"first_ms": 2.0, "second_ms": 1.0}
    assert row["step"] == {"first_ms": 6.0, "second_ms": 5.0}
    assert first_calls.more(row, "forward") == 1.0


def test_every_shape_is_new_and_every_call_is_timed(
    first_calls, device, tmp_path, capsys, monkeypatch
):
    texts = first_calls.shapes(device.type, 40)
    assert len({(p.c_in, p.c_out, p.text) for p in map(bench.parse, texts)}) == 40
    monkeypatch.setitem(first_calls.CLOUDS, device.type, "shell:8")
    path = tmp_path / "calls.jsonl"
    first_calls.main(
        ["--device", device.type, "--shapes", "4", "--cold-memory", "--json", str(path)]
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["shape"] for row in rows] == first_calls.shapes(device.type, 4)
    for row in rows:
        for call in (row["forward"], row["step"]):
            assert call["first_ms"] > 0 and call["second_ms"] > 0
    kernels = [kernel for row in rows for kernel in row["new_kernels"]]
    assert kernels and len(set(rows[0]["new_kernels"])) <= 3
    text = capsys.readouterr().out
    assert "| forward | 4 |" in text and "| step | 4 |" in text
