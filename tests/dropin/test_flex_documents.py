# SPDX-License-Identifier: Apache-2.0
"""What FlexGEMM's documents show runs; importing it leaves no trace; tuning files are kept."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import pickle
import pkgutil
import subprocess
import sys
import textwrap
import types
import warnings

import pytest
import torch
from pytest import fixture, mark, raises

import flex_gemm
from flex_gemm.ops import spconv
from flex_gemm.utils import autotuner

pytestmark = mark.usefixtures("flex_state")
DROPINS = pathlib.Path(flex_gemm.__file__).resolve().parents[2]

MODULES = """
flex_gemm flex_gemm.kernels flex_gemm.kernels.cuda flex_gemm.kernels.cuda_ops
flex_gemm.kernels.triton
flex_gemm.kernels.triton.utils flex_gemm.kernels.triton.spconv
flex_gemm.kernels.triton.spconv.config flex_gemm.kernels.triton.grid_sample
flex_gemm.kernels.triton.grid_sample.config flex_gemm.ops flex_gemm.ops.spconv
flex_gemm.ops.spconv.submanifold_conv3d flex_gemm.ops.spconv.sparse_conv3d
flex_gemm.ops.spconv._custom_ops flex_gemm.ops.grid_sample flex_gemm.ops.serialize
flex_gemm.ops.utils flex_gemm.utils flex_gemm.utils.autotuner
"""


@fixture
def sphere(device):
    """sphere_coords(res, ch, dtype, device): a shell in a box, as the original's tests make one.

    A box of 16 whatever is asked for, so that the CPU follows.
    """

    def sphere_coords(res, ch, device=device, dtype=torch.float32):
        axis = torch.arange(16, device=device)
        at = torch.cartesian_prod(
            torch.zeros(1, dtype=torch.int64, device=device), axis, axis, axis
        )
        radius = ((at[:, 1:] - 7.5) ** 2).sum(1).sqrt()
        coords = at[(radius > 6) & (radius < 7.25)].int().contiguous()
        feats = torch.randn(len(coords), ch, device=device, dtype=dtype)
        return feats, coords, torch.Size((1, ch, 16, 16, 16))

    return sphere_coords


def run(block: str, device: torch.device, **names) -> dict:
    """A document's block with its device replaced; its names afterwards."""
    space = dict(names)
    exec(compile(block.replace("'cuda'", f"'{device}'"), "document", "exec"), space)
    return space


def test_readme_first_program(document, sphere, device, monkeypatch):
    module = types.ModuleType("tests.spconv_fwd")
    module.sphere_coords = sphere
    monkeypatch.setitem(sys.modules, "tests", types.ModuleType("tests"))
    monkeypatch.setitem(sys.modules, "tests.spconv_fwd", module)
    space = run(document("flexgemm-readme.md")[0], device)
    feats, out = space["feats"], space["out_feats"]
    assert out.shape == (len(feats), 256) and out.dtype == torch.float16
    assert space["weight"].grad.shape == space["weight"].shape
    total = torch.full((256,), len(feats), device=device, dtype=torch.float16)
    assert torch.equal(space["bias"].grad, total)


def test_readme_compiled_program(document, sphere, device):
    block = document("flexgemm-readme.md")[1]
    names = {"Ci": 16, "Co": 24, "Ks": 3, "data": sphere(32, 16)}
    # The one thing that the document leaves to its reader.
    space = run(
        block.replace("feats, coords, shape = ...", "feats, coords, shape = data"), device, **names
    )
    loss, weight = space["loss"], space["weight"]
    again = space["sparse_submanifold_conv3d"](
        space["feats"], space["coords"], space["shape"], weight, space["bias"]
    )[0].sum()
    torch.testing.assert_close(loss, again, rtol=1e-4, atol=1e-2)
    wanted = torch.autograd.grad(again, (weight, space["bias"]))
    torch.testing.assert_close((weight.grad, space["bias"].grad), wanted, rtol=1e-4, atol=1e-4)


def test_package_notes(document, sphere, device):
    imports, conventions, template = document("flexgemm-package-notes.md")
    assert "torch.ops.flex_gemm.my_op" in template  # for the reader's own operator: nothing to run
    feats, coords, shape = sphere(32, 8)
    space = {
        "feats": feats,
        "coords": coords,
        "shape": shape,
        "weight": torch.randn(8, 3, 3, 3, 8, device=device),
        "bias": torch.randn(8, device=device),
    }
    space = run(imports, device, **space)
    space = run(conventions, device, **space)
    assert space["out"].shape == feats.shape and not isinstance(space["out"], tuple)
    table = {}
    path = pathlib.Path(__file__).resolve().parents[3] / "shared/seeds/flexgemm-package-notes.md"
    for line in path.read_text().splitlines():
        if line.startswith("| ") and "`" in line and "*" not in line:
            for name in line.split("|")[2].replace("`", "").split(","):
                table[name.strip()] = getattr(torch.ops.flex_gemm, name.strip())
    assert len(table) == 18


def test_a_program_in_both_dialects(sphere, device):
    """What the documents show, written anew, so that it runs without them."""
    feats, coords, shape = sphere(64, 16)
    weight = torch.randn(16, 3, 3, 3, 16, device=device, requires_grad=True)
    bias = torch.randn(16, device=device, requires_grad=True)
    spconv.set_algorithm(spconv.Algorithm.MASKED_IMPLICIT_GEMM_SPLITK)
    out, cache = spconv.sparse_submanifold_conv3d(feats, coords, shape, weight, bias)
    out.sum().backward()
    legacy = weight.grad.clone()
    weight.grad = bias.grad = None
    config = cache.freeze(splitk=1, algorithm="masked_implicit_gemm_splitk")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(feats, weight, bias):
        return spconv.sparse_submanifold_conv3d(
            feats, weight=weight, bias=bias, config=config
        ).sum()

    step(feats, weight, bias).backward()
    torch.testing.assert_close(weight.grad, legacy, rtol=1e-4, atol=1e-4)


@mark.parametrize("name", MODULES.split())
def test_modules(name):
    module = importlib.import_module(name)
    if name == "flex_gemm.ops.spconv.sparse_conv3d":
        assert callable(spconv.sparse_conv3d)
        from flex_gemm.ops.spconv.sparse_conv3d import SparseConv3dFunction

        assert SparseConv3dFunction is spconv.SparseConv3dFunction is module.SparseConv3dFunction
        return
    found = flex_gemm
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert found is module


def test_launchers_have_modules():
    package = flex_gemm.kernels.triton.spconv
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("sparse")]
    assert len(names) == 16
    for name in names:
        module = importlib.import_module(f"{package.__name__}.{name}")
        assert getattr(module, name) is getattr(flex_gemm.kernels.triton, name)
    for name in ("indice_weighed_sum_fwd", "indice_weighed_sum_bwd_input"):
        module = importlib.import_module(f"flex_gemm.kernels.triton.grid_sample.{name}")
        assert getattr(module, name) is getattr(flex_gemm.kernels.triton, name)
        assert callable(getattr(flex_gemm.kernels.triton.grid_sample, name))
    seen = []
    autotuner.walk_package("flex_gemm", seen.append)
    assert set(MODULES.split()) - set(seen) <= {
        *("flex_gemm", "flex_gemm.kernels", "flex_gemm.kernels.triton", "flex_gemm.ops"),
        *("flex_gemm.kernels.triton.spconv", "flex_gemm.kernels.triton.grid_sample"),
        *("flex_gemm.ops.spconv", "flex_gemm.ops.grid_sample", "flex_gemm.utils"),
    }


def fresh(code: str, home: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    """A new process without a GPU and Triton, whose home is read-only."""
    path = os.pathsep.join([str(DROPINS / "flex_gemm"), *sys.path])
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": path, **variables}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    blocked = "import sys; sys.modules['triton'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_import_writes_nothing(tmp_path):
    (tmp_path / ".flex_gemm").mkdir()
    (tmp_path / ".flex_gemm/autotune_cache.json").write_text("{ torn")
    tmp_path.chmod(0o500)
    code = """
        import flex_gemm, torch
        assert flex_gemm.USE_AUTOTUNE_CACHE and flex_gemm.AUTOSAVE_AUTOTUNE_CACHE
        assert flex_gemm.AUTOTUNE_CACHE_PATH.endswith(".flex_gemm/autotune_cache.json")
        out, _ = flex_gemm.ops.spconv.sparse_submanifold_conv3d(
            torch.ones(1, 2), torch.zeros(1, 4, dtype=torch.int32), (1, 2, 4, 4, 4),
            torch.ones(3, 3, 3, 3, 2), None)
        assert out.tolist() == [[2, 2, 2]]
    """
    done = fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.count("no tuning is read") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".flex_gemm", "autotune_cache.json"]
    tmp_path.chmod(0o700)


def test_constants_come_from_the_environment(tmp_path):
    code = """
        import flex_gemm
        print(flex_gemm.USE_AUTOTUNE_CACHE, flex_gemm.AUTOSAVE_AUTOTUNE_CACHE)
        print(flex_gemm.AUTOTUNE_CACHE_PATH)
    """
    done = fresh(
        code,
        tmp_path,
        FLEX_GEMM_USE_AUTOTUNE_CACHE="0",
        FLEX_GEMM_AUTOSAVE_AUTOTUNE_CACHE="0",
        FLEX_GEMM_AUTOTUNE_CACHE_PATH="/else/where.json",
    )
    assert done.stdout.split("\n")[:2] == ["False False", "/else/where.json"]
    assert flex_gemm.__version__.startswith("1.0.0+")


FOREIGN = {
    "NVIDIA A100-SXM4-80GB": {
        "flex_gemm.kernels.triton.spconv.sparse_submanifold_conv_fwd_implicit_gemm_splitk"
        ".sparse_submanifold_conv_fwd_implicit_gemm_splitk": {"(2**18, 64, 64, 27)": {"SPLITK": 2}},
    },
    "*": {"some.other.kernel": {"(1,)": {"B1": 64, "num_warps": 4}}},
}


def test_foreign_entries_survive_saving(tmp_path):
    path = tmp_path / "deep" / "tuning.json"
    path.parent.mkdir()
    path.write_text(json.dumps(FOREIGN))
    flex_gemm.utils.load_autotune_cache(path)
    flex_gemm.utils.load_autotune_cache(FOREIGN)
    flex_gemm.utils.save_autotune_cache(str(path))
    content = json.loads(path.read_text())
    for device, tuners in FOREIGN.items():
        for name, answers in tuners.items():
            assert content[device][name] == answers
    assert set(flex_gemm.utils.get_autotune_cache()) <= set(content)
    with raises(TypeError):
        flex_gemm.utils.load_autotune_cache(3)
    with raises(TypeError):
        flex_gemm.utils.save_autotune_cache(3)


def test_unwritable_files_are_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="stays in memory"):
        flex_gemm.utils.save_autotune_cache(tmp_path / "file" / "below.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flex_gemm.utils.load_autotune_cache(tmp_path / "absent.json")


def test_own_kernels_are_tuned_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flex_gemm, "AUTOTUNE_CACHE_PATH", str(tmp_path / "own.json"))
    calls = []

    @flex_gemm.utils.autotune(
        configs=[{"block": 1}, {"block": 2}], key=["n"], warmup=1, runs=2, verbose=True
    )
    def kernel(x, n, block):
        calls.append(block)
        return x + n

    assert kernel(1, 2) == 3
    assert sorted(set(calls)) == [1, 2] and len(calls) == 7
    assert kernel(5, n=2) == 7 and len(calls) == 8
    assert "kernel" in capsys.readouterr().out
    chosen = kernel.cache[str((2,))]
    assert chosen in ({"block": 1}, {"block": 2})
    kernel.cache = {str((9,)): {"block": 7}}
    kernel(1, 9)
    assert calls[-1] == 7


def test_pickles_of_caches_load():
    state = {"neighbor_map": torch.tensor([[0]], dtype=torch.int32).view(torch.uint32)}
    cache = pickle.loads(pickle.dumps(spconv.SubMConv3dNeighborCache(**state)))
    assert type(cache).__module__ == "flex_gemm.ops.spconv.submanifold_conv3d"
    assert cache.gray_code.tolist() == [1]


def test_platform_questions_need_no_gpu():
    utils = flex_gemm.kernels.triton.utils
    assert utils.get_platform_name() in ("cuda", "hip", "unknown")
    assert utils.get_autotune_config(default=[1]) == [1]
    assert utils.get_autotune_config([1], platform={utils.get_platform_name(): [2]}) == [2]
    assert flex_gemm.kernels.triton.spconv.config.USE_ON_THE_FLY_WEIGHT_TRANSPOSE is True
    assert flex_gemm.kernels.triton.spconv.config.autotune_config == []
    if not torch.cuda.is_available():
        with raises((RuntimeError, AssertionError)):
            utils.get_gpu_name()
