import json

import pytest
from processes import ROOT, together


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_on_several_processes_are_those_of_one(processes, tmp_path):
    """With either regularizer. Also for uneven parts of the batch, as far as the regularizer goes; for parts that a
    process accumulates, by the exact term; and on two processes under FSDP2."""
    together(processes, ROOT / "tests" / "process_worker.py", tmp_path / "errors.json")
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) == {1: 16, 2: 30, 4: 24}[processes]
    for name, error in errors.items():
        assert error < (1e-12 if "float64" in name else 1e-6), f"{name}: {error}"
