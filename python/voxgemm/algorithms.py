# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask of a layer's kernels: search spaces, precisions."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ._library import version_and_kernels
from .errors import ArgumentError

# The search space of each pass as numbers: algorithms, and after -1 the bytes of a kernel's name.
Filters = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


# The order of these is that of the C++ enumerations.
class Algorithm(str, enum.Enum):
    """The search spaces of a layer's choice of kernels; without one, all of them."""

    explicit_gemm = "explicit_gemm"
    implicit_gemm = "implicit_gemm"
    implicit_gemm_splitk = "implicit_gemm_splitk"
    masked_implicit_gemm = "masked_implicit_gemm"
    masked_implicit_gemm_splitk = "masked_implicit_gemm_splitk"


PASSES = ("forward", "grad_input", "grad_weight")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPERATIONS = ("submanifold", "strided", "inverse")
OUTPUT_RULES = ("reached", "floor")
PRECISIONS = ("ieee", "tf32", "bf16x3", "bf16x6")
_NUMBERS = {algorithm.value: number for number, algorithm in enumerate(Algorithm)}
_ANYTHING: Filters = ((), (), ())


def index_in(names: tuple[object, ...], name: object, what: str) -> int:
    if name not in names:
        known = ", ".join(map(str, names))
        raise ArgumentError(f"{what} is {name!r}, expected one of {known}")
    return names.index(name)


def _filter(algorithm: object) -> tuple[int, ...]:
    if algorithm is None or algorithm == "auto":
        return ()
    if isinstance(algorithm, str):
        if algorithm in _NUMBERS:
            return (_NUMBERS[algorithm],)
        if any(algorithm in names for names in version_and_kernels()[1].values()):
            return (-1, *algorithm.encode())
    elif isinstance(algorithm, Iterable) and not isinstance(algorithm, Mapping):
        names = list(algorithm)
        if names and all(isinstance(name, str) and name in _NUMBERS for name in names):
            return tuple(_NUMBERS[name] for name in names)
    raise ArgumentError(
        f"algorithm is {algorithm!r}, expected 'auto', a kernel's full name, one or a list of "
        f"{', '.join(_NUMBERS)}, or a dict of these by pass ({', '.join(PASSES)})"
    )


def filters_of(algorithm: object) -> Filters:
    """None or 'auto' | name | list of names | {pass: any of these}."""
    if algorithm is None:
        return _ANYTHING
    if isinstance(algorithm, Mapping):
        for name in algorithm:
            index_in(PASSES, name, "a pass of algorithm")
        forward, grad_input, grad_weight = (_filter(algorithm.get(name)) for name in PASSES)
        return forward, grad_input, grad_weight
    filter = _filter(algorithm)
    return filter, filter, filter


def precision_of(name: str | None, features: Tensor) -> int:
    """The number of a precision; None: torch's own switch for float32 products on CUDA."""
    if name is not None:
        return index_in(PRECISIONS, name, "precision")
    if features.dtype != torch.float32 or not features.is_cuda:
        return 0
    return PRECISIONS.index("tf32" if torch_takes_tf32() else "ieee")


# A traced graph cannot ask, and the older of torch's two names, which it can, is an error where the
# newer one was set. The answer is the graph's; graphs are made anew when the switch changes.
@torch.compiler.assume_constant_result
def torch_takes_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
