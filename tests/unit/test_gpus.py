"""One worker process per GPU, or per slice of one, named as CUDA names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adc_worker.host.budget import parse_gpu_list, visible_gpus
from adc_worker.runtime.supervisor import Supervisor, WorkerOptions
from adc_worker.settings import Settings

LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 3g.20gb     Device  0: (UUID: MIG-7c23bd58-fa37-5b6c-9b1e-2a5b1b0b0b0b)
  MIG 3g.20gb     Device  1: (UUID: MIG-9f1c7e3a-1d52-5f0e-8a0f-3c6c2c1c1c1c)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-8a1b2c3d-0000-1111-2222-333344445555)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-a32c4fb1-0000-1111-2222-333344445555)
  MIG 7g.40gb     Device  0: (UUID: MIG-GPU-a32c4fb1/1/0)
"""


def test_a_gpu_in_mig_mode_stands_for_its_slices() -> None:
    """Old drivers name slices by their GPU's UUID."""
    assert [name[:12] for name in parse_gpu_list(LISTED)] == [
        "MIG-7c23bd58",
        "MIG-9f1c7e3a",
        "GPU-8a1b2c3d",
        "MIG-GPU-a32c",
    ]


@pytest.mark.parametrize(
    ("variable", "gpus"),
    [
        ("0,2", ["0", "2"]),
        ("MIG-1, MIG-2", ["MIG-1", "MIG-2"]),
        ("", []),
        ("-1", []),
        ("1,-1,2", ["1"]),
    ],
)
def test_the_variable_that_shows_gpus_to_cuda_is_respected(
    variable: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == gpus


def test_without_the_variable_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the driver's own program; where it is missing there is no GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{LISTED}'\n")
    program.chmod(0o755)
    assert len(visible_gpus()) == 4


@pytest.mark.parametrize(
    ("instances", "expected"), [(None, ["MIG-1", "MIG-2"]), (1, ["MIG-1"]), (3, ["MIG-1", "MIG-2", "MIG-1"])]
)
def test_each_process_has_one_gpu_and_more_processes_share_them(
    instances: int | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    supervisor = Supervisor(WorkerOptions(), Settings(worker_instances=instances))
    assert [child.gpu for child in supervisor._children] == expected
    os.close(supervisor._wake_read)
    os.close(supervisor._wake_write)
