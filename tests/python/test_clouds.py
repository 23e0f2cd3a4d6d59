# SPDX-License-Identifier: Apache-2.0
"""Voxels of the data sets against their golden counts, voxelising, and synthetic clouds."""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from voxgemm.clouds import InputError, Mesh, PointCloud, cloud, read, street, voxelize
from voxgemm.clouds.shapes import FORMS
from voxgemm.clouds.street import LABELS

# The package's function of this name hides the module.
voxelize_module = sys.modules[voxelize.__module__]

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder ../shared/data is absent")

# file, voxel: voxels, 3^3 pairs, voxels after 1 to 4 halvings, grid extent, checksum of coordinates
GOLDEN = """
autzen_trim.las 1.0: 108883 238633 89358 36931 11699 2987 1178x563x115 f9f8314bcdf0109e
autzen_trim.las 2.0: 89358 615792 36931 11699 2987 783 589x282x58 b25d1279fbd29078
autzen_trim.las 4.0: 36931 369617 11699 2987 783 181 295x141x29 3bf9b644f61a2e24
autzen_trim.las 8.0: 11699 150003 2987 783 181 44 148x71x15 04e2bbcee3598fda
fragment.pcd 0.01: 56831 559767 15558 4056 1066 273 237x195x81 ed85914b92b672df
fragment.pcd 0.02: 15558 166276 4056 1066 273 79 119x98x41 fbd9fb175871dc83
fragment.pcd 0.05: 2579 27561 680 181 45 10 48x39x17 4f9c1d3c7cf8e582
office1.npz 0.01: 180859 1249275 67039 23784 7722 1879 415x378x354 09d8a0f4b1e7c19a
office1.npz 0.02: 67039 535133 23784 7722 1879 472 208x189x177 510c7692c699a062
office1.npz 0.05: 16768 207830 4689 1129 301 83 83x76x71 b24ea938e180a6c0
ika_drive_32scans.npz 0.1: 60370 298786 38825 21990 9012 2808 1760x826x507 b4c27313412f13d1
ika_drive_32scans.npz 0.2: 38825 248153 21990 9012 2808 807 880x413x254 f9f577a877002d51
small_gicp_target.ply 0.05: 28296 123422 15780 7931 3531 1434 848x1673x276 db44e15f72530578
small_gicp_target.ply 0.1: 15780 86690 7931 3531 1434 575 424x837x138 b8c654d107d2aa64
small_gicp_target.ply 0.2: 7931 54479 3531 1434 575 215 212x419x69 7532592430636b5e
small_gicp_source.ply 0.05: 28479 122441 15969 8032 3588 1508 845x1171x244 9a1b7e5176df5bba
small_gicp_source.ply 0.1: 15969 90279 8032 3588 1508 596 423x586x122 5ace59734d71765f
small_gicp_source.ply 0.2: 8032 56256 3588 1508 596 227 212x293x61 8563518f703cbed9
spot.obj 64grid: 9033 113689 2398 600 146 28 34x63x64 0f6f5902bf83f6f7
spot.obj 256grid: 143143 1776299 38520 9925 2514 616 134x252x256 0b1ebd73fa35e2e1
spot.obj 512grid: 570325 7047609 153815 39817 10072 2534 268x504x512 3fef9dd9dbd278c5
spot.obj 1024grid: 2276584 28072550 615107 159195 40460 10153 535x1007x1024 0e28ad737ee17772
scorpion.obj 64grid: 7402 109018 1836 429 98 20 55x41x64 c08e4591c9133e6f
scorpion.obj 256grid: 118156 1606394 30849 7747 1867 433 218x163x256 cbed290824e0f857
scorpion.obj 512grid: 469900 6322222 123518 31465 7824 1878 435x325x512 8dc46f9736e9aa02
scorpion.obj 1024grid: 1871522 25043926 494745 126595 31855 7872 869x650x1024 6bd74b3c1a8df328
"""

# cm, scan (-1: all): points, voxels, pairs, 4 halvings, checksum, voxels that the scan before had
VLS128 = """
5 0: 209907 194886 578898 155382 101011 54000 23798 54ccc9f777e2c539 0
5 1: 209916 194938 581008 155446 101173 54141 23857 8b8c41964a443fe7 44167
5 2: 210322 195061 580453 155450 101258 54106 23897 edf1dbe015af9fd0 43846
5 -1: 630145 428127 1901959 0 0 0 0 ba10864ce2b65e07 0
10 0: 209907 155382 733524 101011 54000 23798 9146 fe3b49577d88e3e2 0
10 1: 209916 155446 732804 101173 54141 23857 9164 65c06df6b00f1b02 68134
10 2: 210322 155450 732230 101258 54106 23897 9184 d37e93d6f94281df 67810
10 -1: 630145 281305 1704457 0 0 0 0 b3adf8fe9ff33516 0
20 0: 209907 101011 653547 54000 23798 9146 3314 d32585487de0b3dd 0
20 1: 209916 101173 654271 54141 23857 9164 3297 247686b7e97940d1 60281
20 2: 210322 101258 656406 54106 23897 9184 3322 75bd415231e08019 61087
20 -1: 630145 156463 1203067 0 0 0 0 1b88524341e317ea 0
"""

# Each scan of ika_drive_32scans.npz at 0.2 m: points, voxels, pairs.
IKA_SCANS = """
3285,1918,5972 3167,1861,5997 3172,1868,5904 3190,1864,5674 3288,1948,6078 3332,2003,6191
3371,2006,6268 3409,1989,5983 3417,2017,6275 3349,1952,6042 3325,1885,5879 3389,1941,6363
3449,2006,6414 3371,1923,6015 3333,1920,6170 3336,1890,6132 3394,1929,6213 3447,1952,6426
3520,1967,6235 3516,2001,6475 3525,2000,6562 3489,1980,6310 3481,1961,6413 3478,1937,6311
3481,1928,6200 3417,1866,6166 3344,1835,6215 3419,1897,6433 3321,1806,6018 3434,1865,6453
3537,1898,6446 3580,1950,6570
"""
IKA_KEPT = """59 327 269 257 237 145 131 108 116 624 563 318 230 442 544 507 391 498 544 401 521 604
497 474 430 342 428 563 292 475 455"""


def split(table: str) -> list[list[str]]:
    return [line.replace(":", "").split() for line in table.strip().splitlines()]


def pairs(coords: np.ndarray) -> int:
    """Ordered pairs of voxels whose difference is in {-1, 0, 1}^3."""
    shape = coords.max(axis=0).astype(np.int64) + 3
    keys = np.ravel_multi_index((coords.astype(np.int64) + 1).T, shape)  # sorted as the rows are
    total = len(keys)
    for offset in itertools.product((-1, 0, 1), repeat=3):
        if offset > (0, 0, 0):
            moved = keys + (offset[0] * shape[1] + offset[1]) * shape[2] + offset[2]
            at = np.minimum(np.searchsorted(keys, moved), len(keys) - 1)
            total += 2 * int(np.count_nonzero(keys[at] == moved))
    return total


def halvings(coords: np.ndarray) -> list[int]:
    counts = []
    for k in (1, 2, 3, 4):
        halved = coords >> k
        keys = np.ravel_multi_index(halved.T.astype(np.int64), halved.max(axis=0) + 1)
        counts.append(len(np.unique(keys)))
    return counts


def checksum(coords: np.ndarray) -> str:
    return hashlib.sha256(coords.astype("<i4").tobytes()).hexdigest()[:16]


@needs_data
@pytest.mark.parametrize("row", split(GOLDEN), ids=lambda row: "@".join(row[:2]))
def test_golden(row):
    name, voxel, count, pair_count, *halved, extent, digest = row
    item = read(DATA / name)
    voxels = voxelize(item, voxel)
    coords = voxels.coords
    assert coords.dtype == np.int32
    assert len(coords) == int(count)
    assert checksum(coords) == digest
    assert [int(v) for v in extent.split("x")] == list(coords.max(axis=0) + 1)
    assert pairs(coords) == int(pair_count)
    assert halvings(coords) == [int(h) for h in halved]
    if isinstance(item, PointCloud):
        assert voxels.samples.sum() == len(item.points) == len(voxels.inverse)


@needs_data
@pytest.mark.parametrize("cm", [5, 10, 20])
def test_golden_vls128(cm):
    item = read(DATA / "vls128_3scans.npz")
    offsets = np.load(DATA / "vls128_3scans.npz")["offsets"]
    voxels = voxelize(item, cm / 100)
    before = np.zeros(0, dtype=np.int64)
    for row in split(VLS128):
        if int(row[0]) != cm:
            continue
        scan = int(row[1])
        part = slice(None) if scan < 0 else slice(offsets[scan], offsets[scan + 1])
        ids = np.unique(voxels.inverse[part])
        coords = voxels.coords[ids]
        assert len(item.points[part]) == int(row[2])
        assert [len(coords), pairs(coords)] == [int(row[3]), int(row[4])]
        assert checksum(coords) == row[9]
        if scan >= 0:
            assert halvings(coords) == [int(h) for h in row[5:9]]
            assert len(np.intersect1d(ids, before)) == int(row[10])
        before = ids


@needs_data
def test_golden_ika_scans():
    item = read(DATA / "ika_drive_32scans.npz")
    offsets = np.load(DATA / "ika_drive_32scans.npz")["offsets"]
    sums = {0.2: [0, 0], 0.1: [0, 0]}
    ends = {0.2: ("e33fe71dd1c8d3c0", "3c0552aabaf5bc98")}
    ends[0.1] = ("ec9d138d68902e00", "c0d27f3bb40a5d51")
    for size in (0.2, 0.1):
        voxels = voxelize(item, size)
        ids = [np.unique(voxels.inverse[a:b]) for a, b in itertools.pairwise(offsets)]
        scans = [voxels.coords[i] for i in ids]
        rows = [(n, len(s), pairs(s)) for n, s in zip(np.diff(offsets), scans, strict=True)]
        sums[size] = [sum(r[1] for r in rows), sum(r[2] for r in rows)]
        assert (checksum(scans[0]), checksum(scans[-1])) == ends[size]
        if size == 0.2:
            assert rows == [tuple(map(int, r.split(","))) for r in IKA_SCANS.split()]
            kept = [len(np.intersect1d(a, b)) for a, b in itertools.pairwise(ids)]
            assert kept == [int(k) for k in IKA_KEPT.split()]
    assert sums == {0.2: [61763, 198803], 0.1: [83854, 216570]}


@needs_data
def test_mesh_sample_counts():
    spot = read(DATA / "spot.obj")
    assert (len(spot.vertices), len(spot.faces)) == (11533, 23062)
    assert voxelize(spot, 64).samples.sum() == 141168
    assert voxelize(spot, "256 grid").samples.sum() == 925547
    scorpion = read(DATA / "scorpion.obj")
    assert (len(scorpion.vertices), len(scorpion.faces)) == (49997, 99990)
    assert voxelize(scorpion, "64grid").samples.sum() == 459237


@needs_data
def test_attributes_of_the_data_sets():
    las = read(DATA / "autzen_trim.las")
    assert las.color.dtype == np.uint8 and las.intensity.shape == las.label.shape == (110000,)
    fragment = read(DATA / "fragment.pcd")
    assert fragment.color.dtype == np.uint8 and fragment.color.max() > 100
    lengths = np.linalg.norm(fragment.normal.astype(np.float64), axis=1)
    # float32 unit vectors: rounding of three components of at most 1, and those of the writer.
    assert np.abs(lengths - 1).max() < 8 * np.finfo(np.float32).eps
    assert read(DATA / "small_gicp_target.ply").intensity.shape == (69088,)
    assert read(DATA / "vls128_3scans.npz").intensity.dtype == np.uint8


RNG = np.random.RandomState(7)
XYZ = RNG.uniform(-50, 50, (40, 3)).astype(np.float32)

# ---- voxelising


def square(scale: float = 1.0) -> Mesh:
    vertices = scale * np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=np.float64)
    return Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), name="square")


BAD_VOXELS = [
    ("0", "voxel is 0, expected a finite size above 0"),
    (-1.5, "voxel is -1.5, expected a finite size above 0"),
    ("nan", "voxel is nan, expected a finite size above 0"),
    (float("inf"), "voxel is inf, expected a finite size above 0"),
    ("1e400", "voxel is 1e400, expected a finite size above 0"),
    ("abc", "voxel is 'abc', expected a size such as 0.05 or a grid such as 256grid"),
    ("", "voxel is '', expected a size"),
    ("grid", "voxel is 'grid', expected a size"),
    ("1grid", "voxel is '1grid', a grid has a whole number of cells from 2 on"),
    ("2.5grid", "voxel is '2.5grid', a grid has a whole number of cells from 2 on"),
    (1e-12, "voxel 1e-12 makes .* 1e[+]12 voxels wide, int32 coordinates allow 2147483648"),
    ("5e-324", "voxel 5e-324 makes .* voxels wide"),
    (50.0, "voxel 50(.0)? gives one voxel, .* is only 1 wide"),
]


@pytest.mark.parametrize("voxel, message", BAD_VOXELS)
def test_absurd_voxels(voxel, message):
    for item in (square(), PointCloud(square().vertices, name="points")):
        with pytest.raises(InputError, match=message):
            voxelize(item, voxel)


def test_absurd_extents():
    one = PointCloud(np.ones((5, 3)), name="one")
    with pytest.raises(
        InputError, match="one has an extent of 0, every voxel size gives one voxel"
    ):
        voxelize(one, 0.1)
    cube = PointCloud(np.array([[0.0] * 3, [1.0] * 3]), name="cube")
    with pytest.raises(InputError, match="grid of 100000002 x 100000002 x 100000002 cells of cube"):
        voxelize(cube, 1e-8)
    wide = PointCloud(np.array([[-1e308] * 3, [1e308] * 3]), name="wide")
    with np.errstate(over="ignore"), pytest.raises(InputError, match="an extent of inf, expected"):
        voxelize(wide, 1.0)
    with pytest.raises(InputError, match="none has 0 points, expected at least 1"):
        voxelize(PointCloud(np.zeros((0, 3)), name="none"), 1.0)
    with pytest.raises(InputError, match="nan has an extent of nan, expected a finite one"):
        voxelize(PointCloud(np.array([[0, 0, 0], [1, 1, np.nan]]), name="nan"), 1.0)


def test_more_than_memory(monkeypatch):
    monkeypatch.setattr(voxelize_module, "available_memory", lambda: 10**6)
    # 10,000 voxels across one square unit, by the estimate before any sample is taken.
    with pytest.raises(InputError, match="square on this grid has 10,000 voxels and needs"):
        voxelize(square(), "100grid")
    points = PointCloud(XYZ.astype(np.float64), name="points")
    assert len(voxelize(points, 0.01, bytes_per_voxel=25_000).coords) == 40
    with pytest.raises(InputError, match=r"voxel 0.01 of points has 40 voxels and needs 0.0 GB"):
        voxelize(points, 0.01, bytes_per_voxel=25_001)
    with pytest.raises(InputError, match="cloud 'full:100' has 1,000,000 voxels and needs 0.0 GB"):
        cloud("full:100")
    assert voxelize_module.available_memory() == 10**6


def test_needles_are_refused():
    # 10,000 triangles without area, each 200,000 voxels long: 1.6e15 samples.
    needle = Mesh(np.array([[0, 0, 0], [1, 1e-9, 0], [1, 0, 0.0]]), np.array([[0, 1, 2]] * 10000))
    with pytest.raises(InputError, match=r"has 8e\+14 surface samples, expected 1e\+10 at most"):
        voxelize(needle, 200_000)


def test_available_memory_is_plausible():
    assert 10**6 < voxelize_module.available_memory() < 2**63 + 1


def test_voxel_means():
    points = np.array([[0.0, 0, 0], [0.05, 0, 0], [0.25, 0, 0], [0.26, 0, 0], [1.0, 0, 0]])
    item = PointCloud(
        points,
        color=np.array([[255, 0, 0], [0, 255, 0], [51, 0, 0], [0, 0, 0], [0, 0, 0]], np.uint8),
        normal=np.array([[1.0, 0, 0], [0, 1, 0], [np.nan, 0, 0], [0, 0, 1], [np.nan] * 3]),
        intensity=np.array([2.0, 4, 6, 8, 10], dtype=np.float32),
        name="means",
    )
    got = voxelize(item, "0.1")
    assert got.coords.tolist() == [[0, 0, 0], [2, 0, 0], [10, 0, 0]]
    assert got.inverse.tolist() == [0, 0, 1, 1, 2]
    assert got.samples.tolist() == [2, 2, 1]
    # Halves and tenths of 51 / 255 = 0.2, as one rounding of the float64 mean.
    assert np.array_equal(got.color, np.float32([[0.5, 0.5, 0], [0.1, 0, 0], [0, 0, 0]]))
    assert got.normal.tolist() == [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 0]]
    assert got.intensity.tolist() == [3, 7, 10]


def test_mesh_means():
    mesh = square()
    mesh.color = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0.0]])  # red = x
    got = voxelize(mesh, "16grid")
    assert len(got.coords) == 256 and got.inverse is None
    assert np.array_equal(got.normal, np.tile(np.float32([0, 0, 1]), (256, 1)))
    # A mean over samples of the voxel stays inside of the voxel, up to one rounding to float32.
    center = (got.coords[:, 0] + 0.5) / 16
    assert np.abs(got.color[:, 0] - center).max() <= 0.5 / 16 + np.finfo(np.float32).eps


def test_mesh_voxel_is_grid_or_size():
    mesh = square(100.0)
    assert voxelize(mesh, 50).size == 2.0  # from 8 on a grid
    assert voxelize(mesh, "50grid").size == 2.0
    assert voxelize(mesh, 50.0).size == 50.0
    assert voxelize(mesh, "7").size == 7.0
    sized = voxelize(mesh, "2.0")
    assert np.array_equal(sized.coords, voxelize(mesh, 50).coords)
    assert voxelize(mesh, 7).coords.max() == 14  # 100 / 7 = 14.3: 15 voxels
    points = PointCloud(mesh.vertices)
    assert voxelize(points, 50).coords.max() == 2
    assert voxelize(points, "50grid").coords.max() == 49


def test_blocks_do_not_change_the_voxels(monkeypatch):
    rng = np.random.RandomState(1)
    mesh = Mesh(rng.uniform(0, 1, (60, 3)), rng.randint(0, 60, (90, 3)), name="soup")
    whole = voxelize(mesh, "40grid")
    monkeypatch.setattr(voxelize_module, "_BLOCK", 37)
    pieces = voxelize(mesh, "40grid")
    assert np.array_equal(whole.coords, pieces.coords)
    assert np.array_equal(whole.samples, pieces.samples)
    # Sums of unit normals in another order: one rounding of float64 per sample, one of float32.
    bound = whole.samples.max() * np.finfo(np.float64).eps + np.finfo(np.float32).eps
    assert np.abs(whole.normal - pieces.normal).max() <= bound


def test_mesh_samples_by_the_rule():
    """The rule in its plainest form: three loops over one triangle after the other."""
    rng = np.random.RandomState(2)
    mesh = Mesh(rng.uniform(-3, 5, (12, 3)), rng.randint(0, 12, (15, 3)), name="soup")
    low = mesh.vertices.min(axis=0)
    size = (mesh.vertices.max(axis=0) - low).max() / 24
    seen = set()
    for a, b, c in mesh.vertices[mesh.faces]:
        longest = max(
            np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]) for d in (b - a, c - b, a - c)
        )
        n = max(1, int(np.ceil(longest / (0.5 * size))))
        for i in range(n + 1):
            for j in range(n + 1 - i):
                sample = ((i * a + j * b) + (n - i - j) * c) / n
                seen.add(tuple(np.clip(np.floor((sample - low) / size), 0, 23).astype(int)))
    assert sorted(seen) == [tuple(row) for row in voxelize(mesh, "24grid").coords.tolist()]


# ---- synthetic clouds


@pytest.mark.parametrize(
    "res, count",
    [(8, 192), (16, 848), (32, 3840), (64, 15192), (128, 64160), (256, 252392), (512, 1026536)],
)
def test_shell(res, count):
    rows = cloud(f"shell:{res}")
    assert rows.shape == (count, 4) and rows.dtype == np.int32
    assert not rows[:, 0].any()
    if res <= 64:
        half = np.float32(res / 2)
        axis = np.arange(res, dtype=np.float32) - half + np.float32(0.5)
        x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
        radius = np.sqrt(x * x + y * y + z * z)
        dense = np.argwhere((radius >= half - np.float32(1.25)) & (radius <= half))
        assert np.array_equal(rows[:, 1:], dense)


def in_raster_order(rows: np.ndarray) -> bool:
    keys = np.ravel_multi_index(rows[:, 1:].T.astype(np.int64), rows[:, 1:].max(axis=0) + 1)
    return bool((np.diff(keys) > 0).all())


@pytest.mark.parametrize(
    "spec, count",
    [
        ("full:7", 343),
        ("line:9", 9),
        ("random:500:30", 500),
        ("random:900:10", 900),
        ("random:1000:10", 1000),
        ("shell:32", 3840),
    ],
)
def test_counts(spec, count):
    rows = cloud(spec)
    assert rows.shape == (count, 4) and rows.dtype == np.int32
    assert rows.min() >= 0 and in_raster_order(rows)


def test_random_is_uniform_and_seeded():
    rows = cloud("random:20000:50", seed=3)
    assert np.array_equal(rows, cloud("random:20000:50", seed=3))
    assert not np.array_equal(rows, cloud("random:20000:50", seed=4))
    assert rows[:, 1:].min() == 0 and rows[:, 1:].max() == 49
    # 10,000 voxels in each half on average; 5 standard deviations of a binomial are 354.
    assert (np.abs((rows[:, 1:] < 25).sum(axis=0) - 10000) < 354).all()


def test_room():
    rows = cloud("room:64")
    assert in_raster_order(rows) and rows[:, 1:].max(axis=0).tolist() == [63, 47, 25]
    assert (rows[:, 3] == 0).sum() == 64 * 48  # the floor is whole
    assert len(cloud("room")) > 10 * len(rows)  # RES 256: 16 times the surface, less for edges


def test_street_cloud():
    rows = cloud("street")
    assert in_raster_order(rows)
    assert np.array_equal(rows, cloud("street:0.1"))
    assert len(cloud("street:0.4")) < len(rows) / 4


def test_file_cloud(tmp_path):
    np.save(tmp_path / "a@b.npy", XYZ)
    rows = cloud(f"file:{tmp_path / 'a@b.npy'}@0.5")
    assert np.array_equal(rows[:, 1:], voxelize(read(tmp_path / "a@b.npy"), 0.5).coords)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "shell",
        "shell:",
        "foo",
        "foo:3",
        "shell:64:2",
        "random:5",
        "street:0.1:2",
        "file:",
        "room:",
    ],
)
def test_bad_specs(spec):
    if spec == "room:":
        assert len(cloud(spec)) == len(cloud("room"))
        return
    with pytest.raises(InputError, match="expected one of shell:RES, street.*file:PATH@VOXEL"):
        cloud(spec)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("shell:x", "expected a whole number from 1 on, not 'x'"),
        ("shell:0", "expected a whole number from 1 on, not '0'"),
        ("line:-4", "expected a whole number from 1 on, not '-4'"),
        ("random:28:3", "wants 28 voxels, its cube has 27"),
        ("full:9000000", "is 9000000 voxels wide, expected 2097152 at most"),
        ("full:1000000", "has 1,000,000,000,000,000,000 voxels and needs"),
        ("shell:2000000", "needs .* GB, .* GB of memory are free"),
        ("street:none", "voxel is 'none', expected a size"),
        ("file:here.ply", "expected file:PATH@VOXEL"),
        ("file:here.ply@0.1", "here.ply is missing"),
    ],
)
def test_bad_numbers(spec, message):
    with pytest.raises(InputError, match=message):
        cloud(spec)


def test_street():
    scan = street()
    count = len(scan.points)
    assert scan.label.shape == scan.intensity.shape == (count,)
    # 64 x 2048 rays, 2% of them lost, some into the open street.
    assert 0.8 * 131072 < count < 0.99 * 131072
    assert set(np.unique(scan.label)) == set(range(len(LABELS)))
    distance = np.linalg.norm(scan.points, axis=1)
    # The range noise has a standard deviation of 2 cm: 6 of them, and half a millimetre per axis.
    assert distance.max() < 70 + 0.12 + 0.001
    elevation = np.rad2deg(np.arcsin(scan.points[:, 2] / distance))
    assert -24.9 < elevation.min() < -24.7 and 1.9 < elevation.max() < 2.1
    assert scan.intensity.min() >= 0 and scan.intensity.max() <= 1


def test_street_is_seeded():
    first, second, other = street(1), street(1), street(2)
    assert np.array_equal(first.points, second.points)
    assert np.array_equal(first.label, second.label)
    assert first.points.shape != other.points.shape or not np.array_equal(
        first.points, other.points
    )
    assert len(street(0, beams=16, azimuths=512).points) <= 16 * 512
    with pytest.raises(InputError, match="street has 0 beams and 2048 azimuths"):
        street(beams=0)


def test_street_ground_is_where_it_should_be():
    scan = street()
    x, y, z = scan.points[scan.label == LABELS.index("road")].T
    expected = x * x / 4000 - y * y / 500 - 1.8
    # Noise along the ray: its vertical part is at most sin(24.8) of 6 * 2 cm, and rounding.
    assert np.abs(z - expected).max() < 0.12 * np.sin(np.deg2rad(24.8)) + 0.12 * 0.04 + 0.001


def test_every_form_is_known():
    kinds = {form.partition("[")[0].partition(":")[0] for form in FORMS}
    assert kinds == {"shell", "street", "room", "random", "full", "line", "file"}
