# SPDX-License-Identifier: Apache-2.0
"""Every public name says what it takes and gives, with an example that does what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
import torch

import voxgemm as vg
from voxgemm import clouds

PUBLIC = (
    *(vg, vg.functional, vg.nn, vg.depthwise, vg.pooling, vg.sampling, vg.serialization),
    *(vg.hashmap, vg.tuning, vg.errors, clouds),
)
MODULES = sorted(
    module.name
    for package in (vg, clouds)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", ["voxgemm", *MODULES])
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        assert error.name and not error.name.startswith("voxgemm")
        pytest.skip(f"{error.name} is not installed")
    if name == "voxgemm.tuning":
        pytest.importorskip("matplotlib")  # an example draws
    names = {"torch": torch, "vg": vg, "clouds": clouds}
    failed, _ = doctest.testmod(module, extraglobs=names)
    assert failed == 0


def described() -> dict[str, object]:
    """Every public class and function."""
    found = {}
    for module in PUBLIC:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(value, f"{module.__name__}.{name}")
    return {name: value for value, name in found.items()}


FUNCTIONS = sorted(name for name, value in described().items() if inspect.isfunction(value))
# Said once, in conv3d: they are the same everywhere.
SAID_ONCE = {"map", "algorithm", "precision"}


def test_every_module_of_users_is_looked_at():
    listed = [getattr(vg, name) for name in vg.__all__]
    assert {m for m in listed if inspect.ismodule(m)} <= set(PUBLIC)


@pytest.mark.parametrize("name", sorted(described()))
def test_every_public_name_has_an_example(name):
    value = described()[name]
    assert ">>> " in (value.__doc__ or ""), "no example"
    for part, member in vars(value).items() if inspect.isclass(value) else ():
        function = member.fget if isinstance(member, property) else member
        function = getattr(function, "__func__", function)
        if inspect.isfunction(function) and part[0] != "_":
            assert inspect.getdoc(getattr(value, part)), f"{part} says nothing"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_function_is_named(name):
    function = described()[name]
    for argument in inspect.signature(function).parameters:
        assert argument in SAID_ONCE or argument in function.__doc__, argument


# They take nothing that could be wrong, or text and folders only.
WITHOUT_ERRORS = {
    *("voxgemm.info", "voxgemm.calibrate", "voxgemm.tuning.clear_times", "voxgemm.tuning.plot"),
    *("voxgemm.tuning.export_times", "voxgemm.tuning.import_times", "voxgemm.tuning.times_files"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_shapes_dtypes_and_errors(name):
    function = described()[name]
    paragraphs = inspect.getdoc(function).split("\n\n")
    text = "\n".join(part for part in paragraphs if not part.startswith(">>>"))
    if "Tensor" in str(inspect.signature(function)):
        assert re.search(r"\[\w+", text), "no shape"
        assert re.search(r"int32|int64|float|bool|dtype|whole numbers", text, re.I), "no dtype"
    if name not in WITHOUT_ERRORS:
        said = r"ArgumentError|InputError|is an error|errors are those of|are an error"
        assert re.search(said, text), "no errors"
