import re

import golden_inputs
import pytest
import torch
from golden_models import fresh_config, our_weights
from safetensors.torch import load_file, save_file
from transformers import (
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
from umae.convert import encoder_from_pretrained, from_original, rename, set_pooling

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
