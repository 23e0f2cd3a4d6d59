# SPDX-License-Identifier: Apache-2.0
"""What the demo's network learns: chosen by what a cloud has, and learnable from one cloud."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch.nn import functional as F

from .clouds import InputError, Mesh, PointCloud, Voxels
from .clouds.street import LABELS as STREET_LABELS

# In the order of preference.
NAMES = ("color", "label", "intensity", "normal", "height")
# Share of the voxels whose value the network must fill in: few enough stay to need the neighbours.
_HIDDEN = 0.9
# Columns: brightness, red less blue, green less the other two.
_OPPONENT = torch.tensor([[1.0, 1.0, -0.5], [1.0, 0.0, 1.0], [1.0, -1.0, -0.5]])
# Above this, numbers called labels are instances or measurements, not classes.
_MAX_CLASSES = 40


@dataclass
class Task:
    """One number or vector per voxel to predict; `loss` and `error` are a subclass's."""

    name: str
    sentence: str
    features: torch.Tensor  # [n, c_in] f32
    target: torch.Tensor  # [n, outputs] f32, or [n] i64 of classes
    counted: torch.Tensor  # [n] bool: the rows that the loss and the score are about
    outputs: int
    input_title: str
    target_title: str
    input_shown: np.ndarray  # [n] scalars, or [n, 3] colours
    classes: tuple[str, ...] = ()
    error_title: str = "absolute error"
    loss_title: str = "mean absolute error in standard deviations"
    input_bar: str = "height [{unit}]"
    in_units: bool = False  # whether target and error are lengths

    def to(self, device: torch.device) -> Task:
        for item in fields(self):
            if isinstance(getattr(self, item.name), torch.Tensor):
                setattr(self, item.name, getattr(self, item.name).to(device))
        return self

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def error(self, prediction: torch.Tensor) -> torch.Tensor:
        """[n] f32: how far off each voxel is, as `error_title` says."""
        raise NotImplementedError

    def score(self, prediction: torch.Tensor) -> str:
        return f"mean {self.error_title} {float(self.error(prediction)[self.counted].mean()):.3f}"

    def shown(self, values: torch.Tensor) -> np.ndarray:
        """A prediction or the target as scalars or classes [n], or as colours [n, 3]."""
        raise NotImplementedError


@dataclass
class Values(Task):
    """Numbers, or colours as brightness and two differences, in standard deviations of each.

    Else the brightness, in which colours differ most, would drown the hue.
    """

    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(1))  # [outputs]
    axes: torch.Tensor = field(default_factory=lambda: torch.ones(1, 1))  # [outputs, outputs]

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        return F.l1_loss(prediction[self.counted], self.target[self.counted])

    def error(self, prediction: torch.Tensor) -> torch.Tensor:
        return ((prediction - self.target) @ self.axes).abs().mean(1)

    def shown(self, values: torch.Tensor) -> np.ndarray:
        values = (values.detach() @ self.axes + self.mean).cpu().numpy()
        return values[:, 0] if values.shape[1] == 1 else values


class Classes(Task):
    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        # A street is mostly road: rare classes count for more, by the root of their rarity.
        count = torch.bincount(self.target, minlength=self.outputs).clamp(min=1)
        return F.cross_entropy(prediction, self.target, (1 / count).sqrt().to(prediction))

    def error(self, prediction: torch.Tensor) -> torch.Tensor:
        right = prediction.softmax(1).gather(1, self.target[:, None])
        return 1 - right[:, 0]

    def score(self, prediction: torch.Tensor) -> str:
        found = prediction.argmax(1)
        both = torch.bincount(
            self.target * self.outputs + found, minlength=self.outputs**2
        ).reshape(self.outputs, self.outputs)
        union = (both.sum(0) + both.sum(1) - both.diagonal()).clamp(min=1)
        iou = float((both.diagonal() / union).mean())
        right = float((found == self.target).float().mean())
        return f"{100 * right:.1f} % right, mean IoU {iou:.2f}"

    def shown(self, values: torch.Tensor) -> np.ndarray:
        return (values if values.ndim == 1 else values.argmax(1)).cpu().numpy()


class Normals(Task):
    def _cosine(self, prediction: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(prediction, self.target, eps=1e-6)

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        return 1 - self._cosine(prediction)[self.counted].mean()

    def error(self, prediction: torch.Tensor) -> torch.Tensor:
        return torch.rad2deg(torch.arccos(self._cosine(prediction).clamp(-1, 1)))

    def score(self, prediction: torch.Tensor) -> str:
        return f"median angle {float(self.error(prediction)[self.counted].median()):.1f} degrees"

    def shown(self, values: torch.Tensor) -> np.ndarray:
        return (F.normalize(values.detach().float(), eps=1e-6) / 2 + 0.5).cpu().numpy()


def _column(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(len(values), -1))


def upward(points: np.ndarray, y_up: bool) -> np.ndarray:
    """The unit vector that points up; `y_up` is the custom of the file's format.

    A depth camera's frame (z forward from the origin, y down) is recognised by its extents.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    ahead = low[2] > 0.25 * (high[2] - low[2])
    if ahead and (low[:2] < 0).all() and (high[:2] > 0).all():
        return np.array([0.0, -1.0, 0.0])
    return np.array([0.0, 1.0, 0.0] if y_up else [0.0, 0.0, 1.0])


def centers(voxels: Voxels) -> np.ndarray:
    return voxels.origin + (voxels.coords + 0.5) * voxels.size


@dataclass
class Scene:
    """What the makers of tasks look at."""

    item: PointCloud | Mesh
    voxels: Voxels
    up: np.ndarray  # unit vector
    seed: int

    @property
    def height(self) -> np.ndarray:
        """Of each voxel's centre, in the file's unit."""
        return centers(self.voxels) @ self.up

    @property
    def place(self) -> np.ndarray:
        """[n, 3] float64 in -1..1: where in its box each voxel is."""
        middle = (self.voxels.coords.max(axis=0) + 1) / 2
        return (self.voxels.coords + 0.5 - middle) / middle.max()


def _standard(values: torch.Tensor, seen: torch.Tensor, least: float) -> dict[str, torch.Tensor]:
    """Target, mean and axes of values [n, 1 or 3], by the rows that may be looked at.

    `least`: the smallest deviation, for values that hardly differ.
    """
    basis = _OPPONENT if values.shape[1] == 3 else torch.ones(1, 1)
    mean = values[seen].mean(0)
    turned = (values - mean) @ basis
    deviation = turned[seen].std(0, correction=0).clamp(min=least)
    # Hues of a grey scene are mostly noise.
    deviation = deviation.clamp(min=float(deviation.max()) / 6)
    axes = deviation[:, None] * torch.linalg.inv(basis)
    return {"target": turned / deviation, "mean": mean, "axes": axes}


def _completion(values: np.ndarray, what: str, seed: int) -> Values:
    rows = len(values)
    hidden = np.zeros(rows, dtype=bool)
    hidden[np.random.RandomState(seed).permutation(rows)[: max(1, int(_HIDDEN * rows))]] = True
    shown = _column(values).numpy()
    known = torch.from_numpy(~hidden)[:, None].float()
    standard = _standard(_column(values), known[:, 0] > 0, least=0.02)
    if shown.shape[1] == 1:
        shown = np.where(hidden, np.nan, shown[:, 0])
    else:
        shown = np.where(hidden[:, None], np.float32(0.86), shown)
    share = 100 * (1 - _HIDDEN)
    return Values(
        name=f"{what} completion",
        sentence=f"fill in the {what} of the {100 * _HIDDEN:.0f} % of the voxels that hide it",
        features=torch.cat([torch.ones(rows, 1), known, standard["target"] * known], 1),
        counted=torch.from_numpy(hidden),
        outputs=values[0].size,
        input_title=f"{what} of {share:.0f} % of the voxels",
        target_title=what,
        input_shown=shown,
        input_bar=what,
        error_title=f"absolute {what} error",
        **standard,
    )


def _color(scene: Scene) -> Task | None:
    color = scene.voxels.color
    return None if color is None else _completion(color, "colour", scene.seed)


def _intensity(scene: Scene) -> Task | None:
    intensity = scene.voxels.intensity
    # A few mirrors reach hundred times what all else does; the square root spreads the rest.
    top = 0 if intensity is None else float(np.quantile(intensity, 0.99))
    if not top > 0:
        return None
    return _completion(np.sqrt(np.clip(intensity / top, 0, 1)), "intensity", scene.seed)


def _label(scene: Scene) -> Task | None:
    labels = getattr(scene.item, "label", None)
    if labels is None:
        return None
    kinds, number = np.unique(labels, return_inverse=True)
    if not 2 <= len(kinds) <= _MAX_CLASSES:
        return None
    rows = len(scene.voxels.coords)
    votes = np.bincount(scene.voxels.inverse * len(kinds) + number, minlength=rows * len(kinds))
    height = scene.height
    names = STREET_LABELS if scene.item.name == "street" else None
    return Classes(
        name="class from geometry",
        sentence="tell the class of each voxel from occupancy and height",
        features=torch.cat([torch.ones(rows, 1), _column((height - height.mean()) / 2)], 1),
        target=torch.from_numpy(votes.reshape(rows, -1).argmax(1)),
        counted=torch.ones(rows, dtype=torch.bool),
        outputs=len(kinds),
        input_title="occupancy and height",
        target_title="class",
        input_shown=height,
        classes=tuple(names[k] if names else str(k) for k in kinds),
        error_title="1 - probability of the true class",
        loss_title="cross entropy",
    )


def _normal(scene: Scene) -> Task | None:
    normal = scene.voxels.normal
    target = torch.zeros(0, 3) if normal is None else torch.from_numpy(normal)
    # Two sides of a thin sheet in one voxel cancel: no normal to learn there.
    counted = target.norm(dim=1) > 0.1
    if not counted.any():
        return None
    return Normals(
        name="surface normal from geometry",
        sentence="tell the normal of each voxel from occupancy and place",
        # Which side is outside is no local matter, so the network is told where in the box it is.
        features=torch.cat([torch.ones(len(target), 1), _column(scene.place)], 1),
        target=F.normalize(target, eps=1e-6),
        counted=counted,
        outputs=3,
        input_title="occupancy and place",
        target_title="normal",
        input_shown=scene.height,
        error_title="angle in degrees",
        loss_title="1 - cosine",
    )


def _height(scene: Scene) -> Task | None:
    height = scene.height
    plan = scene.place[:, scene.up == 0]
    everything = torch.ones(len(height), dtype=torch.bool)
    return Values(
        name="height from geometry",
        sentence="tell the height of each voxel from occupancy and the place in the plan",
        features=torch.cat([torch.ones(len(height), 1), _column(plan)], 1),
        counted=everything,
        outputs=1,
        input_title="occupancy and place in the plan",
        target_title="height",
        input_shown=plan[:, 0],
        input_bar="first axis of the plan, -1 to 1",
        error_title="absolute height error",
        in_units=True,
        **_standard(_column(height), everything, least=scene.voxels.size),
    )


_MAKERS = dict(zip(NAMES, (_color, _label, _intensity, _normal, _height), strict=True))


def make(scene: Scene, name: str = "auto") -> Task:
    """The named task, or with "auto" the first of NAMES that the cloud has the values for."""
    for key in NAMES if name == "auto" else (name,):
        task = _MAKERS[key](scene)
        if task is not None:
            return task
    raise InputError(f"task is {name!r}, but {scene.item.name} has no usable {name} values")
