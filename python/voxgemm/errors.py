# SPDX-License-Identifier: Apache-2.0
"""The Python types of the library's errors."""

from __future__ import annotations

import re

import torch

__all__ = ["ArgumentError"]


class ArgumentError(ValueError):
    """An argument that cannot be used; the message says what came and what was expected.

    >>> try:
    ...     vg.build_map(torch.zeros(1, 3, dtype=torch.int32), 3)
    ... except ValueError as error:
    ...     print(type(error).__name__)
    ArgumentError
    """


# What an operator raises where no kernel computes what is asked.
Unsupported = NotImplementedError

_TYPES = {
    "invalid_argument": ArgumentError,
    "unsupported": Unsupported,
    "out_of_memory": torch.OutOfMemoryError,
    "device": RuntimeError,
}


def translate(error: RuntimeError) -> Exception:
    """What an operator's error means: its code's type with the sentence alone."""
    text = str(error)
    match = re.match(r"\[voxgemm (\w+)\] ", text)
    if match:
        return _TYPES[match[1]](text[match.end() :])
    # Torch's dispatcher, when no kernel is registered for the tensors' device.
    match = re.match(r"Could not run 'voxgemm::\w+' with arguments from the '(\w+)' backend", text)
    if match:
        return Unsupported(
            f"the tensors are on {match[1]}; this build of voxgemm computes on the CPU only"
        )
    return error
