# SPDX-License-Identifier: Apache-2.0
"""The command line: info, bench, and one sentence with exit status 2 for what cannot be done."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import voxgemm as vg
from voxgemm import bench, cli, targets
from voxgemm.clouds import cloud
from voxgemm.table import table

TINY = "random:300:12"


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(capsys):
    """Runs `voxgemm ARGUMENTS`: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def neighbours(coords: np.ndarray) -> int:
    """Pairs of the 3^3 submanifold map, counted without it."""
    voxels = set(map(tuple, coords[:, 1:].tolist()))
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3).tolist()
    return sum((x + i, y + j, z + k) in voxels for x, y, z in voxels for i, j, k in steps)


def test_info(command):
    status, out, _ = command("info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["voxgemm"] == vg.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert {"python", "cpu_name", "cpu_features", "gpus", "cache_dir"} <= facts.keys()
    assert re.search(r"(GCC|clang).* \d+\.\d+", facts["compiler"])
    cuda = Path(facts["library"]).with_name("libvoxgemm_torch_cuda.so")
    assert bool(facts["cuda_architectures"]) == cuda.is_file()
    assert all(re.fullmatch(r"(sm|compute)_\d+", name) for name in facts["cuda_architectures"])
    status, out, _ = command("info")
    assert status == 0
    for value in (facts["voxgemm"], facts["torch"], facts["cpu_name"], facts["cache_dir"]):
        assert value in out


def test_bench_measures_what_the_problem_says(command, tmp_path):
    path = tmp_path / "bench.jsonl"
    problems = [f"forward f32 subm3 4->8 {TINY}", f"step bf16 subm3 8->8 {TINY}"]
    arguments = ("--threads", 1, "--repeat", 1, "--check", "--json", path)
    status, out, _ = command("bench", *problems, *arguments)
    assert status == 0
    forward, step = rows_of(path.read_text())
    coords = cloud(TINY)
    pairs = neighbours(coords)
    for row, problem, channels, passes in (
        (forward, problems[0], 32, 1),
        (step, problems[1], 64, 3),
    ):
        assert row["problem"] == problem
        assert problem in out
        assert (row["voxels"], row["pairs"]) == (len(coords), pairs)
        assert row["gflops"] == pytest.approx(passes * 2e-6 * pairs * channels / row["ms"])
        assert row["of_ceiling"] == pytest.approx(row["gflops"] / row["ceiling_gflops"])
        assert row["of_mm"] == pytest.approx(row["gflops"] / row["mm_gflops"])
        assert len(row["kernels"]) == len(row["max_error"]) == passes
        assert row["threads"] == 1
        assert row["ms_all"] == [row["ms"]]
        assert {"device", "torch", "voxgemm", "date"} <= row.keys()
    # The same sums in f32, then rounded to bf16.
    assert forward["max_error"]["forward"] < step["max_error"]["forward"]


def test_bench_maps_of_every_operation(command):
    problems = [
        f"map f32 subm3 1->1 {TINY}",
        f"map f32 subm3 1->1 shuffled:{TINY}",
        f"map f32 conv2s2 1->1 {TINY}",
        f"map f32 inv2s2 1->1 {TINY}",
    ]
    status, out, err = command("bench", *problems, "--repeat", 1, "--json", "-")
    plain, shuffled, strided, inverse = rows_of(out)
    assert status == 0
    assert "ms" in err
    coords = cloud(TINY)
    coarse = len(np.unique(coords // 2, axis=0))
    assert plain["pairs"] == shuffled["pairs"] == neighbours(coords)
    assert strided["pairs"] == inverse["pairs"] == len(coords)
    assert (strided["rows_in"], strided["rows_out"]) == (len(coords), coarse)
    assert (inverse["rows_in"], inverse["rows_out"]) == (coarse, len(coords))
    assert all(row["ms"] > 0 and "gflops" not in row for row in (plain, shuffled, strided, inverse))


def test_shuffled_rows_are_the_same_voxels_in_another_order():
    plain, shuffled = bench.coords_of(TINY), bench.coords_of(f"shuffled:{TINY}")
    assert not torch.equal(plain, shuffled)
    assert torch.equal(plain, torch.unique(shuffled, dim=0))


def test_bench_threads(command):
    problem = f"grad_input f32 conv2s2 8->8 {TINY}"
    status, out, _ = command("bench", problem, "--threads", "1,2", "--repeat", 1, "--json", "-")
    one, two = rows_of(out)
    assert status == 0
    assert [row["threads"] for row in (one, two)] == [1, 2]
    assert two["speed_up"] == pytest.approx(one["ms"] / two["ms"])


def test_bench_filters(command):
    problem = f"step f32 subm3 8->8 {TINY}"
    given = ("--repeat", 1, "--json", "-")
    _, out, _ = command("bench", problem, "--algorithm", "explicit_gemm", *given)
    (row,) = rows_of(out)
    assert {name.split("_cpu")[0] for name in row["kernels"]} == {"explicit_gemm"}
    status, out, _ = command("bench", problem, "--kernel", row["kernels"][0], *given)
    assert status == 0
    assert set(rows_of(out)[0]["kernels"]) == {row["kernels"][0]}


def test_the_suite_has_the_figures_to_reach(command, monkeypatch):
    problems = [bench.parse(text) for text in bench.suite()]
    reached = {(p.c_in, p.work): bench._target(p) for p in problems if p.dtype is torch.float32}
    for channels in (16, 32, 64, 128, 256):
        assert reached[channels, "forward"][1] > reached[channels, "step"][1]
    assert sum(p.work == "map" for p in problems) == 8

    tiny = [f"forward f32 subm3 16->16 {TINY}", "map f32 subm3 1->1 shuffled:shell:64"]
    monkeypatch.setattr(bench, "suite", lambda: tiny)
    given = ("--threads", 1, "--repeat", 1, "--json", "-")
    _, out, err = command("bench", "--suite", "cpu", *given)
    forward, map = rows_of(out)
    assert forward["target_share"] == 0.40
    assert map["target_ms"] == pytest.approx(1.3 * 1.5)
    assert "reach" in err
    assert "target_share" not in rows_of(command("bench", *tiny, *given, "--threads", 2)[1])[0]


def test_the_suite_of_maps_has_every_geometry():
    problems = [bench.parse(text) for text in targets.map_suite()]
    assert len({(problem.operation, problem.geometry) for problem in problems}) == 7
    assert {problem.operation for problem in problems} == {"submanifold", "strided", "inverse"}
    assert {problem.work for problem in problems} == {"map"}


def test_every_problem_of_the_h200_suite_has_figures():
    problems = [bench.parse(text) for text in targets.suite()]
    assert len({p.text for p in problems}) == len(problems)
    found = {p.text: targets.figures(p.text) for p in problems}
    assert all(figures and figures.reach > 0 for figures in found.values())
    # One cloud after the other: each is built once.
    clouds = [p.cloud for p in problems]
    assert len(list(itertools.groupby(clouds))) == len(set(clouds))
    for p in problems:
        peers = found[p.text].peers.values()
        assert all(found[p.text].reach < peer for peer in peers)
    assert targets.figures("forward f16 subm3 64->32 shell:64") is None
    assert targets.figures("forward f16 subm3 48->48 shell:64") is None


def test_bench_on_a_gpu(command, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    works = ("forward", "grad_input", "grad_weight", "step", "map")
    problems = [f"{work} bf16 subm3 16->16 {TINY}" for work in works]
    problems += [f"forward tf32 subm3 16->16 {TINY}", f"map f16 conv2s2 16->16 {TINY}"]
    path = tmp_path / "bench.jsonl"
    arguments = ("--device", "cuda", "--repeat", 1, "--check", "--json", path)
    status, out, _ = command("bench", *problems, *arguments)
    assert status == 0
    rows = rows_of(path.read_text())
    assert [row["problem"] for row in rows] == problems
    for row in rows:
        assert row["problem"] in out
        assert row["ms"] > 0
        assert row["device_type"] == "cuda"
        assert not {"graph_error", "compiled_error"} & row.keys()
        assert ("compiled_ms" in row) == row["problem"].startswith("step")
        assert ("max_error" in row) == ("map" not in row["problem"])
    assert rows[0]["pairs"] == neighbours(cloud(TINY))


WRONG = {
    "no command": ((), "COMMAND"),
    "unknown command": (("train",), "'train'"),
    "unknown option": (("info", "--long"), "--long"),
    "no pass": (("bench", "sideways f32 subm3 4->4 shell:8"), "sideways"),
    "no dtype": (("bench", "step f8 subm3 4->4 shell:8"), "f8"),
    "no operation": (("bench", "map f32 pool3 4->4 shell:8"), "pool3"),
    "no cloud": (("bench", "forward f32 subm3 4->4"), "cloud is ''"),
    "unknown cloud": (("bench", "forward f32 subm3 4->4 cube:8"), "cube:8"),
    "cloud's file": (("bench", "forward f32 subm3 4->4 file:absent.ply@0.1"), "absent.ply"),
    "second is wrong": (("bench", f"map f32 subm3 1->1 {TINY}", "nonsense"), "nonsense"),
    "kernel": (("bench", f"forward f32 subm3 4->4 {TINY}", "--kernel", "fast/gemm"), "fast/gemm"),
    "algorithm": (("bench", f"forward f32 subm3 4->4 {TINY}", "--algorithm", "magic"), "magic"),
    "both filters": (("bench", "--kernel", "a/b", "--algorithm", "explicit_gemm"), "--algorithm"),
    "both lists": (("bench", "--suite", "cpu", f"map f32 subm3 1->1 {TINY}"), "--suite cpu"),
    "suite": (("bench", "--suite", "gpu"), "gpu"),
    "suite's device": (("bench", "--suite", "h200", "--device", "cpu"), "h200"),
    "device": (("bench", "--device", "tpu"), "'tpu'"),
    "threads": (("bench", "--threads", "0"), "threads is '0'"),
    "second threads": (("bench", "--threads", "1,many"), "threads is 'many'"),
    "repeat": (("bench", "--repeat", "-3"), "repeat"),
    "explain's json": (
        ("explain", f"step f32 subm3 4->4 {TINY}", "--json", "absent/x"),
        "absent/x",
    ),
    "explain's plot": (("explain", f"step f32 subm3 4->4 {TINY}", "--plot", "x.foo"), "'foo'"),
    "tune's out": (("tune", f"forward f64 subm3 4->4 {TINY}", "--out", "absent/x"), "absent/x"),
    "json": (
        ("bench", f"map f32 subm3 1->1 {TINY}", "--json", "absent/folder/x"),
        "absent/folder/x",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_end_in_one_sentence(command, case):
    arguments, named = WRONG[case]
    status, out, err = command(*arguments)
    assert status == 2
    assert out == ""
    # A progress bar may stand before the sentence.
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("voxgemm")]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in err


def test_as_a_process():
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "voxgemm.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    wrong = run("bench", "nonsense")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.startswith("voxgemm bench: ")
    assert wrong.stderr.count("\n") == 1
    right = run("info")
    assert right.returncode == 0
    assert vg.__version__ in right.stdout


def test_table():
    text = table(("name", "ms"), (("a", "1.5"), ("longer", "12.25")))
    assert text.splitlines() == ["name       ms", "------  -----", "a         1.5", "longer  12.25"]
