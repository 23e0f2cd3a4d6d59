# SPDX-License-Identifier: Apache-2.0
"""bench/first_calls.py: its shapes, and what it prints. Times are not judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from voxgemm import bench

SCRIPT = Path(__file__).parents[2] / "bench" / "first_calls.py"


def test_every_shape_is_new_and_every_call_is_timed(device, tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("first_calls", SCRIPT)
    first_calls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first_calls)
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
            assert call["more_ms"] == call["first_ms"] - call["second_ms"]
    kernels = [kernel for row in rows for kernel in row["new_kernels"]]
    assert kernels and len(set(rows[0]["new_kernels"])) <= 3
    text = capsys.readouterr().out
    assert "| forward | 4 |" in text and "| step | 4 |" in text
