# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: input, target, prediction and error from one viewpoint, loss and times.

Voxels are drawn by projection along one direction (no perspective) into a depth buffer, so the
drawn box with its ticks is to scale and any number of voxels takes a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure

from .clouds import InputError

_DPI = 110
_WIDTH = 15.0  # inches
_PANEL = 4.75  # inches
# Twice what the panel shows, so that reducing it smooths the voxels' edges.
_PIXELS = int(2 * _PANEL * _DPI)
# Voxels below this would leave a scan a mist; above the other the stamp loop takes seconds, unless
# they are few: then no more than so many pixels in all are stamped.
_MIN_STAMP, _MAX_STAMP, _STAMPED = 3, 40, 10_000_000
_GREY = 0.86  # where there is no value


class View(NamedTuple):
    """Where a cloud is seen from; `right`, `up` and `near` are unit vectors."""

    vertical: int  # the axis that points up or down in the picture
    right: np.ndarray
    up: np.ndarray
    near: np.ndarray  # towards the viewer


@dataclass
class Panel:
    title: str
    values: np.ndarray  # [n] scalars (NaN is drawn grey) or classes, or [n, 3] colours of 0..1
    colormap: str = "viridis"
    limits: tuple[float, float] | None = None
    bar: str = ""  # label of the colour bar, or what stands in its place for colours
    classes: tuple[str, ...] = ()


@dataclass
class Picture:
    title: str
    points: np.ndarray  # [n, 3] centres of the voxels, in `unit`
    size: float  # edge of a voxel
    unit: str
    view: View
    panels: list[Panel]  # input, target, prediction, error
    losses: list[float]
    loss_title: str
    times: dict[str, float]  # ms a step, by part
    notes: list[str] = field(default_factory=list)


def view(points: np.ndarray, upward: np.ndarray) -> View:
    """From above and aside, the longer horizontal axis across the picture.

    Where y points down (a depth camera's frame, z forward) from near the camera, which saw no more.
    """
    x, y, z = np.eye(3)
    elevation, azimuth = 30, -65
    if upward[1] < 0:
        floor, elevation, azimuth = (x, z), 20, -75
    else:
        floor = (z, x) if upward[1] > 0 else (x, y)
        extent = np.ptp(points, axis=0)
        if extent @ floor[1] > 1.3 * extent @ floor[0]:
            azimuth = 25
        if extent @ np.abs(upward) < 0.3 * extent.max():
            elevation = 50  # a flat scene has little to show from the side
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    near = np.cos(e) * (np.cos(a) * floor[0] + np.sin(a) * floor[1]) + np.sin(e) * upward
    right = np.cross(upward, near) / np.cos(e)
    return View(int(np.abs(upward).argmax()), right, np.cross(near, right), near)


def _shown_box(points: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """The box of nearly all points: a few far returns would shrink all else to a spot."""
    low, high = np.quantile(points, [0.03, 0.97], axis=0)
    margin = 0.12 * (high - low)
    low = np.maximum(low - margin, points.min(axis=0)) - size / 2
    return low, np.minimum(high + margin, points.max(axis=0)) + size / 2


def _corners(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    bits = np.arange(8)[:, None] >> np.arange(3) & 1
    return np.where(bits, high, low)  # [8, 3]; bit k of a corner's number: high in axis k


class _Raster:
    """Which voxel each pixel shows, and how bright."""

    def __init__(self, picture: Picture):
        seen = picture.view
        self.low, self.high = _shown_box(picture.points, picture.size)
        frame = np.stack([seen.right, seen.up], axis=1)
        flat = _corners(self.low, self.high) @ frame
        first, last = flat.min(axis=0), flat.max(axis=0)
        self.extent = (first[0], last[0], first[1], last[1])
        # Room for the numbers along the edges.
        wide = last[0] - first[0]
        self.frame = (first[0] - 0.09 * wide, last[0] + 0.06 * wide)
        self.frame += (first[1] - 0.08 * wide, last[1] + 0.01 * wide)
        scale = _PIXELS / (last - first).max()
        inside = ((picture.points > self.low) & (picture.points < self.high)).all(axis=1)
        rows = np.flatnonzero(inside)
        depth = picture.points[rows] @ seen.near
        order = np.argsort(depth, kind="stable")  # far to near
        rows, depth = rows[order], depth[order].astype(np.float32)
        # A cube seen from a corner is wider than its edge.
        most = max(_MAX_STAMP, int((_STAMPED / max(len(rows), 1)) ** 0.5))
        stamp = int(np.clip(round(1.15 * scale * picture.size), _MIN_STAMP, most))
        place = ((picture.points[rows] @ frame - first) * scale - (stamp - 1) / 2).astype(np.int64)
        width, height = (np.ceil((last - first) * scale).astype(int) + stamp).tolist()
        self.row = np.full((height, width), -1, dtype=np.int64)
        nearest = np.full((height, width), -np.inf, dtype=np.float32)
        for dy in range(stamp):
            for dx in range(stamp):
                at = (
                    np.clip(place[:, 1] + dy, 0, height - 1),
                    np.clip(place[:, 0] + dx, 0, width - 1),
                )
                front = depth > nearest[at]
                at = (at[0][front], at[1][front])
                # Of equal places the last assignment stays, which is the nearest voxel.
                nearest[at] = depth[front]
                self.row[at] = rows[front]
        self.shade = _shade(nearest, reach=max(2, stamp), unit=(self.high - self.low).max())

    def image(self, colors: np.ndarray) -> np.ndarray:
        """[height, width, 4] for colours [n, 3] of the voxels."""
        image = np.zeros((*self.row.shape, 4), dtype=np.float32)
        image[..., :3] = colors[self.row] * self.shade[..., None]
        image[..., 3] = self.row >= 0
        return image


def _shade(nearest: np.ndarray, reach: int, unit: float) -> np.ndarray:
    """Darkens pixels beside nearer ones, which draws edges and gives a scan its depth."""
    ahead = np.zeros_like(nearest)
    finite = np.where(np.isfinite(nearest), nearest, np.nan)
    for axis in (0, 1):
        for shift in (-reach, reach):
            step = np.roll(finite, shift, axis=axis) - finite
            ahead += np.nan_to_num(np.clip(step, 0, 0.05 * unit))
    return np.maximum(0.55, np.exp(-12 * ahead / unit))


def limits(values: np.ndarray) -> tuple[float, float]:
    """What a colour bar should span: nearly all values, as a few far ones would dull all others."""
    low, high = np.nanquantile(values, [0.01, 0.99])
    if high - low < 1e-6 * max(abs(low), 1):  # one value: in the middle
        return float(low) - 0.5, float(low) + 0.5
    return float(low), float(high)


def _colors(panel: Panel) -> tuple[np.ndarray, ScalarMappable | None]:
    """[n, 3] colours, and what a colour bar needs."""
    if panel.values.ndim == 2:
        return np.clip(panel.values, 0, 1), None
    if panel.classes:
        count = len(panel.classes)
        base = matplotlib.colormaps["tab10" if count <= 10 else "gist_ncar"]
        shades = base(np.arange(count) if count <= 10 else np.linspace(0.05, 0.95, count))
        norm = BoundaryNorm(np.arange(count + 1) - 0.5, count)
        mappable = ScalarMappable(norm, ListedColormap(shades))
    else:
        colormap = matplotlib.colormaps[panel.colormap].with_extremes(bad=(_GREY,) * 3)
        mappable = ScalarMappable(Normalize(*(panel.limits or limits(panel.values))), colormap)
    return mappable.to_rgba(np.ma.masked_invalid(panel.values))[:, :3], mappable


def _draw_box(axes: Axes, picture: Picture, raster: _Raster) -> None:
    """The box's far edges, and ticks with numbers along one edge of each axis."""
    seen = picture.view
    corners = _corners(raster.low, raster.high)
    flat, depth = corners @ np.stack([seen.right, seen.up], axis=1), corners @ seen.near
    center = flat.mean(axis=0)
    for axis in range(3):
        starts = np.flatnonzero(~np.arange(8) >> axis & 1)
        edges = np.stack([starts, starts | 1 << axis], axis=1)  # [4, 2] corners
        middles, depths = flat[edges].mean(axis=1), depth[edges].mean(axis=1)
        for edge in edges[depths < depths.max()]:
            axes.plot(*flat[edge].T, color="0.75", lw=0.7, zorder=-1)
        # The vertical axis at the left, the others below, at the viewer's side.
        left = np.argmin(middles[:, 0])
        chosen = left if axis == seen.vertical else np.argmin(middles[:, 1])
        axes.plot(*flat[edges[chosen]].T, color="0.35", lw=0.9, zorder=-1)
        _draw_ticks(axes, axis, picture.unit, (corners[edges[chosen]], flat[edges[chosen]], center))


def _draw_ticks(
    axes: Axes, axis: int, unit: str, edge: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """`edge`: its two ends in space and in the picture, and the picture's centre."""
    (start, end), (flat_start, flat_end), center = edge
    along = flat_end - flat_start
    outward = np.array([along[1], -along[0]]) / max(np.hypot(*along), 1e-300)
    if outward @ ((flat_start + flat_end) / 2 - center) < 0:
        outward = -outward
    span = np.ptp(axes.get_xlim())
    # Room for a number every 45 points or so.
    count = int(np.clip(np.hypot(*along) / span * 8, 1, 6))
    align = {"ha": "right" if outward[0] < -0.2 else "left" if outward[0] > 0.2 else "center"}
    align["va"] = "top" if outward[1] < -0.5 else "center"
    values = ticker.MaxNLocator(count).tick_values(start[axis], end[axis])
    values = [value for value in values if start[axis] <= value <= end[axis]]
    if np.hypot(*along) < 0.08 * span:
        values = values[-1:]  # two numbers would not fit
    # Survey coordinates have too many digits: they are numbered from a round number on.
    reach = end[axis] - start[axis]
    unit_step = 10.0 ** np.ceil(np.log10(reach))
    base = np.floor(start[axis] / unit_step) * unit_step if abs(start[axis]) > 50 * reach else 0.0
    for value in values:
        foot = flat_start + (value - start[axis]) / (end[axis] - start[axis]) * along
        tip = foot + 0.012 * span * outward
        axes.plot(*np.stack([foot, tip]).T, color="0.35", lw=0.8, clip_on=False)
        axes.text(
            *(tip + 0.008 * span * outward), f"{value - base:g}", fontsize=7, color="0.25", **align
        )
    # Past the numbers, which are as long as they are written.
    longest = max((len(f"{value - base:g}") for value in values), default=0)
    past = 0.06 + 0.011 * longest * abs(outward[0])
    name = flat_start + along / 2 + past * span * outward
    label = f"{'xyz'[axis]}{f' - {base:,.0f}' if base else ''} [{unit}]"
    turn = np.rad2deg(np.arctan2(along[1], along[0]))
    turn = (turn + 90) % 180 - 90
    axes.text(*name, label, fontsize=8, rotation=turn, ha="center", va="center")


def _draw_cloud(figure: Figure, axes: Axes, picture: Picture, work: tuple[_Raster, Panel]) -> None:
    raster, panel = work
    colors, mappable = _colors(panel)
    left, right, bottom, top = raster.frame
    axes.set_axis_off()
    axes.imshow(
        raster.image(colors), origin="lower", extent=raster.extent, interpolation="antialiased"
    )
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    _draw_box(axes, picture, raster)
    axes.set_title(panel.title, fontsize=10, pad=10)
    box = axes.get_position()
    strip = (box.x0 + 0.15 * box.width, box.y0 - 0.25 / figure.get_figheight())
    if mappable is None:
        figure.text(box.x0 + box.width / 2, strip[1], panel.bar, fontsize=8, ha="center")
        return
    place = figure.add_axes((*strip, 0.7 * box.width, 0.1 / figure.get_figheight()))
    bar = figure.colorbar(mappable, cax=place, orientation="horizontal")
    bar.ax.tick_params(labelsize=7)
    bar.set_label(panel.bar, fontsize=8)
    if panel.classes:
        bar.set_ticks(np.arange(len(panel.classes)), labels=panel.classes)
        bar.ax.tick_params(length=0, labelsize=7 if len(panel.classes) < 9 else 5)


def _draw_loss(axes: Axes, picture: Picture) -> None:
    axes.plot(np.arange(len(picture.losses)), picture.losses, color="tab:blue")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(picture.loss_title, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_title(f"loss: {picture.losses[0]:.3f} to {picture.losses[-1]:.3f}", fontsize=10)


def _draw_times(axes: Axes, picture: Picture) -> None:
    names, values = list(picture.times), list(picture.times.values())
    bars = axes.barh(names, values, color="tab:gray", height=0.6)
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("median ms a step", fontsize=8)
    axes.set_title(f"one step: {sum(values):.0f} ms", fontsize=10)


def draw(picture: Picture, path: str) -> None:
    """Writes the picture; the path's suffix chooses the format."""
    raster = _Raster(picture)
    left, right, bottom, top = raster.frame
    panel = float(np.clip(_PANEL * (top - bottom) / (right - left), 2.2, 4.4))  # inches high
    row = panel + 1.3
    height = 0.65 + 2 * row
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    gap = (_WIDTH - 3 * _PANEL) / 4

    def place(column: int, line: int, inset: float = 0.0) -> tuple[float, float, float, float]:
        x = gap + column * (_PANEL + gap) + inset
        y = height - 0.65 - (line + 1) * row + 0.9
        return (x / _WIDTH, y / height, (_PANEL - inset) / _WIDTH, panel / height)

    for number, shown in enumerate(picture.panels):
        axes = figure.add_axes(place(number % 3, number // 3))
        _draw_cloud(figure, axes, picture, (raster, shown))
    for column, plot in ((1, _draw_loss), (2, _draw_times)):
        axes = figure.add_axes(place(column, 1, inset=0.6))
        axes.tick_params(labelsize=8)
        plot(axes, picture)
    x, y, _, _ = place(1, 1)
    figure.text(x + 0.6 / _WIDTH, y - 0.5 / height, "\n".join(picture.notes), fontsize=8, va="top")
    figure.suptitle(picture.title, fontsize=13, y=1 - 0.2 / height)
    figure.savefig(path)


def check_suffix(path: str) -> None:
    """Raises InputError unless a picture of this name can be written."""
    suffix = Path(path).suffix.lstrip(".").lower()
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if suffix not in known:
        raise InputError(
            f"picture {path!r} has the suffix {suffix!r}, expected one of {', '.join(known)}"
        )
