# SPDX-License-Identifier: Apache-2.0
"""Reads point clouds and meshes; each format's library is imported when a file needs it."""

from __future__ import annotations

import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .cloud import InputError, Mesh, PointCloud, finite_cloud, finite_mesh, unit_color

_INTENSITY = ("intensity", "scalar_intensity", "reflectance", "reflectivity", "remission", "i")
_POINT_KEYS = ("xyz", "points", "xyz_cm", "pos", "positions", "coords", "vertices", "arr_0")
# The first bytes of a file, of formats that have such.
_BEGINS = {
    ".las": (b"LASF",),
    ".laz": (b"LASF",),
    ".ply": (b"ply\n", b"ply\r"),
    ".pcd": (b"# .PCD", b"VERSION"),
    ".glb": (b"glTF",),
    ".npy": (b"\x93NUMPY",),
    ".npz": (b"PK\x03\x04", b"PK\x05\x06"),
}


def read(path: str | os.PathLike[str], columns: int | None = None) -> PointCloud | Mesh:
    """The cloud or mesh in a file, chosen by its suffix; InputError for anything unusable.

    Order and values are the file's: float64 of what is stored, nothing merged or reordered.
    `columns` is the number of float32 per point of a .bin: 4 (default), 5 or 6.

    >>> import os, tempfile
    >>> import numpy as np
    >>> path = os.path.join(tempfile.mkdtemp(), "scan.bin")
    >>> np.zeros((2, 4), np.float32).tofile(path)
    >>> clouds.read(path).points.shape
    (2, 3)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}, expected a file")
    reader = _READERS.get(suffix)
    if reader is None:
        raise InputError(
            f"{path.name} has the unknown format {suffix or '(no suffix)'!r}, "
            f"known are {' '.join(_READERS)}"
        )
    if columns is not None and suffix != ".bin":
        raise InputError(f"columns is {columns}, but {path.name} is no .bin file")
    try:
        if not path.stat().st_size:
            raise InputError(f"{path.name} is empty: 0 bytes")
        _check_beginning(path, suffix)
        item = reader(path) if columns is None else _read_bin(path, columns)
        item.name = path.name
        return finite_mesh(item) if isinstance(item, Mesh) else finite_cloud(item)
    except InputError as error:
        if path.name in str(error):
            raise
        raise InputError(f"{path.name}: {error}") from error
    # A corrupt file makes the libraries raise almost anything, MemoryError for an absurd count too.
    except Exception as error:
        said = f"{path.name} cannot be read as {suffix[1:].upper()}, it may be cut off or damaged"
        raise InputError(f"{said}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _check_beginning(path: Path, suffix: str) -> None:
    """Refuses a file of another format than its name says, as far as the first bytes tell."""
    with open(path, "rb") as file:
        begin = file.read(8)
    if begin.startswith(_BEGINS.get(suffix, ())):
        return
    for other, begins in _BEGINS.items():
        if begin.startswith(begins):
            raise InputError(f"{path.name} is a {other} file by its first bytes, {begin!r}")
    if suffix in _BEGINS and suffix != ".pcd":  # which may begin with any comment
        raise InputError(f"{path.name} begins with {begin!r}, expected {_BEGINS[suffix][0]!r}")


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f'reading {what} needs the package {name}: pip install "voxgemm[demo]"'
        ) from error


def _column(table: Any, names: Any, wanted: tuple[str, ...]) -> np.ndarray | None:
    """The first column of `table` whose lower-case name is wanted, as one row of values."""
    by_name = {str(name).lower(): name for name in reversed(list(names))}
    found = next((by_name[w] for w in wanted if w in by_name), None)
    return None if found is None else np.asarray(table[found]).reshape(-1)


def _three(table: Any, names: Any, triples: tuple[tuple[str, ...], ...]) -> np.ndarray | None:
    for triple in triples:
        columns = [_column(table, names, (name,)) for name in triple]
        if all(c is not None for c in columns):
            return np.stack(columns, axis=1)
    return None


def _attributes(table: Any, names: Any) -> dict[str, Any]:
    """Colour, normal, intensity and label of a table with named columns, as far as present."""
    color = _three(
        table,
        names,
        (
            ("red", "green", "blue"),
            ("r", "g", "b"),
            ("diffuse_red", "diffuse_green", "diffuse_blue"),
        ),
    )
    return {
        "color": None if color is None else unit_color(color),
        "normal": _three(table, names, (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"))),
        "intensity": _column(table, names, _INTENSITY),
        "label": _column(table, names, ("label", "classification", "class")),
    }


def _points(table: Any, names: Any, what: str) -> np.ndarray:
    points = _three(table, names, (("x", "y", "z"),))
    if points is None:
        raise InputError(f"{what} has the fields {', '.join(map(str, names))}, expected x, y and z")
    return points


def _read_las(path: Path) -> PointCloud:
    laspy = _library("laspy", "LAS files")
    if path.suffix.lower() == ".laz":
        _library("lazrs", "LAZ files")
    las = laspy.read(path)
    if len(las.points) != las.header.point_count:
        raise InputError(
            f"{path.name} holds {len(las.points)} points, its header says {las.header.point_count}"
        )
    table = {"x": las.x, "y": las.y, "z": las.z}
    table |= {
        name: las[name] for name in las.point_format.dimension_names if name not in ("X", "Y", "Z")
    }
    return PointCloud(_points(table, table, path.name), **_attributes(table, table))


def _read_ply(path: Path) -> PointCloud | Mesh:
    ply = _library("trimesh.exchange.ply", "PLY files")
    raw = path.read_bytes()
    rows, names = _ply_header(raw, path.name)
    said = f"{path.name} holds other data than the {rows} of its header, it may be cut off"
    try:
        loaded = ply.load_ply(io.BytesIO(raw), fix_texture=False, skip_materials=True)
        # trimesh keeps every property of every element, also those without a meaning to it, here.
        vertex = loaded["metadata"]["_ply_raw"]["vertex"]
        data = {name: np.asarray(vertex["data"][name]) for name in names}
    except Exception as error:
        raise InputError(f"{said}: {_reason(error)}") from error
    points = _points(data, names, path.name)
    # An ascii row that ends early leaves columns without a number.
    if len(points) != vertex["length"] or any(column.dtype == object for column in data.values()):
        raise InputError(said)
    attributes = _attributes(data, names)
    if loaded.get("faces") is None:
        return PointCloud(points, **attributes)
    faces = np.asarray(loaded["faces"])
    if faces.ndim == 2 and faces.shape[1] > 3:
        fans = [faces[:, [0, k, k + 1]] for k in range(1, faces.shape[1] - 1)]
        faces = np.stack(fans, axis=1).reshape(-1, 3)
    return Mesh(points, faces, attributes["color"], attributes["normal"])


def _ply_header(raw: bytes, name: str) -> tuple[str, list[str]]:
    """What the header says: "40 vertex, 12 face", and the names of a vertex's numbers."""
    header, end, _ = raw.partition(b"end_header")
    if not end:
        raise InputError(f"{name} has no line end_header: its header is cut off")
    rows: dict[str, str] = {}
    names = []
    for line in header.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["element"] and len(words) == 3:
            rows[words[1]] = words[2]
        elif words[:1] == ["property"] and [*rows][-1:] == ["vertex"] and words[1] != "list":
            names.append(words[-1])
    if rows.get("vertex", "0") == "0":
        raise InputError(f"{name} has 0 points, expected at least 1")
    _points(dict.fromkeys(names, 0), names, name)
    return ", ".join(f"{count} {element}" for element, count in rows.items()), names


def _read_pcd(path: Path) -> PointCloud:
    pypcd4 = _library("pypcd4", "PCD files")
    raw = path.read_bytes()
    if not re.search(rb"^DATA (ascii|binary|binary_compressed)\s*$", raw, re.M):
        raise InputError(
            f"{path.name} has no line DATA: it is cut off in its header, or no PCD file"
        )
    start = raw.find(b"\nDATA ascii")
    if start >= 0:
        # pypcd4 splits ascii rows at every single blank: leave one between two values.
        start = raw.find(b"\n", start + 1) + 1
        rows = (b" ".join(line.split()) for line in raw[start:].splitlines())
        raw = raw[:start] + b"\n".join(row for row in rows if row)
    cloud = pypcd4.PointCloud.from_fileobj(io.BytesIO(raw))
    data = np.atleast_1d(cloud.pc_data)
    if len(data) != cloud.metadata.points:
        raise InputError(
            f"{path.name} holds {len(data)} points, its header says {cloud.metadata.points}"
        )
    names = data.dtype.names
    attributes = _attributes(data, names)
    packed = _column(data, names, ("rgb", "rgba"))
    if packed is not None and packed.dtype.itemsize == 4:
        bits = np.ascontiguousarray(packed).view(np.uint32)  # 0xAARRGGBB, whatever TYPE says
        attributes["color"] = np.stack([bits >> 16, bits >> 8, bits], axis=1).astype(np.uint8)
    return PointCloud(_points(data, names, path.name), **attributes)


def _read_obj(path: Path) -> PointCloud | Mesh:
    """Own parser: trimesh splits vertices where their normal, texture or material differs."""
    vertices: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    furthest = (0, 0, b"")  # the largest index with its line
    text = path.read_bytes().replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")
    for number, line in enumerate(text.splitlines(), 1):
        key, *values = line.split() or [b""]
        try:
            if key == b"v":
                if len(values) < 3:
                    raise ValueError
                vertices.append([float(value) for value in values])
            elif key == b"f":
                corners = [int(value.split(b"/")[0]) for value in values]
                if len(corners) < 3 or 0 in corners:
                    raise ValueError
                if min(corners) < -len(vertices):
                    raise InputError(
                        f"{path.name}, line {number} is {_shown(line)!r}, the file has "
                        f"{len(vertices)} vertices before it"
                    )
                furthest = max(furthest, (max(corners), -number, line))
                # Indices start at 1; a negative one counts back from the vertices so far.
                a, *rest = (i - 1 if i > 0 else len(vertices) + i for i in corners)
                faces.extend((a, b, c) for b, c in zip(rest[:-1], rest[1:], strict=True))
        except InputError:
            raise
        except ValueError:
            expected = "at least 3 indices from 1" if key == b"f" else "3 numbers"
            raise InputError(
                f"{path.name}, line {number} is {_shown(line)!r}, expected {expected}"
            ) from None
    if not vertices:
        raise InputError(f"{path.name} has 0 vertices, expected at least 1 line that begins with v")
    if furthest[0] > len(vertices):
        raise InputError(
            f"{path.name}, line {-furthest[1]} is {_shown(furthest[2])!r}, the file has "
            f"{len(vertices)} vertices"
        )
    columns = min(map(len, vertices))
    table = np.array([vertex[:columns] for vertex in vertices])
    color = unit_color(table[:, 3:6]) if table.shape[1] >= 6 else None
    if not faces:
        return PointCloud(table[:, :3], color)
    return Mesh(table[:, :3], np.array(faces), color)


def _shown(line: bytes) -> str:
    return line.decode("utf-8", "replace").strip()[:60]


def _check_stl(path: Path) -> None:
    """Binary files have the triangles of their header, text ends: trimesh takes others for text."""
    raw = path.read_bytes()
    count = int.from_bytes(raw[80:84], "little")
    end = 84 + 50 * count
    if len(raw) >= 84 and len(raw) == end:
        return
    if raw.lstrip()[:5].lower() != b"solid" or b"\0" in raw:
        header = f"the {count} triangles of its header end at byte {end}"
        expected = header if len(raw) >= 84 else "expected 'solid' or 84 bytes and more"
        raise InputError(f"{path.name} has {len(raw)} bytes, {expected}")
    last = raw.rstrip().splitlines()[-1]
    if last.split()[0].lower() != b"endsolid":
        raise InputError(
            f"{path.name} is cut off: its last line is {_shown(last)!r}, expected endsolid"
        )


def _check_glb(path: Path) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(12)[8:], "little")
    if path.stat().st_size < max(length, 12):
        raise InputError(
            f"{path.name} has {path.stat().st_size} bytes, its header says {max(length, 12)}"
        )


def _read_scene(path: Path) -> PointCloud | Mesh:
    """STL and GLB: every mesh of the scene, placed by its transform, in the file's order."""
    suffix = path.suffix.lower()
    trimesh = _library("trimesh", f"{suffix[1:].upper()} files")
    (_check_stl if suffix == ".stl" else _check_glb)(path)
    scene = trimesh.load(path, process=False, force="scene", skip_materials=True)
    vertices, faces, colors, points, count = [], [], [], [], 0
    # The graph is walked from its last node on: sort the parts as the file's meshes are.
    position = {name: k for k, name in enumerate(scene.geometry)}
    nodes = [scene.graph[node] for node in scene.graph.nodes_geometry]
    for transform, name in sorted(nodes, key=lambda node: position[node[1]]):
        part = scene.geometry[name]
        placed = np.asarray(part.vertices, dtype=np.float64)
        if not np.array_equal(transform, np.eye(4)):
            placed = placed @ transform[:3, :3].T + transform[:3, 3]
        if len(getattr(part, "faces", ())):
            vertices.append(placed)
            faces.append(np.asarray(part.faces, dtype=np.int64) + count)
            count += len(placed)
            if getattr(part.visual, "kind", None) == "vertex":
                colors.append(np.asarray(part.visual.vertex_colors)[:, :3])
        else:
            points.append(placed)
    if faces:
        color = np.concatenate(colors) if len(colors) == len(faces) else None
        return Mesh(np.concatenate(vertices), np.concatenate(faces), color)
    if not points:
        raise InputError(f"{path.name} has 0 triangles and 0 points, expected at least 1")
    return PointCloud(np.concatenate(points))


def _read_bin(path: Path, columns: int = 4) -> PointCloud:
    if columns not in (4, 5, 6):
        raise InputError(f"columns is {columns}, a .bin file has 4, 5 or 6 float32 per point")
    size, row = path.stat().st_size, 4 * columns
    if size % row:
        fits = [str(c) for c in (4, 5, 6) if size % (4 * c) == 0]
        hint = f"; it fits columns {' or '.join(fits)}" if fits else ""
        raise InputError(
            f"{path.name} has {size} bytes, no multiple of {row} ({columns} float32 columns){hint}"
        )
    table = np.fromfile(path, dtype="<f4").reshape(-1, columns)
    return PointCloud(table[:, :3], intensity=table[:, 3].copy())


def _read_npy(path: Path) -> PointCloud:
    table = np.load(path, allow_pickle=False)
    if table.ndim != 2 or table.shape[1] < 3:
        raise InputError(f"{path.name} has shape {list(table.shape)}, expected [n, 3 or more]")
    # The usual orders: x y z intensity [...] and x y z r g b.
    columns = table.shape[1]
    return PointCloud(
        table[:, :3],
        color=unit_color(table[:, 3:6]) if columns == 6 else None,
        intensity=table[:, 3].copy() if columns in (4, 5) else None,
    )


def _read_npz(path: Path) -> PointCloud:
    with np.load(path, allow_pickle=False) as archive:
        key = next((k for k in _POINT_KEYS if k in archive.files), None)
        if key is None:
            raise InputError(
                f"{path.name} has the arrays {', '.join(archive.files) or '(none)'}, "
                f"expected one of {', '.join(_POINT_KEYS)}"
            )
        points = archive[key]

        def first(*names: str) -> np.ndarray | None:
            return next((archive[name] for name in names if name in archive.files), None)

        color = first("rgb", "color", "colors")
        cloud = PointCloud(
            points,
            None if color is None else unit_color(color),
            first("normal", "normals"),
            first("intensity"),
            first("label", "labels"),
        )
    if key == "xyz_cm":
        if points.dtype.kind not in "iu":
            raise InputError(f"{path.name}: xyz_cm has dtype {points.dtype}, expected an integer")
        # Integer centimetres become metres, as every other cloud of a sensor is.
        cloud.points, cloud.ticks, cloud.ticks_per_unit = points / 100, points.astype(np.int64), 100
    return cloud


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_csv(path: Path) -> PointCloud:
    pandas = _library("pandas", "CSV files")
    # Before 3.1 the default may miss the nearest float64; from 3.1 on it does not, and warns.
    old = tuple(int(part) for part in pandas.__version__.split(".")[:2]) < (3, 1)
    with open(path, encoding="utf-8-sig") as file:
        start, first = 0, file.readline()
        while first and not first.strip():
            start, first = file.tell(), file.readline()
        # Behind "#" or "//" stand the names of the columns.
        names = first.lstrip("#/ ")
        separator = next((s for s in ",;\t" if s in names), r"\s+")
        cells = names.split() if separator == r"\s+" else names.split(separator)
        file.seek(start)
        file.read(len(first) - len(names))
        table = pandas.read_csv(
            file,
            sep=separator,
            header=None if all(map(_is_number, cells)) else 0,
            index_col=False,
            float_precision="round_trip" if old else None,
        )
    table.columns = [str(name).strip().lower() for name in table.columns]
    names = list(table.columns)
    if {"x", "y", "z"} <= set(names):
        points = np.stack([pandas.to_numeric(table[axis]) for axis in "xyz"], axis=1)
    else:
        numeric = table.select_dtypes("number")
        if numeric.shape[1] < 3:
            raise InputError(
                f"{path.name} has {numeric.shape[1]} numeric columns, expected x, y, z or 3 of them"
            )
        points = numeric.iloc[:, :3].to_numpy()
    return PointCloud(points, **_attributes(table, names))


_READERS = {
    ".las": _read_las,
    ".laz": _read_las,
    ".ply": _read_ply,
    ".pcd": _read_pcd,
    ".obj": _read_obj,
    ".stl": _read_scene,
    ".glb": _read_scene,
    ".bin": _read_bin,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".csv": _read_csv,
}
