# SPDX-License-Identifier: Apache-2.0
"""What `voxgemm bench --suite h200` holds its times against: numbers only.

Milliseconds, measured on one H200, 2026-11: medians after warm-up on random data, maps reused
unless the row is a map's. Peers are FlexGEMM (its torch.compile dialect, fully tuned), spconv
2.3.8, WarpConvNet 1.8.2 and torchsparse 2.1, each in its fastest mode and in f16 unless said
otherwise. `reach` is what this library sets out for, `stretch` what would be better still.
"""

from __future__ import annotations

from typing import NamedTuple

# A torch.mm 8192^3 in bf16 on one H200.
DENSE_TFLOPS = 790.0


class Figures(NamedTuple):
    reach: float
    peers: dict[str, float] = {}
    stretch: float | None = None


class Shell(NamedTuple):
    """3^3 submanifold in 16 bits; of forward, grad_input, grad_weight and step, or as named."""

    reach: tuple[float, float, float, float]
    stretch: float  # step
    flexgemm: tuple[float, float, float, float]
    spconv: tuple[float, float] | None = None  # forward, step
    warpconvnet: tuple[float, float] | None = None
    torchsparse: tuple[float, float] | None = None


# fmt: off
SHELLS = {  # (RES, channels)
    (8, 1024): Shell((0.020, 0.020, 0.040, 0.12), 0.09, (0.078, 0.56, 0.28, 0.918)),
    (16, 1024): Shell((0.055, 0.055, 0.07, 0.21), 0.17, (0.161, 0.15, 0.25, 0.558),
                      (0.239, 0.739), (0.369, 1.80), (0.366, 4.65)),
    (32, 1024): Shell((0.20, 0.20, 0.20, 0.63), 0.54, (0.422, 0.47, 0.30, 1.191),
                      (0.659, 2.17), (0.848, 3.59), (0.959, 6.09)),
    (64, 1024): Shell((0.63, 0.63, 0.64, 1.95), 1.75, (1.518, 1.52, 1.11, 4.148),
                      (2.17, 7.58), (1.97, 8.08), (3.05, 12.3)),
    (128, 512): Shell((0.67, 0.67, 0.67, 2.05), 1.85, (1.242, 1.12, 1.49, 3.855),
                      (1.99, 7.17), (2.63, 9.54), (3.12, 10.5)),
    (256, 256): Shell((0.62, 0.62, 0.66, 1.95), 1.8, (1.161, 1.07, 1.54, 3.772),
                      (1.74, 6.70), (2.94, 10.8), (3.21, 10.5)),
    (512, 128): Shell((0.72, 0.72, 0.75, 2.25), 2.0, (1.524, 1.10, 2.18, 4.809),
                      (1.80, 7.39), (3.35, 12.4), (3.45, 13.0)),
    (1024, 64): Shell((1.2, 1.2, 1.25, 3.75), 3.0, (2.566, 1.74, 4.63, 8.942),
                      (2.29, 11.5), (4.55, 17.7), (4.29, 19.9)),
    (64, 128): Shell((0.020, 0.020, 0.025, 0.10), 0.07, (0.095, 0.16, 0.43, 0.678),
                     (0.055, 0.596), (0.133, 0.699), (0.097, 0.324)),
    (128, 64): Shell((0.028, 0.028, 0.035, 0.12), 0.09, (0.053, 0.08, 0.59, 0.723),
                     (0.052, 0.588), (0.152, 0.770), (0.094, 0.342)),
    (256, 32): Shell((0.050, 0.050, 0.060, 0.18), 0.15, (0.073, 0.12, 0.39, 0.587),
                     (0.101, 0.669), (0.225, 0.928), (0.194, 0.921)),
    (512, 32): Shell((0.17, 0.17, 0.20, 0.56), 0.48, (0.265, 0.26, 0.48, 1.000),
                     (0.353, 2.24), (0.831, 3.77), (0.655, 4.24)),
}
# fmt: on

# Steps with f32 operands: bf16x3 against the peers' TF32 (WarpConvNet rounds its operands to f16),
# which is less accurate. No peer's figure stands beside bf16x6, whose reach is 2.2 times that of
# bf16x3.
F32_STEPS = {  # (RES, channels): bf16x3, FlexGEMM, spconv, WarpConvNet
    (64, 1024): (6.0, 14.1, 18.1, 11.9),
    (128, 512): (6.2, 13.6, 16.3, 13.5),
    (256, 256): (6.0, 12.5, 15.9, 14.8),
    (512, 128): (6.8, 14.0, 17.6, 19.4),
    (1024, 64): (10.0, 17.9, 20.1, 29.9),
}
BF16X6 = 2.2
# Forward in tf32: half the 16-bit rate, which holds where arithmetic is the limit.
TF32_FORWARD = {  # (RES, channels): reach, FlexGEMM
    (64, 1024): (1.26, 2.95),
    (128, 512): (1.34, 2.54),
    (256, 256): (1.24, 2.22),
    (512, 128): (1.44, 2.55),
    (1024, 64): (2.4, 4.04),
}
# k3 s2 p1, spconv: output set with map, forward, step. The reach is half of each.
STRIDED = {(256, 64): (0.530, 0.075, 0.421), (512, 32): (1.285, 0.183, 0.940)}
# 3^3 submanifold, everything that a training step needs. RES: channels whose schedules are made
# too, reach, peers. 1600 has 10 million voxels.
MAPS = {
    64: (1024, 0.04, {"FlexGEMM": 0.15, "spconv": 0.11}),
    128: (512, 0.05, {"FlexGEMM": 0.29, "spconv": 0.15}),
    256: (256, 0.07, {"FlexGEMM": 0.33, "spconv": 0.23}),
    512: (128, 0.15, {"FlexGEMM": 0.73, "spconv": 0.61}),
    1024: (
        64,
        0.45,
        {"FlexGEMM": 2.93, "spconv": 2.90, "WarpConvNet": 5.1, "torchsparse": 5.2},
    ),
    1600: (64, 1.0, {}),
}
# A LiDAR sweep of up to 100k voxels: forward by channels, and the map.
STREET_FORWARD = {64: 0.015, 128: 0.040}
STREET_MAP = 0.06

_STEPS = ("forward", "grad_input", "grad_weight", "step")


def suite() -> list[str]:
    """The problems of `--suite h200`, those of one cloud after each other."""
    problems = []
    for (res, c), _ in sorted(SHELLS.items()):
        problems += [f"{work} f16 subm3 {c}->{c} shell:{res}" for work in _STEPS]
        if (res, c) in F32_STEPS:
            problems.append(f"forward tf32 subm3 {c}->{c} shell:{res}")
            problems += [f"step {p} subm3 {c}->{c} shell:{res}" for p in ("bf16x3", "bf16x6")]
    for res, (c, *_) in MAPS.items():
        problems.append(f"map f16 subm3 {c}->{c} shell:{res}")
    for res, c in STRIDED:
        works = ("map", "forward", "step")
        problems += [f"{work} f16 conv3s2p1 {c}->{c} shell:{res}" for work in works]
    problems += [f"forward f16 subm3 {c}->{c} street" for c in STREET_FORWARD]
    problems.append("map f16 subm3 64->64 street")
    places = {where: k for k, where in enumerate(dict.fromkeys(p.split()[-1] for p in problems))}
    return sorted(problems, key=lambda problem: places[problem.split()[-1]])


# Every geometry of a map on shells of 10 thousand voxels to 10 million.
_MAP_OPERATIONS = ("subm3", "subm3d2", "subm5", "conv2s2", "conv3s2p1", "conv3p1", "inv2s2")
_MAP_SHELLS = (51, 128, 256, 512, 1024, 1600)


def map_suite() -> list[str]:
    """The problems of `--suite maps`."""
    return [f"map f16 {o} 64->64 shell:{res}" for res in _MAP_SHELLS for o in _MAP_OPERATIONS]


def figures(text: str) -> Figures | None:
    """What a problem of the suite should reach; None of any other problem."""
    work, dtype, operation, channels, cloud = text.split()
    c_in, _, c_out = channels.partition("->")
    if c_in != c_out:
        return None
    where, c = cloud, int(c_in)
    if where == "street" and dtype in ("f16", "bf16") and operation == "subm3":
        reach = STREET_MAP if work == "map" else STREET_FORWARD.get(c)
        return Figures(reach) if reach and work in ("map", "forward") else None
    if not where.startswith("shell:"):
        return None
    res = int(where.removeprefix("shell:"))
    if operation == "conv3s2p1" and (res, c) in STRIDED and dtype in ("f16", "bf16"):
        peer = dict(zip(("map", "forward", "step"), STRIDED[res, c], strict=True)).get(work)
        return Figures(peer / 2, {"spconv": peer}) if peer else None
    if operation != "subm3":
        return None
    if work == "map":
        return Figures(*MAPS[res][1:]) if res in MAPS else None
    if dtype in ("f16", "bf16"):
        return _of_shell((res, c), work)
    return _of_f32((res, c), work, dtype)


def _of_shell(place: tuple[int, int], work: str) -> Figures | None:
    if place not in SHELLS or work not in _STEPS:
        return None
    shell, number = SHELLS[place], _STEPS.index(work)
    peers = {"FlexGEMM": shell.flexgemm[number]}
    others = {
        "spconv": shell.spconv,
        "WarpConvNet": shell.warpconvnet,
        "torchsparse": shell.torchsparse,
    }
    if work in ("forward", "step"):
        peers |= {name: times[work == "step"] for name, times in others.items() if times}
    return Figures(shell.reach[number], peers, shell.stretch if work == "step" else None)


def _of_f32(place: tuple[int, int], work: str, dtype: str) -> Figures | None:
    if work == "forward" and dtype == "tf32" and place in TF32_FORWARD:
        reach, flexgemm = TF32_FORWARD[place]
        return Figures(reach, {"FlexGEMM": flexgemm})
    if work == "step" and dtype in ("bf16x3", "bf16x6") and place in F32_STEPS:
        reach, *times = F32_STEPS[place]
        if dtype == "bf16x6":
            return Figures(BF16X6 * reach)
        return Figures(reach, dict(zip(("FlexGEMM", "spconv", "WarpConvNet"), times, strict=True)))
    return None
