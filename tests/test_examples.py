"""The examples run as their first lines say."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from golden_models import fresh_config
from PIL import Image
from processes import ROOT, run
from safetensors.torch import load_file

from modeling_umae import UMAEForPreTraining
from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor, load_processor
from umae.training.failures import no_failure
from umae.training.loop import optimizer_step
from umae.training.schedules import Schedule, decay_groups, set_learning_rate


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


# ------------------------------------------------------------------------------------------------- dense_retrieval.py


@pytest.fixture
def folder(tmp_path):
    """A model, and images of noise of which one is also the query."""
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path / "model")
    evaluation_processor((16, 16)).save_pretrained(tmp_path / "model")
    numbers = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in "abcdefg":
        pixels = numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    shutil.copy(tmp_path / "images" / "d.png", tmp_path / "query.png")
    return tmp_path


def test_a_part_of_an_image_is_found_where_it_is(folder):
    import dense_retrieval

    for size, (right, down) in ((16, (0.3, 0.8)), (32, (0.9, 0.1))):
        paths = (str(folder / "model"), str(folder / "images"), str(folder / "query.png"))
        figure = dense_retrieval.search(*paths, (right, down), size)
        best = figure.axes[1]
        assert best.get_title() == "d.png, 1.00"
        similar = best.images[1].get_array()
        rows, columns = similar.shape
        assert rows == size // 4
        assert np.unravel_index(similar.argmax(), similar.shape) == (int(down * rows), int(right * columns))


def test_the_program_writes_an_image_and_refuses_a_place_outside(folder):
    words = ("examples/dense_retrieval.py", folder / "model", folder / "images", folder / "query.png")
    run(*words, "--at", "0.4", "0.6", "--layer", "1", "--output", folder / "found.png", cwd=ROOT)
    with Image.open(folder / "found.png") as image:
        assert image.width == 1320
    refused = run(*words, "--at", "1.4", "0.6", cwd=ROOT, check=False)
    assert refused.returncode == 1 and "--at 1.4 0.6 lies outside of the image" in refused.stderr


# ------------------------------------------------------------------------------------------- pretrain_with_trainer.py


SIZES = {
    "size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32,
}  # fmt: skip


def test_the_trainer_takes_the_steps_of_our_loop(tmp_path):
    """Five steps on the same crops and noise, in float32: losses, then weights."""
    import pretrain_with_trainer

    (tmp_path / "images").mkdir()
    digits = load_images("digits")
    for index in range(40):
        digits.read(index).resize((24, 24)).save(tmp_path / "images" / f"{index}.png")
    torch.manual_seed(0)
    trainer = pretrain_with_trainer.make_trainer(str(tmp_path / "images"), str(tmp_path / "run"), batch_size=8, **SIZES)
    trainer.args.num_train_epochs, trainer.args.dataloader_num_workers = 1, 0
    trainer.args.learning_rate, trainer.args.report_to = 0.01, []
    model, seen, losses = trainer.model, [], []
    ours = UMAEForPreTraining(model.config)
    ours.load_state_dict(model.state_dict())

    def remember(_, arguments, given):
        noise = torch.rand(len(given["pixel_values"]), 16, generator=torch.Generator().manual_seed(len(seen)))
        seen.append({"pixel_values": given["pixel_values"].clone(), "noise": noise})
        return arguments, {**given, "noise": noise}

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.register_forward_hook(lambda *arguments: losses.append(arguments[-1].loss.item()))
    trainer.train()
    trainer.save_model()
    assert len(losses) == 5 and losses[0] != losses[1]

    accelerator, schedule = Accelerator(cpu=True), Schedule(5, 1, 0.01)  # the Trainer's warm-up is whole steps
    optimizer = torch.optim.AdamW(decay_groups(ours, 0.05), betas=(0.9, 0.95), fused=True)
    ours, optimizer = accelerator.prepare(ours.train(), optimizer)
    failed = no_failure(accelerator.device, 2)
    for step, (batch, loss) in enumerate(zip(seen, losses, strict=True)):
        set_learning_rate(optimizer, schedule, step)

        def of_step(batch=batch):
            output = ours(**batch)
            yield output.loss, output.loss.detach()[None]

        values = optimizer_step(accelerator, ours, optimizer, of_step(), 1, failed, step)
        assert values[0].item() == pytest.approx(loss, rel=1e-6), step
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-7), name
    assert torch.equal(encoder_from_pretrained(str(tmp_path / "run")).layernorm.weight, model.vit.layernorm.weight)
    assert load_processor(str(tmp_path / "run")).crop_size == {"height": 16, "width": 16}


# ----------------------------------------------------------------------------------------------------------- lora.py


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config(image_size=8, patch_size=2)).save_pretrained(tmp_path / "encoder")
    evaluation_processor((8, 8)).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_lora_changes_the_adapter_and_the_head_only_and_is_loaded_as_it_was(encoder, tmp_path):
    import lora

    torch.manual_seed(0)
    output, names = str(tmp_path / "lora"), [str(digit) for digit in range(10)]
    model = lora.train(encoder, "digits", output, max_steps=8, use_cpu=True, report_to=[], disable_tqdm=True)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns and all("lora_" in name or "classifier.modules_to_save" in name for name in learns)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    before, after = load_file(tmp_path / "encoder" / "model.safetensors"), model.get_base_model().state_dict()
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in after.items()}
    kept = [name for name in before if name.startswith("vit.")]
    assert len(kept) > 30 and all(torch.equal(before[name], after[name]) for name in kept)
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(saved[name].abs().max() > 0 for name in saved if "lora_B" in name), "every adapter has learned"
    pixel_values = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits
        assert torch.equal(lora.load(encoder, names, output)(pixel_values=pixel_values).logits, logits)
        assert not torch.allclose(lora.classifier(encoder, names).eval()(pixel_values).logits, logits)


# ------------------------------------------------------------------------------------------------ several_classes.py


def test_images_of_several_classes_are_learned_from_a_table(encoder, tmp_path):
    import several_classes

    digits, rows = load_images("digits"), []
    (tmp_path / "photos" / "of_digits").mkdir(parents=True)
    for index, digit in enumerate(digits.labels()[:300].tolist()):
        digits.read(index).save(tmp_path / "photos" / "of_digits" / f"{index}.png")
        classes = " ".join(["odd"] * (digit % 2) + ["large"] * (digit > 4))
        rows.append(f"of_digits/{index}.png,{classes}\n")
    (tmp_path / "photos.csv").write_text("".join(rows))
    run = several_classes.train(
        encoder, str(tmp_path / "photos"), str(tmp_path / "photos.csv"), str(tmp_path / "run"), max_train_steps=4,
        per_device_train_batch_size=16, mixed_precision="no",
    )  # fmt: skip
    report = json.loads((run.folder / "finetune.json").read_text())
    assert report["protocol"]["train"]["pictures"] == 240 and report["protocol"]["test"]["pictures"] == 60
    assert 0 < report["mAP"] < 100
    image = str(tmp_path / "photos" / "of_digits" / "0.png")
    assert set(several_classes.tags(run.folder, image, least=0.0)) == {"large", "odd"}
    assert several_classes.tags(run.folder, image, least=1.0) == {}


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_end(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "examples" / "umae_in_ten_minutes.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if not cell.source.startswith("%pip")]
    assert len(cells) == len(notebook.cells) - 1
    stored = [[output.output_type for output in cell.outputs] for cell in cells if cell.cell_type == "code"]
    notebook.cells = cells
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [
        [output.output_type for output in cell.outputs if output.get("name") != "stderr"]
        for cell in cells
        if cell.cell_type == "code"
    ]
    for now, before in zip(kinds, stored, strict=True):
        assert {*now} == {*before}, "it shows what it showed when it was stored"
    assert (tmp_path / "runs" / "umae_probe" / "linear_probe.json").exists() and (tmp_path / "report.html").exists()
