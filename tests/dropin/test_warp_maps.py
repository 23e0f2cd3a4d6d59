# SPDX-License-Identifier: Apache-2.0
"""warpconvnet's kernel maps, depthwise convolution and Voxels."""

from __future__ import annotations

import itertools

import torch
from pytest import fixture, mark, raises

import voxgemm as vg
from warpconvnet.geometry.coords.integer import IntCoords
from warpconvnet.geometry.coords.ops.batch_index import (
    batch_index_from_offset,
    batch_indexed_coordinates,
    offsets_from_batch_index,
)
from warpconvnet.geometry.coords.ops.expand import expand_coords
from warpconvnet.geometry.coords.ops.serialization import POINT_ORDERING, encode
from warpconvnet.geometry.coords.ops.stride import stride_coords
from warpconvnet.geometry.coords.search.packed_hashmap import PackedHashTable
from warpconvnet.geometry.coords.search.search_results import IntSearchResult
from warpconvnet.geometry.coords.search.torch_discrete import (
    generate_kernel_map,
    kernel_offsets_from_size,
)
from warpconvnet.geometry.coords.search.torch_hashmap import TorchHashTable
from warpconvnet.geometry.features.cat import CatFeatures
from warpconvnet.geometry.types.voxels import Voxels
from warpconvnet.nn.functional import (
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
)
from warpconvnet.nn.functional.sparse_conv import (
    generate_output_coords_and_kernel_map,
)
from warpconvnet.nn.modules import (
    SparseDepthwiseConv3d,
)

pytestmark = mark.usefixtures("warp_state")
F32, F64 = torch.float32, torch.float64


def triple(value, axes=3):
    return (value,) * axes if isinstance(value, int) else value


def coords_of(voxels: Voxels) -> torch.Tensor:
    return voxels.batch_indexed_coordinates.cpu()


@fixture
def pairs(scene):
    x = scene(5)
    _, _, found = generate_output_coords_and_kernel_map(x, 3, 1, 1)
    return x, found


@mark.parametrize("algorithm", ["explicit", "implicit"])
@mark.parametrize("kind", ["identity", "listed", "skip"])
def test_depthwise_is_a_loop_over_taps(kind, algorithm, pairs, randn):
    x, map = pairs
    assert map.identity_map_index == 13
    if kind == "listed":
        map = IntSearchResult(map.in_maps, map.out_maps, map.offsets)
    if kind == "skip":
        rows = x.batch_indexed_coordinates
        map = generate_kernel_map(rows, rows, 1, 3, skip_symmetric_kernel_map=True)
        assert len(map) == 13 and map.identity_map_index == 13
    # Whole numbers, of which every sum is exact.
    weight, features, dy = randn(27, 5).round(), x.features.round(), randn(len(x), 5).round()
    leaves = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = spatially_sparse_depthwise_conv(
        *leaves, map, len(x), fwd_algo=algorithm, bwd_algo=algorithm
    )
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = torch.zeros(len(x), 5, dtype=F64)
    for tap, (ins, outs) in enumerate(map):
        product = exact[0][ins.cpu().long()] * exact[1][tap]
        expected = expected.index_add(0, outs.cpu().long(), product)
    if kind == "skip":
        expected = expected + exact[0] * exact[1][13]
    assert torch.equal(out.cpu().double(), expected)
    found = torch.autograd.grad(out, leaves, dy)
    wanted = torch.autograd.grad(expected, exact, dy.cpu().double())
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.cpu().double(), b)
    only = spatially_sparse_depthwise_conv(
        leaves[0], weight, map, len(x), fwd_algo=algorithm, bwd_algo=algorithm
    )
    assert torch.autograd.grad(only.sum(), leaves[0])[0].shape == leaves[0].shape


def test_depthwise_gradcheck(pairs, randn):
    x, map = pairs
    leaves = [x.features.double().requires_grad_(), randn(27, 5, dtype=F64).requires_grad_()]
    for algorithm in ("explicit", "implicit"):

        def run(features, weight, algorithm=algorithm):
            return spatially_sparse_depthwise_conv(
                features, weight, map, len(x), fwd_algo=algorithm, bwd_algo=algorithm
            )

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@mark.parametrize("algorithm", ["explicit", "implicit"])
def test_depthwise_of_pairs_that_share_an_input(algorithm, randn, device):
    """A tap's outputs may all read one row; gradients are the adjoint, to any order."""
    ins, outs = torch.tensor([[1, 1, 1, 0, 1, 1, 4], [0, 1, 3, 2, 2, 0, 3]], device=device).int()
    map = IntSearchResult(ins, outs, torch.tensor([0, 4, 7]))
    leaves = [randn(5, 3, dtype=F64).requires_grad_(), randn(2, 3, dtype=F64).requires_grad_()]

    def run(*leaves):
        return spatially_sparse_depthwise_conv(
            *leaves, map, 4, fwd_algo=algorithm, bwd_algo=algorithm
        )

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@mark.parametrize("options", [{}, {"stride": 2}, {"generative": True}])
def test_depthwise_modules(options, scene):
    x = scene(6)
    x = x.replace(batched_features=x.features.round())
    module = SparseDepthwiseConv3d(6, 3, **options).to(x.device)
    with torch.no_grad():  # whole numbers, of which every sum is exact
        module.weight.copy_((module.weight * 20).round())
        module.bias.copy_((module.bias * 20).round())
    out = module(x)
    whole = torch.diag_embed(module.weight)
    expected = spatially_sparse_conv(x, whole, 3, bias=module.bias, **options)
    assert torch.equal(coords_of(out), coords_of(expected))
    assert torch.equal(out.features, expected.features) and bool(out.features.any())
    out.features.sum().backward()
    assert module.weight.grad.shape == (27, 6) and module.bias.grad.shape == (6,)


def test_kernel_maps_are_complete(oracle, scene):
    x, y = scene(seed=1), scene(seed=2)
    rows, outs = x.batch_indexed_coordinates, y.batch_indexed_coordinates
    for size, stride, dilation in ((3, 1, 1), (2, 2, 1), ((3, 1, 2), (1, 2, 1), 2)):
        size, stride, dilation = triple(size), triple(stride), triple(dilation)
        map = generate_kernel_map(rows, outs, stride, size, dilation)
        other = generate_kernel_map(rows, outs, stride, size, dilation, method="offset")
        expected = oracle(rows.cpu(), outs.cpu(), size, stride, dilation).nonzero().tolist()
        found = [
            (int(o), tap, int(i))
            for tap, pair in enumerate(map)
            for i, o in zip(*pair, strict=True)
        ]
        assert len(found) == len(set(found)) and sorted(map_ for map_ in found) == [
            tuple(row) for row in expected
        ]
        assert torch.equal(map.in_maps, other.in_maps) and map.identity_map_index is None
        for tap, (_, o) in enumerate(map):
            assert o.tolist() == sorted(o.tolist()) and map.numel(tap) == len(o)
        ins, distinct, begins = map.to_csr()
        assert int(begins[-1]) == len(ins) == len(map.in_maps)
        assert distinct.tolist() == sorted(set(map.out_maps.tolist()))
        count = map.neighbor_count_per_output(len(outs))
        assert int(count.sum()) == len(map.in_maps)
    one, _ = map.get_batch(0, 2)
    padded, _ = map.get_batch(0, 2, out_format="tensor")
    assert [row[row >= 0].tolist() for row in padded] == [row.tolist() for row in one]
    assert map.clone().offsets.device.type == "cpu" and len(map.clone()) == len(map)


def test_offsets_of_kernels(offsets_by_hand, device):
    found = kernel_offsets_from_size((3, 1, 2), (1, 1, 2), device=device)
    expected = [(0, *step) for step in offsets_by_hand((3, 1, 2), (1, 1, 2))]
    assert found.dtype == torch.int32 and found.tolist() == [list(row) for row in expected]
    assert kernel_offsets_from_size(3, 1).shape == (27, 4)


def test_identity_needs_the_same_rows_in_order(scene):
    x = scene()
    rows = x.batch_indexed_coordinates
    assert generate_kernel_map(rows, rows, 1, 3).identity_map_index == 13
    assert generate_kernel_map(rows, rows.flip(0), 1, 3).identity_map_index is None
    assert generate_kernel_map(rows, rows, 2, 3).identity_map_index is None
    with raises(vg.ArgumentError, match="one set"):
        generate_kernel_map(rows, rows[1:], 1, 3, skip_symmetric_kernel_map=True)


def test_voxels_of_every_form(scene, device):
    x = scene()
    counts = x.offsets.diff().tolist()
    coords, features = x.coordinate_tensor, x.feature_tensor
    forms = [
        Voxels(list(coords.split(counts)), list(features.split(counts))),
        Voxels(coords, features, x.offsets),
        Voxels(coords.long(), features, x.offsets.tolist(), device=device),
        Voxels(IntCoords(coords, x.offsets), CatFeatures(features, x.offsets)),
        Voxels(IntCoords(coords, x.offsets), features),
        Voxels(coords, x.batched_features.to_pad().batched_tensor, x.offsets).to_cat(),
    ]
    for form in forms:
        assert torch.equal(form.coordinate_tensor, coords) and form.coords.shape == (55, 4)
        assert torch.equal(form.feature_tensor, features) and form.coordinates.dtype == torch.int32
        assert form.offsets.tolist() == [0, 30, 30, 55] and form.offsets.device.type == "cpu"
        assert (form.batch_size, form.num_channels, form.num_spatial_dims, len(form)) == (
            3,
            4,
            3,
            55,
        )
        assert form.device == coords.device and form.dtype == F32
    assert torch.equal(x.coords[:, 0].cpu().bincount(minlength=3), torch.tensor([30, 0, 25]))
    assert len(x[1]) == 0 and torch.equal(x[2].features, features[30:])
    assert x.padded_features.batched_tensor.shape == (3, 30, 4)
    assert x.to_pad(16).features.shape == (3, 32, 4)


def test_voxels_that_cannot_be(device):
    coords = torch.zeros(3, 3, dtype=torch.int32, device=device)
    features = torch.zeros(3, 2, device=device)
    wrong = {
        "offsets is": lambda: Voxels(coords, features, [0, 2]),
        "offsets is .*0, 3, 2": lambda: Voxels(coords, features, [0, 3, 2]),
        "need offsets": lambda: Voxels(coords, features),
        "expected integers": lambda: Voxels(coords.float(), features, [0, 3]),
        "rows": lambda: Voxels([coords], [features[:2]]),
        "expected numbers of 32 bits": lambda: Voxels(coords.long() + 2**40, features, [0, 3]),
    }
    for text, make in wrong.items():
        with raises(ValueError, match=text):
            make()
    with raises(NotImplementedError):
        Voxels(coords, features, [0, 3]).to_point()


def test_extras_and_strides_are_carried(scene):
    x = scene()
    made = Voxels(
        x.coordinate_tensor, x.features, x.offsets, voxel_size=0.1, tensor_stride=2, tag=7
    )
    assert made.tensor_stride == made.stride == (2, 2, 2)
    other = made.replace(batched_features=made.features * 2)
    assert other.voxel_size == 0.1 and other.tag == 7 and other.tensor_stride == (2, 2, 2)
    assert other.cache is made.cache and other.extra_attributes["tag"] == 7
    assert made.replace_features(made.features).replace(tag=8).tag == 8
    with raises(AttributeError):
        made.unknown  # noqa: B018
    assert x.ordering is None and x.half().dtype == torch.float16 and x.double().dtype == F64


def test_dense_and_back(device):
    draw = torch.Generator().manual_seed(1)
    grid = torch.randn(3, 2, 4, 5, 6, generator=draw)
    grid[torch.rand(3, 4, 5, 6, generator=draw)[:, None].expand_as(grid) < 0.7] = 0
    grid[1] = 0
    grid = grid.to(device)
    x = Voxels.from_dense(grid)
    assert x.batch_size == 3 and x.offsets.tolist()[1] == x.offsets.tolist()[2]
    assert torch.equal(coords_of(x), coords_of(x).unique(dim=0))
    assert torch.equal(x.to_dense(spatial_shape=(4, 5, 6)), grid)
    assert torch.equal(x.to_dense(channel_dim=-1, spatial_shape=(4, 5, 6)), grid.movedim(1, -1))
    last = Voxels.from_dense(grid.movedim(1, -1), dense_tensor_channel_dim=-1)
    assert torch.equal(last.features, x.features)
    part = x.to_dense(min_coords=(1, 1, 1), max_coords=(2, 3, 4))
    assert torch.equal(part, grid[:, :, 1:3, 1:4, 1:5])
    target = Voxels.from_dense(torch.ones_like(grid))
    same = Voxels.from_dense(grid, target_spatial_sparse_tensor=target)
    assert torch.equal(same.to_dense(), grid)
    inner = Voxels.from_dense(grid, target_spatial_sparse_tensor=target, dense_max_coords=(1, 4, 5))
    assert torch.equal(inner.to_dense()[:, :, :2], grid[:, :, :2])
    assert int(inner.to_dense()[:, :, 2:].count_nonzero()) == 0
    shifted = Voxels(x.coordinate_tensor - 3, x.features, x.offsets)
    assert torch.equal(shifted.to_dense(), x.to_dense())
    assert Voxels.from_dense(grid[:, :, 0]).num_spatial_dims == 2


def test_rows_chosen_and_ordered(scene, device):
    x = scene()
    twice = Voxels(
        [torch.cat([x[b].coordinate_tensor, x[b].coordinate_tensor[:4]]) for b in range(3)],
        [torch.cat([x[b].features, x[b].features[:4] + 1]) for b in range(3)],
    )
    once = twice.unique()
    assert torch.equal(once.coords, x.coords) and torch.equal(once.features, x.features)
    for order in POINT_ORDERING:
        turned = x.sort(order)
        assert turned.offsets.tolist() == x.offsets.tolist()
        if order == POINT_ORDERING.RANDOM:
            assert torch.equal(turned.coords, x.coords)
            continue
        assert turned.ordering == order and turned.sort(order) is turned
        codes = encode(turned.coords, order=order)
        for b in range(3):
            begin, end = x.offsets[b : b + 2].tolist()
            assert codes[begin:end].tolist() == sorted(codes[begin:end].tolist())
        rows = {tuple(c): f for c, f in zip(coords_of(x).tolist(), x.features, strict=True)}
        expected = torch.stack([rows[tuple(c)] for c in coords_of(turned).tolist()])
        assert torch.equal(turned.features, expected)
    codes, permutation, inverse = encode(
        x.coordinate_tensor, x.offsets, POINT_ORDERING.MORTON_YXZ, True, True
    )
    assert torch.equal(permutation[inverse], torch.arange(55, device=device))


def test_wide_integers_are_refused(device):
    """Beyond 32 bits; some functions took them for other voxels."""
    wide = torch.tensor([[1, 2, 3], [1, 2**32 + 2, 3]], device=device)
    offsets = torch.tensor([0, 2])
    said = r"row 1 of .* is \[1, 4294967298, 3\], expected numbers of 32 bits"
    for call in (
        lambda: encode(wide),
        lambda: encode(wide, offsets),
        lambda: batch_indexed_coordinates(wide, offsets),
        lambda: IntCoords(wide, offsets),
    ):
        with raises(ValueError, match=said):
            call()
    batches = torch.tensor([[2**32, 1, 2, 3]], device=device)
    with raises(ValueError, match=r"row 0 of .* is \[4294967296, 1, 2, 3\]"):
        encode(batches)
    assert torch.equal(encode(wide[:1].repeat(2, 1), offsets), encode(wide[:1].int().repeat(2, 1)))
    with raises(ValueError, match="offsets is .0, 1., expected ascending from 0 to 2"):
        encode(wide.int(), torch.tensor([0, 1]))


def test_arithmetic(scene):
    x = scene()
    f = x.features
    two = torch.tensor([2.0], device=f.device)
    cases = [(x + 1, f + 1), (x - x, f - f), (x * f, f * f), (x / 2, f / 2), (x // two, f // 2)]
    cases += [(x % 2, f % 2), (x**2, f**2), (1 + x, 1 + f), (1 - x, 1 - f), (2 / x, 2 / f)]
    for actual, expected in cases:
        assert isinstance(actual, Voxels) and torch.equal(actual.features, expected)
        assert actual.offsets.tolist() == x.offsets.tolist()
    with raises(ValueError, match="other operand"):
        x + f[:3]


def test_coordinate_functions(scene, device):
    x = scene()
    rows = x.batch_indexed_coordinates
    coarse, offsets = stride_coords(rows, 2)
    expected = rows.cpu().div(torch.tensor([1, 2, 2, 2]), rounding_mode="floor").unique(dim=0)
    assert torch.equal(coarse.cpu(), expected) and int(offsets[-1]) == len(coarse)
    grown, _ = expand_coords(rows, 2, 1)
    steps = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    steps = torch.nn.functional.pad(steps, (1, 0))
    assert torch.equal(grown.cpu(), (rows.cpu()[:, None] + steps).flatten(0, 1).unique(dim=0).int())
    index = batch_index_from_offset(x.offsets)
    assert index.tolist() == [0] * 30 + [2] * 25
    assert offsets_from_batch_index(index, 5).tolist() == [0, 30, 30, 55, 55, 55]
    assert torch.equal(batch_indexed_coordinates(x.coordinate_tensor, x.offsets), rows)
    for table in (TorchHashTable.from_keys(rows), PackedHashTable.from_coords(rows)):
        assert table.search(rows).tolist() == list(range(55))
        assert table.search(rows + 100).tolist() == [-1] * 55
    assert x.coordinate_hashmap.search(rows[3:5]).tolist() == [3, 4]
