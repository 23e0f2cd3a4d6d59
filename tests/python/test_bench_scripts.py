# SPDX-License-Identifier: Apache-2.0
"""Programs of bench/ run and say what they promise. No time is judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from voxgemm import bench

BENCH = Path(__file__).parents[2] / "bench"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_network_is_timed_and_its_graph_gives_the_same(device, capsys):
    dtype = "float32" if device.type == "cpu" else "float16"
    arguments = ["--device", device.type, "--cloud", "shell:20", "--dtype", dtype, "--repeat", "1"]
    script("network").main(arguments)
    row = json.loads(capsys.readouterr().out)
    assert row["voxels"] == len(bench.coords_of("shell:20"))
    assert min(row[key] for key in ("forward_ms", "step_ms")) > 0
    assert device.type == "cpu" or (row["same"] and row["graph_ms"] > 0)


def test_the_table_has_every_file_and_every_peer(tmp_path):
    first = {"problem": "a", "ms": 2.0, "graph_ms": 1.0, "target_ms": 0.5, "of_dense": 0.4}
    first |= {"peers_ms": {"spconv": 3.0}, "max_error": {"forward": 1e-3, "grad_input": 2e-3}}
    rows = ([first, {"problem": "b", "ms": 4.0}], [{"problem": "a", "ms": 8.0}])
    paths = [tmp_path / f"{k}.jsonl" for k in range(2)]
    for path, run in zip(paths, rows, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in run))
    suite_table = script("suite_table")
    lines = suite_table.table([suite_table.read(str(path)) for path in paths]).splitlines()
    one = "| `a` | 0.500 | 2.000 | 1.000 | 8.000 | - | - | 3.00 | - | - | 40% | 2e-03 |"
    two = "| `b` | - | 4.000 | - | - | - | - | - | - | - | - | - |"
    assert lines[2:] == [one, two]
    first["compiled_ms"] = 1.5
    first_alone = suite_table.table([{row["problem"]: row for row in rows[0]}]).splitlines()
    header, _, *lines = [line.split(" | ")[1:5] for line in first_alone]
    assert header == ["reach", "eager 1", "compiled 1", "graph 1"]
    assert lines == [["0.500", "2.000", "1.500", "1.000"], ["-", "4.000", "-", "-"]]


def test_the_accuracy_is_that_of_the_kernel(device, monkeypatch):
    accuracy = script("accuracy")
    monkeypatch.setattr(accuracy, "WIDTHS", ((3, 5), (16, 16)))
    version, kernels = accuracy._library.version_and_kernels()
    in_f64 = version, {"f64": kernels["f64"]}
    monkeypatch.setattr(accuracy._library, "version_and_kernels", lambda: in_f64)
    rows = list(accuracy.rows(device))
    assert rows and all(row["layers"] == 2 for row in rows)
    assert all(0 < row[work] < 1e-13 for row in rows for work in bench.PASSES)
    # A kernel of another arithmetic runs none of the layers.
    map = accuracy.voxgemm.build_map(bench.coords_of(accuracy.CLOUD).to(device), 3)
    assert accuracy.largest_errors(rows[0]["kernel"] + "/no", "f64", map) == {"layers": 0}


def test_the_accuracy_has_a_layer_for_every_kernel(device, monkeypatch):
    accuracy = script("accuracy")
    monkeypatch.setattr(accuracy, "WIDTHS", ((3, 5), (64, 64), (256, 256)))
    rows = list(accuracy.rows(device))
    assert rows and not [row["kernel"] for row in rows if row["layers"] == 0]
    lines = accuracy.largest_of_families(rows).splitlines()
    assert lines[0].split()[0] == "algorithm" and "f64" in lines[0].split()
    assert {line.split()[0] for line in lines} >= {row["kernel"].split("/")[0] for row in rows}


@pytest.mark.parametrize("text", ["subm3 5->7 shell:16", "conv3s2p1 5->7 shell:16"])
@pytest.mark.parametrize("work", ["forward", "grad_input", "grad_weight"])
def test_the_error_is_that_of_the_worst_number(work, text, device, monkeypatch):
    problem = bench.parse(f"step f64 {text}")
    coords = bench.coords_of(problem.cloud).to(device)
    layer = bench.Layer(problem, bench.build_map(problem, coords), bench.filters(None, None))
    assert layer.error(work) < 1e-14
    right = layer.run(work)
    wrong = right.clone()
    wrong.view(-1)[0] += 1e-3 * right.abs().max()
    monkeypatch.setattr(layer, "run", lambda work: wrong)
    assert torch.equal(layer.run(work), wrong)
    assert layer.error(work) >= 0.99e-3


def test_the_epilogue_is_timed_in_four_ways(device, capsys):
    problem = "forward f32 subm3 4->4 line:30"
    script("epilogue").main(["--device", device.type, problem])
    text = capsys.readouterr().out
    assert text.startswith(problem)
    times = [float(word) for word in text.removeprefix(problem).split()]
    assert len(times) == 4 and min(times) > 0


def test_operators_of_rows_are_timed(device, tmp_path, capsys):
    path = tmp_path / "times.jsonl"
    row_operators = script("row_operators")
    row_operators.LAYERS = ((torch.float32, 4),)
    row_operators.main(["--device", device.type, "--cloud", "shell:10", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["operator"] for row in rows}) == len(rows) == 16
    assert all(row["us"] > 0 and row["floor"] > 0 for row in rows)
    assert "of floor" in capsys.readouterr().out


def test_depthwise_is_timed_in_every_order(device, tmp_path, capsys):
    path = tmp_path / "times.jsonl"
    depthwise = script("depthwise")
    depthwise.LAYERS = ((torch.float32, 4),)
    depthwise.main(["--device", device.type, "--cloud", "shell:10", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["order"] for row in rows] == ["raster", "morton", "none"]
    assert all(row[name] > 0 for row in rows for name in (*depthwise.PASSES, "copy"))
    assert "of copy" in capsys.readouterr().out
