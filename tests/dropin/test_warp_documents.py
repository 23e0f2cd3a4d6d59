# SPDX-License-Identifier: Apache-2.0
"""What WarpConvNet's page shows and promises: imports, snippets, environment, tuning, its cache."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
import time

import torch
from pytest import fixture, mark, raises

import voxgemm as vg
import warpconvnet
from warpconvnet import _search, _tuning, constants
from warpconvnet.geometry.types.voxels import Voxels
from warpconvnet.nn.functional import (
    generate_output_coords_and_kernel_map,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
)
from warpconvnet.nn.functional.sparse_conv import (
    SPARSE_CONV_AB_ALGO_MODE,
    SPARSE_CONV_ATB_ALGO_MODE,
    SPARSE_CONV_BWD_ALGO_MODE,
    SPARSE_CONV_FWD_ALGO_MODE,
)
from warpconvnet.nn.functional.sparse_conv_depth import (
    SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE,
    SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE,
)
from warpconvnet.nn.modules import SparseDepthwiseConv3d, SpatiallySparseConv

PAGE = "warpconvnet-sparse-convolutions.md"
DROPINS = pathlib.Path(warpconvnet.__file__).resolve().parents[2]
FWD, BWD = SPARSE_CONV_FWD_ALGO_MODE, SPARSE_CONV_BWD_ALGO_MODE
# Candidates of each algorithm: forward, input gradient, weight gradient.
COUNTS = {
    "explicit_gemm": (1, 1, 1),
    "implicit_gemm": (3, 3, 9),
    "cutlass_implicit_gemm": (16, 16, 16),
}
PASSES = ("forward", "grad_input", "grad_weight")


@fixture
def tuned(warp_state, monkeypatch):
    """As warp_state, with time to measure everything."""
    monkeypatch.setattr(_tuning, "BUDGET", 60.0)
    monkeypatch.setattr(_tuning, "REPEATS", 1)
    return _tuning.times


@fixture
def names(scene, randn):
    """What the page's snippets take as given."""
    x = scene(64, samples=(20, 15))
    map = generate_output_coords_and_kernel_map(x, 3, 1, 1)[2]
    return {
        "input_voxels": x,
        "weight": randn(27, 64, 128),
        "input_features": x.features,
        "depthwise_weight": randn(27, 64),
        "kernel_map": map,
        "num_out_coords": len(x),
        # The page uses these without importing them.
        "SPARSE_CONV_BWD_ALGO_MODE": BWD,
        "SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE": SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE,
    }


@mark.usefixtures("warp_state")
def test_every_snippet_of_the_page(document, names, device):
    blocks = document(PAGE)
    assert len(blocks) == 5
    space = dict(names)
    for block in blocks:
        space.pop("output", None)
        exec(compile(block, PAGE, "exec"), space)
        if "conv" in space:
            out = space.pop("conv").to(device)(names["input_voxels"])
        else:
            out = space["output"]
        features = out.feature_tensor if isinstance(out, Voxels) else out
        assert features.shape[1] in (64, 128) and bool(features.isfinite().all())


@mark.usefixtures("warp_state")
def test_call_forms(scene, randn):
    """The page's forms, written anew, so that they run without it."""
    # Whole numbers, of which every sum is exact.
    x, weight = scene(8), randn(27, 8, 16).round().requires_grad_()
    x = x.replace(batched_features=x.features.round())
    expected = spatially_sparse_conv(x, weight, kernel_size=3).feature_tensor
    forms = [
        (FWD.IMPLICIT_GEMM, FWD.IMPLICIT_GEMM),
        (FWD.AUTO, BWD.AUTO),
        ([FWD.IMPLICIT_GEMM, FWD.CUTLASS_IMPLICIT_GEMM], (BWD.IMPLICIT_GEMM, BWD.EXPLICIT_GEMM)),
        ("implicit_gemm", " Explicit_GEMM "),
        (["implicit_gemm", "cutlass_implicit_gemm"], {"implicit_gemm", "auto"}),
        (
            [FWD.IMPLICIT_GEMM, "cutlass_implicit_gemm"],
            [BWD.IMPLICIT_GEMM, "cutlass_implicit_gemm"],
        ),
        (None, None),
        (SPARSE_CONV_AB_ALGO_MODE.MASK_GEMM, SPARSE_CONV_ATB_ALGO_MODE.CUTE_GROUPED),
        ("trimmed", "all"),
    ]
    for forward, backward in forms:
        out = spatially_sparse_conv(x, weight, 3, fwd_algo=forward, bwd_algo=backward)
        assert torch.equal(out.feature_tensor, expected)
        out.feature_tensor.sum().backward()
        conv = SpatiallySparseConv(8, 16, kernel_size=3, fwd_algo=forward, bwd_algo=backward).to(
            x.device
        )
        assert conv(x).num_channels == 16
    today = spatially_sparse_conv(x, weight, 3, dgrad_algo="explicit_gemm", wgrad_algo="mask_gemm")
    today.feature_tensor.sum().backward()


def test_enumerations():
    for enum in (FWD, BWD):
        assert [m.value for m in enum] == [
            "explicit_gemm",
            "implicit_gemm",
            "cutlass_implicit_gemm",
            "auto",
        ]
    for enum in (SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE, SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE):
        assert [(m.name, m.value) for m in enum] == [
            ("EXPLICIT", "explicit"),
            ("IMPLICIT", "implicit"),
            ("AUTO", "auto"),
        ]
    for enum in (SPARSE_CONV_AB_ALGO_MODE, SPARSE_CONV_ATB_ALGO_MODE):
        for member in enum:
            assert _search.names_of(member, "x")


def test_modules_keep_what_they_were_given():
    conv = SpatiallySparseConv(4, 4, 3, fwd_algo="implicit_gemm", bwd_algo=["auto"])
    assert conv.fwd_algo is FWD.IMPLICIT_GEMM and conv.bwd_algo == ["auto"]
    assert SpatiallySparseConv(4, 4, 3).fwd_algo is FWD.AUTO
    depthwise = SparseDepthwiseConv3d(4, 3, fwd_algo="explicit")
    assert depthwise.fwd_algo is SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE.EXPLICIT


@mark.usefixtures("warp_state")
def test_assigned_algorithms_are_used(scene, device):
    x = scene(8)
    conv = SpatiallySparseConv(8, 8, 3, fwd_algo="implicit_gemm").to(device)
    for name in ("explicit_gemm", FWD.IMPLICIT_GEMM):
        made = Voxels(x.coordinate_tensor.clone(), x.features, x.offsets)
        conv.fwd_algo = name
        conv(made)
        maps = [v for _, v in made.cache._found.values() if isinstance(v, vg.KernelMap)]
        family = name if isinstance(name, str) else name.value
        assert all(c.kernel.startswith(f"{family}_") for c in maps[0]._choices.values())
    conv.fwd_algo = "bogus"
    with raises(ValueError, match="fwd_algo is 'bogus'"):
        conv(x)


BAD = ["fast", ["implicit_gemm", "fast"], [], 3, "", SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE.EXPLICIT]


@mark.usefixtures("warp_state")
@mark.parametrize("bad", BAD, ids=str)
def test_bad_names_are_found_before_any_work(bad, scene, randn):
    x, weight = scene(8), randn(27, 8, 8)
    for _ in range(2):  # with nothing known and with something known
        for argument in ("fwd_algo", "bwd_algo"):
            for call in (
                lambda argument=argument: spatially_sparse_conv(x, weight, 3, **{argument: bad}),
                lambda argument=argument: SpatiallySparseConv(8, 8, 3, **{argument: bad}),
            ):
                with raises(vg.ArgumentError, match=argument) as error:
                    call()
                assert "cutlass_implicit_gemm" in str(error.value)
        assert len(x.cache) <= 1
        spatially_sparse_conv(x, weight, 3)
    map = generate_output_coords_and_kernel_map(x, 3, 1, 1)[2]
    if bad != SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE.EXPLICIT:
        with raises(ValueError, match="bwd_algo"):
            spatially_sparse_depthwise_conv(x.features, weight[:, 0], map, len(x), bwd_algo=bad)


@mark.usefixtures("warp_state")
@mark.parametrize(
    "algorithm, family",
    [
        (FWD.EXPLICIT_GEMM, "explicit_gemm"),
        (FWD.IMPLICIT_GEMM, "implicit_gemm"),
        (FWD.CUTLASS_IMPLICIT_GEMM, "masked_implicit_gemm"),
    ],
)
def test_a_name_runs_its_own_code(algorithm, family, scene, randn):
    """The forward enumeration for the backward, too, as the page's first snippet has it."""
    x, weight = scene(16), randn(27, 16, 16).requires_grad_()
    features = x.features.clone().requires_grad_()
    made = x.replace(batched_features=features)
    out = spatially_sparse_conv(made, weight, 3, fwd_algo=algorithm, bwd_algo=algorithm)
    out.feature_tensor.square().sum().backward()
    maps = [value for _, value in x.cache._found.values() if isinstance(value, vg.KernelMap)]
    chosen = {asked.number: c.kernel for asked, c in maps[0]._choices.items()}
    assert sorted(chosen) == [0, 1, 2]
    assert all(kernel.startswith((f"{family}_", f"{family}_splitk_")) for kernel in chosen.values())


def record(times: _tuning.Times) -> dict[str, dict[str, int]]:
    """By pass, how many candidates of each algorithm are known."""
    found: dict[str, dict[str, int]] = {}
    for key, known in times.known.items():
        name = next(name for name in PASSES if f" {name} " in key)
        for candidate in known:
            counts = found.setdefault(name, {})
            algorithm = candidate.split(" ")[0]
            counts[algorithm] = counts.get(algorithm, 0) + 1
    return found


def train(x: Voxels, weight: torch.Tensor, algorithms) -> None:
    features = x.features.clone().requires_grad_()
    out = spatially_sparse_conv(
        x.replace(batched_features=features), weight, 3, fwd_algo=algorithms, bwd_algo=algorithms
    )
    out.feature_tensor.square().sum().backward()


@mark.parametrize("algorithms", [[name] for name in COUNTS] + [list(COUNTS)[1:], ["auto"]], ids=str)
def test_the_record_holds_exactly_the_grid(algorithms, tuned, scene, randn):
    train(scene(8), randn(27, 8, 8).requires_grad_(), algorithms)
    names = list(COUNTS) if algorithms == ["auto"] else algorithms
    expected = {name: {a: COUNTS[a][number] for a in names} for number, name in enumerate(PASSES)}
    assert record(tuned) == expected
    grids = {candidate for known in tuned.known.values() for candidate in known}
    if "implicit_gemm" in names:
        assert "implicit_gemm gemm_block_size=32 split_k_factor=8" in grids
        assert "implicit_gemm fwd_block_size=4" in grids
    if "cutlass_implicit_gemm" in names:
        last = "cutlass_implicit_gemm mma_tile=3 split_k_slices=8 accumulator_type=float32"
        assert last in grids


def test_filters_are_views_of_one_record(tuned, scene, randn):
    weight = randn(27, 8, 8).requires_grad_()
    x = scene(8)
    train(x, weight, "implicit_gemm")
    alone = tuned.measured
    train(x, weight, "auto")
    assert tuned.measured - alone == sum(sum(COUNTS[name]) for name in COUNTS) - alone
    everything = tuned.measured
    # A made-up time: the best of all is not in the restricted space, and does not leak into it.
    for known in tuned.known.values():
        known["explicit_gemm"] = 0.0
    fresh = Voxels(x.coordinate_tensor.clone(), x.features, x.offsets)
    train(fresh, weight, "implicit_gemm")
    maps = [v for _, v in fresh.cache._found.values() if isinstance(v, vg.KernelMap)]
    kernels = [choice.kernel for choice in maps[0]._choices.values()]
    assert kernels and all(kernel.startswith("implicit_gemm") for kernel in kernels)
    other = Voxels(x.coordinate_tensor.clone(), x.features, x.offsets)
    train(other, weight, "auto")
    maps = [v for _, v in other.cache._found.values() if isinstance(v, vg.KernelMap)]
    kernels = [choice.kernel for choice in maps[0]._choices.values()]
    assert kernels and all(kernel.startswith("explicit_gemm") for kernel in kernels)
    assert tuned.measured == everything


def test_one_call_stays_within_its_budget(warp_state, monkeypatch, scene, randn):
    """The rest is measured by later calls."""
    monkeypatch.setattr(_tuning, "seconds_of", lambda run, device: time.sleep(0.01) or 1.0)
    monkeypatch.setattr(_tuning, "BUDGET", 0.05)
    monkeypatch.setattr(
        "warpconvnet.nn.functional._choice._space",
        lambda candidate, *rest: candidate.algorithm.replace("cutlass", "masked"),
    )
    x, weight = scene(8), randn(27, 8, 8)
    known = []
    for _ in range(3):
        spatially_sparse_conv(x, weight, 3, fwd_algo="auto")
        known.append(_tuning.times.measured)
    # Candidates that run the same are measured once, so three runs are all there is.
    assert known[-1] == 20


def test_a_kernel_that_cannot_run_gives_way_to_its_space(tuned, scene, randn, monkeypatch):
    """The grid is whole where a tile has no kernel for the problem."""
    from warpconvnet.nn.functional import _choice

    bf16 = next(k for k in vg.info()["engines"]["bf16"])
    real = _choice._space
    monkeypatch.setattr(
        _choice,
        "_space",
        lambda candidate, device, *rest: (
            f"implicit_gemm_cpu/bf16/{bf16}" if device == "cpu" else real(candidate, "any", *rest)
        ),
    )
    x = scene(8).to("cpu")
    spatially_sparse_conv(x, randn(27, 8, 8).cpu(), 3)
    assert record(tuned)["forward"] == {name: COUNTS[name][0] for name in COUNTS}
    assert not _tuning._LEFT_OUT


def test_times_depend_on_the_configuration(tuned, scene, randn):
    x, weight = scene(8), randn(27, 8, 8)
    spatially_sparse_conv(x, weight, 3)
    before = len(tuned.known)
    spatially_sparse_conv(x, weight, 3)
    spatially_sparse_conv(scene(8, seed=5), weight, 3)
    assert len(tuned.known) == before
    for changed in (
        lambda: spatially_sparse_conv(x.double(), weight.double(), 3),
        lambda: spatially_sparse_conv(x, weight, 3, stride=2),
        lambda: spatially_sparse_conv(scene(8, samples=(400,)), weight, 3),
        lambda: spatially_sparse_conv(x, weight, 3, kernel_dilation=2),
    ):
        before = len(tuned.known)
        changed()
        assert len(tuned.known) == before + 1


@mark.usefixtures("tuned")
def test_nothing_is_measured_where_it_may_not(scene, randn, device):
    x, weight = scene(8), randn(27, 8, 8).round()
    x = x.replace(batched_features=x.features.round())
    torch.use_deterministic_algorithms(True)
    try:
        spatially_sparse_conv(x, weight, 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert _tuning.times.measured == 0
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = spatially_sparse_conv(x, weight, 3).features
            measured = _tuning.times.measured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = spatially_sparse_conv(x, weight, 3, fwd_algo="implicit_gemm").features
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        assert _tuning.times.measured == measured


def fresh(code: str, home: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    """A new process without a GPU, with a home of its own."""
    path = os.pathsep.join([str(DROPINS / "warpconvnet"), *sys.path])
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment | variables,
    )


CONVOLVE = """
    import torch
    from warpconvnet import _tuning, constants
    from warpconvnet.geometry.types.voxels import Voxels
    from warpconvnet.nn.functional import spatially_sparse_conv
    _tuning.BUDGET, _tuning.REPEATS = 60.0, 1
    at = torch.cartesian_prod(*[torch.arange(4)] * 3).int()
    x = Voxels([at], [torch.ones(64, 4)])
    spatially_sparse_conv(x, torch.ones(27, 4, CHANNELS), 3)
    print(_tuning.times.measured)
"""


def test_later_processes_tune_nothing(tmp_path):
    code = CONVOLVE.replace("CHANNELS", "5")
    first, second = fresh(code, tmp_path), fresh(code, tmp_path)
    assert first.stdout.strip() == "20", first.stderr
    assert second.stdout.strip() == "0", second.stderr
    assert (tmp_path / ".cache/warpconvnet" / _tuning.FILE).is_file()


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    runs = []

    def run(channels: int) -> None:
        runs.append(fresh(CONVOLVE.replace("CHANNELS", str(channels)), tmp_path))

    threads = [threading.Thread(target=run, args=(channels,)) for channels in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.stdout.strip() for done in runs] == ["20", "20"], runs[0].stderr
    lines = (tmp_path / ".cache/warpconvnet" / _tuning.FILE).read_text().splitlines()
    keys = {json.loads(line)["key"] for line in lines}
    assert len(keys) == 2


def test_the_folder_may_vanish_be_torn_or_closed(tuned, scene, randn, tmp_path, caplog):
    folder = tmp_path / "Upper Case"
    constants.WARPCONVNET_BENCHMARK_CACHE_DIR = str(folder)
    x = scene(8)
    spatially_sparse_conv(x, randn(27, 8, 8), 3)
    tuned.save()
    file = folder / _tuning.FILE
    whole = file.read_text()
    file.unlink()
    folder.rmdir()
    spatially_sparse_conv(x, randn(27, 8, 9), 3)
    tuned.save()
    assert file.is_file() and file.read_text() != whole
    torn = whole + whole[: len(whole) // 2] + '\n[3]\n{"format": 9}\n{"format": 1, "key": []}\n\x00'
    file.write_text(torn)
    again = _tuning.Times()
    key = json.loads(whole.splitlines()[0])["key"]
    assert len(again.of(key)) == 20
    (tmp_path / "file").write_text("")
    constants.WARPCONVNET_BENCHMARK_CACHE_DIR = str(tmp_path / "file" / "below")
    for channels in (10, 11):
        spatially_sparse_conv(x, randn(27, 8, channels), 3)
    tuned.save()
    told = [r for r in caplog.records if "stay in memory" in r.getMessage()]
    assert len(told) == 1


IMPORTS = """
    from warpconvnet.nn.functional import spatially_sparse_conv
    from warpconvnet.nn.functional import spatially_sparse_depthwise_conv
    from warpconvnet.nn.functional.sparse_conv import SPARSE_CONV_FWD_ALGO_MODE
    from warpconvnet.nn.functional.sparse_conv import SPARSE_CONV_BWD_ALGO_MODE
    from warpconvnet.nn.functional.sparse_conv_depth import SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE
    from warpconvnet.nn.functional.sparse_conv_depth import SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE
    from warpconvnet.nn.modules import SpatiallySparseConv, SparseConv2d, SparseConv3d
    from warpconvnet.nn.modules.sparse_conv import SparseConv3d
    from warpconvnet.nn.modules.sparse_conv_depth import SparseDepthwiseConv3d
    import warpconvnet.nn.functional.sparse_conv as conv
    import warpconvnet.nn.functional.sparse_conv_depth as depth
    assert conv.spatially_sparse_conv is spatially_sparse_conv
    assert depth.spatially_sparse_depthwise_conv is spatially_sparse_depthwise_conv
    import warpconvnet.nn.functional as functional
    assert functional.SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE is SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE
    from warpconvnet.geometry.base.geometry import Geometry
    from warpconvnet.geometry.features.pad import PadFeatures
    from warpconvnet.geometry.coords.search.cache import IntSearchCache, IntSearchCacheKey
    from warpconvnet.nn.modules.base_module import BaseSpatialModule
"""


def test_import_is_silent(tmp_path):
    tmp_path.chmod(0o500)
    done = fresh(IMPORTS, tmp_path)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)


def constants_with(monkeypatch, **variables: str) -> dict:
    """What the module of constants holds under an environment."""
    for name in [name for name in os.environ if name.startswith("WARPCONVNET_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("warpconvnet._again", constants.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def exports(document) -> list[dict[str, str]]:
    """Every setting that the page shows, and the one of its troubleshooting line."""
    found = []
    lines = [line for block in document(PAGE, "bash") for line in block.splitlines()]
    from_text = pathlib.Path(__file__).resolve().parents[3] / "shared/seeds" / PAGE
    lines += re.findall(r"`(export [^`]+)`", from_text.read_text())
    for line in lines:
        if "export" in line:
            settings = re.findall(r'export (\w+)=("[^"]*"|\S+?)(?:;|$|\s)', line)
            found.append({name: value.strip('"') for name, value in settings})
    return found


def test_settings_of_the_page(document, monkeypatch):
    settings = exports(document)
    assert len(settings) == 13
    for setting in settings:
        found = constants_with(monkeypatch, **setting)
        for name, value in setting.items():
            listed = value.startswith("[")
            assert found[name] == (value.strip("[]").split(",") if listed else value)
            depthwise = "DEPTHWISE" in name
            assert _search.names_of(found[name], name, depthwise)


NAMES = """
    from warpconvnet.nn.modules import SpatiallySparseConv, SparseDepthwiseConv3d
    print(SpatiallySparseConv(4, 4, 3)._names, SparseDepthwiseConv3d(4, 3)._names)
"""


def test_settings_take_effect(tmp_path):
    done = fresh(
        NAMES,
        tmp_path,
        WARPCONVNET_FWD_ALGO_MODE="implicit_gemm",
        WARPCONVNET_BWD_ALGO_MODE="[explicit_gemm,cutlass_implicit_gemm]",
        WARPCONVNET_WGRAD_ALGO_MODE="implicit_gemm",
        WARPCONVNET_DEPTHWISE_CONV_FWD_ALGO_MODE="[explicit_gemm,implicit_gemm]",
        WARPCONVNET_DEPTHWISE_CONV_BWD_ALGO_MODE="explicit",
    )
    regular = (("implicit_gemm",), ("explicit_gemm", "cutlass_implicit_gemm"), ("implicit_gemm",))
    depthwise = (("explicit", "implicit"), ("explicit",))
    assert done.stdout.strip() == f"{regular} {depthwise}", done.stderr


def test_folders(monkeypatch):
    home = os.path.expanduser("~")
    cases = {
        (): f"{home}/.cache/warpconvnet",
        (("WARPCONVNET_BENCHMARK_CACHE_DIR", "~/Times/Here"),): f"{home}/Times/Here",
        (
            ("WARPCONVNET_BENCHMARK_CACHE_DIR", "/a"),
            ("WARPCONVNET_BENCHMARK_CACHE_DIR_OVERRIDE", "/B"),
        ): "/B",
    }
    for setting, expected in cases.items():
        found = constants_with(monkeypatch, **dict(setting))
        assert found["WARPCONVNET_BENCHMARK_CACHE_DIR"] == expected
    found = constants_with(monkeypatch, WARPCONVNET_FWD_ALGO_MODE="[]")
    assert found["WARPCONVNET_FWD_ALGO_MODE"] == found["WARPCONVNET_BWD_ALGO_MODE"] == "auto"


@mark.parametrize("value", ["bogus", "[implicit_gemm,bogus]", "[implicit_gemm", "a,b", ""])
def test_bad_settings_stop_the_import(value, monkeypatch):
    for name in ("WARPCONVNET_FWD_ALGO_MODE", "WARPCONVNET_BWD_ALGO_MODE"):
        with raises(ValueError, match=name) as error:
            constants_with(monkeypatch, **{name: value})
        assert "cutlass_implicit_gemm" in str(error.value)
        assert repr(value) in str(error.value) or "'bogus' in" in str(error.value)


def test_a_bad_setting_stops_a_process(tmp_path):
    done = fresh("import warpconvnet", tmp_path, WARPCONVNET_FWD_ALGO_MODE="bogus")
    assert done.returncode != 0 and "ArgumentError" in done.stderr.strip().splitlines()[-1]


@mark.usefixtures("warp_state")
def test_constants_are_read_at_every_call(monkeypatch, scene, randn):
    x, weight = scene(8), randn(27, 8, 8)
    monkeypatch.setattr(constants, "WARPCONVNET_FWD_ALGO_MODE", ["explicit_gemm"])
    spatially_sparse_conv(x, weight, 3)
    maps = [v for _, v in x.cache._found.values() if isinstance(v, vg.KernelMap)]
    assert all(c.kernel.startswith("explicit") for c in maps[0]._choices.values())
    monkeypatch.setattr(constants, "WARPCONVNET_FWD_ALGO_MODE", "bogus")
    with raises(ValueError, match="WARPCONVNET_FWD_ALGO_MODE is 'bogus'"):
        spatially_sparse_conv(x, weight, 3)


def test_fp16_accumulation_is_a_name():
    assert warpconvnet.get_fp16_accum() is False
    warpconvnet.set_fp16_accum(True)
    assert warpconvnet.get_fp16_accum() is True
    warpconvnet.set_fp16_accum(False)
