# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask of a layer's kernels: search spaces, precisions."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ._library import environment_filter, kernel_names
from .errors import ArgumentError

# The search space of each pass as numbers: algorithms, and after -1 the bytes of a kernel's name.
Filters = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


# The order of these is that of the C++ enumerations.
class Algorithm(str, enum.Enum):
    """The search spaces of a layer's choice of kernels; without one, all of them.

    >>> vg.nn.SubmConv3d(4, 8, 3, algorithm=vg.Algorithm.masked_implicit_gemm).algorithm.value
    'masked_implicit_gemm'
    """

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
_NAMES = (*(algorithm.value for algorithm in Algorithm), "auto")
_PARTS = (*PASSES, "backward")
# Read here, so that a bad value is an error of the import.
_FROM_ENVIRONMENT: Filters = (
    environment_filter(0),
    environment_filter(1),
    environment_filter(2),
)


def index_in(names: tuple[object, ...], name: object, what: str) -> int:
    if name not in names:
        known = ", ".join(map(str, names))
        raise ArgumentError(f"{what} is {name!r}, expected one of {known}")
    return names.index(name)


def _filter(algorithm: object, number: int) -> tuple[int, ...]:
    """Of the pass with this number."""
    if algorithm is None:
        return _FROM_ENVIRONMENT[number]
    wanted = [algorithm]
    if isinstance(algorithm, Iterable) and not isinstance(algorithm, str | Mapping):
        wanted = list(algorithm)
    # Members of an enumeration count by their value, whosever they are.
    values = [each.value if isinstance(each, enum.Enum) else each for each in wanted]
    names = [value.strip().lower() for value in values if isinstance(value, str)]
    if names and len(names) == len(values) and all(name in _NAMES for name in names):
        return () if "auto" in names else tuple({_NAMES.index(name): None for name in names})
    if isinstance(algorithm, str) and algorithm.strip() in kernel_names():
        return (-1, *algorithm.strip().encode())
    raise ArgumentError(
        f"algorithm is {algorithm!r}, expected a kernel's full name, one or a list of "
        f"{', '.join(_NAMES)}, or a dict of these by pass ({', '.join(_PARTS)})"
    )


def filters_of(algorithm: object) -> Filters:
    """None | 'auto' | name | list of names | {pass: any of these}, 'backward' being both gradients.

    None, also of a pass that a dict leaves out: as VOXGEMM_ALGORITHM says, without it everything.

    >>> vg.functional.filters_of({"forward": "explicit_gemm", "backward": ["auto"]})
    ((0,), (), ())

    Raises ArgumentError: a name, type or pass that is not one of these.
    """
    if algorithm is None:
        return _FROM_ENVIRONMENT
    # A layer's name comes again with every call.
    name = algorithm if isinstance(algorithm, str) else ""
    if name in _KNOWN and not torch.compiler.is_compiling():
        return _KNOWN[name]
    given = algorithm if isinstance(algorithm, Mapping) else dict.fromkeys(PASSES, algorithm)
    for name in given:
        index_in(_PARTS, name, "a pass of algorithm")
    if "backward" in given:
        if "grad_input" in given or "grad_weight" in given:
            raise ArgumentError(
                f"algorithm is {algorithm!r}, expected either backward or grad_input and "
                "grad_weight, not both"
            )
        both = given["backward"]
        given = {**given, "grad_input": both, "grad_weight": both}
    forward, grad_input, grad_weight = (
        _filter(given.get(name), number) for number, name in enumerate(PASSES)
    )
    if name and not torch.compiler.is_compiling():
        _KNOWN[name] = (forward, grad_input, grad_weight)
    return forward, grad_input, grad_weight


_KNOWN: dict[str, Filters] = {}


def precision_of(name: str | None, features: Tensor) -> int:
    """The number of a precision; None: torch's own switch for float32 products on CUDA."""
    if name is not None:
        return index_in(PRECISIONS, name, "precision")
    if features.dtype != torch.float32 or not features.is_cuda:
        return 0
    return PRECISIONS.index("tf32" if torch_takes_tf32() else "ieee")


def torch_takes_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# A traced graph cannot ask, and the older of torch's two names, which it can, is an error where the
# newer one was set. The answer is the graph's; graphs are made anew when the switch changes. This
# is torch.compiler.assume_constant_result, which would import the whole compiler.
torch_takes_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
