# SPDX-License-Identifier: Apache-2.0
"""Two processes with different clouds, one of them without any, against one that has all.

The file is also what the processes run: `torchrun --nproc-per-node 2 test_distributed.py CHECK`.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import voxgemm as vg
from voxgemm.unet import ConvNorm, UNet

# Voxels of each of two processes in each step: never as many, and once none.
STEPS = ((90, 40), (30, 0), (0, 70), (55, 60))


def cloud(rows, batch, seed, device):
    """Features [rows, 4], coordinates of one batch item, targets [rows, 3]."""
    draw = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*[torch.arange(8)] * 3).int()
    chosen = every[torch.randperm(len(every), generator=draw)[:rows]]
    coords = nn.functional.pad(chosen, (1, 0), value=batch)
    numbers = torch.randn(rows, 7, generator=draw, dtype=torch.float64)
    return [part.to(device) for part in (numbers[:, :4], coords, numbers[:, 4:])]


def network(device):
    torch.manual_seed(0)
    return UNet(4, 3, 4, 3).to(device, torch.float64)


def steps(net, clouds_of, total, world):
    """The losses of some steps: the mean over the voxels of all processes."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    losses = []
    for step, counts in enumerate(STEPS):
        features, coords, target = clouds_of(step, counts)
        error = (net(vg.SparseTensor(features, coords)) - target).square().sum() / sum(counts)
        losses.append(total(error.detach()))
        optimizer.zero_grad()
        # Gradients are averaged over processes.
        (error * world).backward()
        optimizer.step()
    return torch.stack(losses)


def alone(net, device):
    """One process with the clouds of both."""

    def both(step, counts):
        parts = [cloud(rows, k, 10 * step + k, device) for k, rows in enumerate(counts)]
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    return steps(net, both, lambda loss: loss, 1)


def together(net, device):
    """Each process with its own cloud; the losses summed."""

    def mine(step, counts):
        return cloud(counts[dist.get_rank()], 0, 10 * step + dist.get_rank(), device)

    def total(loss):
        dist.all_reduce(loss)
        return loss

    return steps(net, mine, total, dist.get_world_size())


def assert_like_one_process(model, net, device, whole=lambda tensor: tensor):
    """Losses, parameters and running statistics of `net`, which `model` wraps or is."""
    single = network(device)
    torch.testing.assert_close(together(model, device), alone(single, device))
    found = {name: whole(tensor) for name, tensor in net.state_dict().items()}
    for name, tensor in single.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def check_ddp(device):
    net = vg.nn.SyncBatchNorm.convert(network(device))
    ids = [device.index] if device.type == "cuda" else None
    model = nn.parallel.DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)
    assert_like_one_process(model, net, device)


def check_ddp_of_own_norms(device):
    """Statistics of each process's own: every parameter gets a gradient, whatever the cloud."""
    net = network(device)
    ids = [device.index] if device.type == "cuda" else None
    model = nn.parallel.DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)
    rank = dist.get_rank()
    for rows in ((1, 60), (60, 0), (1, 1)):
        features, coords, _ = cloud(rows[rank], 0, rank, device)
        model.zero_grad()
        model(vg.SparseTensor(features, coords)).square().sum().backward()
        for parameter in net.parameters():
            every = [torch.empty_like(parameter.grad) for _ in range(2)]
            dist.all_gather(every, parameter.grad)
            assert torch.equal(*every)


def sharded(net, device, **options):
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in net.modules():
        if isinstance(block, ConvNorm):
            fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def check_fsdp(device):
    """SparseTensors go from block to block; each has its parameters only while it runs."""
    net = sharded(vg.nn.SyncBatchNorm.convert(network(device)), device)
    weight = net.stem.conv.weight
    assert weight.to_local().numel() < weight.numel()
    assert_like_one_process(
        net, net, device, lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    )


def check_fsdp_shares_maps(device):
    """Blocks hand tensors on through torch's trees: the maps are still built once."""
    net = sharded(network(device), device)
    features, coords, _ = cloud(60, 0, dist.get_rank(), device)
    x = vg.SparseTensor(features, coords)
    net(x).sum().backward()
    built = len(x.maps.sets)
    plain = vg.SparseTensor(features, coords)
    network(device)(plain)
    assert built == len(plain.maps.sets) == 3


def check_fsdp_in_low_precision(device):
    """Parameters cross in bfloat16 and are kept, as their gradients, in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = sharded(network(device).float(), device, mp_policy=policy)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    features, coords, target = cloud(80, 0, dist.get_rank(), device)
    losses = []
    for _ in range(15):
        y = net(vg.SparseTensor(features.float(), coords))
        assert y.dtype == torch.bfloat16
        loss = (y.float() - target.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())


def check_sync_norm(device):
    """Against torch's batch norm of all rows: results, gradients, running statistics."""
    rank = dist.get_rank()
    for counts in ((5, 3), (4, 0), (1, 1)):
        for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
            torch.manual_seed(0)
            rows = torch.randn(sum(counts), 3, dtype=torch.float64).to(device)
            ours, theirs = (
                kind(3, dtype=torch.float64, device=device, **options)
                for kind in (vg.nn.SyncBatchNorm, nn.BatchNorm1d)
            )
            parts = rows.split(counts)
            x, every = parts[rank].clone().requires_grad_(), rows.clone().requires_grad_()
            y, expected = ours(x), theirs(every)
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(y, expected.split(counts)[rank])
            torch.testing.assert_close(x.grad, every.grad.split(counts)[rank])
            torch.testing.assert_close([*ours.buffers()], [*theirs.buffers()])
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                dist.all_reduce(p.grad)
                torch.testing.assert_close(p.grad, q.grad)


CHECKS = {name: value for name, value in globals().copy().items() if name.startswith("check_")}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_two_processes(kind):
    """Every check in turn, by the same two processes."""
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).resolve()), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    assert {word for word in done.stdout.split() if word in CHECKS} == set(CHECKS)


def test_conversion():
    """Norms of rows become joint ones with the same state, others stay."""
    net = nn.Sequential(nn.BatchNorm1d(3), vg.nn.BatchNorm(3), nn.BatchNorm2d(3))
    before = copy.deepcopy(net.state_dict())
    kinds = [type(module) for module in vg.nn.SyncBatchNorm.convert(net)]
    assert kinds == [vg.nn.SyncBatchNorm, vg.nn.SyncBatchNorm, nn.BatchNorm2d]
    torch.testing.assert_close(net.state_dict(), before)


def main(kind):
    rank = int(os.environ["RANK"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    for name, check in CHECKS.items():
        check(device)
        if rank == 0:
            print(name, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # Without the interpreter's end, as examples/train.py says.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
