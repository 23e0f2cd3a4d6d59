# SPDX-License-Identifier: Apache-2.0
"""Importing the package: quiet, quick, and nothing but the package is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import voxgemm as vg
from voxgemm import _library

ROOT = Path(__file__).parents[2]
PACKAGE = Path(vg.__file__).parent

USE = """
import torch, voxgemm as vg
x = vg.SparseTensor(torch.ones(2, 3), torch.arange(8, dtype=torch.int32).view(2, 4))
print(tuple(vg.nn.SubmConv3d(3, 4, 3)(x).features.shape))
"""

# Torch first, then with every eye open the package.
WATCH = """
import io, json, os, sys, time, warnings
import torch

found = {"asked": [], "opened": []}
def asked(*_):
    found["asked"].append("a GPU")
    return False
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, asked)
torch.cuda.device_count = torch.cuda.is_available = asked
home = os.environ["HOME"]
def audit(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir") and arguments:
        if str(arguments[0]).startswith(home):
            found["opened"].append(str(arguments[0]))
sys.addaudithook(audit)
before = set(sys.modules)
streams = sys.stdout, sys.stderr
sys.stdout = sys.stderr = io.StringIO()
begin = time.process_time()
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import voxgemm
found["ms"] = 1000 * (time.process_time() - begin)
found["printed"] = sys.stdout.getvalue()
sys.stdout, sys.stderr = streams
found["warned"] = [str(warning.message) for warning in warned]
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
found["modules"] = sorted(tops - set(sys.stdlib_module_names))
found["compiler"] = "torch._dynamo" in set(sys.modules) - before
found["initialized"] = torch.cuda.is_initialized()
print(json.dumps(found))
"""


def run(code, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return json.loads(run(WATCH, HOME=str(home)).splitlines()[-1])


def test_nothing_is_printed(seen):
    assert seen["printed"] == "" and seen["warned"] == []


def test_no_gpu_is_asked_for(seen):
    """That alone opens the driver: a process may still fork, or choose its GPU afterwards."""
    assert seen["asked"] == [] and not seen["initialized"]


def test_no_file_of_the_home_is_opened(seen):
    assert seen["opened"] == []


def test_what_is_imported(seen):
    """Beside torch only the package and the standard library, and of torch not the compiler."""
    assert [name for name in seen["modules"] if name != "torch"] == ["voxgemm"]
    assert not seen["compiler"]


def test_the_import_is_quick(seen):
    """Below 150 ms beyond torch's: of CPU time, in which other programs hardly show."""
    assert seen["ms"] < 150


@pytest.mark.parametrize("home", ["read-only", "absent", "unset"])
def test_homes(home, tmp_path):
    """The package works where it cannot write or has no home, and leaves nothing there.

    And without a visible GPU.
    """
    folder = tmp_path / "home"
    if home == "read-only":
        folder.mkdir(mode=0o500)
    names = ("XDG_CACHE_HOME", "VOXGEMM_CACHE_DIR", "CUDA_VISIBLE_DEVICES")
    environment = {"HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **dict.fromkeys(names, "")}
    code = USE if home != "unset" else f"import os; os.environ.pop('HOME')\n{USE}"
    assert run(code, **environment).endswith("(2, 4)\n")
    assert not folder.exists() or not list(folder.iterdir())


def touched(code, home):
    """The files under `home` that a process opens or looks for, in whatever language."""
    trace = home.parent / "trace"
    command = ["strace", "-f", "-e", "trace=%file", "-o", str(trace), sys.executable, "-c", code]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip("this place lets no process be traced")
    assert done.returncode == 0, done.stderr[-3000:]
    return set(re.findall(rf'"({re.escape(str(home))}[^"]*)"', trace.read_text()))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_file_of_the_home_is_looked_for(tmp_path):
    """Beside those that torch looks for."""
    home = tmp_path / "home"
    home.mkdir()
    assert touched("import voxgemm", home) <= touched("import torch", home)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
@pytest.mark.parametrize("name", [_library.LIBRARY, _library.CUDA_LIBRARY])
def test_what_the_libraries_need(name):
    """The files that are loaded here, of a wheel too: nothing that torch 2.10 lacks, no RPATH."""
    library = _library.PATH.with_name(name)
    if not library.is_file():
        pytest.skip("built without CUDA")
    torchs = ["cpu", "cuda"] if name == _library.CUDA_LIBRARY else ["cpu"]
    lists = [str(ROOT / "abi" / "torch-2.10" / f"libtorch_{part}.txt") for part in torchs]
    gate = [sys.executable, str(ROOT / "tools" / "check_symbols.py"), "library"]
    found = subprocess.run([*gate, str(library), str(ROOT), *lists], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
