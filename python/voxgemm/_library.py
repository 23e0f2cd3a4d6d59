# SPDX-License-Identifier: Apache-2.0
"""Loads the operators' libraries and tells torch their shapes."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import errors

LIBRARY = "libvoxgemm_torch_cpu.so"
CUDA_LIBRARY = "libvoxgemm_torch_cuda.so"
OLDEST_TORCH = (2, 10)


def find(package_path: Sequence[str]) -> pathlib.Path:
    """Where the library is: in VOXGEMM_LIB_DIR if set, else in `_lib` beside the package's files.

    An editable install has the package in two folders, hence the whole path.
    """
    folder = os.environ.get("VOXGEMM_LIB_DIR")
    folders = [folder] if folder else [os.path.join(entry, "_lib") for entry in package_path]
    for candidate in folders:
        path = pathlib.Path(candidate, LIBRARY)
        if path.is_file():
            return path.resolve()
    raise ImportError(f"voxgemm: no {LIBRARY} in {', '.join(folders)}")


def load(path: pathlib.Path) -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise ImportError(
            f"voxgemm needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, "
            f"found {torch.__version__}"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # Torch says which file; only the loader's own error below it says which symbol is missing.
        reason = error.__cause__ or error
        raise ImportError(
            f"voxgemm: torch {torch.__version__} cannot load {path}: {reason}"
        ) from error


def call(op: Any, *args: Any) -> Any:
    """An operator with its errors as Python's types."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        # Without a name here: this frame, of its own traceback, would keep it and the arguments.
        raise errors.translate(error) from None


def text_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def text_of(tensor: torch.Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def version() -> str:
    """The library's; asks for no GPU."""
    return text_of(ops._info()).partition("\n")[0]


@functools.cache
def _version_and_names() -> tuple[str, dict[str, list[str]]]:
    version, *lines = text_of(ops._info()).split("\n")
    if HAS_CUDA:
        lines += text_of(ops._cuda_info(torch.cuda.is_available())).split("\n")[1:]
    names: dict[str, list[str]] = {}
    for line in lines:
        dtype, name = line.split(" ")
        names.setdefault(dtype, []).append(name)
    return version, names


def version_and_kernels() -> tuple[str, dict[str, list[str]]]:
    """The library's version, and by dtype the names of the kernels that run on this machine."""
    version, names = _version_and_names()
    return version, {dtype: kernels for dtype, kernels in names.items() if dtype != "-"}


def kernel_names() -> list[str]:
    """Every kernel as explain() prints it, also those that cannot run on this machine."""
    return _version_and_names()[1]["-"]


def cache_dir() -> str:
    """Where measured times are kept; empty if there is no place."""
    return text_of(ops._times_folder())


def environment_filter(of_pass: int) -> tuple[int, ...]:
    """The search space that VOXGEMM_ALGORITHM gives a pass, as numbers."""
    return tuple(call(ops._environment_filter.default, of_pass).tolist())


PATH = find(sys.modules[__package__].__path__)
load(PATH)
ops = torch.ops.voxgemm
# A torch without CUDA lacks what the second library links to. Whether there is a device is not
# asked here.
HAS_CUDA = torch.version.cuda is not None and PATH.with_name(CUDA_LIBRARY).is_file()
if HAS_CUDA:
    load(PATH.with_name(CUDA_LIBRARY))


def _int32(like: torch.Tensor, *shape: Any) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _unknown() -> torch.SymInt:
    """A number of rows that is known once the values of the tensors are."""
    return torch.library.get_ctx().new_dynamic_size()


def _repeats(like: torch.Tensor) -> torch.Tensor:
    """Rows that repeat a voxel: one number per row, or none."""
    return _int32(like, _unknown())


def _on_host(*shape: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _tables(like: torch.Tensor, rows: Any, geometry: list[int]) -> tuple[torch.Tensor, ...]:
    """Neighbours, pairs by tap and masks of a map; a CUDA device has masks where 32 bits do."""
    taps = geometry[0] * geometry[1] * geometry[2]
    pairs = like.new_empty((taps,), dtype=torch.int64)
    masks = _int32(like, rows if like.is_cuda and taps <= 32 else 0)
    return _int32(like, taps, rows), pairs, masks


@torch.library.register_fake("voxgemm::_check_coords")
def _(coords, spatial_shape, batch_size):
    return _int32(coords, 1)


@torch.library.register_fake("voxgemm::_unique")
def _(coords):
    rows = _unknown()
    return _int32(coords, rows, 4), _int32(coords, rows), _int32(coords, coords.shape[0])


@torch.library.register_fake("voxgemm::_output_coords")
def _(coords, geometry, rule, spatial_shape, max_voxels=None):
    return _int32(coords, _unknown() if max_voxels is None else max_voxels, 4)


@torch.library.register_fake("voxgemm::_submanifold_map")
def _(coords, geometry, answer=0, owned=False):
    tables = _tables(coords, coords.shape[0], geometry)
    return *tables[:2], _repeats(coords), tables[2]


@torch.library.register_fake("voxgemm::_kernel_map")
def _(in_coords, out_coords, geometry, answer=0, owned=False):
    tables = _tables(in_coords, out_coords.shape[0], geometry)
    firsts = _repeats(in_coords), _repeats(in_coords)
    return *tables[:2], *firsts, tables[2]


@torch.library.register_fake("voxgemm::_transpose")
def _(map, layer, owned=False):
    return _int32(map[0], map[0].shape[0], layer[0]), torch.empty_like(map[1])


@torch.library.register_fake("voxgemm::_pairs")
def _(map, layer):
    return _on_host(1)


@torch.library.register_fake("voxgemm::_choice")
def _(map, layer, problems, masks=None, builds=False):
    found = []  # without what it builds, of which only eager calls ask
    while problems:
        found.append(_on_host(_unknown()))
        problems = problems[1 + problems[0] :]
    return found


@torch.library.register_fake("voxgemm::_schedule")
def _(map, layer, options, masks=None):
    order, _, tile_rows, _ = options
    if order == 0:
        return []
    tiles = _unknown()
    return [
        _int32(map[0], 1, _unknown()),
        map[1].new_empty((1, _unknown())),
        _int32(map[0], tiles, 4),
        _int32(map[0], tiles, tile_rows // 64),
        _int32(map[0], 1, _unknown()),  # as many as the next has rows, or none
        _int32(map[0], _unknown(), tile_rows),
    ]


@torch.library.register_fake("voxgemm::_kept")
def _(neighbours):
    return []


@torch.library.register_fake("voxgemm::_forget")
def _(neighbours):
    pass


@torch.library.register_fake("voxgemm::_explain")
def _(map, layer, problem, as_json):
    return _on_host(_unknown(), dtype=torch.uint8)


# Of the rest only what they give is known.
def _some_text(*arguments):
    return _on_host(_unknown(), dtype=torch.uint8)


def _some_numbers(*arguments):
    return _on_host(_unknown())


for _name in ("_tune", "_calibrate", "_times_folder", "_times_files", "_export_times"):
    torch.library.register_fake(f"voxgemm::{_name}", _some_text)
for _name in ("_is_tuned", "_learn", "_import_times", "_clear_times", "_environment_filter"):
    torch.library.register_fake(f"voxgemm::{_name}", _some_numbers)
torch.library.register_fake("voxgemm::_tunes_at_first_use", _some_numbers)


@torch.library.register_fake("voxgemm::_parse_problem")
def _(text):
    return _on_host(18), _on_host(_unknown(), dtype=torch.uint8)


@torch.library.register_fake("voxgemm::_info")
def _():
    return _on_host(_unknown(), dtype=torch.uint8)


@torch.library.register_fake("voxgemm::_cuda_info")
def _(has_device):
    return _on_host(_unknown(), dtype=torch.uint8)


@torch.library.register_fake("voxgemm::_forward")
def _(x, weight, bias, map, layer, residual=None, relu=False):
    return x.new_empty((map[0].shape[1], weight.shape[0]))


@torch.library.register_fake("voxgemm::_grad_input")
def _(dy, weight, map, transposed, layer):
    return dy.new_empty((layer[0], weight.shape[4]))


@torch.library.register_fake("voxgemm::_grad_weight")
def _(x, dy, map, layer, wanted):
    c_in, c_out = x.shape[1], dy.shape[1]
    dw = dy.new_empty((c_out, *layer[4:7], c_in) if wanted[0] else (0,))
    return dw, dy.new_empty((c_out if wanted[1] else 0,))
