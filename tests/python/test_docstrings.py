# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings say what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import voxgemm as vg

MODULES = sorted(module.name for module in pkgutil.iter_modules(vg.__path__, "voxgemm."))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        assert error.name and not error.name.startswith("voxgemm")
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch, "vg": vg})
    assert failed == 0


WITH_EXAMPLES = {
    vg: "Geometry KernelMap SparseTensor build_map cat collate explain output_coords union_add "
    "unique",
    vg.functional: "conv3d explain generated_coords inverse_conv3d",
    vg.nn: "Sequential SparseAvgPool3d SparseConv3d SparseConvTranspose3d SparseGlobalPool "
    "SparseInverseConv3d SparseMaxPool3d SparseUnpool3d SubmConv3d",
}


def test_what_users_build_with_has_an_example():
    for module, names in WITH_EXAMPLES.items():
        for name in names.split():
            assert ">>> " in getattr(module, name).__doc__, name
