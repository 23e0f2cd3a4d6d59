# SPDX-License-Identifier: Apache-2.0
"""The demo: reads a cloud or mesh, trains a sparse U-Net on it, measures and draws what it did."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import functional, picture, tasks
from .clouds import Mesh, PointCloud, Voxels, read, street, voxelize
from .clouds.voxelize import check_memory
from .machine import provenance
from .tasks import Task
from .tensor import SparseTensor
from .unet import UNet

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
_LEVELS = 5
_MESH_GRID = "256grid"
# The default size of a cloud has at most this many voxels, which two cores train in a minute,
_MAX_VOXELS = 160_000
# and at most this share of its points, so that most voxels have neighbours.
_MAX_SHARE = 0.6
# Useful FLOPs of the layer that the double-precision reference repeats: some seconds of one core.
_REFERENCE_FLOPS = 4e9
_LEARNING_RATE = 0.02
# Maps of a voxel: 27 neighbours at full resolution and about as much again below it.
_MAP_BYTES = 27 * 4 * 2


@dataclass
class Options:
    file: str | None = None
    voxel: str | None = None
    columns: int | None = None
    task: str = "auto"
    steps: int = 60
    channels: int = 16
    dtype: str = "f32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    out: str | None = None

    def picture_path(self) -> str:
        return self.out or f"demo-{Path(self.file).stem if self.file else 'street'}.png"


@dataclass
class Training:
    losses: list[float]  # of each step, before it
    times: dict[str, float]  # median ms of a step's parts


def load(options: Options) -> PointCloud | Mesh:
    if options.file is None:
        return street(options.seed)
    return read(options.file, options.columns)


def default_voxel(item: PointCloud | Mesh) -> str:
    """For a mesh a grid; for a cloud the smallest of 1, 2, 5, 10 ... within the limits above."""
    if isinstance(item, Mesh):
        return _MESH_GRID
    longest = float(np.ptp(item.points, axis=0).max())
    bare = replace(item, color=None, normal=None, intensity=None)
    limit = min(_MAX_VOXELS, _MAX_SHARE * len(item.points))
    chosen = None
    # From 32 voxels across down to where voxels are too many, at the latest one for every point.
    exponent = math.floor(math.log10(longest / 32)) if longest > 0 else 0
    for power in range(exponent, exponent - 6, -1):
        for digit in (5, 2, 1):
            size = f"{digit}e{power}"
            if float(size) > longest / 16:
                continue
            if chosen is not None and len(voxelize(bare, size).coords) > limit:
                return chosen
            chosen = f"{float(size):g}"
    return chosen or "1"


def batch_of(voxels: Voxels, device: torch.device) -> torch.Tensor:
    """int32 [n, 4]: the coordinates as one batch item."""
    coords = torch.zeros((len(voxels.coords), 4), dtype=torch.int32)
    coords[:, 1:] = torch.from_numpy(voxels.coords)
    return coords.to(device)


@dataclass
class Checked:
    """A layer's largest difference from the reference, over the reference's largest value."""

    error: float
    layer: str


class _Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.laps.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    def medians(self) -> dict[str, float]:
        """Of all steps but the first, which also warms caches up."""
        return {name: statistics.median(laps[1:] or laps) for name, laps in self.laps.items()}


def _precision(dtype: torch.dtype, device: torch.device) -> Any:
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def train(net: UNet, task: Task, coords: torch.Tensor, options: Options) -> Training:
    """Every step builds its maps anew, as if each brought another scan."""
    dtype, device = DTYPES[options.dtype], coords.device
    features = task.features.to(net.head.weight.dtype)
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    # Gradients of a mean over 10^5 voxels lie below f16's smallest number.
    scaler = torch.amp.GradScaler(device.type, 2.0**12, enabled=dtype == torch.float16)
    watch, losses = _Stopwatch(device), []
    progress = tqdm(total=options.steps, desc="training", unit="step")
    for _ in range(options.steps):
        with watch.lap("map"):
            x = SparseTensor(features, coords)
            net.maps(x)
        with watch.lap("forward"):
            with _precision(dtype, device):
                prediction = net(x)
            loss = task.loss(prediction.float())
        optimizer.zero_grad()
        with watch.lap("backward"):
            scaler.scale(loss).backward()
        with watch.lap("optimizer"):
            scaler.step(optimizer)
            scaler.update()
        schedule.step()
        losses.append(float(loss.detach()))
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
        progress.update()
    progress.close()
    return Training(losses, watch.medians())


def check_fits(name: str, net: UNet, maps: list[functional.KernelMap]) -> None:
    """Refuses a training step that memory does not hold, before torch is killed for it."""
    values = sum(
        map.n_out * conv.out_channels for conv, map in zip(net.convolutions(), maps, strict=True)
    )
    # Peaks of 0.4 to 2.3 million voxels were 3 to 4 times the results of all layers.
    need = 4 * values * net.head.weight.element_size()
    device = net.head.weight.device
    free = [torch.cuda.mem_get_info(device)[0]] if device.type == "cuda" else []
    check_memory(f"a training step on {name}", maps[0].n_out, need // maps[0].n_out, *free)


def step_flops(net: UNet, maps: list[functional.KernelMap]) -> float:
    """Useful FLOPs of one step: 2 * pairs * c_in * c_out of each layer and pass.

    The first layer has no input gradient, so two passes.
    """
    total = 0.0
    for place, (conv, map) in enumerate(zip(net.convolutions(), maps, strict=True)):
        passes = 2 if place == 0 else 3
        total += passes * 2.0 * map.pairs * conv.in_channels * conv.out_channels
    return total


def predict(net: UNet, x: SparseTensor, dtype: torch.dtype) -> tuple[torch.Tensor, Checked]:
    """The prediction f32 [n, outputs], and one of its layers against the reference on the CPU.

    That layer is the one with most work that stays below _REFERENCE_FLOPS, else that with least.
    """
    layers = list(zip(net.convolutions(), net.maps(x), strict=True))
    work = [2.0 * map.pairs * conv.in_channels * conv.out_channels for conv, map in layers]
    fitting = [place for place, flops in enumerate(work) if flops <= _REFERENCE_FLOPS]
    place = max(fitting, key=work.__getitem__) if fitting else work.index(min(work))
    conv, map = layers[place]
    judge = net.maps(x.to("cpu"))[place]
    caught: list[torch.Tensor] = []
    hook = conv.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].features))
    # Batch norm keeps using the batch itself: after few steps its running averages lag behind.
    with torch.no_grad(), _precision(dtype, x.features.device):
        prediction = net(x).float()
    hook.remove()
    with torch.no_grad():
        features, weight = caught[0].to(dtype), conv.weight.to(dtype)
        found = functional.conv3d(features, weight, None, map).cpu().double()
        # The same rounded operands: what is left is the layer's own arithmetic.
        features, weight = features.cpu().double(), weight.cpu().double()
        expected = functional.conv3d(features, weight, None, judge)
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
    name = f"{type(conv).__name__} {conv.in_channels}->{conv.out_channels}"
    return prediction, Checked(error, f"{name}, {map.pairs:,} pairs")


def _unit(item: PointCloud | Mesh, options: Options) -> str:
    """Metres where the format or its custom says so."""
    suffix = Path(options.file).suffix.lower() if options.file else ""
    return "file unit" if isinstance(item, Mesh) or suffix in (".las", ".laz") else "m"


def _panels(task: Task, prediction: torch.Tensor, unit: str) -> list[picture.Panel]:
    target, found = task.shown(task.target), task.shown(prediction)
    length = f" [{unit}]" if task.in_units else ""
    bar, limits = task.target_title + length, None
    if target.ndim == 1 and not task.classes:
        limits = picture.limits(target)
    elif isinstance(task, tasks.Normals):
        bar = "red x, green y, blue z: half is 0"
    elif target.ndim == 2:
        bar = ""
    error = task.error(prediction).cpu().numpy()
    return [
        picture.Panel(
            f"input: {task.input_title}",
            task.input_shown,
            limits=limits if task.input_bar == bar else None,
            bar="" if task.input_shown.ndim == 2 else task.input_bar.format(unit=unit),
        ),
        picture.Panel(
            f"target: {task.target_title}", target, limits=limits, bar=bar, classes=task.classes
        ),
        picture.Panel(
            f"prediction: {task.score(prediction)}",
            found,
            limits=limits,
            bar=bar,
            classes=task.classes,
        ),
        picture.Panel(
            "error of the prediction",
            error,
            "magma",
            (0.0, picture.limits(error)[1]),
            task.error_title + length,
        ),
    ]


def _where(result: dict[str, Any]) -> str:
    if result["device_type"] == "cuda":
        return f"on one {result['device']}"
    threads = result["threads"]
    return f"with {threads} thread{'s' * (threads > 1)} of {result['device']}"


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains, measures and draws; the numbers as JSON can hold them. `say` gets a line before."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    item = load(options)
    voxel = options.voxel or default_voxel(item)
    voxels = voxelize(item, voxel, _MAP_BYTES)
    points, unit = tasks.centers(voxels), _unit(item, options)
    y_up = options.file is not None and options.file.lower().endswith((".obj", ".glb"))
    up = tasks.upward(points, y_up)
    task = tasks.make(tasks.Scene(item, voxels, up, options.seed), options.task).to(device)
    count = int(voxels.samples.sum())
    kind = "surface samples" if isinstance(item, Mesh) else "points"
    heads = f"{item.name}: {count:,} {kind}, {len(points):,} voxels of {voxels.size:.4g} {unit}"
    heads += "s" * (unit == "file unit" and voxels.size != 1)
    say(f"{heads}\n{task.name}: {task.sentence}")

    net = UNet(task.features.shape[1], task.outputs, options.channels, _LEVELS)
    net = net.to(device, torch.float64 if options.dtype == "f64" else torch.float32)
    coords = batch_of(voxels, device)
    x = SparseTensor(task.features.to(net.head.weight.dtype), coords)
    maps = net.maps(x)
    check_fits(item.name, net, maps)
    trained = train(net, task, coords, options)
    prediction, checked = predict(net, x, dtype)
    losses = [*trained.losses, float(task.loss(prediction))]
    flops, ms_step = step_flops(net, maps), sum(trained.times.values())
    result = {
        "file": item.name,
        "task": task.name,
        "voxel": voxels.size,
        "points": count,
        "dropped": item.dropped,
        "voxels": len(points),
        "pairs": maps[0].pairs,
        "steps": options.steps,
        "channels": options.channels,
        "levels": _LEVELS,
        "dtype": options.dtype,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "score": task.score(prediction),
        "ms_step": ms_step,
        **{f"ms_{part}": value for part, value in trained.times.items()},
        "gflop_step": flops / 1e9,
        "gflops": flops / ms_step / 1e6,
        "max_error": checked.error,
        "max_error_layer": checked.layer,
        **provenance(device),
        "picture": options.picture_path(),
    }
    shown = picture.Picture(
        title=f"{heads}, {maps[0].pairs:,} pairs: {task.name}",
        points=points,
        size=voxels.size,
        unit=unit,
        view=picture.view(points, up),
        panels=_panels(task, prediction, unit),
        losses=losses,
        loss_title=task.loss_title,
        times=trained.times,
        notes=[
            f"{options.dtype}, {options.channels} channels, {_LEVELS} levels,"
            f" {result['gflops']:.1f} useful GFLOP/s {_where(result)}",
            f"largest error of {checked.layer} against double precision: {checked.error:.1e}",
        ],
    )
    picture.draw(shown, options.picture_path())
    return result
