# SPDX-License-Identifier: Apache-2.0
"""Every file format, written here byte by byte and read back, and every way to be unreadable."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from voxgemm.clouds import InputError, PointCloud, read, voxelize

laspy = pytest.importorskip("laspy")
for reader in ("lazrs", "trimesh", "pypcd4"):
    pytest.importorskip(reader)

RNG = np.random.RandomState(7)
XYZ = RNG.uniform(-50, 50, (40, 3)).astype(np.float32)
RGB = RNG.randint(0, 256, (40, 3)).astype(np.uint8)
NORMAL = RNG.normal(size=(40, 3)).astype(np.float32)
INTENSITY = RNG.uniform(0, 1, 40).astype(np.float32)
VERTICES = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0.5]], dtype=np.float32)
FACES = np.array([[0, 1, 2], [3, 2, 0]])


def write_las(path, extra_bits=0):
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales, header.offsets = [0.001] * 3, [5.0, 6.0, 7.0]
    las = laspy.LasData(header)
    las.xyz = XYZ
    las.intensity = (INTENSITY * 1000).astype(np.uint16)
    las.red, las.green, las.blue = (RGB.astype(np.uint16) << extra_bits).T
    las.write(str(path))
    return las


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize("bits", [0, 8])
def test_las(tmp_path, suffix, bits):
    path = tmp_path / f"cloud{suffix}"
    written = write_las(path, bits)
    got = read(path)
    ticks = np.stack([written.X, written.Y, written.Z], axis=1)
    assert np.array_equal(got.points, ticks * 0.001 + [5.0, 6.0, 7.0])
    assert np.array_equal(got.color, RGB)
    assert np.array_equal(got.intensity, (INTENSITY * 1000).astype(np.uint16))
    assert got.name == path.name and got.dropped == 0


def ply_bytes(form: str, mesh: bool = False) -> bytes:
    points = VERTICES if mesh else XYZ
    count = len(points)
    order = ">" if form == "binary_big_endian" else "<"
    dtype = [(axis, order + "f4") for axis in ("x", "y", "z", "nx", "ny", "nz")]
    dtype += [(c, "u1") for c in ("red", "green", "blue")] + [("scalar_Intensity", order + "f4")]
    names = {"u1": "uchar", order + "f4": "float"}
    head = [f"ply\nformat {form} 1.0\ncomment made by a test\nelement vertex {count}"]
    head += [f"property {names[kind]} {name}" for name, kind in dtype]
    table = np.zeros(count, dtype=dtype)
    columns = [*points.T, *NORMAL[:count].T, *RGB[:count].T, INTENSITY[:count]]
    for (name, _), column in zip(dtype, columns, strict=True):
        table[name] = column
    faces = np.zeros(len(FACES), dtype=[("n", "u1"), ("v", order + "i4", 3)])
    faces["n"], faces["v"] = 3, FACES
    if mesh:
        head.append(f"element face {len(FACES)}\nproperty list uchar int vertex_indices")
    head.append("end_header\n")
    if form != "ascii":
        return "\n".join(head).encode() + table.tobytes() + (faces.tobytes() if mesh else b"")
    rows = [" ".join(str(v) for v in row.tolist()) for row in table]
    rows += [f"3 {a} {b} {c}" for a, b, c in FACES] if mesh else []
    return ("\n".join(head) + "\n".join(rows) + "\n").encode()


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("mesh", [False, True])
def test_ply(tmp_path, form, mesh):
    path = tmp_path / "cloud.PLY"
    path.write_bytes(ply_bytes(form, mesh))
    got = read(path)
    points = VERTICES if mesh else XYZ
    assert np.array_equal(got.vertices if mesh else got.points, points)
    assert np.array_equal(got.color, RGB[: len(points)])
    assert np.array_equal(got.normal, NORMAL[: len(points)])
    if mesh:
        assert np.array_equal(got.faces, FACES)
    else:
        assert np.array_equal(got.intensity, INTENSITY)


def lzf(data: bytes) -> bytes:
    """A valid LZF stream of literal runs only."""
    runs = (data[i : i + 32] for i in range(0, len(data), 32))
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def pcd_bytes(form: str, packed: str = "F", blank: bytes = b" ") -> bytes:
    bits = RGB.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    table = np.zeros(
        len(XYZ), dtype=[(n, "<f4") for n in "xyz"] + [("rgb", "<u4"), ("intensity", "<f4")]
    )
    table["x"], table["y"], table["z"] = XYZ.T
    table["rgb"], table["intensity"] = bits, INTENSITY
    head = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS x y z rgb intensity\n"
        f"SIZE 4 4 4 4 4\nTYPE F F F {packed} F\nCOUNT 1 1 1 1 1\nWIDTH {len(XYZ)}\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(XYZ)}\nDATA {form}\n"
    ).encode()
    if form == "binary":
        return head + table.tobytes()
    if form == "binary_compressed":
        raw = b"".join(table[name].tobytes() for name in table.dtype.names)
        squeezed = lzf(raw)
        return head + np.array([len(squeezed), len(raw)], "<u4").tobytes() + squeezed
    rgb = bits.view(np.float32) if packed == "F" else bits
    rows = zip(*(table[n].tolist() for n in "xyz"), rgb.tolist(), INTENSITY.tolist(), strict=True)
    return head + b"\n".join(blank.join(repr(v).encode() for v in row) for row in rows) + b" \n"


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("packed", ["F", "U"])
def test_pcd(tmp_path, form, packed):
    path = tmp_path / "cloud.pcd"
    for blank in (b" ", b"\t  ") if form == "ascii" else (b" ",):
        path.write_bytes(pcd_bytes(form, packed, blank))
        got = read(path)
        assert np.array_equal(got.points, XYZ)
        assert np.array_equal(got.color, RGB)
        assert np.array_equal(got.intensity, INTENSITY)


def test_pcd_of_one_point(tmp_path):
    path = tmp_path / "one.pcd"
    path.write_text(
        "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 1\nHEIGHT 1\n"
        "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 1\nDATA ascii\n1 2 3\n"
    )
    assert read(path).points.tolist() == [[1, 2, 3]]


def test_obj(tmp_path):
    path = tmp_path / "mesh.obj"
    path.write_text(
        "# two materials, a quad, relative indices, a continued line\nmtllib none.mtl\no part\n"
        "v 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0.1\nvt 0 0\nvn 0 0 1\nusemtl a\n"
        "f 1/1/1 2/1/1 3/1/1 4/1/1\nusemtl b\nf 1//1 3//1 4//1\nv 5 5 5\nf -1 -2 \\\n-3\n"
    )
    got = read(path)
    assert got.vertices.tolist() == [[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0.1], [5, 5, 5]]
    assert got.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 2, 3], [4, 3, 2]]


def test_obj_colors_and_points(tmp_path):
    path = tmp_path / "points.obj"
    path.write_text("v 0 0 0 0.5 0.25 1\nv 1 0 0 0 0 0\n")
    got = read(path)
    assert isinstance(got, PointCloud)
    assert got.color.tolist() == [[0.5, 0.25, 1], [0, 0, 0]]


def stl_bytes() -> bytes:
    table = np.zeros(2, dtype=[("n", "<f4", 3), ("v", "<f4", (3, 3)), ("a", "<u2")])
    table["v"] = VERTICES[FACES]
    return b"a test".ljust(80) + np.array([2], "<u4").tobytes() + table.tobytes()


def stl_text() -> bytes:
    facets = "".join(
        "facet normal 0 0 1\nouter loop\n"
        + "".join("vertex {} {} {}\n".format(*VERTICES[v].tolist()) for v in face)
        + "endloop\nendfacet\n"
        for face in FACES
    )
    return f"solid test\n{facets}endsolid test\n".encode()


@pytest.mark.parametrize("content", [stl_bytes, stl_text])
def test_stl(tmp_path, content):
    path = tmp_path / "mesh.stl"
    path.write_bytes(content())
    got = read(path)
    assert np.array_equal(got.vertices[got.faces], VERTICES[FACES])


def glb_bytes() -> bytes:
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.Trimesh(VERTICES, FACES, vertex_colors=RGB[:4], process=False)
    scene = trimesh.Scene()
    for name, shift in (("a", 0.0), ("b", 10.0)):
        move = np.eye(4)
        move[0, 3] = shift
        scene.add_geometry(mesh, node_name=name, geom_name=name, transform=move)
    return scene.export(file_type="glb")


def test_glb(tmp_path):
    path = tmp_path / "mesh.glb"
    path.write_bytes(glb_bytes())
    got = read(path)
    moved = VERTICES + np.array([10, 0, 0], dtype=np.float32)
    assert np.array_equal(got.vertices, np.concatenate([VERTICES, moved]))
    assert np.array_equal(got.faces, np.concatenate([FACES, FACES + 4]))
    assert np.array_equal(got.color, np.concatenate([RGB[:4]] * 2))


@pytest.mark.parametrize("columns", [4, 5, 6])
def test_bin(tmp_path, columns):
    path = tmp_path / "scan.bin"
    table = np.zeros((41, columns), dtype="<f4")
    table[:40, :3], table[:40, 3] = XYZ, INTENSITY
    table[40, 1] = np.nan
    table.tofile(path)
    got = read(path, columns=columns)
    assert np.array_equal(got.points, XYZ)
    assert np.array_equal(got.intensity, INTENSITY)
    assert got.dropped == 1
    if columns == 4:
        assert np.array_equal(read(path).points, XYZ)


def test_npy(tmp_path):
    path = tmp_path / "cloud.npy"
    for dtype in (np.float64, np.float32, np.float16, np.int16):
        np.save(path, XYZ.astype(dtype))
        assert np.array_equal(read(path).points, XYZ.astype(dtype))
    np.save(path, np.column_stack([XYZ, INTENSITY]))
    assert np.array_equal(read(path).intensity, INTENSITY)
    np.save(path, np.column_stack([XYZ, RGB]))
    got = read(path)
    assert got.intensity is None
    assert np.array_equal(got.color, (RGB / np.float32(255)).astype(np.float32))


@pytest.mark.parametrize("key", ["xyz", "points", "arr_0"])
def test_npz(tmp_path, key):
    path = tmp_path / "cloud.npz"
    np.savez(path, **{key: XYZ}, rgb=RGB, intensity=INTENSITY, normal=NORMAL, offsets=[0, 10, 40])
    got = read(path)
    assert np.array_equal(got.points, XYZ)
    assert np.array_equal(got.color, RGB)
    assert np.array_equal(got.intensity, INTENSITY)
    assert np.array_equal(got.normal, NORMAL)


def test_npz_of_centimetres(tmp_path):
    path = tmp_path / "cloud.npz"
    # 0.15 / 0.05 is below 3 in float64: only the integer rule finds voxel 3.
    np.savez(path, xyz_cm=np.array([[0, 0, 0], [15, 30, 35], [4, 5, 6]], dtype=np.int16))
    got = read(path)
    assert got.points[1].tolist() == [0.15, 0.3, 0.35]
    coords = voxelize(got, 0.05)
    assert coords.coords.tolist() == [[0, 0, 0], [0, 1, 1], [3, 6, 7]]
    assert voxelize(got, "0.1").coords.tolist() == [[0, 0, 0], [1, 3, 3]]
    # No multiple of a centimetre: the float64 rule.
    expected = np.floor(got.points / 0.025).astype(int)
    assert np.array_equal(voxelize(got, 0.025).coords[[0, 2]], expected[[0, 1]])


CSV = {
    "named": "t,X,Y,Z,r,g,b,intensity\n9,1.5,2,3,255,0,1,0.5\n9,4,5,6,0,0,0,0.25\n",
    "first numbers": "name,a,b,c\np,1.5,2,3\nq,4,5,6\n",
    "no header": "1.5,2,3\n4,5,6\n",
    "semicolons": "x;y;z\n1.5;2;3\n4;5;6\n",
    "blanks": "x y z\n1.5 2 3\n4 5 6\n",
    "comment": "//X,Y,Z\n1.5,2,3\n4,5,6\n",
    "comment and blanks": "# x y z\n1.5 2 3\n4 5 6\n",
    "blank lines": "\n \n1.5,2,3\n4,5,6\n",
}


@pytest.mark.parametrize("kind", CSV)
def test_csv(tmp_path, kind):
    pytest.importorskip("pandas")
    path = tmp_path / "cloud.csv"
    path.write_text(CSV[kind])
    got = read(path)
    assert got.points.tolist() == [[1.5, 2, 3], [4, 5, 6]]
    if kind == "named":
        assert got.color.tolist() == [[255, 0, 1], [0, 0, 0]]
        assert got.intensity.tolist() == [0.5, 0.25]


def test_csv_keeps_every_digit(tmp_path):
    pytest.importorskip("pandas")
    points = RNG.uniform(-1e6, 1e6, (200, 3))
    path = tmp_path / "cloud.csv"
    path.write_text("x,y,z\n" + "\n".join(",".join(map(repr, row)) for row in points.tolist()))
    assert np.array_equal(read(path).points, points)


# ---- what cannot be used


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def npy_bytes(tmp_path: Path, suffix: str) -> bytes:
    path = tmp_path / f"good{suffix}"
    np.save(path, XYZ) if suffix == ".npy" else np.savez(path, xyz=XYZ)
    return path.read_bytes()


def good_bytes(tmp_path: Path, kind: str) -> bytes:
    if kind in (".las", ".laz"):
        pytest.importorskip("lazrs")
        write_las(tmp_path / f"good{kind}")
        return (tmp_path / f"good{kind}").read_bytes()
    if kind in (".npy", ".npz"):
        return npy_bytes(tmp_path, kind)
    return {
        ".ply": lambda: ply_bytes("binary_little_endian"),
        ".ascii.ply": lambda: ply_bytes("ascii"),
        ".pcd": lambda: pcd_bytes("binary"),
        ".ascii.pcd": lambda: pcd_bytes("ascii"),
        ".compressed.pcd": lambda: pcd_bytes("binary_compressed"),
        ".stl": stl_bytes,
        ".glb": glb_bytes,
    }[kind]()


ALL = [".las", ".laz", ".ply", ".pcd", ".obj", ".stl", ".glb", ".bin", ".npy", ".npz", ".csv"]
CUT = [".las", ".laz", ".ply", ".ascii.ply", ".pcd", ".ascii.pcd", ".compressed.pcd", ".stl"]
CUT += [".glb", ".npy", ".npz"]
SAYS_CUT = ("cut off", "its header says", "its header end at", "expected b'", "expected 'solid'")


@pytest.mark.parametrize("kind", CUT)
def test_truncated(tmp_path, kind):
    content = good_bytes(tmp_path, kind)
    # An ascii row may end early in its last number and still be a row.
    end = content[:-2].rfind(b"\n") if "ascii" in kind else len(content) - 1
    for cut in np.linspace(1, end, 25).astype(int):
        path = write(tmp_path / f"cut{kind}", content[:cut])
        with pytest.raises(InputError, match=f"^cut{kind} .*{'|'.join(SAYS_CUT)}"):
            read(path)


@pytest.mark.parametrize("kind", [".stl", ".glb"])
def test_sizes_that_a_header_says(tmp_path, kind):
    content = good_bytes(tmp_path, kind)
    said = {
        ".stl": f"150 bytes, the 2 triangles of its header end at byte {len(content)}",
        ".glb": f"150 bytes, its header says {len(content)}",
    }[kind]
    with pytest.raises(InputError, match=f"cut{kind} has {said}"):
        read(write(tmp_path / f"cut{kind}", content[:150]))


def test_stl_text_that_is_cut_off(tmp_path):
    pytest.importorskip("trimesh")
    content, path = stl_text(), tmp_path / "cut.stl"
    for cut in range(5, len(content) - len("endsolid test\n") + 1):
        with pytest.raises(InputError, match="cut.stl is cut off: its last line is '.*', expected"):
            read(write(path, content[:cut]))
    with pytest.raises(InputError, match="cut.stl cannot be read as STL"):
        read(write(path, content.replace(b"vertex 2.0", b"vertex")))


def test_files_of_other_formats(tmp_path):
    """A suffix that the first bytes deny; a .bin took them for points."""
    kinds = {kind.rpartition(".")[2]: good_bytes(tmp_path, kind) for kind in CUT if kind != ".stl"}
    for kind, content in kinds.items():
        for suffix in ALL:
            if {kind, suffix[1:]} <= {"las", "laz"} or suffix[1:] == kind:
                continue
            known = ".las" if kind == "laz" else f".{kind}"
            with pytest.raises(InputError, match=f"^a{suffix} is a {known} file by its first"):
                read(write(tmp_path / f"a{suffix}", content + bytes(-len(content) % 16)))
    for suffix, begin in ((".ply", "ply"), (".glb", "glTF"), (".npy", "NUMPY"), (".las", "LASF")):
        with pytest.raises(InputError, match=f"a{suffix} begins with b'<html>.*{begin}"):
            read(write(tmp_path / f"a{suffix}", b"<html><body></body></html>"))


@pytest.mark.parametrize("suffix", ALL)
def test_garbage(tmp_path, suffix):
    # An odd number of bytes, as any multiple of 16 is a .bin file.
    noise = np.random.RandomState(3).bytes(801)
    for content in (noise, b"f 1 2 x\n" + noise, b"\0" * 801, b"hello world\n"):
        with pytest.raises(InputError, match="bad"):
            read(write(tmp_path / f"bad{suffix}", content))


@pytest.mark.parametrize("suffix", ALL)
def test_empty_and_missing(tmp_path, suffix):
    with pytest.raises(InputError, match="is empty: 0 bytes"):
        read(write(tmp_path / f"none{suffix}", b""))
    with pytest.raises(InputError, match="is missing, expected a file"):
        read(tmp_path / f"other{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(InputError, match="is a folder, expected a file"):
        read(tmp_path / f"folder{suffix}")


def test_unknown_format(tmp_path):
    with pytest.raises(
        InputError, match=r"x.xyz has the unknown format '.xyz', known are .las .laz"
    ):
        read(write(tmp_path / "x.xyz", b"1 2 3"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nend_header\n"),
        ("a.csv", b"x,y,z\n"),
        ("a.obj", b"# nothing\n"),
        ("a.stl", b"empty".ljust(84, b"\0")),
        (
            "a.pcd",
            pcd_bytes("binary").split(b"WIDTH")[0] + b"WIDTH 0\nHEIGHT 1\nPOINTS 0\nDATA binary\n",
        ),
    ],
)
def test_no_points(tmp_path, name, content):
    with pytest.raises(InputError, match=r"a\.\w+ has 0 (points|vertices|triangles)"):
        read(write(tmp_path / name, content))


def test_no_points_in_las_and_arrays(tmp_path):
    laspy.LasData(laspy.LasHeader(point_format=3, version="1.2")).write(str(tmp_path / "a.las"))
    np.save(tmp_path / "a.npy", np.zeros((0, 3)))
    np.savez(tmp_path / "a.npz", xyz=np.zeros((0, 3)))
    for name in ("a.las", "a.npy", "a.npz"):
        with pytest.raises(InputError, match=f"{name} has 0 points, expected at least 1"):
            read(tmp_path / name)


def test_non_finite_points(tmp_path):
    points = XYZ.copy()
    points[3, 0], points[7, 2] = np.nan, np.inf
    np.savez(tmp_path / "some.npz", xyz=points, rgb=RGB)
    got = read(tmp_path / "some.npz")
    keep = np.delete(np.arange(40), [3, 7])
    assert got.dropped == 2
    assert np.array_equal(got.points, XYZ[keep]) and np.array_equal(got.color, RGB[keep])
    np.save(tmp_path / "all.npy", np.full((5, 3), np.nan))
    with pytest.raises(InputError, match="all.npy: all 5 points have a non-finite coordinate"):
        read(tmp_path / "all.npy")


def test_non_finite_vertices(tmp_path):
    text = "v 0 0 0\nv 1 0 0\nv nan 0 0\nv 0 1 0\nv 1 1 1\nf 1 2 3\nf 1 2 4\nf 2 4 5\n"
    got = read(write(tmp_path / "some.obj", text.encode()))
    assert got.dropped == 1 and got.faces.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert np.isfinite(voxelize(got, "8grid").normal).all()
    with pytest.raises(InputError, match="all 1 triangles have a non-finite vertex"):
        read(write(tmp_path / "all.obj", b"v 0 0 0\nv inf 0 0\nv 0 1 0\nf 1 2 3\n"))


def test_bin_errors(tmp_path):
    path = write(tmp_path / "scan.bin", bytes(60))
    message = r"scan.bin has 60 bytes, no multiple of 16 \(4 float32 columns\); it fits columns 5"
    with pytest.raises(InputError, match=message):
        read(path)
    with pytest.raises(InputError, match="columns is 7, a .bin file has 4, 5 or 6"):
        read(path, columns=7)
    with pytest.raises(InputError, match="columns is 4, but a.npy is no .bin file"):
        read(write(tmp_path / "a.npy", b"x"), columns=4)


@pytest.mark.parametrize(
    "line, shown", [(b"f 1 2", "f 1 2"), (b"f 0 1 2", "f 0 1 2"), (b"v 1 x 3", "v 1 x 3")]
)
def test_obj_errors(tmp_path, line, shown):
    with pytest.raises(InputError, match=f"bad.obj, line 2 is '{shown}', expected"):
        read(write(tmp_path / "bad.obj", b"v 0 0 0\n" + line))


def test_obj_of_faces_without_their_vertices(tmp_path):
    for text, said in (
        ("f 1 2 3\n", "a.obj has 0 vertices, expected at least 1 line that begins with v"),
        ("v 0 0 0\nf 1 2 3\nf 1 1 4\n", "line 3 is 'f 1 1 4', the file has 1 vertices"),
        ("v 0 0 0\nf -1 -1 -2\nv 0 0 1", "line 2 is 'f -1 -1 -2', the file has 1 vertices before"),
    ):
        with pytest.raises(InputError, match=said):
            read(write(tmp_path / "a.obj", text.encode()))
    behind = "f 1 2 3\nv 0 0 0\nv 0 1 0\nv 1 0 0\n"
    assert read(write(tmp_path / "a.obj", behind.encode())).faces.tolist() == [[0, 1, 2]]


def test_obj_vertices_of_several_lengths(tmp_path):
    path = write(tmp_path / "a.obj", b"v 1 2 3\nv 4 5 6 1 0 0\n")
    assert read(path).points.tolist() == [[1, 2, 3], [4, 5, 6]] and read(path).color is None


def test_ply_of_quads(tmp_path):
    pytest.importorskip("trimesh")
    head = "ply\nformat ascii 1.0\nelement vertex 4\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz")
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    rows = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 3 0 1 2\n"
    path = write(tmp_path / "a.ply", (head + rows).encode())
    assert read(path).faces.tolist() == [[3, 0, 1], [3, 1, 2]]


def test_ply_without_an_axis(tmp_path):
    pytest.importorskip("trimesh")
    content = ply_bytes("ascii").replace(b"property float z\n", b"")
    with pytest.raises(InputError, match="a.ply has the fields x, y, nx.* expected x, y and z"):
        read(write(tmp_path / "a.ply", content))


@pytest.mark.parametrize(
    "field, values, sentence",
    [
        ("color", np.zeros((40, 4)), r"color has shape \[40, 4\], expected \[n, 3\]"),
        ("color", np.full((40, 3), "red"), "colours have dtype <U3, expected real numbers"),
        ("normal", np.zeros((40, 2)), r"normal has shape \[40, 2\], expected \[n, 3\]"),
        ("intensity", np.zeros((40, 5)), r"intensity has shape \[40, 5\], expected \[n\]"),
        ("intensity", np.array(1.0), r"intensity has shape \[\], expected \[n\]"),
        ("intensity", np.full(40, "much"), "intensity has dtype <U4, expected real numbers"),
        ("label", np.zeros((40, 1), int), r"label has shape \[40, 1\], expected \[n\]"),
    ],
)
def test_wrong_attributes(tmp_path, field, values, sentence):
    np.savez(tmp_path / "a.npz", xyz=XYZ, **{field: values})
    with pytest.raises(InputError, match=sentence):
        read(tmp_path / "a.npz")


def test_wrong_contents(tmp_path):
    content = ply_bytes("ascii", mesh=True).replace(b"3 0 1 2\n", b"3 0 1 8\n")
    with pytest.raises(InputError, match=r"faces name the vertices 0 to 8, the mesh has 4"):
        read(write(tmp_path / "a.ply", content))
    np.save(tmp_path / "a.npy", np.zeros((5, 2)))
    with pytest.raises(InputError, match=r"has shape \[5, 2\], expected \[n, 3 or more\]"):
        read(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((5, 3), dtype=complex))
    with pytest.raises(InputError, match="dtype complex128, expected"):
        read(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", foo=XYZ)
    with pytest.raises(InputError, match="has the arrays foo, expected one of xyz, points"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", xyz=XYZ, rgb=RGB[:9])
    with pytest.raises(InputError, match="color has 9 rows, the points have 40"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", xyz_cm=XYZ)
    with pytest.raises(InputError, match="xyz_cm has dtype float32, expected an integer"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "suffix, package",
    [(".las", "laspy"), (".laz", "lazrs"), (".ply", "trimesh.exchange.ply"), (".pcd", "pypcd4")]
    + [(".stl", "trimesh"), (".glb", "trimesh"), (".csv", "pandas")],
)
def test_missing_package(tmp_path, monkeypatch, suffix, package):
    if package == "lazrs":
        pytest.importorskip("laspy")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=r'files needs the package .*: pip install "voxgemm\[demo\]"'
    ):
        content = b"x" if suffix == ".csv" else good_bytes(tmp_path, suffix)
        read(write(tmp_path / f"a{suffix}", content))
