# SPDX-License-Identifier: Apache-2.0
"""The demo: counts, tasks, numeric types, picture, and one sentence for unusable input."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from voxgemm import cli, demo, picture, tasks
from voxgemm.clouds import InputError, Mesh, PointCloud, read, street, voxelize
from voxgemm.clouds.voxelize import check_memory
from voxgemm.tensor import SparseTensor
from voxgemm.unet import UNet

matplotlib_image = pytest.importorskip("matplotlib.image")
pytest.importorskip("trimesh")
DATA = Path(__file__).parents[2].parent / "shared" / "data"

# file, voxel, voxels, 3^3 pairs
GOLDEN = (
    ("autzen_trim.las", "8.0", 11_699, 150_003),
    ("fragment.pcd", "0.05", 2_579, 27_561),
    ("office1.npz", "0.05", 16_768, 207_830),
    ("ika_drive_32scans.npz", "0.2", 38_825, 248_153),
    ("vls128_3scans.npz", "0.2", 156_463, 1_203_067),
    ("small_gicp_target.ply", "0.2", 7_931, 54_479),
    ("small_gicp_source.ply", "0.2", 8_032, 56_256),
    ("spot.obj", "64grid", 9_033, 113_689),
    ("scorpion.obj", "64grid", 7_402, 109_018),
)


def wave(rows: int = 4000) -> PointCloud:
    """A curved sheet of 1 m with everything a cloud can have."""
    draw = np.random.RandomState(0)
    x, y = draw.uniform(size=(2, rows))
    z = 0.15 * np.sin(5 * x) * np.cos(4 * y)
    slope = [-0.75 * np.cos(5 * x) * np.cos(4 * y), 0.6 * np.sin(5 * x) * np.sin(4 * y)]
    normal = np.stack([*slope, np.ones(rows)], axis=1)
    return PointCloud(
        np.stack([x, y, z], axis=1),
        color=np.stack([x, y, 1 - x], axis=1).astype(np.float32),
        normal=normal / np.linalg.norm(normal, axis=1, keepdims=True),
        intensity=x * y,
        label=(x > 0.5).astype(np.int64) + (y > 0.5),
        name="wave",
    )


def write_ply(path: Path) -> Path:
    cloud = wave()
    table = np.concatenate([cloud.points, 255 * cloud.color], axis=1)
    names = ("float x", "float y", "float z", "uchar red", "uchar green", "uchar blue")
    head = ["ply", "format ascii 1.0", f"element vertex {len(table)}"]
    head += [f"property {name}" for name in names] + ["end_header"]
    body = ["{:.6f} {:.6f} {:.6f} {:.0f} {:.0f} {:.0f}".format(*row) for row in table]
    path.write_text("\n".join(head + body) + "\n")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Fast on a busy machine, too; results do not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Runs the demo on a cloud or mesh in memory, with few steps unless told."""

    def run(item: PointCloud | Mesh, **options) -> dict:
        monkeypatch.setattr(demo, "load", lambda _: item)
        chosen = {"voxel": "0.04", "steps": 6, "channels": 4, "out": str(tmp_path / "p.png")}
        return demo.run(demo.Options(**(chosen | options)), lambda _: None)

    return run


def test_a_file_from_end_to_end(tmp_path):
    file, image, numbers = write_ply(tmp_path / "w.ply"), tmp_path / "w.png", tmp_path / "w.json"
    command = [sys.executable, "-m", "voxgemm.cli", "demo", file, "--voxel", "0.04", "--steps", "8"]
    command += ["--channels", "4", "--threads", "1", "--out", image, "--json", numbers]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(numbers.read_text())
    voxels = voxelize(read(file), "0.04").coords
    there = set(map(tuple, voxels.tolist()))
    around = list(itertools.product((-1, 0, 1), repeat=3))
    pairs = sum((x + i, y + j, z + k) in there for x, y, z in there for i, j, k in around)
    assert (result["points"], result["voxels"], result["pairs"]) == (4000, len(voxels), pairs)
    assert result["loss_last"] < result["loss_first"]
    assert result["ms_step"] > 0
    assert result["gflops"] > 0
    assert result["task"] == "colour completion"
    parts = ("map", "forward", "backward", "optimizer")
    assert result["ms_step"] == pytest.approx(sum(result[f"ms_{part}"] for part in parts))
    assert result["gflops"] == pytest.approx(1e3 * result["gflop_step"] / result["ms_step"])
    assert {"device", "torch", "voxgemm", "date", "max_error", "file", "voxel"} <= result.keys()
    for shown in ("colour completion", "training", f"{len(voxels):,}", f"{pairs:,}", "GFLOP/s"):
        assert shown in done.stdout + done.stderr
    pixels = matplotlib_image.imread(image)
    height, width = pixels.shape[:2]
    assert height > 700
    assert width > 1400
    # Input, target and prediction differ, and each has some hundred colours.
    panels = [pixels[: height // 2, width * k // 3 : width * (k + 1) // 3, :3] for k in range(3)]
    assert all(len(np.unique(panel.reshape(-1, 3), axis=0)) > 300 for panel in panels)
    assert not np.array_equal(panels[0], panels[1])
    assert not np.array_equal(panels[1], panels[2])


@pytest.mark.parametrize("task", tasks.NAMES)
def test_every_task_is_learned(small, task):
    result = small(wave(), task=task, steps=12)
    assert result["loss_last"] < 0.8 * result["loss_first"]


@pytest.mark.parametrize("dtype", demo.DTYPES)
def test_every_dtype(small, dtype):
    result = small(wave(), task="normal", dtype=dtype, steps=12)
    assert result["loss_last"] < result["loss_first"]
    # The reference of f64 is the kernel itself.
    assert (result["max_error"] == 0) == (dtype == "f64")


def test_on_every_device(small, device):
    result = small(wave(), device=str(device), task="normal", dtype="bf16", steps=12)
    assert result["device_type"] == device.type
    assert result["loss_last"] < result["loss_first"]
    assert 0 < result["max_error"] < 2**-7  # of the largest value: one rounding to 8 bits


def test_16_bit_layers_err_more_than_f32(small):
    errors = [small(wave(), dtype=dtype)["max_error"] for dtype in ("f32", "f16", "bf16")]
    assert errors == sorted(errors)


def test_the_task_is_the_best_that_the_cloud_has(small):
    cloud = wave()
    for field, name in (
        ("color", "colour completion"),
        ("label", "class from geometry"),
        ("intensity", "intensity completion"),
        ("normal", "surface normal from geometry"),
        (None, "height from geometry"),
    ):
        assert small(cloud, steps=1)["task"] == name
        cloud = replace(cloud, **{field: None}) if field else cloud


def test_the_same_seed_gives_the_same_losses(small):
    first, second, other = (small(wave(), seed=seed)["loss_last"] for seed in (3, 3, 4))
    assert first == second != other


def test_a_mesh_and_its_default_grid(small):
    corners = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    faces = [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1)]
    mesh = Mesh(corners, np.array(faces), name="cube")
    assert demo.default_voxel(mesh) == "256grid"
    result = small(mesh, voxel="16grid")
    assert result["task"] == "surface normal from geometry"
    # Three faces that meet in edges only: 3 * 16^2 less what they share.
    assert result["voxels"] == voxelize(mesh, "16grid").coords.shape[0]


@pytest.mark.parametrize("rows", [2, 3, 20])
def test_a_handful_of_points(small, rows):
    result = small(wave(rows), voxel=None)
    assert math.isfinite(result["loss_last"])
    assert result["points"] == rows


def test_default_voxels_are_neither_too_many_nor_alone():
    cloud = street()
    size = float(demo.default_voxel(cloud))
    count = len(voxelize(cloud, size).coords)
    assert count <= 160_000
    assert count <= 0.6 * len(cloud.points)
    digit = size / 10 ** math.floor(math.log10(size) + 1e-9)
    assert round(digit, 6) in (1, 2, 5)
    # Half the size would break a limit.
    finer = len(voxelize(cloud, size / 2).coords)
    assert finer > min(160_000, 0.6 * len(cloud.points))


def test_useful_work_counts_every_layer_and_pass():
    net = UNet(2, 3, channels=4, levels=2)
    voxels = voxelize(wave(500), "0.1")
    x = SparseTensor(torch.ones(len(voxels.coords), 2), demo.batch_of(voxels, torch.device("cpu")))
    maps = net.maps(x)
    channels = [(2, 4), (4, 4), (4, 4), (4, 8), (8, 8), (8, 8), (8, 4), (8, 4)]
    assert [(c.in_channels, c.out_channels) for c in net.convolutions()] == channels
    assert maps[3].pairs == maps[6].pairs == len(voxels.coords)
    work = [2 * map.pairs * a * b for map, (a, b) in zip(maps, channels, strict=True)]
    assert demo.step_flops(net, maps) == 3 * sum(work) - work[0]
    # The network uses exactly these maps.
    assert net(x).shape == (len(voxels.coords), 3)
    assert all(map is again for map, again in zip(maps, net.maps(x), strict=True))


def test_the_view_is_a_right_handed_frame():
    points = wave().points
    for up in ([0, 0, 1.0], [0, 1.0, 0], [0, -1.0, 0]):
        seen = picture.view(points, np.array(up))
        frame = np.stack([seen.right, seen.up, seen.near])
        assert np.allclose(frame @ frame.T, np.eye(3))
        assert np.linalg.det(frame) == pytest.approx(1)
        assert seen.up @ up > 0
        assert abs(up[seen.vertical]) == 1


def test_a_cameras_frame_has_its_up_at_minus_y():
    corners = np.array([[-1, -1, 2.0], [1, 1, 5.0]])
    assert tasks.upward(corners, y_up=False).tolist() == [0, -1, 0]
    assert tasks.upward(corners - [0, 0, 3], y_up=False).tolist() == [0, 0, 1]
    assert tasks.upward(corners - [0, 0, 3], y_up=True).tolist() == [0, 1, 0]


def test_memory_is_asked_for_before_it_is_taken(small, monkeypatch):
    def refuse(what: str, voxels: int, bytes_per_voxel: int) -> None:
        assert bytes_per_voxel > 4 * 4 * 5  # at least the results of the five layers at the top
        check_memory(what, 10**12, bytes_per_voxel)

    monkeypatch.setattr(demo, "check_memory", refuse)
    with pytest.raises(InputError, match="a training step on wave .* of memory are free"):
        small(wave())


@pytest.mark.parametrize(("file", "voxel", "voxels", "pairs"), GOLDEN)
def test_golden_counts(tmp_path, file, voxel, voxels, pairs):
    if not (DATA / file).exists():
        pytest.skip("the folder ../shared/data is absent")
    options = demo.Options(
        file=str(DATA / file), voxel=voxel, steps=2, channels=2, out=str(tmp_path / "p.png")
    )
    result = demo.run(options, lambda _: None)
    assert (result["voxels"], result["pairs"]) == (voxels, pairs)
    assert result["loss_last"] < result["loss_first"]


def test_large_voxels_leave_no_gaps():
    x, y = np.meshgrid(np.arange(9.0), np.arange(7.0))
    points = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], 1)
    seen = picture.view(points, np.array([0, 0, 1]))
    shown = picture.Picture("plate", points, 1.0, "m", seen, [], [1.0], "loss", {})
    covered = picture._Raster(shown).row >= 0
    # From left to right a plate begins once.
    assert (np.diff(covered.astype(int), axis=1) == 1).sum(1).max() <= 1


def test_a_bar_of_one_value():
    assert picture.limits(np.full(5, 3.0)) == (2.5, 3.5)
    assert picture.limits(np.array([1.0, 2.0])) == pytest.approx((1.01, 1.99))


WRONG = {
    "missing": (["absent.ply"], "absent.ply is missing"),
    "folder": (["d.png"], "d.png is a folder"),
    "format": (["notes.txt"], "'.txt'"),
    "empty": (["empty.ply"], "empty"),
    "torn": (["torn.ply"], "torn.ply"),
    "nan": (["nan.npy"], "non-finite"),
    "one place": (["point.npy"], "one voxel"),
    "columns of a bin": (["torn.bin", "--columns", "5"], "30 bytes"),
    "columns of a ply": (["w.ply", "--columns", "4"], "columns"),
    "columns": (["w.ply", "--columns", "7"], "columns"),
    "one voxel": (["w.ply", "--voxel", "100"], "one voxel"),
    "tiny voxel": (["w.ply", "--voxel", "1e-12"], "1e-12"),
    "no voxel": (["w.ply", "--voxel", "small"], "'small'"),
    "zero voxel": (["w.ply", "--voxel", "0"], "voxel is 0"),
    "nan voxel": (["w.ply", "--voxel", "nan"], "voxel is nan"),
    "task": (["w.ply", "--task", "label"], "label"),
    "no task": (["w.ply", "--task", "flow"], "flow"),
    "steps": (["w.ply", "--steps", "0"], "steps is '0'"),
    "channels": (["w.ply", "--channels", "1.5"], "channels is '1.5'"),
    "dtype": (["w.ply", "--dtype", "int8"], "int8"),
    "device": (["w.ply", "--device", "tpu"], "device is 'tpu'"),
    "seed": (["w.ply", "--seed", "-1"], "seed"),
    "picture's place": (["w.ply", "--out", "no/p.png"], "p.png"),
    "picture's format": (["w.ply", "--out", "p.docx"], "docx"),
    "picture is a folder": (["w.ply", "--out", "d.png"], "d.png"),
    "json's place": (["w.ply", "--json", "no/x.json"], "x.json"),
}


@pytest.fixture
def odd_files(tmp_path, monkeypatch):
    """A folder with files that the demo cannot use, and w.ply, which it can."""
    monkeypatch.chdir(tmp_path)
    write_ply(tmp_path / "w.ply")
    (tmp_path / "d.png").mkdir()
    (tmp_path / "empty.ply").touch()
    (tmp_path / "notes.txt").write_text("x y z\n")
    (tmp_path / "torn.bin").write_bytes(b"\0" * 30)
    (tmp_path / "torn.ply").write_text("ply\nformat ascii 1.0\nelement vertex 9\n")
    np.save(tmp_path / "nan.npy", np.full((5, 3), np.nan))
    np.save(tmp_path / "point.npy", np.ones((5, 3)))
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_unusable_input_ends_in_one_sentence(odd_files, capsys, case):
    arguments, named = WRONG[case]
    before = sorted(odd_files.iterdir())
    try:
        status = cli.main(["demo", *arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("voxgemm demo: ")
    assert err.count("\n") == 1
    assert named in err
    # Nothing is left behind.
    assert sorted(odd_files.iterdir()) == before
