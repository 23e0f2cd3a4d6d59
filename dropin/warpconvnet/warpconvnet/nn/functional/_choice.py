# SPDX-License-Identifier: Apache-2.0
"""Which of voxgemm's kernels a pass runs: the fastest of a search space, by measured times."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import voxgemm
from voxgemm import ArgumentError, passes
from voxgemm._library import version_and_kernels
from voxgemm.algorithms import PASSES, filters_of, precision_of
from voxgemm.kernel_map import Asked, KernelMap

from ... import _tuning, constants
from ..._search import Candidate, Names, candidates, names_of

# voxgemm's search space of each algorithm, without and with slices.
_SPACES = {
    "explicit_gemm": ("explicit_gemm", "explicit_gemm"),
    "implicit_gemm": ("implicit_gemm", "implicit_gemm_splitk"),
    "cutlass_implicit_gemm": ("masked_implicit_gemm", "masked_implicit_gemm_splitk"),
}


@dataclasses.dataclass(eq=False, frozen=True)
class Search:
    """The algorithms of each pass, and what of the configuration a map does not say."""

    names: tuple[Names, Names, Names]
    configuration: str


def names_by_pass(
    fwd: object, bwd: object, dgrad: object, wgrad: object
) -> tuple[Names, Names, Names]:
    """Of the four arguments; None is the environment's."""
    if fwd is None and bwd is None and dgrad is None and wgrad is None:
        return _of_environments(*environment())
    if bwd is not None and (dgrad is not None or wgrad is not None):
        raise ArgumentError(
            f"bwd_algo is {bwd!r} together with dgrad_algo {dgrad!r} and wgrad_algo {wgrad!r}, "
            "expected either"
        )
    found = [_named(fwd, "fwd_algo", "WARPCONVNET_FWD_ALGO_MODE")]
    both = None if bwd is None else names_of(bwd, "bwd_algo")
    for given, what in ((dgrad, "dgrad"), (wgrad, "wgrad")):
        own = f"WARPCONVNET_{what.upper()}_ALGO_MODE"
        variable = own if getattr(constants, own) else "WARPCONVNET_BWD_ALGO_MODE"
        found.append(both if both is not None else _named(given, f"{what}_algo", variable))
    return tuple(found)


def _named(given: object, what: str, variable: str) -> Names:
    if given is not None:
        return names_of(given, what)
    return _of_environment(variable, str(getattr(constants, variable)))


def environment() -> tuple[str | tuple[str, ...] | None, ...]:
    """What stands in for algorithms that are not given."""
    fwd, bwd = constants.WARPCONVNET_FWD_ALGO_MODE, constants.WARPCONVNET_BWD_ALGO_MODE
    dgrad, wgrad = constants.WARPCONVNET_DGRAD_ALGO_MODE, constants.WARPCONVNET_WGRAD_ALGO_MODE
    return (
        tuple(fwd) if isinstance(fwd, list) else fwd,
        tuple(bwd) if isinstance(bwd, list) else bwd,
        (tuple(dgrad) if isinstance(dgrad, list) else dgrad) or None,
        (tuple(wgrad) if isinstance(wgrad, list) else wgrad) or None,
    )


@functools.lru_cache(maxsize=64)
def _of_environments(*values: str | tuple[str, ...] | None) -> tuple[Names, Names, Names]:
    """By pass, of the four variables."""
    fwd, bwd, dgrad, wgrad = values
    chosen = (
        (fwd, "WARPCONVNET_FWD_ALGO_MODE"),
        (dgrad, "WARPCONVNET_DGRAD_ALGO_MODE") if dgrad else (bwd, "WARPCONVNET_BWD_ALGO_MODE"),
        (wgrad, "WARPCONVNET_WGRAD_ALGO_MODE") if wgrad else (bwd, "WARPCONVNET_BWD_ALGO_MODE"),
    )
    return tuple(names_of(value, variable) for value, variable in chosen)


@functools.lru_cache(maxsize=64)
def _of_environment(variable: str, _: str) -> Names:
    return names_of(getattr(constants, variable), variable)


@functools.lru_cache(maxsize=256)
def _space(candidate: Candidate, device: str, dtype: torch.dtype, number: int) -> str:
    """voxgemm's name of what a candidate runs: a kernel where tiles can be asked for, else a space.

    voxgemm's tiles are its own: a number of rows picks the nearest there is, mma_tile counts from
    the largest tile to the smallest. How many slices is the kernel's business; one is none.
    """
    parameters = dict(candidate.parameters)
    slices = parameters.get("split_k_slices", parameters.get("split_k_factor", 1))
    space = _SPACES[candidate.algorithm][slices > 1]
    of_weights = number == 2
    short = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}.get(dtype, "f64")
    tiles = []
    for name in version_and_kernels()[1].get(short, ()):
        size = re.search(r"/(\d+)x(\d+)", name)
        mine = size and device == "cuda" and re.match(rf"{space}_(grad_weight_)?sm\d+/", name)
        if mine and of_weights == ("grad_weight" in name):
            tiles.append((int(size[1]), int(size[2]), name))
    if not tiles:
        return space
    if "mma_tile" in parameters:
        tiles.sort(key=lambda tile: -tile[0] * tile[1])
        return tiles[min(parameters["mma_tile"] * len(tiles) // 4, len(tiles) - 1)][2]
    rows = parameters.get("fwd_block_size", parameters.get("gemm_block_size"))
    return space if rows is None else min(tiles, key=lambda tile: abs(tile[0] - rows))[2]


def _size_class(count: int) -> int:
    return int(count).bit_length()


def _key(search: Search, number: int, map: KernelMap, channels: Hashable, x: Tensor) -> str:
    device = (
        torch.cuda.get_device_name(x.device)
        if x.is_cuda
        else torch.backends.cpu.get_cpu_capability()
    )
    pairs = _size_class(8 * map.pairs // max(map.n_out, 1))
    rows = f"{_size_class(map.n_in)}>{_size_class(map.n_out)}:{pairs}"
    parts = (voxgemm.__version__, device, PASSES[number], search.configuration, channels, x.dtype)
    return " ".join(str(part) for part in (*parts, precision_of(None, x), rows))


# A search, the pass's number, channels, dtype and precision; of both gradients, for the number,
# which of them are wanted.
What = tuple[Search, Any, tuple[int, int], torch.dtype, int]


class Now(NamedTuple):
    """A pass that is about to run."""

    x: Tensor  # or dy
    run: Callable[[passes.How], Any]
    magnitude: Callable[[], Tensor]  # of an element's products, or more
    terms: int  # of its sums


def memo_of(map: KernelMap) -> dict[What, passes.How]:
    """What was found for good, kept with the map."""
    memo = map.__dict__.get("_warpconvnet")
    if memo is None:
        memo = map.__dict__["_warpconvnet"] = {}
    return memo


def how_of(what: What, map: KernelMap, now: Now) -> passes.How:
    """How a pass runs: as measured if it may be measured, else as the model says in the space."""
    memo = memo_of(map)
    if what in memo:
        return memo[what]
    filter, final = _filter_of(what, map, now)
    how = _how(what, filter)
    if final:
        memo[what] = how
    return how


def how_of_backward(
    what: What, map: KernelMap, gradients: tuple[Now | None, Now | None]
) -> passes.How:
    """Of both gradients, each searched by itself; None of one that is not wanted."""
    search, _, *rest = what
    filters, final = [(), (), ()], True
    for number, now in enumerate(gradients, 1):
        if now is not None:
            alone = (search, number, *rest)
            filters[number] = how_of(alone, map, now).filters[number]
            final = final and alone in memo_of(map)
    both = passes.How(tuple(filters), what[4])
    if final:
        memo_of(map)[what] = both
    return both


def _how(what: What, filter: Any) -> passes.How:
    filters = [(), (), ()]
    filters[what[1]] = filter
    return passes.How(tuple(filters), what[4])


def _filter_of(what: What, map: KernelMap, now: Now) -> tuple[Any, bool]:
    """voxgemm's filter of a pass, and whether it stays."""
    search, number, channels, _, precision = what
    x = now.x
    names = search.names[number]
    spaces = [space for name in names for space in _SPACES[name]]
    anything = filters_of(list(dict.fromkeys(spaces)))[number]
    if torch.compiler.is_compiling() or not len(x):
        return anything, False

    def asked(candidate: Candidate) -> Any:
        """The kernel that has the parameters; where it cannot run, those of its space that can."""
        # Which kernels there are for float32 in another precision is not listed.
        device = x.device.type if precision == 0 else "any"
        named, space = (_space(candidate, where, x.dtype, number) for where in (device, "any"))
        for way in (named, space, list(_SPACES[candidate.algorithm])):
            filter = filters_of(way)[number]
            try:
                map.choice(Asked(number, *channels, x.dtype, precision, filter))
                return filter
            except NotImplementedError:
                continue
        return filter

    def of(candidate: Candidate) -> tuple[Hashable, Callable[[], Any]]:
        filter = asked(candidate)
        return filter, lambda: now.run(_how(what, filter))

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return anything, False
    map.settle(wait=True)
    text = _key(search, number, map, channels, x)

    def expected() -> Any:
        """Of explicit_gemm, which the map's record of what ran does not count."""
        before = dict(map._choices)
        result = now.run(_how(what, filters_of("explicit_gemm")[number]))
        map._choices.clear()
        map._choices.update(before)
        return result

    agrees = _tuning.agreement(expected, now.magnitude, now.terms, precision)
    with torch.no_grad():
        best, complete = _tuning.fastest(text, candidates(names, number), of, x.device, agrees)
    filter = anything if best is None else asked(best)
    return filter, complete or not _tuning.may_measure()
