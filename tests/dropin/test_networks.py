# SPDX-License-Identifier: Apache-2.0
"""Networks: one through both drop-ins and voxgemm, and one of each kind trained on a scan."""

from __future__ import annotations

import pathlib

import pytest
import torch
from pytest import fixture, mark
from torch import nn

import voxgemm as vg
import warpconvnet.nn.modules as warp
from flex_gemm.ops import spconv
from voxgemm import clouds as readers
from warpconvnet.geometry.features.cat import CatFeatures
from warpconvnet.geometry.types.voxels import Voxels

pytestmark = mark.usefixtures("flex_state", "warp_state")
SCANS = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
STEPS = 50


@fixture(params=["street", "small_gicp_target.ply"])
def scan(request, device):
    """coords int32 [n, 4] in a box from 0, and its size: a made-up street, or a measured scan."""
    if request.param == "street":
        cloud, voxel = readers.street(beams=16, azimuths=256), 1.5
    else:
        path = SCANS / request.param
        if not path.is_file():
            pytest.skip(f"{path} is not at hand")
        cloud, voxel = readers.read(path), 2.0
    found = torch.from_numpy(readers.voxelize(cloud, voxel).coords).int()
    coords = nn.functional.pad(found - found.amin(0), (1, 0))
    assert 300 < len(coords) < 6000
    return coords.contiguous().to(device), (coords[:, 1:].amax(0) + 1).tolist()


def test_one_network_through_all_three(scan):
    """Convolution, down by two, convolution, a ReLU behind each; of whole numbers so small that
    every sum is exact in float64 whatever its order, so that all bits are equal."""
    coords, box = scan
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randint(-1, 2, shape, generator=draw).double().to(coords.device)

    features = numbers(len(coords), 4)
    weights = [numbers(8, 3, 3, 3, 4), numbers(8, 2, 2, 2, 8), numbers(6, 3, 3, 3, 8)]
    biases = [numbers(8), numbers(8), numbers(6)]
    sizes = (3, 2, 3)

    def through_voxgemm(weights):
        x = vg.SparseTensor(features, coords)
        for size, weight, bias in zip(sizes, weights, biases, strict=True):
            kind = vg.nn.SubmConv3d if size == 3 else vg.nn.SparseConv3d
            options = {} if size == 3 else {"stride": 2}
            layer = kind(weight.shape[4], weight.shape[0], size, **options)
            state = {"weight": weight, "bias": bias}
            x = torch.func.functional_call(layer, state, (x,))
            x = x.replace(torch.relu(x.features))
        return x.coords, x.features

    def through_flex_gemm(weights):
        x, at, shape = features, coords, (1, 4, *box)
        for size, weight, bias in zip(sizes, weights, biases, strict=True):
            if size == 3:
                x, _ = spconv.sparse_submanifold_conv3d(x, at, shape, weight, bias)
            else:
                # Rounded up to whole windows, since the original drops what does not fill one.
                shape = (1, 8, *(n + n % 2 for n in box))
                x, at, _ = spconv.sparse_conv3d(x, at, shape, weight, bias, stride=(2, 2, 2))
                shape = (1, 8, *(n // 2 for n in shape[2:]))
            x = torch.relu(x)
        return at, x

    def through_warpconvnet(weights):
        x = Voxels([coords[:, 1:]], [features])
        for size, weight, bias in zip(sizes, weights, biases, strict=True):
            layer = warp.SparseConv3d(*weight.shape[4::-4], size, stride=1 if size == 3 else 2)
            theirs = weight.permute(1, 2, 3, 4, 0).reshape(size**3, weight.shape[4], -1)
            x = torch.func.functional_call(layer, {"weight": theirs, "bias": bias}, (x,))
            act = torch.relu(x.feature_tensor)
            x = x.replace(batched_features=CatFeatures(act, x.offsets))
        return x.coords, x.feature_tensor

    results = []
    for run in (through_voxgemm, through_flex_gemm, through_warpconvnet):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        at, out = run(leaves)
        results.append((at, out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    assert float(results[0][1].abs().max()) > 10
    assert all(float(g.abs().max()) < 2**53 for g in results[0][2:])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


class SparseBlock(nn.Module):
    """A block of a sparse VAE as TRELLIS.2's: norm, activation, submanifold convolution, twice,
    and the residual; one neighbour cache for all."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        shape, bound = (channels, 3, 3, 3, channels), (27 * channels) ** -0.5
        drawn = (torch.empty(shape).uniform_(-bound, bound) for _ in range(2))
        self.weights = nn.ParameterList(drawn)
        self.biases = nn.ParameterList(torch.zeros(channels) for _ in range(2))

    def forward(self, x, coords, shape, caches):
        residual = x
        for norm, weight, bias in zip(self.norms, self.weights, self.biases, strict=True):
            spconv.set_algorithm(spconv.Algorithm.MASKED_IMPLICIT_GEMM_SPLITK)
            spconv.set_hashmap_ratio(2.0)
            x = nn.functional.silu(norm(x))
            x, caches["subm"] = spconv.sparse_submanifold_conv3d(
                x, coords, shape, weight, bias, caches.get("subm"), (1, 1, 1)
            )
        return x + residual


class SparseVAE(nn.Module):
    def __init__(self, channels: int = 16, latent: int = 4):
        super().__init__()
        self.input = nn.Linear(3, channels)
        self.encoder, self.decoder = SparseBlock(channels), SparseBlock(channels)
        self.to_latent = nn.Linear(channels, 2 * latent)
        self.from_latent = nn.Linear(latent, channels)
        self.output = nn.Linear(channels, 3)

    def forward(self, x, coords, shape, noise):
        caches = {}
        x = torch.utils.checkpoint.checkpoint(
            self.encoder, self.input(x), coords, shape, caches, use_reentrant=False
        )
        mean, spread = self.to_latent(x).chunk(2, 1)
        x = self.from_latent(mean + noise * (0.5 * spread).exp())
        divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return self.output(self.decoder(x, coords, shape, caches)), divergence


def trained(network: nn.Module, loss_of) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_sparse_vae_trains(scan, threads):
    threads(1)  # of rows this few
    coords, box = scan
    torch.manual_seed(0)
    network = SparseVAE().to(coords.device)
    sizes = torch.tensor(box, device=coords.device)
    wanted = torch.sin(coords[:, 1:] / sizes * 6.3)
    noise = torch.randn(len(coords), 4, device=coords.device)

    def loss_of():
        out, divergence = network(wanted, coords, (1, 16, *box), noise)
        return nn.functional.mse_loss(out, wanted) + 1e-4 * divergence

    losses = trained(network, loss_of)
    assert losses[-1] < 0.3 * losses[0], losses[::10]


class MinkUNet(nn.Module):
    """Two levels down and up again, with skips."""

    def __init__(self, classes: int, width: int = 16):
        super().__init__()
        self.stem = warp.SparseConv3d(4, width, 3)
        self.downs, self.encoders = nn.ModuleList(), nn.ModuleList()
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.downs.append(warp.SparseConv3d(width, width, 2, stride=2))
            self.encoders.append(warp.SparseConv3d(width, width, 3))
            self.ups.append(warp.SparseConv3d(width, width, 2, stride=2, transposed=True))
            self.decoders.append(warp.SparseConv3d(2 * width, width, 3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(9))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Voxels) -> torch.Tensor:
        norms = iter(self.norms)

        def normed(y: Voxels) -> Voxels:
            features = torch.relu(next(norms)(y.feature_tensor))
            return y.replace(batched_features=CatFeatures(features, y.offsets))

        x = normed(self.stem(x))
        skips = []
        for down, encoder in zip(self.downs, self.encoders, strict=True):
            skips.append(x)
            x = normed(encoder(normed(down(x))))
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            skip = skips.pop()
            x = normed(up(x, skip))
            both = torch.cat([x.feature_tensor, skip.feature_tensor], 1)
            x = normed(decoder(x.replace(batched_features=CatFeatures(both, x.offsets))))
        return self.head(x.feature_tensor)


def test_a_minkunet_trains(scan, threads):
    threads(1)
    coords, box = scan
    torch.manual_seed(0)
    network = MinkUNet(classes=4).to(coords.device)
    height = coords[:, 3].float() / max(box[2], 1)
    labels = (height * 4).long().clamp(max=3)
    places = coords[:, 1:] / torch.tensor(box, device=coords.device)
    features = torch.cat([places, height[:, None]], 1)
    x = Voxels([coords[:, 1:]], [features])

    def loss_of():
        return nn.functional.cross_entropy(network(x), labels)

    losses = trained(network, loss_of)
    assert losses[-1] < 0.3 * losses[0], losses[::10]
