# SPDX-License-Identifier: Apache-2.0
"""Schedules that the operators of traced graphs find with a map, and what becomes of them."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import voxgemm as vg
from voxgemm._library import ops
from voxgemm.functional import Geometry, conv3d
from voxgemm.owned import Owned

MASKED = "masked_implicit_gemm"  # all its kernels for f32 want a schedule, on any device
DOWN = Geometry((2, 2, 2), (2, 2, 2))
kept = ops._kept.default


@pytest.fixture(autouse=True)
def from_scratch():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def operands(device):
    """make(rows) -> features [rows, 16] and weights that want gradients."""

    def make(rows):
        shapes = (rows, 16), (16, 3, 3, 3, 16)
        return [torch.randn(s, device=device).requires_grad_() for s in shapes]

    return make


def eager(x, weight, map):
    return conv3d(x, weight, None, map, MASKED)


@pytest.fixture
def compiled():
    return torch.compile(eager, fullgraph=True, backend="aot_eager")


def step(function, x, weight, map):
    y = function(x, weight, map)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))]


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_traced_operator_builds_is_there_for_the_next(clouds, operands, compiled):
    map = vg.build_map(clouds.random(60, extent=9), 3)
    x, weight = operands(60)
    size = map.nbytes
    found = step(compiled, x, weight, map)
    parts = kept(map.neighbours)
    assert len(parts) >= 6 and len(parts) % 6 == 0 and not map._schedules
    assert map.nbytes > size
    assert_same(step(compiled, x, weight, map), found)
    again = kept(map.neighbours)
    assert [p.data_ptr() for p in again] == [p.data_ptr() for p in parts]
    # Eager finds them, too.
    assert_same(step(eager, x, weight, map), found)
    mine = {t.data_ptr() for tensors in map._schedules.values() for t in tensors}
    assert mine and mine <= {p.data_ptr() for p in kept(map.neighbours)}
    # Nothing is built any more: what is kept now leads nowhere, and so does every pass.
    for indices in kept(map.neighbours)[5::6]:
        indices.fill_(-1)
    assert not any(t.any() for t in step(compiled, x, weight, map))


def test_traced_operators_find_what_eager_built(clouds, operands, compiled):
    map = vg.build_map(clouds.random(60, extent=9), 3)
    x, weight = operands(60)
    expected = step(eager, x, weight, map)
    parts = [p.data_ptr() for p in kept(map.neighbours)]
    assert parts
    assert_same(step(compiled, x, weight, map), expected)
    assert [p.data_ptr() for p in kept(map.neighbours)] == parts


def test_of_a_strided_map_and_its_transposed_one(clouds, operands, device, compiled):
    coords = clouds.random(60, extent=9)
    map = vg.functional.strided_map(coords, vg.output_coords(coords, DOWN), DOWN)
    x, _ = operands(60)
    weight = torch.randn(16, 2, 2, 2, 16, device=device, requires_grad=True)
    expected = step(eager, x, weight, map)
    counts = [len(kept(m.neighbours)) for m in (map, map.transposed())]
    assert all(counts)
    for _ in range(2):
        assert_same(step(compiled, x, weight, map), expected)
    assert [len(kept(m.neighbours)) for m in (map, map.transposed())] == counts


def test_a_dead_map_leaves_nothing(clouds, operands, compiled):
    map = vg.build_map(clouds.random(60, extent=9), 3)
    step(compiled, *operands(60), map)
    table, sharing = map.neighbours, map._copy()
    del map
    gc.collect()
    assert kept(table)
    del sharing
    gc.collect()
    assert not kept(table)


def test_other_maps_at_an_address_have_schedules_of_their_own(clouds, operands, compiled):
    x, weight = operands(60)
    addresses = set()
    for seed in range(12):
        map = vg.build_map(clouds.random(60, seed=seed, extent=9), 3)
        addresses.add(map.neighbours.data_ptr())
        assert not kept(map.neighbours)
        found = step(compiled, x, weight, map)
        assert kept(map.neighbours)
        assert_same(found, step(eager, x, weight, copy.deepcopy(map)))
        del map
        torch._dynamo.reset()  # the last graph's arguments
        gc.collect()
    assert len(addresses) < 12


def test_maps_of_a_graph_are_nobodys(clouds, operands):
    x, weight = operands(60)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, weight, coords):
        map = vg.build_map(coords, 3)
        return eager(x, weight, map), map.neighbours

    for seed in range(3):
        coords = clouds.random(60, seed=seed, extent=9)
        y, table = function(x, weight, coords)
        assert not kept(table)
        assert torch.equal(y, eager(x, weight, vg.build_map(coords, 3)))


def test_copies_are_nobodys(clouds, operands, compiled):
    map = vg.build_map(clouds.random(60, extent=9), 3)
    x, weight = operands(60)
    expected = step(eager, x, weight, map)
    for copied in (copy.deepcopy(map), pytree.tree_map_only(torch.Tensor, torch.clone, map)):
        for function in (compiled, eager):
            assert_same(step(function, x, weight, copied), expected)
        assert not kept(copied.neighbours)
    del copied
    gc.collect()
    assert kept(map.neighbours)


def test_a_map_may_die_while_a_graph_is_traced(clouds, operands, compiled):
    map = vg.build_map(clouds.random(60, extent=9), 3)
    step(compiled, *operands(60), map)
    table = map.neighbours
    with FakeTensorMode():
        del map
        gc.collect()
        assert len(Owned._late) == 1
    assert kept(table)
    vg.build_map(clouds.random(5), 3)
    assert not kept(table) and not Owned._late


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_streams_and_captures_build_their_own(clouds, operands, compiled):
    map = vg.build_map(clouds.random(60, extent=9), 3)
    map.settle(wait=True)
    x, weight = operands(60)
    with torch.no_grad():
        expected = compiled(x, weight, map)
        count = len(kept(map.neighbours))
        assert count == 6
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(compiled(x, weight, map), expected)
        torch.cuda.synchronize()
        assert len(kept(map.neighbours)) == count
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compiled(x, weight, map)
        assert len(kept(map.neighbours)) == count
        for indices in kept(map.neighbours)[5::6]:
            indices.fill_(-1)
        graph.replay()
        assert torch.equal(y, expected)


def test_a_step_chooses_its_passes_in_one_call(clouds, operands, device):
    """Where gradients are wanted, and only what they need."""
    x, weight = operands(60)

    def chosen(*operands):
        map = vg.build_map(clouds.random(60, extent=9), 3)
        conv3d(*operands, None, map)
        return sorted(asked.number for asked in map._choices)

    assert chosen(x, weight) == [0, 1, 2]
    assert chosen(x.detach(), weight) == [0, 2]
    assert chosen(x, weight.detach()) == [0, 1]
    with torch.no_grad():
        assert chosen(x, weight) == [0]


def test_a_map_that_outlives_torch():
    """At the end of a program, where a mode of torch is on: nothing is said."""
    program = """
import builtins, torch, voxgemm
torch.set_default_device("cpu")
builtins.kept = voxgemm.build_map(torch.zeros(1, 4, dtype=torch.int32), 3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
