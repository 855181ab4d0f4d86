"""The shipped recipes: each is read by the program that it is for, and trains."""

import json
from pathlib import Path

import pytest
from processes import ROOT, SHARED

import umae
from arguments_umae import PROGRAMS

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip


def program_of(recipe: Path) -> str:
    kinds = {"probe": "probe", "finetune": "finetune", "finetuned": "finetune"}
    return kinds.get(recipe.stem.rpartition("_")[2], "pretrain")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_says_what_it_costs_and_gives(recipe):
    _, arguments_of = PROGRAMS[program_of(recipe)]
    given = {} if program_of(recipe) == "pretrain" else {"model_name_or_path": "run", "output_dir": "out"}
    arguments_of({"recipe": recipe.stem, **given})
    head = recipe.read_text().partition("\ndataset_name")[0]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert "# Costs:" in head and ("Reported by others" in head or "Reache" in head)
    if recipe.stem.startswith(("own", "imagenet")):
        assert "Not measured" in " ".join(head.replace("\n# ", " ").split()) or "none of it measured here" in head


def test_the_recipes_of_the_papers_have_their_steps():
    """U-MAE: 1,024 images a step on eight GPUs; MAE's probe and fine-tuning: 16,384 and 1,024."""
    expected = {"base": 1024, "large": 4096, "probe": 16384, "finetune": 1024}
    for recipe in RECIPES:
        if recipe.stem.startswith("imagenet1k"):
            _, arguments_of = PROGRAMS[program_of(recipe)]
            given = {} if program_of(recipe) == "pretrain" else {"model_name_or_path": "run"}
            args = arguments_of({"recipe": recipe.stem, **given})[-1]
            images = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
            assert images == expected[recipe.stem.rpartition("_")[2]], recipe.stem


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps(recipe, tmp_path, monkeypatch):
    """With all that it says but its images and the width of its layers; the bundled digits as they are."""
    monkeypatch.chdir(tmp_path)
    images = photographs(tmp_path / "images")
    name = recipe.stem
    few = {"dataset_name": "digits" if name.startswith("digits") else str(images)}
    few |= {"per_device_train_batch_size": 4, "output_dir": "out"}
    two_steps = {"max_train_steps": 2, "eval_steps": 0, "warmup_epochs": 0}
    if program_of(recipe) == "pretrain":
        run = umae.pretrain(recipe=name, config_overrides=SMALL, **two_steps, **few)
        assert json.loads((run.folder / "run.json").read_text())["finished"]
        return
    size = {"digits": {"image_size": 8, "patch_size": 2}, "cifar10": {"image_size": 32, "patch_size": 4}}
    start = umae.pretrain(
        dataset_name=few["dataset_name"], max_train_steps=1, eval_steps=0, per_device_train_batch_size=4,
        config_overrides=SMALL, output_dir="run", **size.get(name.partition("_")[0], {}),
    )  # fmt: skip
    if program_of(recipe) == "probe":
        epochs = {"num_train_epochs": 2, "warmup_epochs": 1}
        report = umae.probe(recipe=name, model_name_or_path=start.folder, **epochs, **few)
        assert report["protocol"]["linear_protocol"] == "mae"
    else:
        umae.finetune(recipe=name, model_name_or_path=start.folder, **two_steps, **few)


def photographs(folder: Path) -> Path:
    """A few images of two classes, in a split to train on and one to evaluate on."""
    for split in ("train", "test"):
        images = umae.load_images(str(SHARED / "data" / "groceries"), split=split)
        labels = images.labels().tolist()
        for kind in (0, 1):
            (folder / split / str(kind)).mkdir(parents=True)
            for index in [index for index, label in enumerate(labels) if label == kind][:24]:
                images.read(index).save(folder / split / str(kind) / f"{index}.png")
    return folder
