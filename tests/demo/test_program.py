"""`umae demo`: its arguments, and what it refuses."""

import importlib.util

import pytest
from processes import run as run_program

from arguments_umae import DEMO, arguments_of
from command_line_umae import given_flags


def test_one_model_or_two_stand_alone_anywhere_on_the_command_line():
    for words in ("a b --images i", "a --images i b", "--images i --run a --other_run b"):
        assert given_flags(DEMO, words.split()) == {"run": "a", "other_run": "b", "images": "i"}
    assert given_flags(DEMO, ["a"]) == {"run": "a"}
    with pytest.raises(ValueError, match="unknown argument c"):
        given_flags(DEMO, ["a", "b", "c"])
    with pytest.raises(ValueError, match="run is missing: Model: a run folder"):
        arguments_of(DEMO, {})


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_a_missing_gradio_is_named_with_what_installs_it(run):
    result = run_program("-m", "umae", "demo", run, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith('install it: pip install "umae[demo]"')
