# SPDX-License-Identifier: Apache-2.0
"""Every operator under torch's own checks, and what it costs in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import voxgemm as vg
from voxgemm import hashmap, pooling, sampling, serialization
from voxgemm._library import text_tensor
from voxgemm.functional import Geometry

GEOMETRY = Geometry((2, 2, 2), (2, 2, 2))


@pytest.fixture
def calls(clouds, device, layer):
    """An example call of every operator."""
    coords = clouds.random(50)
    outputs = vg.output_coords(coords, GEOMETRY)
    x, weight, bias, map = layer(coords, 3, 4, torch.float32, GEOMETRY, outputs)
    dy = torch.randn(len(outputs), 4, device=device)
    tensors, numbers = map.tensors(), map.layer()
    back = map.transposed().tensors()
    codes = serialization.encode(coords, 4)
    table = hashmap.make_table(64, torch.int64, torch.int32, device)
    status = torch.tensor([50, -1], device=device)
    points = torch.rand(20, 3, device=device) * 8
    sampled, weights = sampling.sample_map(coords, points)
    rows, at_points = torch.randn(50, 4, device=device), torch.randn(20, 4, device=device)
    taps = torch.randn(8, 4, device=device)
    pooled, winners = pooling.max_pool_rows(rows, map)
    curve = [1, 4, 0, 1, 2, 0, 0, 0]
    return {
        "_check_coords": (coords, [8, 8, 8], 2),
        "_unique": (coords.repeat(2, 1),),
        "_output_coords": (coords, GEOMETRY.numbers(), 0, None, None),
        "_submanifold_map": (
            coords,
            Geometry.submanifold((3, 3, 3), (1, 1, 1)).numbers(),
        ),
        "_kernel_map": (coords, outputs, GEOMETRY.numbers()),
        "_transpose": (tensors, numbers),
        "_forward": (x, weight, bias, tensors, numbers),
        "_grad_input": (dy, weight, tensors, back, numbers),
        "_grad_weight": (x, dy, tensors, numbers, [True, True]),
        "_pairs": (tensors, numbers),
        "_kept": (tensors[0],),
        "_forget": (tensors[0],),
        "_choice": (tensors, numbers, [4, 0, 2, 3, 4, 5, 1, 2, 3, 4, -2]),
        "_schedule": (tensors, numbers, [1, 2, 128, 128]),
        "_explain": (tensors, numbers, [0, 2, 3, 4], True),
        "_is_tuned": (tensors, numbers, [0, 2, 3, 4]),
        "_learn": (x, []),
        "_environment_filter": (0,),
        "_tunes_at_first_use": (),
        "_times_folder": (),
        "_times_files": (),
        "_export_times": (text_tensor("no such device"),),
        "_import_times": (text_tensor(""),),
        "_parse_problem": (text_tensor("forward f32 subm3 3->4"),),
        "_info": (),
        "_cuda_info": (True,),
        "_sample_map": (coords, points, None, 10, [1, 0, 8, 8, 8]),
        "_sample_map_grad": (points, sampled, weights),
        "_weighted_sum": (rows, sampled, weights),
        "_weighted_sum_grad_input": (at_points, sampled, weights, 50),
        "_weighted_sum_grad_weights": (rows, at_points, sampled),
        "_pool": (rows, tensors, numbers, 0),
        "_pool_grad": ([pooled, winners], tensors, back, numbers, 0),
        "_segment_reduce": (rows, coords[:, 0], 2, 3),
        "_depthwise": (rows, taps, taps[0], tensors, numbers),
        "_depthwise_grad_input": (pooled, taps, tensors, back, numbers),
        "_depthwise_grad_weight": (rows, pooled, tensors, numbers),
        "_curve_encode": (coords, curve, True),
        "_curve_decode": (codes, curve),
        "_sort_codes": (codes,),
        "_hash_insert": (*table, codes, None, False),
        "_check_hash_insert": (*table, status),
        "_hash_lookup": (*table, codes),
        "_voxel_keys": (coords, [8, 8, 8], False),
    }


# They measure, or remove files: test_tuning calls them.
IN_TEST_TUNING = {"_tune", "_calibrate", "_clear_times"}
# Gives addresses, other ones in every call.
NOT_REPEATABLE = IN_TEST_TUNING | {"_views"}
# What only CUDA has.
ON_GPU = ("_cuda_info",)
OPERATORS = {
    name.partition("::")[2].partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("voxgemm::")
} - NOT_REPEATABLE


@pytest.mark.parametrize("name", sorted(OPERATORS.union(ON_GPU)))
def test_opcheck(name, calls, device):
    if name in ON_GPU and device.type == "cpu":
        pytest.skip("no operator of the CPU")
    torch.library.opcheck(getattr(torch.ops.voxgemm, name).default, calls[name])


def test_opcheck_of_absent_arguments(calls):
    x, weight, _, tensors, numbers = calls["_forward"]
    torch.library.opcheck(torch.ops.voxgemm._forward.default, (x, weight, None, tensors, numbers))
    dy, weight, tensors, _, numbers = calls["_grad_input"]
    torch.library.opcheck(torch.ops.voxgemm._grad_input.default, (dy, weight, tensors, [], numbers))
    x, dy, tensors, numbers, _ = calls["_grad_weight"]
    for wanted in ([True, False], [False, True]):
        torch.library.opcheck(
            torch.ops.voxgemm._grad_weight.default, (x, dy, tensors, numbers, wanted)
        )


def prepared(map: list[torch.Tensor], back: list[torch.Tensor], numbers: list[int], schedule=()):
    """What operators take for lists of a map, of the transposed one and of the layer."""
    views = torch.ops.voxgemm._views
    none = torch.empty(0, dtype=torch.int64)
    lists = (list(map), list(back), list(schedule))
    return [torch.tensor(numbers), *(views(each) if each else none for each in lists)]


@pytest.mark.parametrize("options", [None, (1, 1, 128, 128)])
def test_prepared_maps_are_the_same(options, calls):
    ops = torch.ops.voxgemm
    x, weight, bias, map, numbers = calls["_forward"]
    dy, _, _, back, _ = calls["_grad_input"]
    of_map, of_back = [], []
    if options is not None:
        order = list(options)
        of_map = ops._schedule(map, numbers, order)
        flipped = [dy.shape[0], *numbers[1:3], 1 - numbers[3], *numbers[4:]]
        of_back = ops._schedule(back, flipped, order)
        numbers = [*numbers[:17], *options, *numbers[21:]]
    forward = prepared(map, [], numbers, of_map)
    backward = prepared(map, back, numbers, of_back)
    for expected, found in (
        (
            ops._forward(x, weight, bias, [*map, *of_map], numbers),
            ops._forward(x, weight, bias, forward, []),
        ),
        (
            ops._grad_input(dy, weight, map, [*back, *of_back], numbers),
            ops._grad_input(dy, weight, backward, [], []),
        ),
        (
            ops._grad_weight(x, dy, [*map, *of_map], numbers, [True, True]),
            ops._grad_weight(x, dy, forward, [], [True, True]),
        ),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_is_not_prepared(calls):
    ops = torch.ops.voxgemm
    x, weight, bias, map, numbers = calls["_forward"]
    whole = prepared(map, [], numbers)
    for wrong, message in (
        (whole[:3], "a prepared map has 3 tensors, expected 4"),
        ([x, *whole[1:]], "tensor 0 of a prepared map is not int64 numbers of the host"),
        ([whole[0][:3], *whole[1:]], "a layer has 3 numbers, expected 21"),
        ([whole[0], whole[1][:5], *whole[2:]], "tensor 1 of a prepared map has 5 numbers"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._forward(x, weight, bias, wrong, [])
    with pytest.raises(RuntimeError, match="a schedule has 3 tensors, expected 6"):
        ops._views(map[:3])
    with pytest.raises(RuntimeError, match="tensor 0 of the kernel map has another dtype"):
        ops._views([map[0].long(), *map[1:]])


def test_given_and_made_transposed_maps_agree(calls):
    dy, weight, tensors, back, numbers = calls["_grad_input"]
    given = torch.ops.voxgemm._grad_input(dy, weight, tensors, back, numbers)
    assert torch.equal(given, torch.ops.voxgemm._grad_input(dy, weight, tensors, [], numbers))


def test_transposing_twice_gives_the_map_back(clouds):
    coords = clouds.random(50)
    map = vg.build_map(coords, 2, out_coords=vg.output_coords(coords, GEOMETRY), stride=2)
    again = map.transposed().transposed()
    assert (again.n_in, again.n_out, again.operation) == (map.n_in, map.n_out, map.operation)
    fresh = vg.KernelMap(*(v for k, v in vars(map.transposed()).items() if k[0] != "_"))
    for back in (again, fresh.transposed()):
        assert all(torch.equal(a, b) for a, b in zip(back.tensors(), map.tensors(), strict=True))


def test_a_map_is_a_pytree(clouds):
    map = vg.build_map(clouds.random(50), 3)
    leaves, spec = torch.utils._pytree.tree_flatten(map)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 4
    back = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert back.geometry == map.geometry and back.neighbours is map.neighbours
    assert torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(spec)) == spec


def test_unique_keeps_first_rows(clouds):
    coords = clouds.random(30).repeat(3, 1)
    merged, first, inverse = vg.unique(coords)
    assert torch.equal(merged, coords[:30])
    assert first.tolist() == list(range(30))
    assert torch.equal(merged[inverse.long()], coords)


def test_results_own_their_memory(clouds):
    """A result is the memory it was computed in, and lives as long as it is held."""
    map = vg.build_map(clouds.random(50), 3)
    before = map.neighbours.clone()
    held = map.neighbours
    del map
    for _ in range(10):
        vg.build_map(clouds.random(50, seed=1), 3)
    assert torch.equal(held, before)


def test_nothing_is_kept_alive_by_cycles(clouds, device):
    gc.collect()
    gc.disable()
    try:
        x = vg.SparseTensor(torch.randn(200, 4, device=device), clouds.random(200))
        net = vg.nn.Sequential(
            vg.nn.SubmConv3d(4, 4, 3),
            vg.nn.SparseConv3d(4, 8, 2, 2),
            vg.nn.SparseInverseConv3d(8, 4, 2),
        ).to(device)
        y = net(x)
        y.features.sum().backward()
        _, map = x.maps.strided(0, net[1].geometry, "reached")
        watched = [weakref.ref(t) for t in (map.neighbours, map.transposed().neighbours, y.coords)]
        del x, y, map
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_memory_does_not_grow(clouds):
    """One leaked tensor object a call, 200 bytes or more, would be 1 MB here."""
    resource = pytest.importorskip("resource")
    coords = clouds.random(20)
    map = vg.build_map(coords, 3)
    x, weight, bias = torch.randn(20, 4), torch.randn(4, 3, 3, 3, 4), torch.randn(4)

    def run(calls):
        for _ in range(calls):
            vg.functional.conv3d(x, weight, bias, map)
            vg.build_map(coords, 1)

    run(500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(5000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 1 << 10
