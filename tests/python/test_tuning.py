# SPDX-License-Identifier: Apache-2.0
"""Measured times from Python: what a model's layers are, what is kept, who uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import voxgemm as vg
from voxgemm import cli, tuning
from voxgemm.algorithms import PASSES

TINY = "random:300:12"


def some_layer(clouds, channels, **options):
    """A layer and its input; a test that wants cold times takes channels of its own."""
    coords = clouds.random(300, 12)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(len(coords), channels, generator=draw).to(coords.device)
    conv = vg.nn.SubmConv3d(channels, 8, 3, device=coords.device, **options)
    return conv, vg.SparseTensor(x, coords)


def measured(conv, x):
    """By pass the kernels with a time."""
    found = vg.explanations(conv, x)
    return [{c["kernel"] for c in each["candidates"] if c["measured_ms"]} for each in found]


def test_a_models_layers_are_measured_once_each(clouds):
    conv, x = some_layer(clouds, 5)
    other = vg.nn.SubmConv3d(8, 8, 3, device=x.features.device)
    model = vg.nn.Sequential(conv, nn.Dropout(), other, other)
    found = vg.tune(model, x, 2.0, show_progress=False)
    assert len(found) == 2 * len(PASSES) and model.training and model[1].training
    assert [each.problem.split()[0] for each in found] == [*PASSES, *PASSES]
    for each, kernels in zip(found[:3], measured(conv, x), strict=True):
        assert each.candidates == len(kernels) >= 1
        assert each.picked in kernels and each.seconds > 0
        assert each.records.count("\n") == each.candidates
    for of_pass in vg.explanations(conv, x):
        assert of_pass["picked_by"] == "store"
    assert all(f" > {each.picked} " in vg.explain(conv, x) for each in found[:3])
    before = measured(conv, x)
    again = vg.tune(model, x, 2.0, show_progress=False)
    for each, had, has in zip(again[:3], before, measured(conv, x), strict=True):
        assert each.candidates == len(has - had), "what is known is not measured again"
    assert conv(x).features.shape == (300, 8)


def test_the_passes_and_the_filter_that_were_asked_for(clouds):
    conv, x = some_layer(clouds, 6, algorithm={"forward": "explicit_gemm"})
    (found,) = vg.tune(conv, (x,), 30.0, exhaustive=True, passes=["forward"], show_progress=False)
    kernels, *others = measured(conv, x)
    assert others == [set(), set()] and found.picked in kernels
    assert all(kernel.startswith("explicit_gemm") for kernel in kernels)
    # Another filter's answer is its own.
    free = vg.explanations(vg.nn.SubmConv3d(6, 8, 3, device=x.features.device), x)[0]
    cold = vg.nn.SubmConv3d(6, 8, 3, device=x.features.device, algorithm="implicit_gemm")
    assert free["picked"] not in kernels or free["picked_by"] == "store"
    assert vg.explanations(cold, x)[0]["picked_by"] in ("model", "filter")


def test_bad_arguments(clouds):
    conv, x = some_layer(clouds, 4)
    with pytest.raises(vg.ArgumentError, match="'back', expected one of forward, grad_input"):
        vg.tune(conv, x, passes=["back"])
    with pytest.raises(vg.ArgumentError, match="budget_seconds is 0"):
        vg.tune(conv, x, 0)
    with pytest.raises(vg.ArgumentError, match="budget_seconds is -1"):
        vg.calibrate("cpu", -1)


def test_determinism_asks_the_model_alone(clouds):
    conv, x = some_layer(clouds, 7)
    able = [c for c in vg.explanations(conv, x)[0]["candidates"] if c["reason"] is None]
    favourite = vg.explanations(conv, x)[0]["picked"]
    slow = max(able, key=lambda c: c["predicted_ms"])["kernel"]
    (found,) = vg.tune(conv, x, 1.0, passes=["forward"], show_progress=False)
    record = json.loads(found.records.splitlines()[0])
    lines = [
        record | {"kernel": favourite, "seconds": 1.0},
        record | {"kernel": slow, "seconds": 1e-9},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    torch.ops.voxgemm._learn(x.features, list(text.encode()))
    map = x.maps.submanifold(x.number, conv.geometry)
    map.forget_choices()

    def runs():
        conv(x)
        return [c.kernel for asked, c in map._choices.items() if asked.number == 0][-1]

    assert runs() == slow
    torch.use_deterministic_algorithms(True)
    try:
        assert runs() == favourite
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_cannot_be_written_is_known_all_the_same(clouds):
    code = """
import warnings, torch, voxgemm as vg
warnings.simplefilter("error")
coords = torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4, 4)]).int()
x, conv = vg.SparseTensor(torch.randn(64, 4), coords), vg.nn.SubmConv3d(4, 4, 3)
conv(x)
try:
    vg.tune(conv, x, 1.0, passes=["forward"], show_progress=False)
except UserWarning as warning:
    print(warning)
print(vg.explanations(conv, x)[0]["picked_by"])
"""
    result = run_python(code, VOXGEMM_CACHE_DIR="/proc/voxgemm")
    assert "measured times are not kept: /proc/voxgemm/" in result.stdout, result.stderr
    assert result.stdout.endswith("store\n")


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


FIRST_USE = """
import torch, voxgemm as vg
coords = torch.cartesian_prod(*[torch.arange(n) for n in (1, 6, 6, 6)]).int()
x = vg.SparseTensor(torch.randn(216, 4, requires_grad=True), coords)
conv = vg.nn.SubmConv3d(4, 4, 3)
conv(x).features.sum().backward()
print(*[each["picked_by"] for each in vg.explanations(conv, x)])
"""


@pytest.mark.parametrize("tune, wanted", [("first_use", "store"), ("off", "model"), ("", "model")])
def test_first_use(tune, wanted, tmp_path):
    for _ in range(2):  # with a cold store and with a warm one
        result = run_python(FIRST_USE, VOXGEMM_CACHE_DIR=str(tmp_path), VOXGEMM_TUNE=tune)
        assert result.stdout.split() == [wanted] * 3, result.stderr
    assert len(list(tmp_path.iterdir())) == (wanted == "store")


TRACED = """
import torch, voxgemm as vg
coords = torch.cartesian_prod(*[torch.arange(n) for n in (1, 6, 6, 6)]).int()
map = vg.functional.build_map(coords, 3)
weight = torch.randn(4, 3, 3, 3, 4)
conv = torch.compile(lambda x: vg.functional.conv3d(x, weight, None, map), backend="aot_eager")
conv(torch.randn(216, 4))
x = vg.SparseTensor(torch.randn(216, 4), coords)
print(vg.explanations(vg.nn.SubmConv3d(4, 4, 3), x)[0]["picked_by"])
"""


def test_nothing_is_measured_in_a_compiled_layer(tmp_path):
    result = run_python(TRACED, VOXGEMM_CACHE_DIR=str(tmp_path), VOXGEMM_TUNE="first_use")
    assert result.stdout == "model\n", result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_nothing_is_measured_in_a_capture(monkeypatch):
    coords = torch.cartesian_prod(*[torch.arange(n) for n in (1, 7, 7, 7)]).int().cuda()
    map, other = (vg.functional.build_map(coords, 3) for _ in range(2))
    map.settle(wait=True)
    # Whole numbers, whose sums are exact in every kernel.
    weight = torch.randint(-2, 3, (16, 3, 3, 3, 16), device="cuda").float()
    x = torch.randint(-2, 3, (len(coords), 16), device="cuda").float()
    asked = tuning.Layer(map, 16, 16, x.dtype, 0, ((), (), ())).asked(0)
    expected = vg.functional.conv3d(x, weight, None, other)  # and its code is loaded
    monkeypatch.setattr(vg.kernel_map, "_TUNES_AT_FIRST_USE", True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = vg.functional.conv3d(x, weight, None, map)
    graph.replay()
    assert torch.equal(y, expected)
    assert tuning.explanation(map, asked)["picked_by"] == "model"
    other.forget_choices()
    assert torch.equal(vg.functional.conv3d(x, weight, None, other), expected)
    assert tuning.explanation(map, asked)["picked_by"] == "store"


def test_a_wrong_kernel_is_named():
    text = "3 0.5\n\nsome_kernel/f32\n{}\n"
    with pytest.warns(RuntimeWarning, match="wrong results, .*some_kernel/f32 .*forward f32"):
        found = tuning._measured(text, "forward f32 subm3 4->4", "another/f32")
    assert (found.candidates, found.seconds, found.picked) == (3, 0.5, "another/f32")


def test_a_bad_wish_is_an_error_of_the_import():
    result = run_python("import voxgemm", VOXGEMM_TUNE="always")
    assert result.returncode != 0
    assert 'ArgumentError: VOXGEMM_TUNE is "always", expected off or first_use' in result.stderr


def test_bad_files_stop_nothing(tmp_path):
    """store_test has more of them."""
    folder = str(tmp_path)
    run_python(FIRST_USE, VOXGEMM_CACHE_DIR=folder, VOXGEMM_TUNE="first_use")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\0\n{{\n\xff\xfe nonsense\n[]\n{}\n" + file.read_bytes()[:50])
    result = run_python(FIRST_USE, VOXGEMM_CACHE_DIR=folder)
    assert result.stdout.split() == ["model"] * 3, result.stderr
    file.unlink()
    file.mkdir()
    assert run_python(FIRST_USE, VOXGEMM_CACHE_DIR=folder).stdout.split() == ["model"] * 3


RANKS = """
import sys, torch, torch.distributed as dist, voxgemm as vg
rank, port, tmp = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{tmp}/meet", rank=rank, world_size=2)
coords = torch.cartesian_prod(*[torch.arange(n) for n in (1, 6, 6, 6)]).int()
x, conv = vg.SparseTensor(torch.randn(216, 4), coords), vg.nn.SubmConv3d(4, 4, 3)
conv(x)
print([each["picked_by"] for each in vg.explanations(conv, x)])
found = vg.tune(conv, x, 2.0, all_ranks=True, show_progress=False)
for each in vg.explanations(conv, x):
    times = {c["kernel"]: c["measured_ms"] for c in each["candidates"] if c["measured_ms"]}
    print(each["picked"], each["picked_by"], sorted(times.items()))
print("measured", len(found))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_ranks_use_what_one_measured(tmp_path):
    def start(rank):
        folder = str(tmp_path / f"cache{rank}")
        return subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), "0", str(tmp_path)],
            env={**os.environ, "VOXGEMM_CACHE_DIR": folder, "VOXGEMM_TUNE": "first_use"},
            stdout=subprocess.PIPE,
            text=True,
        )

    # Torch 2.10 has Gloo print what it is connected to.
    (first, *times, count), (other_first, *other_times, other_count) = (
        [line for line in process.communicate(timeout=120)[0].splitlines() if line[:6] != "[Gloo]"]
        for process in [start(0), start(1)]
    )
    assert first == other_first == "['model', 'model', 'model']", "nobody measured by itself"
    assert times == other_times and len(times) == 3
    assert all(" store " in line for line in times)
    assert (count, other_count) == ("measured 3", "measured 0")


def command(*arguments, **environment):
    code = "import sys; from voxgemm.cli import main; sys.exit(main(sys.argv[1:]))"
    return run_python(code, *map(str, arguments), **environment)


def test_the_cache_commands(tmp_path):
    own, other = ({"VOXGEMM_CACHE_DIR": str(tmp_path / name)} for name in ("own", "other"))
    problem = f"forward f32 subm3 4->4 {TINY}"
    assert command("cache", "show", **own).stdout == "no measured times\n"
    prior = tmp_path / "prior.jsonl"
    tuned = command("tune", problem, "--json", "-", "--out", prior, **own)
    (row,) = map(json.loads, tuned.stdout.splitlines())
    assert row["problem"] == problem and row["measured"] >= 1 and row["picked_by"] == "store"
    (file,) = json.loads(command("cache", "show", "--json", **own).stdout)
    assert file["records"] == row["measured"] and file["problems"] == 1
    assert file["device"] in command("cache", "show", **own).stdout
    exported = command("cache", "export", **own).stdout
    assert sorted(exported.splitlines()) == sorted(prior.read_text().splitlines())
    # A prior is read and never written.
    before = prior.read_text()
    shipped = {"VOXGEMM_CACHE_DIR": f"{tmp_path / 'none'}:{prior}"}
    explained = command("explain", problem, "--json", "-", **shipped)
    assert json.loads(explained.stdout)["picked_by"] == "store"
    assert prior.read_text() == before and not (tmp_path / "none").exists()
    imported = command("cache", "import", prior, **other)
    assert imported.stdout == f"{row['measured']} records\n"
    assert "picked by the store" in command("explain", problem, **other).stdout
    assert command("cache", "clear", **other).stdout == "1 files removed\n"
    assert "picked by the model" in command("explain", problem, **other).stdout
    (tmp_path / "notes").write_text("no record\n")
    refused = command("cache", "import", tmp_path / "notes", **other)
    assert refused.returncode == 2 and "line 1 is no record" in refused.stderr


def test_calibration(tmp_path):
    result = command("calibrate", "--budget", "0.5", VOXGEMM_CACHE_DIR=str(tmp_path))
    assert " kernels and passes in " in result.stdout, result.stderr
    (file,) = tmp_path.iterdir()
    assert "calibration of forward" in file.read_text()


def test_an_explanation_as_data_and_picture(clouds, tmp_path):
    conv, x = some_layer(clouds, 9)
    found = vg.explanations(conv, x)
    assert [each["problem"] for each in found] == [f"{name} f32 subm3 9->8" for name in PASSES]
    for of_pass in found:
        assert of_pass["rows_in"] == of_pass["rows_out"] == 300
        (picked,) = [c for c in of_pass["candidates"] if c["kernel"] == of_pass["picked"]]
        assert picked["reason"] is None and picked["predicted_ms"] > 0
        for c in of_pass["candidates"]:
            assert (c["reason"] is None) == (c["predicted_ms"] is not None)
    pytest.importorskip("matplotlib")
    vg.tune(conv, x, 1.0, show_progress=False)
    tuning.plot(vg.explanations(conv, x), tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("tune",), "--suite"),
        (("tune", "forward f32 subm3 4->4 line:3", "--suite", "cpu"), "--suite"),
        (("tune", "forward f32 subm3 4->4 line:3", "--budget", "0"), "budget"),
        (("tune", "map f32 subm3 4->4 line:3"), "runs no kernel"),
        (("tune", "forward f32 subm3 4->4 line:3", "--out", "/no/such/file"), "/no/such/file"),
        (("tune", "forward f32 subm3 4->4 line:3", "--json", "/no/such/file"), "/no/such/file"),
        (("explain", "map f32 subm3 4->4 line:3"), "runs no kernel"),
        (("explain", "forward f32 subm3 4->4 line:3", "--json", "/no/such/file"), "/no/such/file"),
        (("explain", "forward f32 subm3 4->4 line:3", "--plot", "times.foo"), "suffix 'foo'"),
        (("explain", "forward f32 subm3 4->4 line:3", "--algorithm", "magic"), "magic"),
        (("cache", "import", "/no/such/file"), "/no/such/file"),
    ],
)
def test_a_bad_command_is_a_sentence(arguments, word, capsys):
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and word in err and err.count("\n") == 1
    assert out == "", "it is refused before the work"
