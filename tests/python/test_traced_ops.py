# SPDX-License-Identifier: Apache-2.0
"""The operators beside convolution in traced graphs."""

from __future__ import annotations

import torch

import voxgemm as vg
from voxgemm import hashmap, pooling, sampling, serialization
from voxgemm.depthwise import depthwise_conv3d


def test_a_traced_graph_encodes_and_looks_up(clouds):
    def find(coords, keys):
        codes = serialization.encode(coords, 4, curve="hilbert")
        table = hashmap.make_table(64, torch.int64, torch.int32, coords.device)
        hashmap.insert(*table, codes)
        return hashmap.lookup(*table, keys), serialization.decode(codes, 4, curve="hilbert")

    coords = clouds.random(50)
    keys = torch.arange(1 << 13, device=coords.device)
    torch._dynamo.reset()
    traced = torch.compile(find, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(traced(coords, keys), find(coords, keys), strict=True):
        assert torch.equal(actual, expected)


def test_a_traced_graph_trains(clouds, device):
    """Forward and backward without a break, bits as without tracing."""
    coords = clouds.random(50)
    map = vg.build_map(coords, 3)
    points = torch.rand(20, 3, device=device) * 8
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((50, 4), (27, 4))]

    def loss(x, weight):
        y = depthwise_conv3d(x, weight, None, map)
        y = pooling.pool(y, map, "max") + pooling.pool(y, map, "mean")
        pooled = pooling.global_pool(y, coords, 2).sum()
        for reduction in pooling.REDUCTIONS:
            rows = pooling.segment_reduce(y, coords[:, 1] - 1, 5, reduction)
            pooled = pooled + rows.square().sum()
        return sampling.sample(y, coords, points).sum() + pooled

    torch._dynamo.reset()
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (traced, loss):
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
