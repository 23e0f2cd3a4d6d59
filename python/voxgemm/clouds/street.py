# SPDX-License-Identifier: Apache-2.0
"""A simulated LiDAR sweep of a street: known geometry, any number of points, no file needed.

The sensor turns once at 1.8 m above the road, in whose frame the points are (x along the street, z
up). Rays are `[azimuths, beams]`; every object is tested against the azimuths it can cover only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .cloud import InputError, PointCloud

LABELS = ("road", "sidewalk", "car", "building", "pole", "tree", "pedestrian")
_ROAD, _SIDEWALK, _CAR, _BUILDING, _POLE, _TREE, _PEDESTRIAN = range(len(LABELS))
_REFLECTANCE = np.array([0.18, 0.30, 0.55, 0.40, 0.60, 0.25, 0.35])

_RANGE = 70.0
_NOISE = 0.02
_SENSOR_HEIGHT = 1.8
_KERB_Y, _KERB_HEIGHT = 9.0, 0.15
# z = _BEND * x^2 - _CROWN * y^2: the street rises by 1.2 m at 70 m, its gutters lie 16 cm lower.
_BEND, _CROWN = 1 / 4000, 1 / 500


@dataclass
class _Rays:
    direction: np.ndarray  # [azimuths, beams, 3], unit length
    distance: np.ndarray  # [azimuths, beams], of the nearest hit so far, inf without
    label: np.ndarray  # [azimuths, beams]
    foliage: np.ndarray  # [azimuths, beams], metres of leaves that this ray passes through

    def columns(self, x: float, y: float, radius: float) -> np.ndarray:
        """The azimuths that can meet an object within `radius` of (x, y)."""
        count = len(self.direction)
        away = np.hypot(x, y)
        if away <= radius:
            return np.arange(count)
        middle, half = np.arctan2(y, x), np.arcsin(radius / away)
        step = 2 * np.pi / count
        first, last = np.floor((middle - half) / step), np.ceil((middle + half) / step)
        # Both ends may meet where an object covers nearly the whole turn.
        return np.unique(np.arange(int(first), int(last) + 1) % count)

    def hit(self, columns: np.ndarray | slice, distance: np.ndarray, label: int) -> None:
        """Keeps the nearer of the hits so far and `distance`, NaN or inf where there is none."""
        nearer = distance < self.distance[columns]
        self.distance[columns] = np.where(nearer, distance, self.distance[columns])
        self.label[columns] = np.where(nearer, label, self.label[columns])


def _ground(x: float, y: float) -> float:
    kerb = _KERB_HEIGHT if abs(y) > _KERB_Y else 0.0
    return _BEND * x * x - _CROWN * y * y + kerb - _SENSOR_HEIGHT


def _cast_ground(rays: _Rays) -> None:
    dx, dy, dz = np.moveaxis(rays.direction, -1, 0)
    bend = _BEND * dx * dx - _CROWN * dy * dy
    for base, label in ((-_SENSOR_HEIGHT, _ROAD), (_KERB_HEIGHT - _SENSOR_HEIGHT, _SIDEWALK)):
        # bend t^2 - dz t + base = 0, in the form without cancellation; smallest positive root.
        root = np.sqrt(dz * dz - 4 * bend * base)
        roots = np.stack([2 * base / (dz - root), 2 * base / (dz + root)])
        distance = np.where(roots > 0, roots, np.inf).min(axis=0)
        on_walk = np.abs(distance * dy) > _KERB_Y
        rays.hit(slice(None), np.where(on_walk == (label == _SIDEWALK), distance, np.inf), label)
    kerb = _KERB_Y / np.abs(dy)
    rise = kerb * dz - (bend * kerb * kerb - _SENSOR_HEIGHT)
    rays.hit(slice(None), np.where((rise > 0) & (rise < _KERB_HEIGHT), kerb, np.inf), _SIDEWALK)


def _cast_box(rays: _Rays, center: np.ndarray, half: np.ndarray, yaw: float, label: int) -> None:
    columns = rays.columns(center[0], center[1], np.hypot(half[0], half[1]))
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])  # street to box
    direction = rays.direction[columns] @ turn.T
    origin = -turn @ center
    low, high = (-half - origin) / direction, (half - origin) / direction
    near = np.minimum(low, high).max(axis=-1)
    far = np.maximum(low, high).min(axis=-1)
    rays.hit(columns, np.where((near <= far) & (near > 0), near, np.inf), label)


def _cast_cylinder(rays: _Rays, foot: np.ndarray, radius: float, height: float, label: int) -> None:
    columns = rays.columns(foot[0], foot[1], radius)
    dx, dy, dz = np.moveaxis(rays.direction[columns], -1, 0)
    a, b = dx * dx + dy * dy, dx * foot[0] + dy * foot[1]
    root = b * b - a * (foot[0] ** 2 + foot[1] ** 2 - radius**2)
    distance = (b - np.sqrt(root)) / a  # NaN where the ray passes by
    z = distance * dz - foot[2]
    rays.hit(columns, np.where((z >= 0) & (z <= height) & (distance > 0), distance, np.inf), label)


def _cast_crown(rays: _Rays, center: np.ndarray, radius: float) -> None:
    columns = rays.columns(center[0], center[1], radius)
    along = rays.direction[columns] @ center
    half_chord = np.sqrt(along * along - (center @ center - radius**2))  # NaN: passes by
    depth = rays.foliage[columns]
    rays.hit(columns, np.where(depth < 2 * half_chord, along - half_chord + depth, np.inf), _TREE)


def _build(rays: _Rays, draw: np.random.RandomState) -> None:
    def foot(x: float, y: float) -> np.ndarray:
        return np.array([x, y, _ground(x, y)])

    def box(x: float, y: float, size: tuple[float, float, float], yaw: float, label: int) -> None:
        half = np.array(size) / 2
        _cast_box(rays, foot(x, y) + [0, 0, half[2]], half, yaw, label)

    for side in (-1, 1):
        for k in range(15):
            length, height, depth = draw.uniform([6, 6, 6], [8.5, 18, 12])
            front = draw.uniform(15, 20)
            y = side * (front + depth / 2)
            box(-65 + 9.3 * k, y, (length, depth, height), draw.uniform(-0.03, 0.03), _BUILDING)
        for k in range(40):
            thickness, height = draw.uniform([0.04, 2.5], [0.14, 8])
            at = foot(-68 + 3.4 * k + draw.uniform(-1, 1), side * draw.uniform(9.4, 10.2))
            _cast_cylinder(rays, at, thickness, height, _POLE)
        for k in range(8):
            at = foot(-60 + 17 * k + draw.uniform(-3, 3), side * draw.uniform(10.8, 12))
            trunk = draw.uniform(2.2, 3.2)
            _cast_cylinder(rays, at, draw.uniform(0.12, 0.3), trunk + 1, _TREE)
            crown = draw.uniform(1.2, 2.2)
            _cast_crown(rays, at + [0, 0, trunk + crown], crown)
        # 15 of 20 places at the kerb are taken, 15 cars drive, none where the sensor's own car is.
        places = draw.permutation(20)[:15]
        parked = [(-64 + 6.7 * k + draw.uniform(-0.6, 0.6), 7.8) for k in places]
        driving = [(x + draw.uniform(-3, 3), 1.9) for x in (-60, -48, -36, -24, 24, 36, 48, 60)]
        driving += [(x + draw.uniform(-3, 3), 5.2) for x in (-58, -42, -26, -10, 16, 32, 50)]
        for x, y in parked + driving:
            length, width, height = draw.uniform([3.9, 1.65, 1.4], [4.8, 1.9, 1.7])
            yaw = draw.uniform(-0.04, 0.04)
            box(x, side * y, (length, width, 0.55 * height), yaw, _CAR)
            box(x - 0.2, side * y, (0.55 * length, 0.88 * width, height), yaw, _CAR)
        for _ in range(8):
            at = foot(draw.uniform(-35, 35), side * draw.uniform(9.5, 14))
            _cast_cylinder(rays, at, draw.uniform(0.2, 0.3), draw.uniform(1.5, 1.9), _PEDESTRIAN)


def street(seed: int = 0, beams: int = 64, azimuths: int = 2048) -> PointCloud:
    """One turn of a 64-beam LiDAR (-24.8 to 2 degrees, 70 m, 2 cm range noise) in a street.

    beams are spread over the elevations, azimuths over the turn, at most 1,024 and 65,536; the seed
    draws noise and what stands in the street. Labels index LABELS. Coordinates are rounded to
    millimetres, which also hides the last-digit differences that sine and cosine have between
    machines.

    >>> clouds.street(beams=4, azimuths=16).points.shape[1]
    3

    Raises InputError: too many beams or azimuths.
    """
    if not (1 <= beams <= 1024 and 8 <= azimuths <= 1 << 16):
        raise InputError(
            f"street has {beams} beams and {azimuths} azimuths, expected 1..1024 and 8..65536"
        )
    # RandomState's streams are frozen, default_rng's may change between numpy versions.
    draw = np.random.RandomState(seed)
    shape = (azimuths, beams)
    foliage, noise = draw.exponential(1.5, shape), draw.normal(0, 1, shape)
    dropout, glint = draw.uniform(size=shape), draw.normal(0, 0.03, shape)

    azimuth = np.arange(azimuths)[:, None] * (2 * np.pi / azimuths)
    elevation = np.deg2rad(np.linspace(-24.8, 2.0, beams))[None, :]
    direction = np.stack(
        [
            np.cos(azimuth) * np.cos(elevation),
            np.sin(azimuth) * np.cos(elevation),
            np.broadcast_to(np.sin(elevation), shape),
        ],
        axis=-1,
    )
    rays = _Rays(direction, np.full(shape, np.inf), np.zeros(shape, np.uint8), foliage)
    with np.errstate(divide="ignore", invalid="ignore"):
        _cast_ground(rays)
        _build(rays, draw)

    # Real sweeps miss a few per cent of the returns.
    seen = (rays.distance < _RANGE) & (dropout > 0.02)
    distance, label = rays.distance[seen], rays.label[seen]
    points = direction[seen] * (distance + _NOISE * noise[seen])[:, None]
    intensity = _REFLECTANCE[label] * (1 - distance / (2 * _RANGE)) + glint[seen]
    return PointCloud(
        np.round(points, 3),
        intensity=np.clip(intensity, 0, 1).astype(np.float32),
        label=label,
        name="street",
    )
