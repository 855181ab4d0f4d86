"""What a run is started on."""

import os

import pytest
import torch
from accelerate import Accelerator

from umae.training import hardware


@pytest.mark.parametrize(
    ("environ", "flops", "threads"),
    [({}, 0.9e9, 1), ({}, 42e9, 2), ({"OMP_NUM_THREADS": "2"}, 0.9e9, 2)],
    ids=["a tiny model", "a larger one", "as the user says"],
)
def test_a_step_gets_the_threads_that_it_can_use(monkeypatch, environ, flops, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        hardware.set_threads(Accelerator(cpu=True), environ, flops)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("load", "said"), [(6.1, True), (0.5, False)])
def test_a_busy_machine_is_named(monkeypatch, capsys, load, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(hardware, "usable_cores", lambda: 2)
    hardware.set_threads(Accelerator(cpu=True), {"OMP_NUM_THREADS": "1"}, 1e12)
    assert ("load 6.1 on 2 cores" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("launcher", "fast", "asked", "expected"),
    [("no", True, None, "bf16"), ("no", False, None, "no"), ("no", True, "no", "no"), ("bf16", False, None, "bf16")],
)
def test_precision_is_what_was_asked_for_or_what_the_hardware_has(
    monkeypatch, tmp_path, launcher, fast, asked, expected
):
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda device: fast)
    environ = {"ACCELERATE_MIXED_PRECISION": launcher, "ACCELERATE_USE_CPU": "1"}
    assert hardware.make_accelerator(environ, asked, 1, "none", tmp_path).mixed_precision == expected


@pytest.mark.parametrize("version", [{}, {"FSDP_VERSION": "1"}])
def test_the_first_version_of_fsdp_is_refused(tmp_path, version):
    environ = {"ACCELERATE_USE_CPU": "1", "ACCELERATE_USE_FSDP": "true", **version}
    with pytest.raises(ValueError, match="FSDP version 1, expected 2; set fsdp_version: 2 in its configuration"):
        hardware.make_accelerator(environ, "no", 1, "none", tmp_path)
