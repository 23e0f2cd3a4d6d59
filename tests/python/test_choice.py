# SPDX-License-Identifier: Apache-2.0
"""bench/choice.py: the problems that it measures, and what it makes of times."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from voxgemm import bench

PATH = pathlib.Path(__file__).parents[2] / "bench" / "choice.py"


@pytest.fixture(scope="module")
def choice():
    spec = importlib.util.spec_from_file_location("choice", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_random_problems_are_the_same_and_none_takes_long(device):
    problems = bench.random_problems(200, device)
    assert problems == bench.random_problems(200, device)
    assert len(set(problems)) == 200
    passes, dtypes, operations, *_ = map(set, zip(*map(str.split, problems), strict=True))
    assert passes == set(bench.PASSES) and {"subm3", "conv2s2", "inv2s2"} <= operations
    assert ("tf32" in dtypes) == (device == "cuda")
    for problem in map(bench.parse, problems[:: 200 // 15]):
        map_ = bench.build_map(problem, bench.coords_of(problem.cloud))
        flops = 2 * map_.pairs * problem.c_in * problem.c_out
        # How many pairs a cloud has is estimated.
        assert flops <= 2.5 * (4e9 if device == "cpu" else 1e12), problem.text


def made_up(choice, noise=0.02):
    """Lines and formulas; two kernels of a family, of which the formula knows one is for wide
    layers and the other for narrow ones, but not where it changes."""
    draw = np.random.RandomState(0)
    lines, said = [], []
    for number in range(60):
        rows, wide = draw.uniform(-5, 5), draw.uniform(-3, 3)
        sizes = [1, rows, abs(rows), wide, 0, 0]
        formulas = {"family/f16/128": 1e-3 * 2 ** (-0.3 * wide), "family/f16/64": 1e-3}
        times = {
            kernel: seconds
            * (2.0 * 2 ** (0.1 * rows) if kernel.endswith("64") else 1.0)
            * 2 ** (noise * draw.randn())
            for kernel, seconds in formulas.items()
        }
        lines.append({"problem": f"forward f16 subm3 8->8 cloud:{number}", "seconds": times})
        said.append({"sizes": sizes, "kernels": formulas})
    return choice.Times(lines, said)


def test_a_fit_finds_what_the_formulas_lack_on_problems_that_it_has_not_seen(choice):
    times = made_up(choice)
    before = times.regret(times.formula)
    held_out = choice.held_out(times, 0.2)
    found = choice.fit(times, np.ones(60, dtype=bool), 0.2)
    after = times.regret(choice.corrected(times, found))
    assert before.mean() > 1.2 and (before >= 1).all()
    assert held_out.mean() < 1.02 and np.quantile(held_out, 0.95) < 1.1
    assert after.mean() < 1.02
    difference = found["forward", "family/f16/64"] - found["forward", "family/f16/128"]
    assert difference[0] == pytest.approx(1, abs=0.2)
    assert difference[1] == pytest.approx(0.1, abs=0.03)


def test_problems_held_out_do_not_take_part_in_another_pass_either(choice):
    times = made_up(choice, noise=0)
    for number, line in enumerate(times.lines):
        line["problem"] = f"{bench.PASSES[number % 3]} f16 subm3 8->8 cloud"
    # Nothing is left to learn from.
    assert np.array_equal(choice.held_out(times, 0.2), times.regret(times.formula))


def test_measuring_goes_on_where_it_stopped(choice, tmp_path, monkeypatch):
    texts = [f"forward f32 subm3 4->{c} line:50" for c in (4, 8, 16)]
    monkeypatch.setattr(choice, "problems_of", lambda suite, device: texts)
    path = tmp_path / "lines.jsonl"
    options = argparse.Namespace(
        lines=str(path), device="cpu", suite="all", seconds=0, budget=0.05, threads=0
    )
    options.processes = 1
    choice.measure(options)
    assert [line["problem"] for line in choice.read([str(path)])] == texts[:1]
    whole = path.read_text()
    path.write_text(whole + whole[:50] + "\n")  # a run that was killed
    options.seconds, options.processes = 100, 2
    choice.measure(options)
    lines = choice.read([str(path)])
    assert sorted(line["problem"] for line in lines) == sorted(texts)
    for line in lines:
        assert line["rows_in"] == line["rows_out"] == 50 and line["pairs"] == 148
        assert set(line["seconds"]) <= set(line["able"])
        assert all(seconds > 0 for seconds in line["seconds"].values())
    assert json.loads(whole)["problem"] == texts[0]
