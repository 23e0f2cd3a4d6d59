# SPDX-License-Identifier: Apache-2.0
"""bench/overhead.py: the number of operator calls, and what it prints. Times are not judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import voxgemm as vg

SCRIPT = Path(__file__).parents[2] / "bench" / "overhead.py"


@pytest.fixture(scope="module")
def overhead():
    spec = importlib.util.spec_from_file_location("overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROUNDS, module.SECONDS = 3, 1e-4
    return module


def test_table_and_json(overhead, device, tmp_path, capsys):
    _ = pytest.importorskip("flex_gemm"), pytest.importorskip("warpconvnet")
    threads = torch.get_num_threads()
    path = tmp_path / "times.jsonl"
    rows = overhead.main(["--device", device.type, "--json", str(path)])
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == [
        row["name"] for row in rows
    ]
    assert all(row["name"] in text for row in rows)
    of_dropins = {row["name"].partition(":")[0] for row in rows if "of" in row}
    assert of_dropins == {"flex_gemm", "warpconvnet"}
    rows = [row for row in rows if "of" not in row]
    for row in rows:
        assert 0 < row["lowest_us"] <= row["us"]
    calls = {row["name"]: row["calls"] for row in rows}
    assert calls["linear, forward and backward"] == 0
    assert calls["conv3d, forward"] == calls["nn.SubmConv3d, forward"] == 1
    assert calls["conv3d, forward and backward"] == 3, "one a pass"
    assert calls["build_map"] == calls["build_map, strided"] == 1


@pytest.mark.parametrize("kind", ["subm", "down", "up"])
def test_one_call_for_a_layer_and_a_pass(kind, overhead, clouds, device):
    """Once the maps are there: of every layer, whatever wants a gradient."""
    layers = {
        "subm": vg.nn.SubmConv3d(4, 4, 3),
        "down": vg.nn.SparseConv3d(4, 4, 2, stride=2),
        "up": vg.nn.SparseInverseConv3d(4, 4, 2),
    }
    net = {name: layer.to(device) for name, layer in layers.items()}
    features = torch.randn(60, 4, device=device, requires_grad=True)
    x = vg.SparseTensor(features, clouds.random(60))
    if kind == "up":
        x = net["down"](x)
        x = x.replace(x.features.detach().requires_grad_())
    leaves = [x.features, *net[kind].parameters()]

    def run(wanted):
        return torch.autograd.grad(net[kind](x).features.sum(), wanted)

    run(leaves)
    assert overhead.operators(lambda: net[kind](x)) == 1
    assert overhead.operators(lambda: run(leaves)) == 3
    assert overhead.operators(lambda: run(leaves[:1])) in (2, 3)
