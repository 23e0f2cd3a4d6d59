# SPDX-License-Identifier: Apache-2.0
"""Search spaces: the names that arguments and variables take, and the candidates they stand for."""

from __future__ import annotations

import enum
import itertools
from typing import NamedTuple

from voxgemm import ArgumentError

# Every spelling of a convolution's algorithm, and which of the three it runs.
REGULAR = {
    "explicit_gemm": "explicit_gemm",
    "explicit_gemm_grouped": "explicit_gemm",
    "implicit_gemm": "implicit_gemm",
    "implicit_gemm_grouped": "implicit_gemm",
    "cutlass_implicit_gemm": "cutlass_implicit_gemm",
    "cutlass_grouped_hybrid": "cutlass_implicit_gemm",
    "cute_implicit_gemm": "cutlass_implicit_gemm",
    "cute_grouped": "cutlass_implicit_gemm",
    "cute_implicit_gemm_sm90": "cutlass_implicit_gemm",
    "cute_grouped_sm90": "cutlass_implicit_gemm",
    "mask_gemm": "cutlass_implicit_gemm",
}
DEPTHWISE = {
    "explicit": "explicit",
    "explicit_gemm": "explicit",
    "implicit": "implicit",
    "implicit_gemm": "implicit",
}
EVERYTHING = ("auto", "all", "trimmed")
Names = tuple[str, ...]


def names_of(algorithms: object, what: str, depthwise: bool = False) -> Names:
    """The algorithms that a member, a name, or a list, tuple or set of these admits; no repeats."""
    legal = DEPTHWISE if depthwise else REGULAR
    every = tuple(dict.fromkeys(legal.values()))
    given = algorithms if isinstance(algorithms, list | tuple | set | frozenset) else [algorithms]
    found: dict[str, None] = {}
    for entry in given:
        name = entry.value if isinstance(entry, enum.Enum) else entry
        key = name.strip().lower() if isinstance(name, str) else None
        if key in legal:
            found[legal[key]] = None
        elif key in EVERYTHING and (not depthwise or key == "auto"):
            found.update(dict.fromkeys(every))
        else:
            shown = f"{entry!r} in {algorithms!r}" if entry is not algorithms else repr(entry)
            raise ArgumentError(
                f"{what} is {shown}, expected one or a list of {', '.join(legal)}, auto"
            )
    if not found:
        raise ArgumentError(
            f"{what} is {algorithms!r}, expected one or a list of {', '.join(legal)}, auto"
        )
    return tuple(name for name in every if name in found)


class Candidate(NamedTuple):
    algorithm: str
    parameters: tuple[tuple[str, int | str], ...] = ()

    @property
    def text(self) -> str:
        return " ".join([self.algorithm, *(f"{name}={value}" for name, value in self.parameters)])


# By algorithm and pass (forward, grad_input, grad_weight), the parameters and their values.
_CUTLASS = {
    "mma_tile": (0, 1, 2, 3),
    "split_k_slices": (1, 2, 4, 8),
    "accumulator_type": ("float32",),
}
_BLOCKS = (4, 16, 32)
GRIDS = {
    "explicit_gemm": ({}, {}, {}),
    "implicit_gemm": (
        {"fwd_block_size": _BLOCKS},
        {"gemm_block_size": _BLOCKS},
        {"gemm_block_size": _BLOCKS, "split_k_factor": (2, 4, 8)},
    ),
    "cutlass_implicit_gemm": (_CUTLASS, _CUTLASS, _CUTLASS),
    "explicit": ({}, {}, {}),
    "implicit": ({}, {}, {}),
}


def candidates(names: Names, number: int) -> list[Candidate]:
    """Every combination of parameters of the algorithms in a pass."""
    found = []
    for name in names:
        grid = GRIDS[name][number]
        for values in itertools.product(*grid.values()):
            found.append(Candidate(name, tuple(zip(grid, values, strict=True))))
    return found
