import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal, get_args, get_type_hints

import pytest
from processes import ROOT, run

import arguments_umae
from arguments_umae import Between, arguments_of, check_launch, flag, parse_overrides, pretraining_arguments
from command_line_umae import given_flags, one_line_refusals


@dataclass
class Example:
    recipe: str | None = flag(None, "A YAML file.")
    mask_ratio: Annotated[float | None, Between(0, 1)] = flag(None, "A share.")
    num_train_epochs: Annotated[int, Between(1)] = flag(3, "A count.")
    norm_pix_loss: bool | None = flag(None, "A switch.")
    pooling: Literal["cls", "mean"] | None = flag(None, "A choice.")
    mixed_precision: Literal["no", "bf16"] | None = flag(None, "A choice that YAML reads as false.")
    max_train_steps: Annotated[int | None, Between(1)] = flag(5, "A count, or none.")
    streaming: bool = flag(False, "A switch that is on or off.")
    output_dir: str = flag("runs", "Text.")
    config_overrides: Mapping | str | None = flag(None, "Fields.")


DIGITS = ROOT / "recipes" / "digits.yaml"


def parse_arguments(types, argv) -> tuple:
    return arguments_of(types, given_flags(types, argv))


def parsed(*argv: str) -> Example:
    (example,) = parse_arguments((Example,), argv)
    return example


def with_recipe(folder, text: str, *argv: str) -> Example:
    (folder / "r.yaml").write_text(text)
    return parsed("--recipe", str(folder / "r.yaml"), *argv)


def test_flags_override_the_recipe_which_overrides_the_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("mask_ratio: 0.5\nnum_train_epochs: 7\nnorm_pix_loss: false\nconfig_overrides: {a: 1, b: x}\n")
    example = parsed("--recipe", str(recipe), "--num_train_epochs", "9")
    assert (example.mask_ratio, example.num_train_epochs, example.norm_pix_loss) == (0.5, 9, False)
    assert example.config_overrides == {"a": 1, "b": "x"} and example.pooling is None
    assert parsed(f"--recipe={recipe}").num_train_epochs == 7
    assert parsed().num_train_epochs == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask_ration", "0.5"], "unknown argument --mask_ration; did you mean --mask_ratio?"),
        (["--mask", "0.5"], "unknown argument --mask"),  # no abbreviations
        (["--mask_ratio=nan"], "^mask_ratio must be at least 0 and at most 1, got nan"),
        (["--mask_ratio", "1.5"], "^mask_ratio must be at least 0 and at most 1, got 1.5"),
        (["--num_train_epochs", "0"], "^num_train_epochs must be at least 1, got 0"),
        (["images"], "unknown argument images"),
        (["--recipe", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
    ],
    ids=str,
)
def test_wrong_flags_are_refused_with_what_was_meant(argv, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parsed(*argv)


SCRIPTS = (arguments_umae.PRETRAIN, arguments_umae.PROBE, arguments_umae.FINETUNE)
REQUIRED = ["--model_name_or_path", "m", "--output_dir", "o"]


def numeric_flags() -> list:
    """(dataclasses of the script, name, type, range) of every flag of the scripts that takes a number."""
    found = []
    for types in SCRIPTS:
        for name, hint in chain(*(get_type_hints(one, include_extras=True).items() for one in types)):
            limits = [limit for limit in getattr(hint, "__metadata__", ()) if isinstance(limit, Between)]
            plain = hint.__origin__ if limits else hint
            kind = {int, float} & {plain, *get_args(plain)}
            if kind:
                found.append((types, name, *kind, limits))
    return found


def test_every_number_has_a_range_and_is_refused_outside_of_it_by_name(capsys):
    assert len(numeric_flags()) > 40
    for types, name, kind, limits in numeric_flags():
        assert len(limits) == 1, (types, name)
        (limit,) = limits
        outside = [limit.low - 1] + ([limit.high + 1] if limit.high < math.inf else [])
        for value in map(kind, outside):
            with pytest.raises(ValueError, match=rf"^{name} must be at least {limit.low}.*, got {value}"):
                parse_arguments(types, [*REQUIRED, f"--{name}={value}"])
        for value in ("nan", "inf", "-inf"):
            with pytest.raises((ValueError, SystemExit)) as refusal:
                parse_arguments(types, [*REQUIRED, f"--{name}={value}"])
            assert name in str(refusal.value) + capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--num_train_epochs", "many"], ["--pooling", "max"]], ids=str)
def test_values_of_the_wrong_type_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("max_train_steps: null", None),
        ("max_train_steps:", None),
        ("config_overrides: null", None),
        ("mixed_precision: no", "no"),
        ("mixed_precision: off", "no"),
        ('mixed_precision: "no"', "no"),
        ("mixed_precision: bf16", "bf16"),
        ("mixed_precision: null", None),
        ("norm_pix_loss: no", False),
        ("norm_pix_loss: null", None),
        ("streaming: true", True),
        ("mask_ratio: 1", 1.0),
        ("mask_ratio: 5e-4", 5e-4),  # text in YAML 1.1, a number in YAML 1.2 and everywhere else
        ("output_dir: None", "None"),
        ("config_overrides: {image_size: [8, 16], hidden_act: null}", {"image_size": [8, 16], "hidden_act": None}),
        ("config_overrides: hidden_size=8,pooling=mean", "hidden_size=8,pooling=mean"),
    ],
)
def test_values_of_a_recipe_keep_their_types(tmp_path, line, value):
    found = getattr(with_recipe(tmp_path, line), line.partition(":")[0])
    assert found == value and type(found) is type(value)


def test_a_flag_overrides_whatever_type_the_recipe_has(tmp_path):
    text = "max_train_steps: null\nmixed_precision: no\nstreaming: true\nconfig_overrides: {a: 1}"
    flags = ("--max_train_steps=3", "--mixed_precision=bf16", "--streaming=false", "--config_overrides=a=2")
    example = with_recipe(tmp_path, text, *flags)
    assert (example.max_train_steps, example.mixed_precision, example.streaming) == (3, "bf16", False)
    assert example.config_overrides == "a=2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_train_epochs: many", "num_train_epochs is 'many', expected a whole number"),
        ('num_train_epochs: "7"', "num_train_epochs is '7', expected a whole number"),
        ("num_train_epochs: 7.5", "num_train_epochs is 7.5, expected a whole number"),
        ("num_train_epochs: true", "num_train_epochs is true, expected a whole number"),
        ("num_train_epochs: null", "num_train_epochs is null, expected a whole number"),
        ("mask_ratio: [0.5]", "mask_ratio is [0.5], expected a number or null"),
        ("mask_ratio: no", "mask_ratio is false, expected a number or null"),
        ("streaming: 1", "streaming is 1, expected true or false"),
        ("pooling: max", "pooling is 'max', expected one of cls, mean or null"),
        ("pooling: no", "pooling is false, expected one of cls, mean or null"),
        ("mixed_precision: yes", "mixed_precision is true, expected one of no, bf16 or null"),
        ("output_dir: null", "output_dir is null, expected text"),
        ("output_dir: 2024", "output_dir is 2024, expected text (in quotes)"),
        ("output_dir: {a: 1}", "output_dir is {'a': 1}, expected text"),
        ("config_overrides: [a]", "config_overrides is ['a'], expected names and values, text (in quotes) or null"),
    ],
)
def test_recipes_with_values_of_another_type_are_refused_by_file_and_name(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"r\.yaml: {re.escape(message)}"):
        with_recipe(tmp_path, line)


def test_the_sizes_of_a_recipe_yield_to_those_of_weights_on_the_command_line(tmp_path):
    def sizes(*words):
        _, model, training = pretraining_arguments(given_flags(arguments_umae.PRETRAIN, words))
        assert training.num_train_epochs == 100 and training.mixed_precision == "no", "what else the recipe says holds"
        return model.image_size, model.patch_size, model.config_overrides

    weights = ("--model_name_or_path", "runs/mine")
    by_name = ("--recipe", str(DIGITS))
    assert sizes()[:2] == sizes(*by_name)[:2] == (8, 2) and sizes()[2]["num_attention_heads"] == 4
    assert sizes(*weights) == sizes(*by_name, *weights) == (None, None, None)
    assert sizes(*weights, "--image_size", "32") == (32, None, None)
    assert sizes(*weights, "--config_overrides", "qkv_bias=false") == (None, None, "qkv_bias=false")
    (tmp_path / "r.yaml").write_text(DIGITS.read_text() + "model_name_or_path: runs/mine\n")
    assert sizes("--recipe", str(tmp_path / "r.yaml")) == sizes(), "the recipe is made for the weights that it names"


def test_the_sizes_of_a_recipe_yield_to_a_model_size_on_the_command_line(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "image_size: 8\nconfig_overrides: {hidden_size: 64, decoder_hidden_size: 32, hidden_act: relu}"
    )
    words = ["--recipe", str(tmp_path / "r.yaml"), "--model_size", "small"]
    _, model, _ = pretraining_arguments(given_flags(arguments_umae.PRETRAIN, words))
    assert (model.image_size, model.config_overrides) == (8, {"hidden_act": "relu"})
    words += ["--config_overrides", "decoder_hidden_size=96"]
    _, model, _ = pretraining_arguments(given_flags(arguments_umae.PRETRAIN, words))
    assert model.config_overrides == "decoder_hidden_size=96"


def test_a_recipe_may_hold_what_the_program_demands(tmp_path):
    (tmp_path / "r.yaml").write_text("model_name_or_path: runs/mine\nmixed_precision: no\n")
    words = ["--recipe", str(tmp_path / "r.yaml"), "--output_dir", "runs/tuned"]
    _, model, _, training = parse_arguments(arguments_umae.FINETUNE, words)
    assert (model.model_name_or_path, training.output_dir, training.mixed_precision) == (
        "runs/mine",
        "runs/tuned",
        "no",
    )
    with pytest.raises(ValueError, match=r"^output_dir is missing: The run folder"):
        parse_arguments(arguments_umae.FINETUNE, words[:2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_ration: 0.5", "unknown key 'mask_ration'; did you mean mask_ratio"),
        ("recipe: other.yaml", "unknown key 'recipe'"),
        ("a: b: c", r"r.yaml is no YAML: mapping values are not allowed here"),
        ("- 1", "holds no names and values"),
        ("num_train_epochs: 0", "must be at least 1"),
    ],
)
def test_wrong_recipes_are_refused_with_what_was_meant(tmp_path, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        parsed("--recipe", str(recipe))


def test_overrides_are_read_as_their_types():
    text = "hidden_size=192, pooling=mean,qkv_bias=false,layer_norm_eps=1.0e-5"
    names = ["hidden_size", "pooling", "qkv_bias", "layer_norm_eps"]
    overrides = parse_overrides(text, names, "--config_overrides")
    assert overrides == {"hidden_size": 192, "pooling": "mean", "qkv_bias": False, "layer_norm_eps": 1e-5}
    assert parse_overrides(None, names, "--config_overrides") == {}
    with pytest.raises(ValueError, match="did you mean hidden_size"):
        parse_overrides("hidden_sise=1", names, "--config_overrides")
    block = {"image_size": [8, 16], "pooling": None}
    assert parse_overrides(block, ["image_size", "pooling"], "config_overrides") == block
    with pytest.raises(ValueError, match="config_overrides: unknown name 'hidden_sise'; did you mean hidden_size"):
        parse_overrides({"hidden_sise": 1}, names, "config_overrides")
    assert parse_overrides("layer_norm_eps=1e-5", names, "config_overrides") == {"layer_norm_eps": 1e-5}
    with pytest.raises(ValueError, match="not name=value"):
        parse_overrides("hidden_size", names, "--config_overrides")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "lower num_train_epochs, or give another output_dir.",
            "lower --num_train_epochs, or give another --output_dir.",
        ),
        ("runs/output_dir holds a run (mask_ratio 0.5)", "runs/output_dir holds a run (--mask_ratio 0.5)"),
        ("--mask_ratio 2: my_mask_ratio, mask_ratio_2", "--mask_ratio 2: my_mask_ratio, mask_ratio_2"),
        ("a column 'output_dir', a file output_dir.csv", "a column 'output_dir', a file output_dir.csv"),
        (
            "pooling and streaming, hidden_size",
            "--pooling and streaming, hidden_size",
        ),  # the subject, then a word, no flag
    ],
)
def test_a_refusal_by_the_package_shows_the_flags_of_the_program(text, shown):
    with pytest.raises(SystemExit) as stop, one_line_refusals("run.py", (Example,)):
        raise ValueError(text)
    assert str(stop.value) == f"run.py: {shown}"


def test_processes_that_do_not_know_of_each_other_are_refused():
    with pytest.raises(ValueError, match="started 2 processes, but Accelerate sees 1"):
        check_launch({"WORLD_SIZE": "2"}, 1)
    check_launch({"WORLD_SIZE": "2"}, 2)
    check_launch({}, 1)


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_linear_probe.py", "run_finetune.py"])
def test_help_fits_two_screens_of_fifty_lines(script):
    """Flags are debt: whoever adds one past this has to take one away."""
    lines = run(script, "--help").stdout.splitlines()
    assert 10 < len(lines) <= 100 and max(map(len, lines)) <= 120
    assert all(line.startswith("  -") or not line.startswith("  ") for line in lines), "a flag needs a second line"


IMPORTED = """
import gc, command_line_umae
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
assert command_line_umae.imported("asyncio").run
assert not collections and gc.isenabled() and gc.get_freeze_count() > 1000, (collections, gc.get_freeze_count())
"""


def test_a_program_looks_for_garbage_after_its_imports_and_not_among_them():
    run("-c", IMPORTED, fresh=True)
