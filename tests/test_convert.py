import argparse
import json
import os
import pickle
import re

import golden_inputs
import pytest
import torch
from golden_models import batch, fresh_config, original_file, our_weights, pretraining_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from modeling_umae import UMAEForImageClassification, UMAEForPreTraining, UMAEModel
from umae.convert import command, encoder_from_pretrained, load_exactly, read_model, resize_positions, set_pooling
from umae.convert.families import original_config
from umae.convert.names import from_original, rename, to_original
from umae.convert.weights import read_weights

PIXELS = torch.linspace(-2, 2, 3 * 3 * 16 * 16).reshape(3, 3, 16, 16).sin()
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16,
    "patch_size": 4, "layer_norm_eps": 1e-2, "hidden_act": "relu",
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip


def saved(model, folder):
    """A model with no parameter left as a fresh one has it, saved."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return folder


@torch.no_grad()
def features(encoder, pixels=PIXELS):
    return encoder(pixels).last_hidden_state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("model_class", [ViTModel, ViTForImageClassification])
def test_a_vit_gives_the_same_as_in_transformers(model_class, bias, tmp_path):
    folder = saved(model_class(ViTConfig(**SIZES, qkv_bias=bias)), tmp_path)
    theirs = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    encoder = encoder_from_pretrained(folder)
    assert (features(encoder) - features(theirs)).abs().max() < 1e-5
    assert encoder.config.pooling == "cls" and not encoder.training


@pytest.mark.parametrize("model_class", [ViTMAEModel, ViTMAEForPreTraining])
def test_a_vit_mae_gives_the_same_as_in_transformers(model_class, tmp_path):
    folder = saved(model_class(ViTMAEConfig(**SIZES, **DECODER)), tmp_path)
    theirs = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()
    with torch.no_grad():  # it masks in evaluation mode too; this noise keeps the order
        expected = theirs(PIXELS, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
    assert (features(encoder_from_pretrained(folder)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("model_class", [UMAEModel, UMAEForPreTraining, UMAEForImageClassification])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_saved_umae_gives_its_encoder(model_class, pooling, tmp_path):
    model = model_class(fresh_config(pooling=pooling))
    folder = saved(model, tmp_path)
    encoder = encoder_from_pretrained(folder)
    assert encoder.config.pooling == pooling and not encoder.training
    with torch.no_grad():
        assert torch.equal(encoder(PIXELS).pooler_output, getattr(model, "vit", model)(PIXELS).pooler_output)


def test_mean_pooling_keeps_a_trained_norm_and_is_a_plain_one_otherwise(tmp_path, capfd):
    for trained_with, scale in (("mean", True), ("cls", False)):
        model = UMAEForPreTraining(fresh_config(pooling=trained_with))
        folder = saved(model, tmp_path / trained_with)
        encoder = encoder_from_pretrained(folder, pooling="mean")
        with torch.no_grad():
            mean = features(encoder)[:, 1:].mean(dim=1)
            expected = torch.nn.functional.layer_norm(mean, (32,), eps=1e-6)
            if scale:
                expected = expected * model.vit.fc_norm.weight + model.vit.fc_norm.bias
            assert (encoder(PIXELS).pooler_output - expected).abs().max() < 1e-5
    assert "newly initialized" not in "".join(capfd.readouterr())


def test_class_token_pooling_leaves_no_norm_behind(tmp_path):
    encoder = encoder_from_pretrained(saved(UMAEModel(fresh_config(pooling="mean")), tmp_path), pooling="cls")
    assert not any("fc_norm" in name for name in encoder.state_dict())
    with torch.no_grad():
        output = encoder(PIXELS)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    with pytest.raises(ValueError, match="pooling must be one of cls, mean, got 'max'"):
        set_pooling(encoder, "max")


def test_half_precision_weights_are_computed_in_float32(tmp_path):
    saved(UMAEModel(fresh_config()).to(torch.bfloat16), tmp_path)
    assert encoder_from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.parametrize(
    "model",
    [UMAEForPreTraining(fresh_config(pooling="mean")), ViTModel(ViTConfig(**SIZES))],
    ids=["umae", "vit"],
)
def test_weights_that_do_not_fit_are_listed(model, tmp_path):
    file = saved(model, tmp_path) / "model.safetensors"
    good = load_file(file)
    norm = next(name for name in good if name.endswith("layernorm.bias"))
    table = next(name for name in good if name.endswith("position_embeddings"))
    for broken, message in (
        ({k: v for k, v in good.items() if k != norm}, "missing: layernorm.bias"),
        ({**good, "extra.weight": torch.ones(2)}, "left over: extra.weight"),
        ({**good, table: torch.ones(1, 5, 32)}, "of another shape: embeddings.position_embeddings"),
    ):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            encoder_from_pretrained(tmp_path)


def test_a_missing_trained_norm_is_an_error(tmp_path):
    file = saved(UMAEForPreTraining(fresh_config(pooling="mean")), tmp_path) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "fc_norm" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape("missing: fc_norm.bias, fc_norm.weight")):
        encoder_from_pretrained(tmp_path)


def test_other_models_and_missing_folders_are_refused(tmp_path):
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'resnet'; accepted are umae, vit, vit_mae"):
        encoder_from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no model"):
        encoder_from_pretrained(tmp_path / "nothing")


def test_names_of_transformers_before_5_17_are_ours_already():
    name = "encoder.layer.11.attention.attention.query.weight"
    assert rename(name) == name
    assert rename("layers.11.attention.q_proj.weight") == name
    assert rename("layers.11.mlp.fc2.bias") == "encoder.layer.11.output.dense.bias"


@pytest.mark.parametrize("setup", golden_inputs.SETUPS.values(), ids=golden_inputs.SETUPS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_weights_in_the_originals_names_load_with_no_wrong_value(setup, pooling):
    values = golden_inputs.with_position_tables(setup, golden_inputs.weights(setup))
    ours = from_original({name: torch.tensor(v) for name, v in golden_inputs.to_original(values).items()})
    expected = our_weights(setup, pooling)
    assert all(torch.equal(ours.pop(name), tensor) for name, tensor in expected.items())
    assert set(ours) <= {"fc.weight", "fc.bias", "vit.fc_norm.weight", "vit.fc_norm.bias"}


# ------------------------------------------------------------------------------------------- files of the original code


HEADS = ["--num_attention_heads", "3", "--decoder_num_attention_heads", "4"]


def test_a_file_of_the_original_becomes_a_model_with_its_outputs_and_settings(tmp_path, capsys):
    command.main([str(original_file(tmp_path / "checkpoint-3.pth")), str(tmp_path / "out"), *HEADS])
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    assert isinstance(model, UMAEForPreTraining) and f"{tmp_path}/out: UMAEForPreTraining" in capsys.readouterr().out
    config = model.config
    assert (config.mask_ratio, config.norm_pix_loss, config.pooling) == (0.6, True, "cls")
    assert config.uniformity_weight == 0.01, "0.08 of 8 processes"
    pixel_values, noise = batch()
    expected = pretraining_model().eval()
    with torch.no_grad():
        output, wanted = (m(pixel_values, noise=noise, mask_ratio=0.75) for m in (model, expected))
    assert torch.equal(output.logits, wanted.logits) and torch.equal(output.features, wanted.features)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.crop_size == {"height": 32, "width": 32}


@pytest.mark.parametrize("settings", [None, argparse.Namespace(mask_ratio=0.6)], ids=["none", "without lamb"])
def test_weights_that_no_uniformity_term_has_trained_have_none(tmp_path, settings):
    path = original_file(tmp_path / "mae.pth", args=settings)
    assert original_config(*read_weights(path), 3, 4).uniformity_weight == 0
    for model in (ViTModel(ViTConfig(**SIZES)), ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **DECODER))):
        assert read_model(saved(model, tmp_path / "folder"))[0].uniformity_weight == 0
        assert read_model(tmp_path / "folder")[0].regularizer == "uniformity"
    umae = saved(UMAEModel(fresh_config(uniformity_weight=0.3, regularizer="coding_rate")), tmp_path / "umae")
    config, _ = read_model(umae)
    assert (config.uniformity_weight, config.regularizer) == (0.3, "coding_rate")


def test_a_file_without_decoder_becomes_an_encoder(tmp_path):
    source = original_file(tmp_path / "encoder.pth", decoder=False, args=None, optimizer=None, epoch=None)
    command.main([str(source), str(tmp_path / "out"), *HEADS])
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(model, UMAEModel)
    pixel_values, _ = batch()
    assert torch.equal(features(model, pixel_values), features(pretraining_model().vit, pixel_values))


def test_a_trained_norm_of_the_mean_makes_it_the_pooling(tmp_path):
    path = original_file(tmp_path / "mean.pth")
    tensors, _ = read_weights(path)
    torch.save({"model": {**tensors, "fc_norm.bias": torch.full((48,), 0.5)}}, path)
    config, ours = read_model(path, None, 3, 4)
    model = load_exactly(UMAEForPreTraining(config), ours, path)
    assert model.config.pooling == "mean" and torch.equal(model.vit.fc_norm.bias, torch.full((48,), 0.5))


def test_safetensors_in_the_originals_names_are_read_too(tmp_path):
    tensors, _ = read_weights(original_file(tmp_path / "mae.pth"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "mae.safetensors")
    again, settings = read_weights(tmp_path / "mae.safetensors")
    assert settings == {} and all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_heads_of_another_width_have_to_be_named(tmp_path):
    path = original_file(tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=r"width 48 is none of the published ones \(768, 1024, 1280\); give num_att"):
        command.main([str(path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def pickle_with(path, protocol: int) -> None:
    path.write_bytes(pickle.dumps({"model": Hostile()}, protocol=protocol))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"model": {}, "args": Hostile()}, path),
        lambda path: torch.save({"model": {}, "args": Hostile()}, path, pickle_protocol=4),
        lambda path: torch.save({"model": {}, "args": Hostile()}, path, _use_new_zipfile_serialization=False),
        lambda path: pickle_with(path, 2),
        lambda path: pickle_with(path, 4),
    ],
    ids=["zip", "zip, protocol 4", "older torch", "plain", "plain, protocol 4"],
)
def test_a_pickle_that_would_run_code_is_refused_by_what_it_asks_for(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth was not opened: .*asks for posix\.system, which could run code"):
        command.main(["evil.pth", "out"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: EOFError"),
        (b"<html>not found</html>", "is no checkpoint: neither safetensors nor written by torch.save"),
        (b"PK\x03\x04 half a zip", "cannot be read"),
    ],
    ids=["empty", "html", "cut"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "file.pth")
    with pytest.raises(ValueError, match="cannot be read: FileNotFoundError"):
        read_weights(tmp_path / "nothing.pth")
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read: SafetensorError"):
        read_weights(tmp_path / "file.safetensors")


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"../../{i}/x": ONE for i in range(7)}, r"keys that are no names of tensors: ../../0/x, .*4/x and 2 more"),
        ({7: ONE}, "keys that are no names of tensors: 7"),
        ({"norm.weight": [1.0]}, "values that are no tensors: norm.weight"),
        ({"norm.weight": torch.eye(2).to_sparse()}, "values that are no tensors: norm.weight"),
        ({"norm.weight": torch.full((48,), torch.nan)}, "tensors with NaN or infinite values: norm.weight"),
        ({"norm.weight": torch.ones(0)}, "tensors that are empty: norm.weight"),
        ({"norm.weight": ONE.expand(10**6, 10**6)}, "tensors that are larger than what is stored: norm.weight"),
        ({"norm.weight": None}, r"missing: vit\.layernorm\.weight"),
        ({f"norm{i}.weight": ONE for i in range(7)}, r"left over: norm0.weight, .*norm4.weight and 2 more"),
        ({"norm.weight": torch.ones(49)}, r"of another shape: vit\.layernorm\.weight"),
        ({"blocks.0.attn.qkv.weight": torch.tensor(1.0)}, "missing: .*key.weight.*left over: .*attn.qkv.weight"),
        ({"patch_embed.proj.weight": None}, "found no patch_embed.proj.weight of 4 dimensions among blocks.0.attn"),
        ({"pos_embed": torch.ones(48)}, "found no pos_embed of 3 dimensions"),
        ({f"blocks.{i}.x": ONE for i in range(2000)}, "num_hidden_layers must be .* from 0 to 1000, got 2000"),
    ],
    ids=str,
)
def test_files_that_do_not_hold_such_a_model_are_refused_with_the_first_five(tmp_path, changes, message):
    tensors, settings = read_weights(original_file(tmp_path / "mae.pth"))
    changed = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    torch.save({"model": changed, "args": argparse.Namespace(**settings)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message):
        command.main([str(tmp_path / "bad.pth"), str(tmp_path / "out"), *HEADS])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"lamb": "0.1"}, {"lamb": 1.0, "world_size": 0}, {"mask_ratio": "x"}], ids=str)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings):
    path = original_file(tmp_path / "mae.pth", args=argparse.Namespace(**settings))
    with pytest.raises(ValueError, match=r"lamb|mask_ratio"):
        original_config(*read_weights(path), 3, 4)


def original_classifier(path, head: dict[str, torch.Tensor], settings=None) -> torch.nn.Module:
    """A file with a head on the encoder, as main_linprobe.py and main_finetune.py save it; returns the encoder."""
    tensors, _ = read_weights(original_file(path, decoder=False))
    torch.save({"model": {**tensors, **head}, "args": settings}, path)
    return pretraining_model().eval().vit


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_a_linear_probe_of_the_original_gives_its_logits(tmp_path, pooling):
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(48, affine=False, eps=1e-6), torch.nn.Linear(48, 7)).eval()
    head[0].running_mean.normal_()
    head[0].running_var.uniform_(0.1, 2)
    encoder = original_classifier(tmp_path / "probe.pth", {f"head.{key}": v for key, v in head.state_dict().items()})
    pixel_values, _ = batch()
    feature = encoder(pixel_values).last_hidden_state[:, 0]
    if pooling == "mean":  # --global_pool: the encoder's norm is not there, and the one of the mean stays as it began
        tensors, _ = read_weights(tmp_path / "probe.pth")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("norm.")}
        plain = {"fc_norm.weight": torch.ones(48), "fc_norm.bias": torch.zeros(48)}
        torch.save({"model": {**tensors, **plain}}, tmp_path / "probe.pth")
        encoder.layernorm = torch.nn.Identity()
        mean = encoder(pixel_values).last_hidden_state[:, 1:].mean(dim=1)
        feature = torch.nn.functional.layer_norm(mean, (48,), eps=1e-6)
    command.main([str(tmp_path / "probe.pth"), str(tmp_path / "out"), *HEADS])
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert classifier.config.num_labels == 7
    assert torch.allclose(classifier(pixel_values).logits, head(feature), atol=1e-5)
    assert torch.allclose(encoder_from_pretrained(tmp_path / "out")(pixel_values).pooler_output, feature, atol=1e-5)


def test_a_fine_tuned_model_of_the_original_keeps_its_drop_path(tmp_path):
    settings = argparse.Namespace(drop_path=0.2)
    original_classifier(tmp_path / "tuned.pth", dict(torch.nn.Linear(48, 7).named_parameters(prefix="head")), settings)
    assert read_model(tmp_path / "tuned.pth", None, 3)[0].drop_path_rate == 0.2


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_a_fine_tuned_model_of_the_original_gives_its_logits(tmp_path, pooling):
    head, pixel_values = torch.nn.Linear(48, 7), batch()[0]
    named = {f"head.{key}": v for key, v in head.state_dict().items()}
    encoder = original_classifier(tmp_path / "tuned.pth", named)
    if pooling == "mean":  # with global pooling there is no norm before, and another one behind
        norm, encoder.layernorm = encoder.layernorm, torch.nn.Identity()
        tensors, _ = read_weights(tmp_path / "tuned.pth")
        pooled = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: v for key, v in tensors.items()}
        torch.save({"model": pooled}, tmp_path / "tuned.pth")
        feature = norm(encoder(pixel_values).last_hidden_state[:, 1:].mean(dim=1))
    else:
        feature = encoder(pixel_values).last_hidden_state[:, 0]
    command.main([str(tmp_path / "tuned.pth"), str(tmp_path / "out"), *HEADS])
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(classifier(pixel_values).logits, head(feature), atol=1e-5)
    assert "classifier" not in str(encoder_from_pretrained(tmp_path / "out").state_dict().keys())


def test_ours_goes_back_to_the_originals_names_bit_for_bit(tmp_path):
    source = original_file(tmp_path / "mae.pth")
    command.main([str(source), str(tmp_path / "folder"), *HEADS])
    command.main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors")])
    original, _ = read_weights(source)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == {key for key in original if not key.startswith("fc")}
    assert all(torch.equal(back[key], original[key]) for key in back)
    assert to_original(from_original(original)).keys() == original.keys()


@pytest.mark.parametrize("names", ["as transformers saves it", "as in memory"])
@torch.no_grad()
def test_a_vit_mae_keeps_its_decoder_whatever_its_names(tmp_path, names):
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **DECODER, mask_ratio=0.6))
    saved(theirs, tmp_path / "mae")
    if names == "as in memory":
        save_file(theirs.state_dict(), tmp_path / "mae" / "model.safetensors", metadata={"format": "pt"})
    else:
        assert any("decoder_encoder" in key for key in load_file(tmp_path / "mae" / "model.safetensors"))
    command.main([str(tmp_path / "mae"), str(tmp_path / "out")])
    ours = AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    noise = torch.rand(3, 16)
    expected = theirs(PIXELS, noise=noise)
    found = ours(PIXELS, noise=noise)
    assert torch.equal(found.mask, expected.mask) and ours.config.mask_ratio == 0.6
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)


def test_older_checkpoints_without_safetensors_are_read_and_hostile_ones_not(tmp_path):
    folder = saved(ViTModel(ViTConfig(**SIZES)), tmp_path / "vit")
    expected = encoder_from_pretrained(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights, neither model\.safetensors nor"):
        encoder_from_pretrained(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    found = encoder_from_pretrained(folder).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    torch.save({**tensors, "x": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"asks for posix\.system"):
        encoder_from_pretrained(folder)


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists, and is left as it is"):
        command.main([str(original_file(tmp_path / "mae.pth")), str(tmp_path / "out"), *HEADS])
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------- hostile folders


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "umae", "x": ' + "[" * 200_000 + "]" * 200_000 + "}", "config.json holds no plain names"),
        ("[1]", "config.json holds a list"),
        ("3", "config.json holds no plain names"),
        ("{", "there is no model"),
        ('{"model_type": ["umae"]}', r"is a model of type \['umae'\]"),
    ],
    ids=["deep", "list", "number", "cut", "type"],
)
def test_a_config_that_is_none_is_refused(tmp_path, config, message):
    saved(UMAEModel(fresh_config()), tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        encoder_from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    saved(UMAEModel(fresh_config()), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"layernorm.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"index.json names files outside of its folder: {name}"):
        encoder_from_pretrained(tmp_path / "model")


def test_weights_for_another_image_size_keep_all_but_their_position_tables(tmp_path):
    _, tensors = read_model(saved(UMAEForPreTraining(fresh_config()), tmp_path))
    encoder, decoder = "vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"
    tensors[encoder] = torch.randn(1, 17, 32)  # as if trained
    assert resize_positions(tensors, (4, 4), fresh_config(), print) is tensors
    said = []
    resized = resize_positions(tensors, (4, 4), fresh_config(image_size=[32, 24]), said.append)
    assert said == ["the encoder's position table is interpolated from 4 x 4 to 8 x 6 patches, the decoder's made anew"]
    patches = tensors[encoder][:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, (8, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(resized[encoder], torch.cat([tensors[encoder][:, :1], patches], dim=1))
    assert torch.equal(
        resized[decoder], UMAEForPreTraining(fresh_config(image_size=[32, 24])).decoder.decoder_pos_embed
    )
    assert all(resized[name] is tensors[name] for name in tensors if name not in (encoder, decoder))


def test_a_position_table_of_no_such_grid_is_refused_by_its_shape(tmp_path):
    config, tensors = read_model(saved(UMAEModel(fresh_config()), tmp_path))
    config.image_size = 32
    tensors["vit.embeddings.position_embeddings"] = torch.zeros(1, 15, 32)
    with pytest.raises(ValueError, match=r"of another shape: embeddings\.position_embeddings"):
        load_exactly(UMAEModel(config), resize_positions(tensors, (4, 4), config, print), "weights")
