# SPDX-License-Identifier: Apache-2.0
"""examples/train.py: one process or several, interrupted or not, the losses are the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
# Five scans in steps of two or three: with two processes one of them has none in the last step.
SMALL = ("--scans", "5", "--beams", "12", "--azimuths", "128", "--voxel", "1", "--channels", "4")
SMALL += ("--levels", "3", "--epochs", "3", "--batch", "2", "--dtype", "f64")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Fast on a busy machine, too; results do not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train():
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(train):
    return train.main(SMALL)


def processes(count: int, path: Path, *arguments: str) -> list[float]:
    """The losses of several processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", str(SCRIPT), *arguments, "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def test_losses_fall(alone):
    assert len(alone) == 9
    assert alone[-1] < 0.9 * alone[0]


def test_shares_of_a_step(train, alone):
    options = train.parse(SMALL)
    every = [list(train.Shares(options, 5, rank, 2)) for rank in range(2)]
    assert [len(share) for share in every[0]] == [1, 1, 1]
    assert [len(share) for share in every[1]] == [1, 1, 0]
    (joint,) = [list(train.Shares(options, 5, 0, 1))]
    dealt = [a + b for a, b in zip(*every, strict=True)]
    assert dealt == joint
    assert sorted(sum(joint, [])) == list(range(5))


def test_two_processes_have_the_losses_of_one(alone, tmp_path):
    """Voxel counts differ, and the second process has no scan in every third step."""
    losses = processes(2, tmp_path / "losses.json", *SMALL, "--sync-norm")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone))


def test_two_processes_with_a_part_of_the_network_each(alone, tmp_path):
    """And they go on where they were, as one process would from their checkpoint."""
    path = tmp_path / "losses.json"
    arguments = (*SMALL, "--sync-norm", "--shard", "--checkpoint", str(tmp_path / "run.pt"))
    before = processes(2, path, *arguments, "--stop-after", "1")
    assert len(before) == 3
    losses = processes(2, path, *arguments, "--resume")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone))


def test_scalars_for_tensorboard(train, tmp_path, monkeypatch):
    """Loss and learning rate of every step."""
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    train.main((*SMALL, "--epochs", "1", "--tensorboard", str(tmp_path)))
    steps = [(name, step) for step in (1, 2, 3) for name in ("loss", "lr")]
    assert written == [str(tmp_path), *steps, "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        train.main((*SMALL, "--tensorboard", str(tmp_path)))


def test_shards_need_torchrun(train):
    with pytest.raises(SystemExit):
        train.main((*SMALL, "--shard"))


def test_an_interrupted_run_goes_on_where_it_was(train, alone, tmp_path, monkeypatch):
    arguments = (*SMALL, "--checkpoint", str(tmp_path / "run.pt"), "--resume")
    save = train.Trainer.save

    def save_and_stop(self, path):
        save(self, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save", save_and_stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train.main(arguments)
    assert train.main(arguments) == alone
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_mixed_precision(train, device, dtype):
    arguments = (*SMALL[:-2], "--device", device.type, "--dtype", dtype, "--batch", "3")
    losses = train.main(arguments)
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]


def test_files_of_scans(train, tmp_path):
    import numpy as np

    draw = np.random.RandomState(0)
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", draw.uniform(0, 3, (400, 3)))
    files = [str(tmp_path / f"{k}.npy") for k in range(2)]
    losses = train.main((*files, *SMALL[6:], "--epochs", "4"))
    assert losses[-1] < losses[0]
    with pytest.raises(SystemExit):
        train.main((*files, "--task", "label"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_have_the_losses_of_one(train, tmp_path):
    arguments = (*SMALL, "--device", "cuda")
    expected = torch.tensor(train.main(arguments))
    for options in (["--sync-norm"], ["--sync-norm", "--shard"]):
        losses = processes(2, tmp_path / "losses.json", *arguments, *options)
        torch.testing.assert_close(torch.tensor(losses), expected)
