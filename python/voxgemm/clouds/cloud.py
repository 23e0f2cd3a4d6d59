# SPDX-License-Identifier: Apache-2.0
"""Point clouds and meshes in memory, and the one exception for input that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


class InputError(ValueError):
    """A file, option or cloud that cannot be used; the message is one sentence with both values.

    >>> from voxgemm import clouds
    >>> try:
    ...     clouds.cloud("cube:8")
    ... except clouds.InputError as error:
    ...     print(str(error)[:15])
    cloud is 'cube:
    """


@dataclass
class PointCloud:
    """Points and what each of them has.

    >>> import numpy as np
    >>> from voxgemm import clouds
    >>> clouds.voxelize(clouds.PointCloud(np.eye(3)), 0.5).coords.tolist()
    [[0, 0, 2], [0, 2, 0], [2, 0, 0]]
    """

    points: np.ndarray  # [n, 3] float64, in the file's unit
    color: np.ndarray | None = None  # [n, 3] uint8 of 0..255 or float of 0..1
    normal: np.ndarray | None = None  # [n, 3]
    intensity: np.ndarray | None = None  # [n]
    label: np.ndarray | None = None  # [n] integer class
    name: str = ""
    dropped: int = 0  # points of the file that had a non-finite coordinate
    # Coordinates stored as integers keep exact voxel borders: points = ticks / ticks_per_unit.
    ticks: np.ndarray | None = None  # [n, 3] int64
    ticks_per_unit: int = 1


@dataclass
class Mesh:
    """Triangles.

    >>> import numpy as np
    >>> from voxgemm import clouds
    >>> mesh = clouds.Mesh(np.eye(3), np.array([[0, 1, 2]]))
    >>> clouds.voxelize(mesh, "8grid").coords.shape[1]
    3
    """

    vertices: np.ndarray  # [n, 3] float64, in file order
    faces: np.ndarray  # [m, 3] int64, in file order
    color: np.ndarray | None = None  # [n, 3] uint8 of 0..255 or float of 0..1
    normal: np.ndarray | None = None  # [n, 3]
    name: str = ""
    dropped: int = 0  # vertices of the file that had a non-finite coordinate


def unit_color(color: np.ndarray) -> np.ndarray:
    """Colours as uint8 or as float32 of 0..1, from 8-bit, 16-bit or float values."""
    color = np.asarray(color)
    if color.dtype.kind not in "fiub":
        raise InputError(f"colours have dtype {color.dtype}, expected real numbers")
    if color.dtype == np.uint8:
        return color
    top = np.nanmax(color, initial=0)
    if color.dtype.kind in "iu":
        # 16-bit fields often hold 8-bit values: the largest one tells them apart.
        return (color if top <= 255 else color >> 8).clip(0, 255).astype(np.uint8)
    return (color if top <= 1 else color / 255).astype(np.float32)


def _rows(array: np.ndarray, what: str, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "fiu":
        raise InputError(
            f"{name}: {what} have shape {list(array.shape)} and dtype {array.dtype}, "
            "expected [n, 3] real numbers"
        )
    return np.ascontiguousarray(array, dtype=np.float64)


def _check_fields(item: PointCloud | Mesh, rows: int) -> None:
    fields = {"color": [3], "normal": [3], "intensity": [], "label": [], "ticks": [3]}
    for field, columns in fields.items():
        values = getattr(item, field, None)
        if values is None:
            continue
        shape = list(np.shape(values))
        if shape[1:] != columns and not (field == "intensity" and shape[1:] == [1]) or not shape:
            expected = ", ".join(map(str, ["n", *columns]))
            raise InputError(f"{item.name}: {field} has shape {shape}, expected [{expected}]")
        if shape[0] != rows:
            raise InputError(f"{item.name}: {field} has {shape[0]} rows, the points have {rows}")
        kind = np.asarray(values).dtype
        if field != "label" and kind.kind not in "fiu":
            raise InputError(f"{item.name}: {field} has dtype {kind}, expected real numbers")


def finite_cloud(cloud: PointCloud) -> PointCloud:
    """Checks shapes and drops the points with a non-finite coordinate."""
    points = _rows(cloud.points, "points", cloud.name)
    if not len(points):
        raise InputError(f"{cloud.name} has 0 points, expected at least 1")
    _check_fields(cloud, len(points))
    keep = np.isfinite(points).all(axis=1)
    dropped = len(points) - int(np.count_nonzero(keep))
    if dropped == len(points):
        raise InputError(f"{cloud.name}: all {dropped} points have a non-finite coordinate")
    if not dropped:
        return replace(cloud, points=points)
    fields = ("color", "normal", "intensity", "label", "ticks")
    kept = {f: getattr(cloud, f)[keep] for f in fields if getattr(cloud, f) is not None}
    return replace(cloud, points=points[keep], dropped=dropped, **kept)


def finite_mesh(mesh: Mesh) -> Mesh:
    """Checks shapes and indices; drops vertices with a non-finite coordinate, and their faces."""
    vertices = _rows(mesh.vertices, "vertices", mesh.name)
    faces = _rows(mesh.faces, "faces", mesh.name).astype(np.int64)
    if not len(faces):
        raise InputError(f"{mesh.name} has 0 triangles, expected at least 1")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError(
            f"{mesh.name}: faces name the vertices {faces.min()} to {faces.max()}, "
            f"the mesh has {len(vertices)} (0 to {len(vertices) - 1})"
        )
    _check_fields(mesh, len(vertices))
    keep = np.isfinite(vertices).all(axis=1)
    if keep.all():
        return replace(mesh, vertices=vertices, faces=faces)
    faces = faces[keep[faces].all(axis=1)]
    if not len(faces):
        raise InputError(f"{mesh.name}: all {len(mesh.faces)} triangles have a non-finite vertex")
    kept = {f: getattr(mesh, f)[keep] for f in ("color", "normal") if getattr(mesh, f) is not None}
    number = np.cumsum(keep) - 1
    dropped = int(np.count_nonzero(~keep))
    return replace(mesh, vertices=vertices[keep], faces=number[faces], dropped=dropped, **kept)
