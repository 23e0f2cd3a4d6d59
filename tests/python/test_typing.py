# SPDX-License-Identifier: Apache-2.0
"""The types of what users call, as mypy sees them in its strict mode."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import voxgemm as vg

ROOT = Path(__file__).parents[2]

RIGHT = """
import torch
import voxgemm as vg
from torch import Tensor
from typing_extensions import assert_type

x = vg.SparseTensor(torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int32), (8, 8, 8), 1)
assert_type(x.features, Tensor)
assert_type(x * 2 + x / torch.ones(4) - x, vg.SparseTensor)
assert_type(2 * x, vg.SparseTensor)
assert_type(vg.union_add(x, vg.cat([x, x])), vg.SparseTensor)
assert_type([item.voxels for item in x], list[int])
assert_type(x[0].dense(), Tensor)
net = vg.nn.Sequential(
    vg.nn.SubmConv3d(4, 8, 3, padding="same", algorithm="implicit_gemm"),
    torch.nn.ReLU(),
    vg.nn.SparseConv3d(8, 8, (1, 2, 2), stride=2),
    vg.nn.SparseInverseConv3d(8, 4, 2, device="cpu", dtype=torch.float32),
    vg.nn.SparseConvTranspose3d(4, 4, 2, stride=2),
)
y: vg.SparseTensor = net(x)
layer = vg.nn.SubmConv3d.from_torch(torch.nn.Conv3d(4, 4, 3, padding=1))
assert_type(layer, vg.nn.SubmConv3d)
assert_type(layer(x), vg.SparseTensor)
map = vg.build_map(x.coords, 3)
assert_type(map, vg.KernelMap)
assert_type(vg.functional.conv3d(x.features, layer.weight, layer.bias, map), Tensor)
assert_type(vg.unique(x.coords).inverse, Tensor)
assert_type(vg.output_coords(x.coords, vg.Geometry((2, 2, 2), (2, 2, 2))), Tensor)
assert_type(vg.explain(layer, x), str)
"""

WRONG = """
import torch
import voxgemm as vg

x = vg.SparseTensor(torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int32))
x = vg.SparseTensor([1.0], x.coords)  # wrong
x = vg.SparseTensor(x.features, x.coords, "8")  # wrong
x + "1"  # wrong
x.select([0, 1])  # wrong
x[x.features]  # wrong
vg.nn.SubmConv3d("4", 4, 3)  # wrong
vg.nn.SparseConv3d(4, 4, 2, stride=(2, 2))  # wrong
vg.nn.SparseConv3d(4, 4, 2, output_rule=0)  # wrong
vg.build_map(x, 3)  # wrong
vg.functional.conv3d(x.features, x.features, None)  # wrong
vg.cat(x, x)  # wrong
vg.nn.SubmConv3d(4, 4, 3)(x).feature  # wrong
"""


def test_the_package_says_that_it_is_typed():
    assert Path(vg.__file__).with_name("py.typed").is_file()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{file: lines with an error}, of the package and of two programs that use it."""
    mypy = shutil.which("mypy")
    if mypy is None:
        pytest.skip("mypy is not installed")
    folder = tmp_path_factory.mktemp("programs")
    for name, text in (("right", RIGHT), ("wrong", WRONG)):
        (folder / f"{name}.py").write_text(text)
    python = ROOT / "python"
    done = subprocess.run(
        [
            mypy,
            *("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"),
            *("--python-executable", sys.executable, "right.py", "wrong.py"),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(python)},
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines: dict[str, list[str]] = {"wrong.py": []}
    for line in done.stdout.splitlines():
        name, _, rest = line.partition(":")
        if ": error:" in line:
            lines.setdefault(name, []).append(rest)
    return lines


def test_types_of_the_package_and_of_what_uses_it(found):
    assert {name: lines for name, lines in found.items() if name != "wrong.py"} == {}


def test_misuse_is_an_error(found):
    expected = {n for n, line in enumerate(WRONG.split("\n"), 1) if line.endswith("# wrong")}
    assert {int(line.partition(":")[0]) for line in found["wrong.py"]} == expected
