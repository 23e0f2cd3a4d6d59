# SPDX-License-Identifier: Apache-2.0
"""Search spaces: every spelling, by pass, from the environment, and that a choice keeps to them."""

from __future__ import annotations

import enum
import os
import subprocess
import sys

import pytest
import torch

import voxgemm as vg
from voxgemm.algorithms import PASSES, filters_of

NAMES = [algorithm.value for algorithm in vg.Algorithm]


class Foreign(enum.Enum):
    IMPLICIT = "implicit_gemm"
    AUTO = "auto"


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("auto", ()),
        (" AUTO ", ()),
        (Foreign.AUTO, ()),
        (["explicit_gemm", "auto"], ()),
        ("explicit_gemm", (0,)),
        (" Implicit_GEMM ", (1,)),
        (vg.Algorithm.implicit_gemm, (1,)),
        (Foreign.IMPLICIT, (1,)),
        (NAMES, (0, 1, 2, 3, 4)),
        ((vg.Algorithm.masked_implicit_gemm, "explicit_gemm", Foreign.IMPLICIT), (3, 0, 1)),
        (["implicit_gemm", "IMPLICIT_GEMM"], (1,)),
        ({"implicit_gemm"}, (1,)),
        ("reference_cpu", (-1, *b"reference_cpu")),
    ],
    ids=str,
)
def test_every_spelling(given, wanted):
    assert filters_of(given) == (wanted,) * 3
    assert filters_of({"forward": given}) == (wanted, (), ())
    assert filters_of({"backward": given}) == ((), wanted, wanted)
    assert filters_of({"grad_input": given, "grad_weight": "auto"}) == ((), wanted, ())


def test_none_and_a_pass_left_out_are_the_environments():
    assert filters_of(None) == filters_of({}) == filters_of({"forward": None}) == ((),) * 3


def test_every_kernel_that_explain_prints_can_be_named(layer, clouds):
    *_, map = layer(clouds.random(40))
    for dtype in vg.functional.DTYPES:
        for line in vg.functional.explain(map, 16, 16, dtype).splitlines():
            if line.startswith(tuple(PASSES)) or not line.strip():
                continue
            name = line[3:].split()[0]
            assert filters_of(name) == ((-1, *name.encode()),) * 3


@pytest.mark.parametrize("by_pass", PASSES)
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_keeps_to_its_search_space(name, by_pass, layer, clouds):
    *_, map = layer(clouds.random(200), dtype=torch.float32)
    tables = vg.functional.explain(map, 16, 16, torch.float32, {by_pass: name})
    reasons = []
    for line in tables.splitlines():
        if line.startswith(PASSES):
            number = PASSES.index(line.split()[0])
        elif "the filter leaves out" in line:
            reasons.append(number)
    assert set(reasons) == {PASSES.index(by_pass)}


def imported(value, code="import voxgemm as vg; print(vg.algorithms.filters_of(None))"):
    environment = {**os.environ, "VOXGEMM_ALGORITHM": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("[explicit_gemm, implicit_gemm]", ((0, 1),) * 3),
        ("backward=masked_implicit_gemm", ((), (3,), (3,))),
    ],
)
def test_the_environment(value, wanted):
    assert imported(value).stdout.strip() == str(wanted)


@pytest.mark.parametrize("value", ["magic", "forward=magic", "[implicit_gemm", "a,b"])
def test_a_bad_environment_is_an_error_of_the_import(value):
    result = imported(value)
    assert result.returncode != 0
    assert f'ArgumentError: VOXGEMM_ALGORITHM is "{value}"' in result.stderr
    assert "masked_implicit_gemm_splitk" in result.stderr or "bracket" in result.stderr


def test_an_argument_goes_before_the_environment():
    code = "import voxgemm as vg; print(vg.algorithms.filters_of({'forward': 'auto'}))"
    assert imported("explicit_gemm", code).stdout.strip() == "((), (0,), (0,))"
