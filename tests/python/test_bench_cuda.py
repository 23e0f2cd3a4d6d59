# SPDX-License-Identifier: Apache-2.0
"""bench_cuda.py: what a compiled step is, and where its figures go. Nothing here needs a GPU."""

from __future__ import annotations

import pytest
import torch

from voxgemm import bench, bench_cuda, functional

TINY = "random:300:12"
SOMEWHERE = dict.fromkeys(("device", "cuda", "torch", "voxgemm", "date"), "?")


def layer_of(text, device):
    problem = bench.parse(text)
    map = bench.build_map(problem, bench.coords_of(problem.cloud).to(device))
    return bench.Layer(problem, map, functional.filters_of(None))


@pytest.mark.parametrize("text", ["f32 subm3 4->8", "f16 conv3s2p1 8->4", "bf16x3 subm3 8->8"])
def test_a_compiled_step_is_the_eager_one(text, device):
    layer = layer_of(f"step {text} {TINY}", device)
    row, waits = {}, []
    eager = bench.Contender(bench_cuda._step(layer), 3.0, 7, lambda: waits.append(1), 0.5)
    compiled = bench_cuda._compiled(layer, eager, row)["compiled"]
    assert row.keys() == {"compile_s"} and row["compile_s"] > 0 and waits
    assert (compiled.flops, compiled.rest, compiled.wait) == (3.0, 0.5, eager.wait)
    expected = eager.work()
    with torch.compiler.set_stance("fail_on_recompile"):
        found = compiled.work()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_compiler_that_fails_is_reported(device, monkeypatch):
    def untraceable(x, weight, bias, map, **_):
        torch._dynamo.graph_break()
        return x

    monkeypatch.setattr(functional, "conv3d", untraceable)
    layer = layer_of(f"step f32 subm3 4->8 {TINY}", device)
    row = {"problem": layer.problem.text, "voxels": 300, "ms": 1.5}
    assert bench_cuda._compiled(layer, bench.Contender(lambda: None, 1.0), row) == {}
    assert "compile_s" not in row
    options = bench.Options([1], 1, functional.filters_of(None))
    table, line = bench_cuda.summary([row | SOMEWHERE], options).split("\nnothing compiled ")
    assert "compiled" not in table.splitlines()[0]
    error, note = line.split("\n", 1)
    assert error.startswith(f"of {row['problem']}: ") and "graph_break" in error
    assert len(error) < 400 and "medians of 1 rounds" in note


def test_which_problems_are_compiled():
    options = bench.Options([1], 1, functional.filters_of(None))
    most = bench_cuda._MOST_COMPILED_VOXELS
    step, forward = (bench.parse(f"{work} f16 subm3 8->8 {TINY}") for work in ("step", "forward"))
    assert bench_cuda._is_compiled(step, most, options)
    assert not bench_cuda._is_compiled(step, most + 1, options)
    assert not bench_cuda._is_compiled(forward, most, options)
    options.filters = bench.filters(None, "explicit_gemm")
    assert not bench_cuda._is_compiled(step, most, options)


def test_compiled_times_are_shown_and_not_judged():
    """The fastest of all here, and yet no rate, ratio or count is of it."""
    problem = bench.parse("step f16 subm3 128->128 shell:64")
    seconds = {"ours": 4e-3, "graph": 2e-3, "compiled": 1e-3, "ceiling": 1e-3, "mm": 1e-3}
    contenders = {name: bench.Contender(lambda: None, 1e12) for name in seconds}
    times = {name: [s, s, s] for name, s in seconds.items()}
    row = bench_cuda._figures(problem, contenders, times)
    assert (row["compiled_ms"], row["compiled_ms_all"]) == (1.0, [1.0, 1.0, 1.0])
    shown = {"compiled_ms", "compiled_ms_all"}
    del contenders["compiled"], times["compiled"]
    without = bench_cuda._figures(problem, contenders, times)
    assert {key: value for key, value in row.items() if key not in shown} == without
    row |= {"problem": problem.text, "voxels": 15192, "target_ms": 1.5} | SOMEWHERE
    text = bench_cuda.summary([row], bench.Options([1], 3, functional.filters_of(None)))
    header, _, line, judged, _ = text.splitlines()
    assert header.split()[:5] == ["problem", "voxels", "ms", "compiled", "graph"]
    assert line.split()[5:9] == ["15,192", "4.0000", "1.0000", "2.0000"]
    assert judged.startswith("reached (eager or graph): 0 of 1")
