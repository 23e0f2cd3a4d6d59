# SPDX-License-Identifier: Apache-2.0
"""The operators beside convolution under torch's own checks, and in traced graphs."""

from __future__ import annotations

import pytest
import torch

import voxgemm as vg
from voxgemm import hashmap, pooling, sampling, serialization
from voxgemm.depthwise import depthwise_conv3d

DOWN = vg.Geometry((2, 2, 2), (2, 2, 2))
CURVE = [1, 4, 0, 1, 2, 0, 0, 0]

OPERATORS = (
    "_curve_encode",
    "_curve_decode",
    "_sort_codes",
    "_hash_insert",
    "_check_hash_insert",
    "_hash_lookup",
    "_voxel_keys",
    "_sample_map",
    "_sample_map_grad",
    "_weighted_sum",
    "_weighted_sum_grad_input",
    "_weighted_sum_grad_weights",
    "_pool",
    "_pool_grad",
    "_segment_reduce",
    "_depthwise",
    "_depthwise_grad_input",
    "_depthwise_grad_weight",
)


@pytest.fixture
def calls(clouds, device):
    """An example call of every operator."""
    coords = clouds.random(50)
    codes = serialization.encode(coords, 4)
    table = hashmap.make_table(64, torch.int64, torch.int32, device)
    status = torch.tensor([50, -1], device=device)
    points = torch.rand(20, 3, device=device) * 8
    sampled, weights = sampling.sample_map(coords, points)
    x, at_points = torch.randn(50, 4, device=device), torch.randn(20, 4, device=device)
    map = vg.build_map(coords, 2, out_coords=vg.output_coords(coords, DOWN), stride=2)
    tensors, back, layer = map.tensors(), map.transposed().tensors(), map.layer()
    taps = torch.randn(8, 4, device=device)
    dy, winners = pooling.max_pool_rows(x, map)
    return {
        "_sample_map": (coords, points, None, 10, [1, 0, 8, 8, 8]),
        "_sample_map_grad": (points, sampled, weights),
        "_weighted_sum": (x, sampled, weights),
        "_weighted_sum_grad_input": (at_points, sampled, weights, 50),
        "_weighted_sum_grad_weights": (x, at_points, sampled),
        "_pool": (x, tensors, layer, 0),
        "_pool_grad": ([dy, winners], tensors, back, layer, 0),
        "_segment_reduce": (x, coords[:, 0], 2, 3),
        "_depthwise": (x, taps, taps[0], tensors, layer),
        "_depthwise_grad_input": (dy, taps, tensors, back, layer),
        "_depthwise_grad_weight": (x, dy, tensors, layer),
        "_curve_encode": (coords, CURVE, True),
        "_curve_decode": (codes, CURVE),
        "_sort_codes": (codes,),
        "_hash_insert": (*table, codes, None, False),
        "_check_hash_insert": (*table, status),
        "_hash_lookup": (*table, codes),
        "_voxel_keys": (coords, [8, 8, 8], False),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, calls):
    torch.library.opcheck(getattr(torch.ops.voxgemm, name).default, calls[name])


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
        pooled = pooling.global_pool(y, coords, 2)
        return sampling.sample(y, coords, points).sum() + pooled.sum()

    torch._dynamo.reset()
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (traced, loss):
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
