# SPDX-License-Identifier: Apache-2.0
"""Errors that a program can catch as FlexGEMM's assertions or as ValueError."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import voxgemm


class ArgumentError(voxgemm.ArgumentError, AssertionError):
    """An argument that cannot be used."""


def expect(condition: bool, sentence: str) -> None:
    if not condition:
        raise ArgumentError(sentence)


def expect_tensors(feats: Any, weight: Any) -> None:
    if not isinstance(feats, torch.Tensor):
        raise_type("feats", feats, torch.Tensor)
    if not isinstance(weight, torch.Tensor):
        raise_type("weight", weight, torch.Tensor)


def raise_type(name: str, value: Any, kind: type) -> None:
    raise TypeError(f"{name} is a {type(value).__name__}, expected a {kind.__name__}")


def speaking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with voxgemm's own argument errors as ArgumentError."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except voxgemm.ArgumentError as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(*error.args) from None

    return checked
