# SPDX-License-Identifier: Apache-2.0
"""SparseTensor: arithmetic, joins, parts, conversions."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

import voxgemm as vg


@pytest.fixture(autouse=True)
def default_device(device):
    with device:
        yield


@pytest.fixture
def x(clouds):
    torch.manual_seed(0)
    return vg.SparseTensor(torch.randn(80, 4), clouds.random(80), (8, 8, 8), batch_size=2)


def random(coords, channels=3, **options):
    return vg.SparseTensor(torch.randn(len(coords), channels), coords, **options)


def by_voxel(tensor):
    """{coordinate: features}; the coordinates are distinct."""
    rows = dict(zip(map(tuple, tensor.coords.tolist()), tensor.features.tolist(), strict=True))
    assert len(rows) == tensor.voxels
    return rows


OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


@pytest.mark.parametrize("sign", OPERATIONS)
def test_arithmetic(sign, x, device):
    operation = OPERATIONS[sign]
    y = x.replace(torch.rand(80, 4) + 1)
    column, row = torch.rand(80, 1) + 1, torch.rand(4) + 1
    for a, b in ((x, y), (y, 3), (2.5, y), (y, column), (column, y), (y, row), (row, y)):
        result = operation(a, b)
        plain = [t.features if isinstance(t, vg.SparseTensor) else t for t in (a, b)]
        assert torch.equal(result.features, operation(*plain))
        assert result.coords is x.coords and result.maps is x.maps
    if device.type == "cpu":
        assert torch.equal(operation(np.float32(2), y).features, operation(2.0, y.features))


def test_sums_in_place_and_negatives(x):
    features = x.features.clone()
    y = x
    y += x
    assert torch.equal(y.features, 2 * features) and torch.equal(x.features, features)
    assert torch.equal((-x).features, -features)
    assert torch.equal(x.apply(torch.relu).features, features.relu())


def test_gradients_of_arithmetic(clouds):
    coords = clouds.random(6)

    def function(a, b):
        x, y = vg.SparseTensor(a, coords), vg.SparseTensor(b, coords)
        return ((x * y + 1) / (y * y + 2) - vg.cat([x, y]).features[:, :2]).features

    a, b = (torch.randn(6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(function, (a, b))


def test_the_same_coordinates_are_known_by_identity(x):
    """Of one tensor of coordinates, or of one network; a copy is another set."""
    again = vg.SparseTensor(torch.ones(80, 4), x.coords)
    assert x.shares_coords(again) and (x + again).maps is x.maps
    down = vg.nn.SparseConv3d(4, 4, 2, 2)
    assert down(x).shares_coords(down(x * 2))
    back = vg.nn.SparseInverseConv3d(4, 4, 2)(down(x))
    assert (back + x).coords is x.coords
    assert not x.shares_coords(vg.SparseTensor(x.features, x.coords.clone()))
    assert not x.shares_coords(down(x))


@pytest.mark.parametrize("sign", OPERATIONS)
def test_other_coordinates_are_refused(sign, x):
    down = vg.nn.SparseConv3d(4, 4, 2, 2)(x)
    sentence = rf"80 voxels at stride \(1, 1, 1\), and {down.voxels} at \(2, 2, 2\).*union_add"
    with pytest.raises(vg.ArgumentError, match=sentence):
        OPERATIONS[sign](x, down)
    with pytest.raises(vg.ArgumentError, match="cat of tensors on different coordinates"):
        vg.cat([x, down])


def test_arithmetic_that_leaves_the_rows_is_refused(x):
    with pytest.raises(vg.ArgumentError, match=r"\[3, 80, 4\], expected \[80, channels\]"):
        x + torch.ones(3, 80, 4)


def test_arithmetic_waits_for_no_device(x, device):
    if device.type == "cpu":
        pytest.skip("the CPU is never waited for")
    other = vg.SparseTensor(x.features, x.coords.clone(), (8, 8, 8), batch_size=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = vg.cat([x * 2 + x, -x / 3])
        shared = y.shares_coords(other)
        total = vg.union_add(x, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.channels == 8 and not shared and torch.equal(total.features, 2 * x.features)


def test_cat(x):
    y = vg.cat([x, x * 2, x.replace(x.features[:, :1])])
    assert torch.equal(y.features, torch.cat([x.features, 2 * x.features, x.features[:, :1]], 1))
    assert y.coords is x.coords
    with pytest.raises(vg.ArgumentError, match="cat of no tensors"):
        vg.cat([])
    with pytest.raises(vg.ArgumentError, match="got a Tensor, expected SparseTensors"):
        vg.cat([x, x.features])


def test_union_add(clouds):
    every = clouds.random(60)
    a, b, c = random(every[:40]), random(every[20:50]), random(every[45:])
    total = vg.union_add(a, b, c)
    assert torch.equal(total.coords, every)
    expected = {}
    for tensor in (a, b, c):
        for place, row in by_voxel(tensor).items():
            before = torch.tensor(expected.get(place, [0.0] * 3))
            expected[place] = (before + torch.tensor(row)).tolist()
    assert by_voxel(total) == expected


def test_union_add_of_what_adds_no_voxel_keeps_the_maps(x, clouds):
    part = random(x.coords[30:50].clone(), 4, spatial_shape=(8, 8, 8), batch_size=2)
    total = vg.union_add(x, part)
    assert total.coords is x.coords and total.maps is x.maps
    expected = x.features.clone()
    expected[30:50] += part.features
    assert torch.equal(total.features, expected)
    assert torch.equal(vg.union_add(x, x, x).features, x.features + x.features + x.features)


def test_union_add_of_repeated_voxels(clouds):
    coords = clouds.random(5)
    a, b = (random(places, 3) for places in (coords.repeat(2, 1), coords[:3]))
    a, b = (t.replace((8 * t.features).round()) for t in (a, b))  # sums of these are exact
    total = vg.union_add(a, b)
    expected = a.features[:5] + a.features[5:]
    expected[:3] += b.features
    assert torch.equal(total.coords, coords) and torch.equal(total.features, expected)


def test_union_add_refuses(x, clouds):
    for other, sentence in (
        (vg.nn.SparseConv3d(4, 4, 2, 2)(x), r"stride is \(1, 1, 1\) and \(2, 2, 2\)"),
        (random(x.coords, 3, spatial_shape=(8, 8, 8)), "channels is 4 and 3"),
        (random(x.coords, 4), r"spatial_shape is \(8, 8, 8\) and None"),
    ):
        with pytest.raises(vg.ArgumentError, match=sentence):
            vg.union_add(x, other)


def test_gradients_of_union_add_and_unique(clouds):
    every = clouds.random(8)
    one, other = every[:5].repeat(2, 1), every[3:]
    a = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def total(a, b):
        return vg.union_add(vg.SparseTensor(a, one), vg.SparseTensor(b, other)).features

    assert gradcheck(total, (a, b)) and gradgradcheck(total, (a, b))
    for reduce in ("sum", "mean", "first"):
        assert gradcheck(lambda a, r=reduce: vg.SparseTensor(a, one).unique(r).features, a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unique(dtype, clouds, within):
    draw = torch.randint(20, (200,), generator=torch.Generator().manual_seed(3), device="cpu")
    coords = clouds.random(20)[draw.to(clouds.device)]
    x = vg.SparseTensor(torch.randn(200, 3).to(dtype), coords)
    merged, first, inverse = vg.unique(coords)
    counts = inverse.bincount().cpu()
    exact = torch.zeros(len(merged), 3, dtype=torch.float64, device="cpu")
    sums = exact.index_add(0, inverse.cpu().long(), x.features.cpu().double())
    sizes = exact.index_add(0, inverse.cpu().long(), x.features.cpu().double().abs())
    total = x.unique()
    assert torch.equal(total.coords, merged) and total.dtype == dtype
    within(total.features, sums, sizes, int(counts.max()))
    assert torch.equal(total.features, x.unique("sum").features)
    # The mean is one division more, of the sum before its rounding.
    counts = counts[:, None].double()
    within(x.unique("mean").features, sums / counts, sizes / counts, int(counts.max()) + 1)
    assert torch.equal(x.unique("first").features, x.features[first.long()])
    with pytest.raises(vg.ArgumentError, match="reduce is 'max', expected one of sum, mean, first"):
        x.unique("max")


def test_unique_of_distinct_voxels_is_the_tensor_itself(x):
    assert x.unique() is x
    nothing = vg.SparseTensor(torch.zeros(0, 2), torch.zeros(0, 4, dtype=torch.int32))
    assert nothing.unique().features.shape == (0, 2)
    assert vg.union_add(nothing, nothing * 2).features.shape == (0, 2)


def test_select(x):
    mask = x.features[:, 0] > 0
    kept = x.select(mask)
    assert torch.equal(kept.coords, x.coords[mask])
    assert torch.equal(kept.features, x.features[mask])
    assert kept.spatial_shape == (8, 8, 8) and kept.batch_size == 2
    rows = torch.tensor([5, 2, 2])
    assert torch.equal(x.select(rows).coords, x.coords[rows])
    alone = vg.nn.SubmConv3d(4, 3, 3)
    fresh = vg.SparseTensor(x.features[mask], x.coords[mask])
    alone(x)
    assert torch.equal(alone(kept).features, alone(fresh).features)
    down = vg.nn.SparseConv3d(4, 4, 2, 2)(x)
    assert down.select(down.features[:, 0] > 0).stride == (2, 2, 2)
    for which in (mask[:5], rows.int(), mask[None], rows.float()):
        with pytest.raises(vg.ArgumentError, match=r"expected bool \[80\] or int64 \[k\]"):
            x.select(which)


def test_gradients_of_parts(clouds):
    coords = clouds.random(7)
    features = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)

    def parts(features):
        x = vg.SparseTensor(features, coords)
        rows = [x.select(features[:, 0] > 0), x.select(torch.tensor([3, 3, 1])), x[1], *x]
        return tuple(part.features for part in rows)

    assert gradcheck(parts, features) and gradgradcheck(parts, features)


def test_batch_items(clouds):
    coords = clouds.random(50, batch=4)
    coords = coords[coords[:, 0] != 2]
    x = random(coords, 3, spatial_shape=(8, 8, 8))
    assert len(x) == 4
    items = list(x)
    for number, item in enumerate(items):
        mask = coords[:, 0] == number
        for part in (item, x[number], x[number - 4]):
            assert torch.equal(part.features, x.features[mask])
            assert torch.equal(part.coords[:, 1:], coords[mask][:, 1:])
            assert not part.coords[:, 0].any() and len(part) == 1
            assert part.spatial_shape == (8, 8, 8)
    assert [item.voxels > 0 for item in items] == [True, True, False, True]
    with pytest.raises(IndexError, match="batch item 4 of 4"):
        x[4]
    with pytest.raises(vg.ArgumentError, match="got a Tensor; x.select takes masks"):
        x[x.features[:, 0] > 0]


@pytest.mark.parametrize("part", [slice(1, 3), slice(None, None, -1), slice(2, None), slice(3, 3)])
def test_slices_of_the_batch(part, clouds):
    coords = clouds.random(50, batch=4)
    x = random(coords, 3)
    sliced = x[part]
    kept = list(range(4))[part]
    assert len(sliced) == len(kept)
    for item, number in zip(sliced, kept, strict=True):
        assert by_voxel(item) == by_voxel(x[number])


def test_collate_is_the_inverse_of_iteration(clouds):
    coords = clouds.random(50, batch=4)
    coords = coords[coords[:, 0] != 3]
    x = random(coords, 3, spatial_shape=(8, 8, 8), batch_size=4)
    back = vg.collate(list(x))
    assert by_voxel(back) == by_voxel(x)
    assert (len(back), back.spatial_shape) == (4, (8, 8, 8))
    again = vg.collate([x, x])
    assert len(again) == 8 and torch.equal(again[4:].coords, x.coords)
    wide = random(coords, 3, spatial_shape=(9, 8, 20))
    assert vg.collate([x, wide]).spatial_shape == (9, 8, 20)
    assert vg.collate([x, random(coords, 3)]).spatial_shape is None
    with pytest.raises(vg.ArgumentError, match="channels is 3 and 2"):
        vg.collate([x, random(coords, 2)])


def test_numbers_of_numpy_and_of_tensors(clouds):
    x = random(clouds.random(50, batch=4))
    for number in (np.int64(2), torch.tensor(2), np.uint8(2)):
        assert by_voxel(x[number]) == by_voxel(x[2])
    with pytest.raises(vg.ArgumentError, match="got a float64"):
        x[np.float64(2)]
    shape = np.array([9, 8, 7])
    y = vg.SparseTensor(x.features[:0], x.coords[:0], shape)
    assert y.spatial_shape == (9, 8, 7) and all(type(extent) is int for extent in y.spatial_shape)
    layer = vg.nn.SubmConv3d(3, 4, np.int32(3), dilation=torch.tensor([1, 2, 1]))
    assert layer.kernel_size == (3, 3, 3) and layer.dilation == (1, 2, 1)


def test_huge_batch_numbers(device):
    coords = torch.zeros(2, 4, dtype=torch.int32, device=device)
    coords[1] = 2**31 - 1
    x = vg.SparseTensor(torch.ones(2, 1, device=device), coords)
    assert len(x) == 2**31
    assert x[-1].coords.tolist() == [[0, *[2**31 - 1] * 3]] and x[5].voxels == 0
    assert x[:: 2**31 - 1].coords[:, 0].tolist() == [0, 1]
    assert x[:0:-1].coords[:, 0].tolist() == [0]
    with pytest.raises(vg.ArgumentError, match=f"{2**32} batch items, expected at most {2**31}"):
        vg.collate([x, x])


def test_padding_has_no_extent():
    coords = torch.tensor([[0, 1, 0, 1], [vg.functional.PADDING_BATCH, -9, 9, 9]]).int()
    assert vg.SparseTensor(torch.ones(2, 3), coords).dense().shape == (1, 3, 2, 1, 2)


def test_negative_batch_numbers_have_no_items():
    coords = torch.tensor([[-1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    for use in (list, lambda x: x[0], lambda x: vg.collate([x])):
        with pytest.raises(vg.ArgumentError, match="-1"):
            use(random(coords))


def test_from_dense_and_back(x):
    again = vg.SparseTensor.from_dense(x.dense())
    assert by_voxel(again) == by_voxel(x)
    assert (again.spatial_shape, again.batch_size) == ((8, 8, 8), 2)
    mask = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    mask[1, 2, 3, 4] = mask[0, 7, 0, 0] = True
    few = vg.SparseTensor.from_dense(x.dense(), mask)
    assert few.coords.tolist() == [[0, 7, 0, 0], [1, 2, 3, 4]]
    assert torch.equal(few.features[1], x.dense()[1, :, 2, 3, 4])
    for grid, wrong, sentence in (
        (x.features, None, r"grid is float32 \[80, 4\]"),
        (x.dense(), mask[0], r"mask is bool \[8, 8, 8\], expected bool \[2, 8, 8, 8\]"),
        (x.dense(), mask.int(), "mask is int32"),
    ):
        with pytest.raises(vg.ArgumentError, match=sentence):
            vg.SparseTensor.from_dense(grid, wrong)


def test_gradients_of_dense(clouds):
    coords = clouds.random(6, extent=3)
    features = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    grid = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 2, 3, 2) > 0.5
    assert gradcheck(lambda f: vg.SparseTensor(f, coords).dense(), features)
    assert gradcheck(lambda g: vg.SparseTensor.from_dense(g, mask).features, grid)


def test_conversions(x):
    assert x.half().dtype == torch.float16 and x.bfloat16().dtype == torch.bfloat16
    assert x.double().float().dtype == torch.float32 and x.double().maps is x.maps
    assert x.cpu().device.type == "cpu"
    leaf = x.replace(x.features.clone().requires_grad_())
    assert not (leaf * 2).detach().features.requires_grad
    away = x.to("meta", torch.float64)
    assert (away.device.type, away.dtype, away.coords.dtype) == ("meta", torch.float64, torch.int32)
    assert (x.voxels, x.channels, x.device) == (80, 4, x.features.device)


def test_the_same_coordinates_are_the_same_on_another_device(x):
    there, other = x.to("meta"), (x * 2).to("meta")
    assert (there + other).maps is there.maps and not there.shares_coords(x)
    down = vg.nn.SparseConv3d(4, 4, 2, 2)(x)
    assert down.to("meta").stride == (2, 2, 2)
    assert copy.deepcopy(x).to("meta").voxels == 80
    watched = weakref.ref(there.coords)
    gc.collect()
    del there, other
    assert watched() is None


def test_what_a_repr_tells(x):
    assert repr(x.half()) == (
        f"SparseTensor(80 voxels, 4 channels, torch.float16, {x.device}, stride=(1, 1, 1), "
        "spatial_shape=(8, 8, 8), batch_size=2)"
    )


def test_copies(x):
    vg.nn.SubmConv3d(4, 4, 3)(x)
    for back in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), copy.copy(x)):
        assert torch.equal(back.features, x.features) and torch.equal(back.coords, x.coords)
        assert (back.spatial_shape, back.batch_size) == (x.spatial_shape, x.batch_size)
    one, other = pickle.loads(pickle.dumps((x, x * 2)))
    assert (one + other).maps is one.maps


def test_a_pytree_of_features_and_coordinates(x):
    leaves, spec = pytree.tree_flatten({"x": x})
    assert leaves[0] is x.features and leaves[1] is x.coords and len(leaves) == 2
    assert pytree.tree_unflatten(leaves, spec)["x"].maps is x.maps
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2 if t.is_floating_point() else t, x)
    assert doubled.maps is x.maps and torch.equal(doubled.features, 2 * x.features)
    down = vg.nn.SparseConv3d(4, 4, 2, 2)(x)
    moved = pytree.tree_map(lambda t: t.to("meta"), down)
    assert moved.coords.device.type == "meta" and moved.maps is not x.maps
    assert (moved.stride, moved.spatial_shape) == ((2, 2, 2), (4, 4, 4))


def test_specifications_compare_and_are_written(x):
    spec = pytree.tree_structure(x)
    same = vg.SparseTensor(torch.ones(3, 1), x.coords[:3], (8, 8, 8), 2)
    assert spec == pytree.tree_structure(same)
    assert spec != pytree.tree_structure(vg.nn.SparseConv3d(4, 4, 2, 2)(x))
    for back in (
        pytree.treespec_loads(pytree.treespec_dumps(spec)),
        copy.deepcopy(spec),
        pickle.loads(pickle.dumps(spec)),
    ):
        assert back == spec
        assert pytree.tree_unflatten([x.features, x.coords], back).spatial_shape == (8, 8, 8)


def test_specifications_keep_no_tensor_alive(clouds):
    gc.collect()
    x = random(clouds.random(30))
    spec, watched = pytree.tree_structure(x), weakref.ref(x.coords)
    del x
    assert watched() is None and spec.num_leaves == 2


def test_rows_of_padding_are_no_voxels(clouds):
    """Rows with the batch number that says so: not added, not dense, in no batch item."""
    coords = clouds.random(20, extent=4)
    padded = torch.cat([coords, torch.full_like(coords[:5], vg.functional.PADDING_BATCH)])
    x = random(padded, spatial_shape=(4, 4, 4))
    alone = vg.SparseTensor(x.features[:20], coords, (4, 4, 4))
    assert len(x) == 2 and torch.equal(x.dense(), alone.dense())
    for reduce in ("sum", "mean", "first"):
        assert by_voxel(x.unique(reduce)) == by_voxel(alone)
    assert [by_voxel(item) for item in x] == [by_voxel(item) for item in alone]
    assert by_voxel(x[1]) == by_voxel(alone[1]) and by_voxel(x[::-1]) == by_voxel(alone[::-1])
    assert by_voxel(vg.union_add(x, x.select(torch.arange(25)))) == by_voxel(alone * 2)
    assert by_voxel(vg.collate([x, x]).unique()) == by_voxel(vg.collate([alone, alone]))
    nothing = random(padded[20:])
    assert len(nothing) == 0 and list(nothing) == [] and nothing.unique().voxels == 0
