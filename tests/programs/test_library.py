"""The programs as functions: the same arguments, no command line, and nothing that is left behind in the process."""

import inspect
import json
import threading

import pytest
from accelerate.state import AcceleratorState, PartialState
from training_runs import SHORT

import arguments_umae
import umae
from umae.programs.finetune import finetune
from umae.programs.pretrain import pretrain
from umae.programs.probe import probe
from umae.programs.shrink import shrink

pytestmark = pytest.mark.usefixtures("no_figures")

TWO_STEPS = {"max_train_steps": 2, "eval_steps": 0, "logging_steps": 1}


def test_every_public_name_is_there_and_no_other():
    assert {name for name in umae.__all__ if getattr(umae, name, None) is None} == set()
    assert set(umae.__all__) <= set(dir(umae))
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        umae.pretrian  # noqa: B018


@pytest.mark.parametrize(
    ("function", "program"), [(pretrain, "pretrain"), (probe, "probe"), (finetune, "finetune"), (shrink, "shrink")]
)
def test_keywords_are_the_flags_with_their_defaults_and_help(function, program):
    parameters = inspect.signature(function).parameters
    types, _ = arguments_umae.PROGRAMS[program]
    assert list(parameters) == arguments_umae.field_names(types)
    for kind in types:
        for name, field in kind.__dataclass_fields__.items():
            required = field.default is not parameters[name].default
            assert required == (parameters[name].default is inspect.Parameter.empty)
            assert f"{name}: {field.metadata['help'].replace('%%', '%')}\n" in function.__doc__


def test_a_function_trains_to_the_bits_of_the_command(finished, tmp_path):
    folder, _ = finished
    values = dict(zip((name.removeprefix("--") for name in SHORT[::2]), map(int, SHORT[1::2]), strict=True))
    result = umae.pretrain(output_dir=tmp_path / "run", **values)
    assert result.folder == tmp_path / "run" and result.metrics[-1]["step"] == 12
    assert (result.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    model = result.model()
    assert type(model) is umae.UMAEForPreTraining and not model.training


def test_runs_in_one_process_leave_nothing_to_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"^mask_ratio 0 hides no patch"):
        umae.pretrain(output_dir=tmp_path / "refused", mixed_precision="bf16", mask_ratio=0, **TWO_STEPS)
    assert not AcceleratorState._shared_state, "a probe or a diagnosis would compute in bf16"
    pretrained = umae.pretrain(output_dir=tmp_path / "run", mixed_precision="no", **TWO_STEPS)
    identity = json.loads((pretrained.folder / "run.json").read_text())["identity"]
    assert identity["mixed_precision"] == "no", "that of the run before would be found in Accelerate's state"
    assert not AcceleratorState._shared_state and not PartialState._shared_state
    tuned = umae.finetune(
        model_name_or_path=pretrained.folder, recipe="digits_finetune", output_dir=tmp_path / "tuned",
        max_train_steps=2, warmup_epochs=0,
    )  # fmt: skip
    assert type(tuned.model()) is umae.UMAEForImageClassification and "test_top1" in tuned.metrics[-1]


def test_a_run_in_a_thread_of_a_notebook_trains(tmp_path):
    """Signals belong to the main thread; a run in another one does without them."""
    results = []
    call = threading.Thread(target=lambda: results.append(umae.pretrain(output_dir=tmp_path / "run", **TWO_STEPS)))
    call.start()
    call.join()
    assert results and results[0].metrics[-1]["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ration": 0.5}, "^unknown argument mask_ration; did you mean mask_ratio?"),
        ({"mask_ratio": "0.5"}, "^mask_ratio is '0.5', expected a number or null"),
        ({"max_train_steps": 2.5}, "^max_train_steps is 2.5, expected a whole number or null"),
        ({"seed": -1}, "^seed must be at least 0"),
        ({"recipe": "digit"}, "^there is no recipe digit; give the path of a YAML file, or one of .*digits"),
    ],
    ids=str,
)
def test_wrong_keywords_are_refused_by_name_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        umae.pretrain(output_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_what_is_required_is_named():
    with pytest.raises(ValueError, match=r"^model_name_or_path is missing: Encoder to evaluate"):
        umae.probe(output_dir="somewhere")
