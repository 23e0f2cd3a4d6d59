#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times MinkUNet18, the usual network for the segmentation of LiDAR scans, on one cloud.

    python bench/network.py --device cuda
    python bench/network.py --device cpu --cloud street --dtype float32

ms, medians of bursts: building every map and schedule of the network, its forward pass without
gradients (eager and, on a GPU, as a replayed CUDA graph), and a training step (forward, loss,
backward) on maps that are at hand. Weights and features are random. Batch norm is in evaluation
mode for the forward pass, in training mode for the step. "folded": with each batch norm in the
weights before it, and residual sums and ReLU in the convolutions' kernels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import voxgemm as vg
from voxgemm import bench
from voxgemm.machine import provenance
from voxgemm.unet import ConvNorm

STEM, DOWN, UP = 32, (32, 64, 128, 256), (256, 128, 96, 96)
# Forward as a graph on an H200, at most 100 thousand voxels, f16.
REACH_MS = 1.2


def subm(c_in: int, c_out: int, size: int = 3, relu: bool = True) -> ConvNorm:
    return ConvNorm(vg.nn.SubmConv3d(c_in, c_out, size, bias=False), c_out, relu)


class Block(nn.Module):
    """Two 3^3 convolutions and a shortcut, through a 1^3 convolution where the width changes."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.first, self.second = subm(c_in, c_out), subm(c_out, c_out)
        self.shortcut = nn.Identity() if c_in == c_out else subm(c_in, c_out, 1, relu=False)

    def forward(self, x: vg.SparseTensor) -> vg.SparseTensor:
        y: vg.SparseTensor = self.second(self.first(x), residual=self.shortcut(x))
        return y


class MinkUNet18(nn.Module):
    def __init__(self, c_in: int = 4, classes: int = 20):
        super().__init__()
        self.stem = nn.Sequential(subm(c_in, STEM), subm(STEM, STEM))
        widths = (STEM, *DOWN)
        self.downs, self.encoders = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in zip(widths[:-1], widths[1:], strict=True):
            halved = vg.nn.SparseConv3d(fine, fine, 2, stride=2, bias=False)
            self.downs.append(ConvNorm(halved, fine))
            self.encoders.append(nn.Sequential(Block(fine, coarse), Block(coarse, coarse)))
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        width = DOWN[-1]
        for up, skip in zip(UP, reversed(widths[:-1]), strict=True):
            doubled = vg.nn.SparseInverseConv3d(width, up, 2, bias=False)
            self.ups.append(ConvNorm(doubled, up))
            self.decoders.append(nn.Sequential(Block(up + skip, up), Block(up, up)))
            width = up
        self.head = nn.Linear(width, classes)

    def forward(self, x: vg.SparseTensor) -> torch.Tensor:
        x = self.stem(x)
        skips = []
        for down, encoder in zip(self.downs, self.encoders, strict=True):
            skips.append(x)
            x = encoder(down(x))
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(vg.cat([up(x), skips.pop()]))
        logits: torch.Tensor = self.head(x.features)
        return logits


def measured(options: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    coords = bench.coords_of(options.cloud).to(device)
    features = torch.randn(len(coords), 4, device=device, dtype=dtype)
    net = MinkUNet18().to(device, dtype)
    labels = torch.randint(0, 20, (len(coords),), device=device)

    wait = bench.waiting(device)

    def milliseconds(work: Callable[[], Any]) -> float:
        return 1e3 * bench.median_seconds(work, device, options.repeat)

    def forward(x: vg.SparseTensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = net(x)
        return logits

    def step() -> None:
        net.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x).float(), labels).backward()

    x = vg.SparseTensor(features, coords)
    net.eval()
    start = time.perf_counter()
    forward(x)
    wait()
    row: dict[str, Any] = {"network": "MinkUNet18", "cloud": options.cloud, "voxels": len(coords)}
    row |= {"dtype": options.dtype, "first_ms": 1e3 * (time.perf_counter() - start)}
    fresh = milliseconds(lambda: forward(vg.SparseTensor(features, coords)))

    def time_forward(prefix: str) -> None:
        row[f"{prefix}forward_ms"] = milliseconds(lambda: forward(x))
        if device.type != "cuda":
            return
        wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = forward(x)
        row[f"{prefix}graph_ms"] = milliseconds(graph.replay)
        row[f"{prefix}same"] = torch.equal(kept, forward(x))

    time_forward("")
    row["maps_ms"] = fresh - row["forward_ms"]
    net.train()
    row["step_ms"] = milliseconds(step)
    net.eval()
    expected = forward(x).float()
    for module in list(net.modules()):
        if isinstance(module, ConvNorm):
            module.fold()
    time_forward("folded_")
    difference = (forward(x).float() - expected).abs().max() / expected.abs().max()
    row |= {"folded_difference": float(difference), "target_ms": REACH_MS}
    return row | provenance(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--cloud", default="street:0.05", help="as in voxgemm bench")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--repeat", type=int, default=5)
    print(json.dumps(measured(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
