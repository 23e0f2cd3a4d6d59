# SPDX-License-Identifier: Apache-2.0
"""What only a CUDA device has: streams, graphs, no waiting. Other tests run there by `device`."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch
from torch import nn

import voxgemm as vg
from voxgemm.functional import Geometry, conv3d, inverse_conv3d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none")

SUBM = Geometry.submanifold((3, 3, 3), (1, 1, 1))
DOWN = Geometry((3, 3, 3), (2, 2, 2), (1, 1, 1))
OPERATIONS = ("submanifold", "strided", "inverse")
# About a second: longer than the host needs for what it then queues.
LONG = 2_000_000_000


@pytest.fixture
def device():
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


def make_map(operation, coords):
    if operation == "submanifold":
        return vg.functional.submanifold_map(coords, SUBM)
    down = vg.functional.strided_map(coords, vg.output_coords(coords, DOWN), DOWN)
    return down.transposed() if operation == "inverse" else down


def make_operands(map, c_in, c_out, dtype=torch.float32, seed=0):
    """x, weight, bias and dy of a map, all wanting gradients but dy."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((map.n_in, c_in), (c_out, *map.geometry.size, c_in), (c_out,), (map.n_out, c_out))
    tensors = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    x, weight, bias, dy = (t.to(map.neighbours.device) for t in tensors)
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()], dy


def run(map, operands, dy, **options):
    """The result and the three gradients."""
    y = conv3d(*operands, map, **options)
    return [y.detach(), *torch.autograd.grad(y, operands, dy)]


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@contextlib.contextmanager
def no_waiting(device):
    """Whatever the body queues is queued before the device has finished what it had to do."""
    torch.cuda.synchronize(device)
    busy = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not busy.query(), "the host waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)


def test_waiting_is_noticed(device):
    with pytest.raises(AssertionError, match="waited"), no_waiting(device):
        torch.cuda.synchronize(device)


@pytest.fixture(scope="module")
def cloud():
    """Two batch items that fill a third of their box: all kinds of tap masks, some tiles."""
    draw = torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(*[torch.arange(n) for n in (2, 20, 18, 15)]).int()
    return every[torch.randperm(len(every), generator=draw)[: len(every) // 3]]


def in_float64(map):
    """The layer as a reference: tensors of the CPU in and out, whatever the map's device."""
    where = map.neighbours.device
    return lambda *operands: conv3d(*(t.to(where) for t in operands), map).cpu()


CHANNELS = ((1, 1), (3, 5), (16, 16), (17, 33), (32, 64), (64, 64), (96, 48), (128, 128))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_results_and_gradients(channels, operation, cloud, device, against):
    """Every dtype and precision against float64, of few channels on the CPU."""
    there = make_map(operation, cloud.to(device))
    here = make_map(operation, cloud) if max(channels) < 40 else there
    operands, _ = make_operands(there, *channels)
    modes = [(dtype, "ieee") for dtype in vg.functional.DTYPES]
    modes += [(torch.float32, precision) for precision in vg.functional.PRECISIONS[1:]]
    for dtype, precision in modes:
        against(
            lambda x, w, b, p=precision: conv3d(x, w, b, there, precision=p),
            in_float64(here),
            [t.detach().to(dtype) for t in operands],
            max(27 * max(channels), there.n_in, there.n_out) + 1,
            precision,
        )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kernel_of_a_layer(operation, cloud, device, against):
    """Whatever explain() says could run, by its full name and by its algorithm."""
    there = make_map(operation, cloud.to(device))
    operands, _ = make_operands(there, 64, 64)
    seen = set()
    for dtype in vg.functional.DTYPES:
        tables = vg.functional.explain(there, 64, 64, dtype)
        for number, name_of_pass in enumerate(vg.functional.PASSES):
            part = tables[tables.index(f"{name_of_pass} ") :]
            if number < 2:
                part = part[: part.index(f"\n{vg.functional.PASSES[number + 1]} ")]
            for line in part.splitlines()[1:]:
                if "no: " in line or not line.strip():
                    continue
                name = line[3:].split()[0]
                seen.add(name)
                against(
                    lambda x, w, b, a={name_of_pass: name}: conv3d(x, w, b, there, a),
                    in_float64(there),
                    [t.detach().to(dtype) for t in operands],
                    max(27 * 64, there.n_in, there.n_out) + 1,
                )
    assert len(seen) >= len(vg.functional.DTYPES)


@pytest.mark.parametrize("shift", [0, -9, 2**31 - 40], ids=["", "negative", "extreme"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_coordinates_and_maps_equal_the_cpus(repeats, shift, cloud, device):
    coords = cloud[:2000].repeat(repeats, 1)
    coords[:, 1:] += shift
    for a, b in zip(vg.unique(coords), vg.unique(coords.to(device)), strict=True):
        assert torch.equal(a, b.cpu())
    for rule in vg.functional.OUTPUT_RULES:
        ours = vg.output_coords(coords.to(device), DOWN, rule)
        assert torch.equal(vg.output_coords(coords, DOWN, rule), ours.cpu())
    for operation in OPERATIONS:
        theirs, ours = make_map(operation, coords), make_map(operation, coords.to(device))
        ours.settle(wait=True)
        assert ours.pairs == theirs.pairs
        assert same(theirs.tensors(), [t.cpu() for t in ours.tensors()])


@pytest.mark.parametrize("dtype", vg.functional.DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_repeats_and_side_streams_give_the_same_bits(operation, dtype, cloud, device):
    coords = cloud.to(device)
    map = make_map(operation, coords)
    operands, dy = make_operands(map, 64, 48, dtype)
    expected = run(map, operands, dy)
    load = torch.randn(2048, 2048, device=device)
    for _ in range(5):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        load @ load  # beside which the side stream runs
        with torch.cuda.stream(side):
            again = run(make_map(operation, coords), operands, dy)
        side.synchronize()
        assert same(again, expected)


def test_work_is_on_the_callers_stream(cloud, device):
    map = make_map("submanifold", cloud.to(device))
    operands, dy = make_operands(map, 16, 16)
    expected = run(map, operands, dy)
    side, busy = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    busy.record()
    with torch.cuda.stream(side):
        results = run(map, operands, dy)
    side.synchronize()
    assert not busy.query(), "something ran on another stream than the current one"
    assert same(results, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_pass_waits_for_the_device(operation, cloud, device):
    map = make_map(operation, cloud.to(device))
    operands, dy = make_operands(map, 64, 64, torch.float16)
    expected = run(map, operands, dy)
    with no_waiting(device):
        results = run(map, operands, dy)
    assert same(results, expected)


def test_a_submanifold_layer_waits_for_nothing_in_its_forward(cloud, device):
    """Its map included."""
    coords, features = cloud.to(device), torch.randn(len(cloud), 16, device=device)
    net = vg.nn.Sequential(vg.nn.SubmConv3d(16, 16, 3), nn.ReLU(), vg.nn.SubmConv3d(16, 16, 5))
    net.to(device)
    with torch.no_grad():
        expected = net(vg.SparseTensor(features, coords)).features
        with no_waiting(device):
            y = net(vg.SparseTensor(features, coords)).features
    assert torch.equal(y, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_host_threads(operation, cloud, device):
    """Each its own stream, its own maps, and all of them one shared map."""
    coords = cloud.to(device)
    shared = make_map(operation, coords)
    operands, dy = make_operands(shared, 32, 32)
    expected = run(shared, operands, dy)
    # A map's schedules are made on the stream of their first use, like any tensor.
    torch.cuda.synchronize()
    failures = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for map in (shared, make_map(operation, coords), shared):
                for _ in range(10):
                    if not same(run(map, operands, dy), expected):
                        failures.append(map)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@two_gpus
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_current_device_does_not_matter(operation, cloud):
    results = []
    for index in range(2):
        map = make_map(operation, cloud.to(f"cuda:{index}"))
        results.append(run(map, *make_operands(map, 32, 32)))
        assert torch.cuda.current_device() == 0
        assert all(t.device.index == index for t in results[-1])
    assert same([t.cpu() for t in results[0]], [t.cpu() for t in results[1]])


@two_gpus
def test_two_gpus_are_not_mixed(cloud):
    map = make_map("submanifold", cloud.to("cuda:0"))
    operands, _ = make_operands(map, 4, 4)
    with pytest.raises(vg.ArgumentError, match="cuda:1"):
        conv3d(operands[0].to("cuda:1"), *operands[1:], map)


def refuse(*words, kind=vg.ArgumentError):
    """Raises with all of the words, in any order."""
    return pytest.raises(kind, match="".join(f"(?=.*{word})" for word in words))


def test_devices_are_not_mixed(cloud, device):
    map = make_map("submanifold", cloud.to(device))
    (x, weight, bias), _ = make_operands(map, 4, 4)
    with refuse("cpu", "cuda:0"):
        conv3d(x.cpu(), weight, bias, map)
    with refuse("cpu", "cuda:0"):
        conv3d(x, weight.cpu(), bias, map)
    with refuse("cpu", "cuda:0"):
        conv3d(x, weight, bias.cpu(), map)
    with refuse("features is on cuda:0, the map on cpu"):
        conv3d(x, weight, bias, make_map("submanifold", cloud))
    with refuse("features is on cpu, the map on cuda:0"):
        conv3d(x.cpu(), weight.cpu(), bias.cpu(), map)
    with refuse("features is on cpu, coords on cuda:0"):
        vg.SparseTensor(x.cpu(), cloud.to(device))
    with refuse("cpu|cuda:0|different devices"):
        vg.build_map(cloud.to(device), 3, out_coords=cloud)


def test_dtypes_are_not_mixed(cloud, device):
    map = make_map("submanifold", cloud.to(device))
    (x, weight, bias), _ = make_operands(map, 4, 4)
    with refuse("x has dtype f16, expected f32"):
        conv3d(x.half(), weight, bias, map)
    with refuse("expected int32"):
        vg.SparseTensor(x, cloud.to(device).long())
    with refuse("Byte|dtype"):
        conv3d(x.byte(), weight.byte(), bias.byte(), map)
    with refuse("precision is 'half', expected one of ieee, tf32"):
        conv3d(x, weight, bias, map, precision="half")


def test_first_rows_are_kept_only_where_voxels_repeat(cloud, device):
    once, twice = cloud[:300].to(device), cloud[:300].repeat(2, 1).to(device)
    for coords, rows in ((once, 0), (twice, 600)):
        map = make_map("submanifold", coords)
        assert len(map.in_first) == 2 * 300 or len(map.in_first) == 300
        map.settle(wait=True)
        assert len(map.in_first) == len(map.out_first) == rows
    strided = vg.build_map(twice, 2, out_coords=vg.output_coords(twice, DOWN), stride=2)
    strided.settle(wait=True)
    assert (len(strided.in_first), len(strided.out_first)) == (600, 0)
    back = vg.build_map(twice, 2, out_coords=vg.output_coords(twice, DOWN), stride=2).transposed()
    back.settle(wait=True)
    assert (len(back.in_first), len(back.out_first)) == (0, 600)


def test_a_box_too_wide_for_a_map_is_an_error(device):
    lowest, highest = -(2**31), 2**31 - 1
    rows = [[0, lowest, lowest, lowest], [0, highest, highest, highest]]
    coords = torch.tensor(rows, dtype=torch.int32, device=device)
    map = vg.build_map(coords, 3)
    with refuse("2\\^63 bricks"):
        map.settle(wait=True)
    with refuse("2\\^63 bricks"):
        _ = vg.build_map(coords, 3).pairs
    net = vg.nn.SubmConv3d(2, 2, 3, device=device)
    with refuse("2\\^63 bricks"):
        net(vg.SparseTensor(torch.ones(2, 2, device=device), coords)).features.sum().backward()


def test_precision_follows_torchs_switch(cloud, device):
    map = make_map("submanifold", cloud.to(device))
    operands, dy = make_operands(map, 64, 64)
    by_name = {name: run(map, operands, dy, precision=name) for name in vg.functional.PRECISIONS}
    assert all(
        not torch.equal(by_name[a][0], by_name[b][0]) for a, b in itertools.combinations(by_name, 2)
    )
    assert same(run(map, operands, dy), by_name["ieee"])
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    try:
        flags.fp32_precision = "tf32"
        assert same(run(map, operands, dy), by_name["tf32"])
    finally:
        flags.fp32_precision = before


class Network(nn.Module):
    """A layer of every kind, maps given."""

    def __init__(self, channels=32):
        super().__init__()
        torch.manual_seed(0)
        self.stem = vg.nn.SubmConv3d(8, channels, 3)
        self.down = vg.nn.SparseConv3d(channels, channels, 3, 2, 1)
        self.up = vg.nn.SparseInverseConv3d(channels, channels, 3)
        self.norm = nn.BatchNorm1d(channels)
        self.head = nn.Linear(channels, 4)

    def forward(self, features, same, down):
        y = conv3d(features, self.stem.weight, self.stem.bias, same)
        y = torch.relu(self.norm(y))
        z = torch.relu(conv3d(y, self.down.weight, self.down.bias, down))
        return self.head(y + inverse_conv3d(z, self.up.weight, self.up.bias, down))


def maps_of(coords, coarse):
    return (
        vg.functional.submanifold_map(coords, SUBM),
        vg.functional.strided_map(coords, coarse, DOWN),
    )


class Step:
    """A training step on tensors that stay where they are."""

    def __init__(self, device, rows, dtype):
        self.net = Network().to(device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9)
        self.features = torch.zeros(rows, 8, device=device)
        self.target = torch.zeros(rows, 4, device=device)
        self.dtype = dtype

    def fill(self, seed):
        draw = torch.Generator().manual_seed(seed)
        for tensor in (self.features, self.target):
            tensor.copy_(torch.randn(tensor.shape, generator=draw))

    def __call__(self, maps):
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            y = self.net(self.features, *maps)
        loss = (y.float() - self.target).square().mean()
        # Gradients that are None would be allocated inside a graph, those set to zero are not.
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self):
        return [p.detach().clone() for p in self.net.parameters()]


def captured(function, warm_up=2):
    """(graph, its results); the function has run before on a side stream, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_forward_is_replayed_with_other_features(operation, dtype, cloud, device):
    map = make_map(operation, cloud.to(device))
    (x, weight, bias), _ = make_operands(map, 32, 48, dtype)
    with torch.no_grad():
        static = x.clone()
        graph, y = captured(lambda: conv3d(static, weight, bias, map))
        for seed in (1, 2):
            other = make_operands(map, 32, 48, dtype, seed)[0][0]
            static.copy_(other)
            graph.replay()
            assert torch.equal(y, conv3d(other, weight, bias, map))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_replayed(dtype, cloud, device):
    """Other features and targets each time; the same weights as eager steps, bit for bit."""
    coords = cloud.to(device)
    maps = maps_of(coords, vg.output_coords(coords, DOWN))
    replayed, eager = (Step(device, len(coords), dtype) for _ in range(2))
    replayed.fill(0)
    eager.fill(0)
    graph, loss = captured(lambda: replayed(maps))
    for _ in range(2):  # those of the warm-up; what is captured is not run
        eager(maps)
    for seed in range(1, 4):
        replayed.fill(seed)
        graph.replay()
        eager.fill(seed)
        assert torch.equal(eager(maps), loss)
    assert same(replayed.state(), eager.state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_replayed_with_other_coordinates(dtype, cloud, device):
    """As many rows as before: the maps and schedules are built inside the graph."""
    clouds = []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        coords = cloud[torch.randperm(len(cloud), generator=draw)[:1500]].to(device)
        coords[:, 1:] -= 7 * seed
        clouds.append((coords, vg.output_coords(coords, DOWN)[:900]))
    static = [t.clone() for t in clouds[0]]
    replayed, eager = (Step(device, 1500, dtype) for _ in range(2))
    replayed.fill(0)
    eager.fill(0)
    graph, loss = captured(lambda: replayed(maps_of(*static)))
    for _ in range(2):
        eager(maps_of(*clouds[0]))
    for seed, other in enumerate(clouds):
        for tensor, values in zip(static, other, strict=True):
            tensor.copy_(values)
        replayed.fill(seed)
        graph.replay()
        eager.fill(seed)
        assert torch.equal(eager(maps_of(*other)), loss)
    assert same(replayed.state(), eager.state())


def test_what_must_wait_says_so_in_a_capture(cloud, device):
    """And leaves the capture intact."""
    coords = cloud.to(device)
    static = torch.zeros(4, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static += 1
        with pytest.raises(NotImplementedError, match="the stream is being captured into a graph"):
            vg.output_coords(coords, DOWN)
        static += 1
    graph.replay()
    assert static.tolist() == [2] * 4


def test_autocast_and_loss_scaling(cloud, device):
    """A small network learns under f16 as it does in f32."""
    coords = cloud.to(device)
    maps = maps_of(coords, vg.output_coords(coords, DOWN))
    features = torch.randn(len(coords), 8, device=device)
    target = torch.tanh(features[:, :4] * 2)
    losses = {}
    for dtype in (torch.float32, torch.float16):
        net = Network().to(device)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        losses[dtype] = []
        for _ in range(30):
            with torch.autocast("cuda", dtype, enabled=dtype == torch.float16):
                y = net(features, *maps)
            loss = (y.float() - target).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[dtype].append(float(loss))
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
        assert losses[dtype][-1] < 0.5 * losses[dtype][0]


def test_memory_comes_back(cloud, device):
    """Maps, schedules and what passes use in between are torch's memory, freed with their owner."""
    coords = cloud.to(device)
    features = torch.randn(len(coords), 16, device=device)
    net = vg.nn.Sequential(
        vg.nn.SubmConv3d(16, 16, 3), vg.nn.SparseConv3d(16, 16, 2, 2), vg.nn.SubmConv3d(16, 16, 3)
    ).to(device)
    allocated = []
    for _ in range(4):
        net(vg.SparseTensor(features, coords)).features.sum().backward()
        net.zero_grad()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1] == allocated[2] == allocated[3]


def test_tensors_move_between_devices(cloud, device):
    x = vg.SparseTensor(torch.randn(len(cloud), 4), cloud, (20, 18, 15))
    net = vg.nn.SubmConv3d(4, 4, 3, dtype=torch.float64)
    expected = net(x.to(torch.float64)).features
    moved = x.to(device, torch.float64)
    assert moved.coords.device == device and moved.spatial_shape == x.spatial_shape
    back = net.to(device)(moved).to("cpu")
    assert back.coords.device.type == "cpu"
    torch.testing.assert_close(back.features, expected)


def test_info_names_the_device():
    info = vg.info()
    assert info["gpus"] == [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    assert "cuda" in info["backends"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strided_network_is_replayed_with_other_coordinates(dtype, cloud, device):
    """The whole step, output coordinates included; as many rows as room for them, padded."""
    rows, room = 2000, 1500
    coords = torch.zeros(rows, 4, dtype=torch.int32, device=device)
    features = torch.zeros(rows, 8, device=device, dtype=dtype)

    def fill(seed, count):
        draw = torch.Generator().manual_seed(seed)
        coords.zero_()
        coords[:, 0] = vg.PADDING_BATCH
        coords[:count] = cloud[torch.randperm(len(cloud), generator=draw)[:count]].to(device)
        coords[:count, 1:] -= 7 * seed
        features.copy_(torch.randn(features.shape, generator=draw))

    torch.manual_seed(0)
    net = vg.nn.Sequential(
        vg.nn.SubmConv3d(8, 16, 3),
        torch.nn.ReLU(),
        vg.nn.SparseConv3d(16, 16, 2, 2, max_voxels=room),
        vg.nn.SubmConv3d(16, 16, 3),
        torch.nn.ReLU(),
        vg.nn.SparseInverseConv3d(16, 8, 2),
    ).to(device, dtype)
    parameters = list(net.parameters())

    def step():
        y = net(vg.SparseTensor(features, coords))
        # Padding has no part in the loss.
        voxels = (coords[:, :1] != vg.PADDING_BATCH).float()
        loss = (y.features.float().square() * voxels).sum()
        return loss, y, torch.autograd.grad(loss, parameters)

    fill(0, 900)
    graph, (loss, y, gradients) = captured(step)
    for seed, count in ((1, 900), (2, 1100), (3, 1)):
        fill(seed, count)
        graph.replay()
        y.maps.settle()
        eager_loss, eager, expected = step()
        assert torch.equal(loss, eager_loss)
        assert torch.equal(y.features, eager.features)
        assert same(gradients, expected)
    fill(4, rows)
    coords[:, 1:] *= 8  # as many output voxels as rows
    graph.replay()
    with pytest.raises(vg.ArgumentError, match=r"found at least \d+ voxels, max_voxels is 1500"):
        y.maps.settle()
