# SPDX-License-Identifier: Apache-2.0
"""Trains the sparse U-Net of voxgemm to name what each voxel of a scan is, on one or many devices.

    python examples/train.py --epochs 4                                  simulated streets, CPU
    python examples/train.py --device cuda --dtype bf16 --checkpoint run.pt
    torchrun --nproc-per-node 2 examples/train.py --device cuda --sync-norm
    torchrun --nproc-per-node 2 examples/train.py --device cuda --sync-norm --shard
    python examples/train.py scans/*.ply --task color --voxel 0.05

Without files the scans are streets of different seeds, whose points have classes. With files the
network learns a task of `voxgemm demo` that one cloud is enough for: color, intensity, normal or
height. A step takes --batch scans in all, dealt out to the processes; the loss is the mean over the
voxels of all of them, so that a step does not depend on the number of processes, also where a
process has few voxels or none. Only batch norm does, unless --sync-norm joins its statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import voxgemm as vg
from voxgemm import tasks
from voxgemm.clouds import InputError, read, street, voxelize
from voxgemm.clouds.street import LABELS
from voxgemm.unet import ConvNorm, UNet

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


@dataclass
class Scan:
    coords: torch.Tensor  # int32 [n, 3]
    features: torch.Tensor  # f32 [n, c_in]
    target: torch.Tensor  # int64 [n] of classes, or f32 [n, outputs]
    counted: torch.Tensor  # bool [n]: the voxels that the loss is about


class Scans(Dataset):
    """Voxelised scans, kept once they are made."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self._made: dict[int, Scan] = {}

    def __len__(self) -> int:
        return len(self.options.files) or self.options.scans

    def __getitem__(self, index: int) -> Scan:
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def _make(self, index: int) -> Scan:
        o = self.options
        item = read(o.files[index]) if o.files else street(o.seed + index, o.beams, o.azimuths)
        voxels = voxelize(item, o.voxel)
        up = tasks.upward(tasks.centers(voxels), y_up=False)
        scene = tasks.Scene(item, voxels, up, o.seed + index)
        task = tasks.make(scene, "height" if o.task == "label" else o.task)
        features, target, counted = task.features, task.target, task.counted
        if o.task == "label":
            # By the number that all scans have in common, not by what is there in this one.
            votes = np.bincount(
                voxels.inverse * len(LABELS) + item.label,
                minlength=len(voxels.coords) * len(LABELS),
            )
            target = torch.from_numpy(votes.reshape(-1, len(LABELS)).argmax(1))
            height = torch.from_numpy(scene.height).float()[:, None] / 2
            features = torch.cat([torch.ones(len(target), 1), height], 1)
            counted = torch.ones(len(target), dtype=torch.bool)
        return Scan(torch.from_numpy(voxels.coords).int(), features, target, counted)


class Shares(Sampler):
    """Of every step's scans those of one process: numbers in an order that the epoch decides.

    The last step may have fewer scans than there are processes; then a list is empty.
    """

    def __init__(self, options: argparse.Namespace, scans: int, rank: int, world: int):
        self.options, self.scans, self.rank, self.world = options, scans, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.scans // self.options.batch)

    def __iter__(self) -> Iterator[list[int]]:
        draw = torch.Generator().manual_seed(self.options.seed + self.epoch)
        order = torch.randperm(self.scans, generator=draw).tolist()
        for first in range(0, self.scans, self.options.batch):
            yield order[first : first + self.options.batch][self.rank :: self.world]


def joined(scans: Sequence[Scan], like: Scan) -> tuple[torch.Tensor, ...]:
    """The scans as one batch: coords int32 [n, 4], features, target, counted. None: no rows."""
    coords = [nn.functional.pad(scan.coords, (1, 0), value=k) for k, scan in enumerate(scans)]
    nothing = Scan(*(part[:0] for part in vars(like).values()))
    parts = [nothing, *scans]
    rows = [
        torch.cat([getattr(s, name) for s in parts]) for name in ("features", "target", "counted")
    ]
    return (torch.cat([torch.zeros(0, 4, dtype=torch.int32), *coords]), *rows)


@dataclass
class Place:
    """Where this process stands among all."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *values: torch.Tensor | float) -> list[float]:
        """The sums over all processes."""
        sums = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(sums)
        return sums.tolist()


def start(options: argparse.Namespace) -> Place:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(rank, world, device)


def sharded(net: UNet, place: Place) -> None:
    """Parameters, gradients and the optimizer's state dealt out to the processes by the block."""
    mesh = init_device_mesh(place.device.type, (place.world,))
    for block in net.modules():
        if isinstance(block, ConvNorm):
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


class Trainer:
    def __init__(self, options: argparse.Namespace, place: Place):
        self.options, self.place, self.dtype = options, place, DTYPES[options.dtype]
        self.scans = Scans(options)
        self.shares = Shares(options, len(self.scans), place.rank, place.world)
        self.loader = DataLoader(
            self.scans, batch_sampler=self.shares, collate_fn=list, num_workers=options.workers
        )
        self.like = self.scans[0]
        self.classes = len(LABELS) if options.task == "label" else 0
        outputs = self.classes or self.like.target.shape[1]
        torch.manual_seed(options.seed)
        net = UNet(self.like.features.shape[1], outputs, options.channels, options.levels)
        if options.sync_norm and place.world > 1:
            vg.nn.SyncBatchNorm.convert(net)
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.net = net.to(place.device, exact)
        self.model = self.net
        if options.shard:
            sharded(self.net, place)
        elif place.world > 1:
            ids = [place.device.index] if place.device.type == "cuda" else None
            # Statistics stay each process's own where they are not joined.
            self.model = nn.parallel.DistributedDataParallel(
                self.net, device_ids=ids, broadcast_buffers=False
            )
        self.optimizer = torch.optim.AdamW(self.net.parameters(), options.lr)
        steps = options.epochs * len(self.shares)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(steps, 1))
        self.scaler = torch.amp.GradScaler(
            place.device.type, 2.0**12, enabled=self.dtype == torch.float16
        )
        self.epoch = 0
        self.losses: list[float] = []  # of every step, before it

    def _loss(self, prediction: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The sum over this process's voxels."""
        _, _, target, counted = batch
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if self.classes:
            return nn.functional.cross_entropy(prediction, target, reduction="sum")
        if self.options.task == "normal":
            cosine = nn.functional.cosine_similarity(prediction, target, eps=1e-6)
            return (1 - cosine)[counted].sum()
        return (prediction - target)[counted].abs().mean(1).sum()

    def _forward(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        coords, features = batch[:2]
        x = vg.SparseTensor(features.to(self.net.head.weight.dtype), coords)
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(self.place.device.type, self.dtype if half else None, enabled=half):
            return model(x)

    def _moved(self, scans: Sequence[Scan]) -> tuple[torch.Tensor, ...]:
        parts = joined(scans, self.like)
        if self.place.device.type == "cuda":
            parts = tuple(part.pin_memory() if part.numel() else part for part in parts)
        return tuple(part.to(self.place.device, non_blocking=True) for part in parts)

    def step(self, scans: Sequence[Scan]) -> float:
        """One step of all processes; the loss before it, over the voxels of all."""
        batch = self._moved(scans)
        local = self._loss(self._forward(self.model, batch), batch)
        total, count = self.place.total(local.detach(), batch[3].sum())
        # Processes average their gradients.
        loss = local * (self.place.world / max(count, 1))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return total / max(count, 1)

    def train(self, log: Any = None) -> None:
        while self.epoch < self.options.epochs:
            self.shares.epoch = self.epoch
            self.model.train()
            bar = tqdm(
                self.loader,
                desc=f"epoch {self.epoch + 1}",
                unit="step",
                disable=not self.place.first,
            )
            for scans in bar:
                self.losses.append(self.step(scans))
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}")
                if log is not None:
                    log.add_scalar("loss", self.losses[-1], len(self.losses))
                    log.add_scalar("lr", self.schedule.get_last_lr()[0], len(self.losses))
            self.epoch += 1
            if self.options.checkpoint:
                self.save(Path(self.options.checkpoint))
            if self.epoch == self.options.stop_after:
                break

    def save(self, path: Path) -> None:
        """What every process has of the state, written by the first."""
        options = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
        net, optimizer = whole.get_state_dict(self.net, self.optimizer, options=options)
        if not self.place.first:
            return
        state = {"net": net, "optimizer": optimizer, "epoch": self.epoch, "losses": self.losses}
        state |= {"schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict()}
        # A torn file never takes the place of a whole one.
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        whole.set_state_dict(
            self.net,
            self.optimizer,
            model_state_dict=state["net"],
            optim_state_dict=state["optimizer"],
            options=whole.StateDictOptions(full_state_dict=True),
        )
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.losses = state["epoch"], state["losses"]

    def share_right(self) -> float:
        """Of a scan that no epoch has seen, the share of voxels whose class is found."""
        unseen = Scans(
            argparse.Namespace(**vars(self.options) | {"seed": self.options.seed + 10**6})
        )
        batch = self._moved([unseen[0]])
        self.net.eval()
        with torch.no_grad():
            found = self._forward(self.net, batch).argmax(1)
        return float((found == batch[2]).float().mean())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="*", help="scans; without: simulated streets")
    add("--scans", type=int, default=16, help="how many streets")
    add("--beams", type=int, default=64, help="of a street's sensor")
    add("--azimuths", type=int, default=2048, help="of a street's sensor")
    add("--task", choices=("label", "color", "intensity", "normal", "height"))
    add("--voxel", default="0.2")
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=4, help="scans of a step, over all processes")
    add("--channels", type=int, default=16, help="at full resolution")
    add("--levels", type=int, default=4)
    add("--lr", type=float, default=0.01)
    add("--dtype", choices=DTYPES, default="f32", help="16 bits: mixed precision")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--sync-norm", action="store_true", help="batch norm over all processes")
    add("--shard", action="store_true", help="deal parameters out to the processes, under torchrun")
    add("--stop-after", type=int, metavar="EPOCH", help="end the run early, to be resumed")
    add("--workers", type=int, default=0, help="processes that read scans")
    add("--checkpoint", metavar="PATH", help="written after every epoch")
    add("--resume", action="store_true", help="from the checkpoint, if there is one")
    add("--tensorboard", metavar="FOLDER")
    add("--json", metavar="PATH", help="losses of all steps")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.task = options.task or ("height" if options.files else "label")
    if options.task == "label" and options.files:
        parser.error("classes differ from file to file; --task label is for simulated streets")
    if options.shard and "RANK" not in os.environ:
        parser.error("--shard deals out to the processes that torchrun starts")
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint")
    return options


def scalars(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        sys.exit(f"--tensorboard needs the package tensorboard: {error}")
    return SummaryWriter(folder)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    options = parse(arguments)
    place = start(options)
    trainer = Trainer(options, place)
    if options.resume and Path(options.checkpoint).exists():
        trainer.resume(Path(options.checkpoint))
    log = scalars(options.tensorboard) if options.tensorboard and place.first else None
    try:
        trainer.train(log)
        right = trainer.share_right() if trainer.classes else None
        if place.first:
            print(f"loss {trainer.losses[0]:.4f} to {trainer.losses[-1]:.4f}", flush=True)
            if right is not None:
                print(f"{100 * right:.1f} % right on a scan not seen before")
            if options.json:
                Path(options.json).write_text(json.dumps(trainer.losses))
    finally:
        if log is not None:
            log.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return trainer.losses


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"train.py: {error}")
    if "RANK" in os.environ:
        # Threads of gloo outlive the process group where torch still knows a mesh of it, and one
        # that lets go of a tensor while the interpreter ends aborts it (seen on a busy machine).
        sys.stdout.flush()
        os._exit(0)
