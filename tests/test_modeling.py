import copy
import io
import math

import golden_inputs
import pytest
import torch
from golden_models import SETUP, batch, fresh_config, our_weights, pretraining_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining

from configuration_umae import REGULARIZERS, UMAEConfig
from modeling_umae import (
    CODING_RATE_SCALE,
    UMAEForImageClassification,
    UMAEForPreTraining,
    UMAEModel,
    coding_rate_loss,
    drop_path_scales,
    feature_second_moment,
    gather_patches,
    patchify,
    random_masking,
    resize_position_table,
    sincos_position_table,
    uniformity_loss,
    unpatchify,
)
from umae.speed import compile_model

TERMS = pytest.mark.parametrize("term", [uniformity_loss, coding_rate_loss])


def images_for(config: UMAEConfig, count: int = 4) -> torch.Tensor:
    return torch.randn(count, config.num_channels, *config.image_height_width)


# ---------------------------------------------------------------------------------------------------- initialisation


def test_fresh_model_predicts_something_else_at_every_hidden_place():
    torch.manual_seed(0)
    model = UMAEForPreTraining(fresh_config()).eval()
    output = model(images_for(model.config, 2))
    for logits, mask in zip(output.logits, output.mask, strict=True):
        assert logits[mask.bool()].std(dim=0).mean() > 0.05


def test_weights_of_vit_base_fill_the_ranges_of_the_original():
    torch.manual_seed(0)
    model = UMAEForPreTraining(UMAEConfig())
    layer = model.vit.encoder["layer"][0]
    bounds = {
        **{layer.attention.attention[name].weight: 0.0442 for name in ("query", "key", "value")},
        layer.attention.output["dense"].weight: 0.0625,
        layer.intermediate["dense"].weight: 0.0395,
        layer.output["dense"].weight: 0.0395,
        model.vit.embeddings.patch_embeddings["projection"].weight: 0.0625,
        model.decoder.decoder_embed.weight: 0.0685,
    }
    for weight, bound in bounds.items():
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)  # uniform, not just bounded
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.15)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def assert_tables_right(model: UMAEForPreTraining) -> None:
    config = model.config
    encoder, decoder = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
    assert torch.equal(encoder, sincos_position_table(config.hidden_size, config.grid))
    assert torch.equal(decoder, sincos_position_table(config.decoder_hidden_size, config.grid))
    tables = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert not tables & {name for name, _ in model.named_parameters()}, "a table would be trained"


def test_position_tables_stand_however_the_model_came_about(tmp_path):
    config = fresh_config()
    assert_tables_right(UMAEForPreTraining(config))
    assert_tables_right(UMAEForPreTraining._from_config(config))
    UMAEModel(config).save_pretrained(tmp_path)
    assert_tables_right(UMAEForPreTraining.from_pretrained(tmp_path))


ALL_CLASSES = pytest.mark.parametrize("model_class", [UMAEModel, UMAEForPreTraining, UMAEForImageClassification])


@ALL_CLASSES
def test_every_buffer_is_the_same_from_the_constructor_and_from_initialisation_alone(model_class, monkeypatch):
    """transformers fills the buffers of models without memory by either way."""
    config = fresh_config(image_size=(16, 32))
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", lambda self, *args: None)
    constructed = dict(model_class(config).named_buffers())
    initialised = dict(model.named_buffers())
    assert constructed.keys() == initialised.keys()
    assert [name for name, buffer in constructed.items() if not torch.equal(buffer, initialised[name])] == []


@ALL_CLASSES
def test_the_input_embeddings_are_the_whole_embeddings(model_class):
    model = model_class(fresh_config())
    embeddings = model.get_input_embeddings()
    assert embeddings is getattr(model, "vit", model).embeddings
    other = copy.deepcopy(embeddings)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other is getattr(model, "vit", model).embeddings


@ALL_CLASSES
def test_layers_on_frozen_embeddings_learn_under_checkpointing_once_inputs_require_gradients(model_class):
    """Reentrant checkpointing gives none to what lies on an input without one."""
    model = model_class(fresh_config()).train()
    model.get_input_embeddings().requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model(images_for(model.config))[0].sum().backward()
    layer = getattr(model, "vit", model).encoder["layer"][0]
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in model.get_input_embeddings().parameters())


# ------------------------------------------------------------------------------------------------- forward, backward


@pytest.mark.parametrize(
    "changes",
    [
        {"num_channels": 1},
        {"num_channels": 7},
        {"image_size": (32, 64), "patch_size": (4, 8)},
        {"image_size": [16, 32], "pooling": "mean"},
        {"num_hidden_layers": 0, "decoder_num_hidden_layers": 0},
    ],
    ids=str,
)
def test_unusual_images_run_forward_and_backward(changes):
    model = UMAEForPreTraining(fresh_config(**changes)).train()
    output = model(images_for(model.config))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layers", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_vit_base_at_224_runs_forward_and_backward(layers):
    model = UMAEForPreTraining(UMAEConfig(num_hidden_layers=layers, decoder_num_hidden_layers=min(layers, 8))).train()
    model(images_for(model.config, 1)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_every_parameter_has_a_gradient(pooling, weight):
    """DistributedDataParallel waits for each of them."""
    model = UMAEForPreTraining(fresh_config(pooling=pooling, uniformity_weight=weight)).train()
    model(images_for(model.config)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_encoder_sees_everything_and_is_deterministic_unless_asked_to_mask():
    model = UMAEModel(fresh_config(pooling="mean")).train()
    pixel_values = images_for(model.config)
    first, second = model(pixel_values), model(pixel_values)
    assert first.last_hidden_state.shape == (4, 17, 32)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert torch.equal(first.pooler_output, second.pooler_output)
    assert first.mask is None and first.ids_restore is None
    masked = model(pixel_values, mask_ratio=0.5)
    assert masked.last_hidden_state.shape == (4, 9, 32) and masked.mask.sum(dim=1).tolist() == [8] * 4


def test_pooler_output_is_the_class_token_or_the_normalised_mean():
    pixel_values = images_for(fresh_config())
    by_class = UMAEModel(fresh_config())(pixel_values)
    assert torch.equal(by_class.pooler_output, by_class.last_hidden_state[:, 0])
    model = UMAEModel(fresh_config(pooling="mean"))
    nn.init.normal_(model.fc_norm.weight)
    by_mean = model(pixel_values)
    mean = by_mean.last_hidden_state[:, 1:].mean(dim=1)
    assert torch.allclose(by_mean.pooler_output, model.fc_norm(mean))


def test_fc_norm_exists_with_mean_pooling_only():
    assert not hasattr(UMAEModel(fresh_config()), "fc_norm")
    assert hasattr(UMAEModel(fresh_config(pooling="mean")), "fc_norm")


@pytest.mark.parametrize(
    "changes",
    [{}, {"pooling": "mean"}, {"norm_pix_loss": False, "mask_ratio": 0.3}, {"decoder_num_hidden_layers": 0},
     {"decoder_num_hidden_layers": 3, "image_size": (16, 32), "num_channels": 2}],
    ids=str,
)  # fmt: skip
def test_what_training_leaves_out_changes_no_loss_and_no_gradient(changes):
    """In training only the hidden patches are predicted; float64, because the same sums run in another order."""
    model = UMAEForPreTraining(fresh_config(**changes)).double().train()
    pixel_values = images_for(model.config).double()
    noise = torch.rand(4, model.config.grid[0] * model.config.grid[1])
    gradients = []
    for training in (True, False):
        model.train(training).zero_grad()
        output = model(pixel_values, noise=noise)
        output.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert (output.logits is None) == (output.ids_restore is None) == training
        assert output.loss.item() == pytest.approx(model(pixel_values, noise=noise).loss.item(), rel=1e-12)
    for name, short in gradients[0].items():
        assert torch.allclose(short, gradients[1][name], rtol=1e-9, atol=1e-13), name


@given(
    batch=st.integers(1, 4),
    patches=st.integers(1, 60),
    ratio=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
    ties=st.booleans(),
)
def test_the_patches_of_the_smallest_noise_are_seen_and_all_others_hidden(batch, patches, ratio, seed, ties):
    visible = int(patches * (1 - ratio))
    noise = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed))
    noise = (noise * 4).round() if ties else noise
    ids_keep, mask, ids_restore = random_masking(noise, ratio)
    assert ids_keep.shape == (batch, visible) and mask.shape == ids_restore.shape == (batch, patches)
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(patches).expand(batch, -1)), "a permutation"
    assert torch.equal(mask, torch.ones(batch, patches).scatter(1, ids_keep, 0.0)), "0 where seen, 1 where hidden"
    for row in range(batch):
        seen, hidden = noise[row][mask[row] == 0], noise[row][mask[row] == 1]
        assert len(seen) == visible and (len(seen) == 0 or len(hidden) == 0 or seen.max() <= hidden.min())
    assert torch.equal(gather_patches(noise[..., None], ids_keep)[..., 0], noise.sort(dim=1).values[:, :visible])


def test_no_convolution_runs_on_a_gpu_and_the_product_in_its_place_is_the_same():
    """A GPU's convolution computes in TensorFloat-32 unless told otherwise: evaluation would differ from training."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    model, called = UMAEModel(fresh_config()).eval(), []
    for mask_ratio in (None, 0.5):
        pixel_values = images_for(model.config)
        with Calls(), torch.no_grad():
            model.to("meta")(pixel_values.to("meta"), mask_ratio=mask_ratio)
        assert called and not [name for name in called if "conv" in name]
    embeddings = UMAEModel(fresh_config()).embeddings
    expected = embeddings.patch_embeddings["projection"](pixel_values).flatten(2).transpose(1, 2)
    assert torch.allclose(embeddings.project_patches(pixel_values, None), expected, atol=1e-6)


def test_patches_and_images_are_inverse():
    pixel_values = torch.randn(2, 5, 8, 24)
    patches = patchify(pixel_values, (4, 8))
    assert patches.shape == (2, 6, 160)
    assert torch.equal(patches[0, 1, 5:10], pixel_values[0, :, 0, 9])  # second patch of the first row, second pixel
    assert torch.equal(unpatchify(patches, (4, 8), (2, 3)), pixel_values)


def test_position_tables_are_interpolated_in_two_dimensions():
    table = sincos_position_table(16, (4, 8))
    resized = resize_position_table(table, (4, 8), (8, 16))
    assert resized.shape == (1, 129, 16)
    grid = resized[0, 1:].reshape(8, 16, 16)
    # the first half of the channels encodes the column alone, the second the row alone; so it must stay
    assert torch.allclose(grid[0, :, :8], grid[5, :, :8], atol=1e-5)
    assert torch.allclose(grid[:, 0, 8:], grid[:, 9, 8:], atol=1e-5)
    assert not torch.allclose(grid[0, 0, :8], grid[0, 9, :8], atol=1e-2)


def test_other_sizes_run_when_asked_for():
    model = UMAEForPreTraining(fresh_config()).eval()
    larger = torch.randn(2, 3, 24, 32)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(larger)
    assert model(larger, interpolate_pos_encoding=True).logits.shape == (2, 48, 48)


def test_hidden_states_and_attentions_are_the_encoders():
    model = UMAEForPreTraining._from_config(fresh_config(), attn_implementation="eager")
    output = model(images_for(model.config), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(4, 5, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(4, 4, 5, 5)] * 2
    assert torch.allclose(output.attentions[0].sum(-1), torch.ones(4, 4, 5))


def test_tuple_outputs_start_with_the_loss():
    model = UMAEForPreTraining(fresh_config())
    pixel_values, noise = images_for(model.config), torch.rand(4, 16)
    assert torch.equal(model(pixel_values, noise=noise, return_dict=False)[0], model(pixel_values, noise=noise).loss)


def test_gradient_checkpointing_changes_no_gradient():
    plain = UMAEForPreTraining(fresh_config()).train()
    thrifty = copy.deepcopy(plain)
    thrifty.gradient_checkpointing_enable()
    pixel_values, noise = images_for(plain.config), torch.rand(4, 16)
    for model in (plain, thrifty):
        model(pixel_values, noise=noise).loss.backward()
    for parameter, other in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}], ids=str)
def test_one_product_for_queries_keys_and_values_is_three_in_value_and_gradient(changes):
    torch.manual_seed(0)
    attention = UMAEModel(fresh_config(**changes)).encoder["layer"][0].attention.double().train()
    tokens = torch.randn(2, 5, attention.output["dense"].in_features, dtype=torch.float64)
    weights = [parameter for parameter in attention.parameters() if parameter is not attention.output["dense"].weight]
    results = []
    for separate in (False, True):  # a hook on one of them takes all three apart
        hooks = [attention.attention["key"].register_forward_hook(lambda *_: None)] if separate else []
        projected = attention.project(tokens, "query", "key", "value")
        gradients = torch.autograd.grad(sum(part.square().sum() for part in projected), weights, allow_unused=True)
        results.append([*projected, *(gradient for gradient in gradients if gradient is not None)])
        for hook in hooks:
            hook.remove()
    assert len(results[0]) == 3 + (6 if attention.config.qkv_bias else 3)
    for joint, apart in zip(*results, strict=True):
        assert torch.allclose(joint, apart, rtol=1e-12, atol=0)


def test_what_stands_in_place_of_a_projection_is_called_in_training():
    """An adapter, for example: its own weights would be passed by."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.weight, self.bias, self.base = base.weight, base.bias, base

        def forward(self, tokens):
            return self.base(tokens) + 1

    attention = UMAEModel(fresh_config()).encoder["layer"][0].attention.train()
    tokens = torch.randn(2, 5, attention.output["dense"].in_features)
    before = attention.project(tokens, "query", "key", "value")
    attention.attention["value"] = Adapter(attention.attention["value"])
    query, _, value = attention.project(tokens, "query", "key", "value")
    assert torch.allclose(query, before[0], atol=1e-6) and torch.allclose(value, before[2] + 1, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("what", ["layers", "model", "graphs"])
@pytest.mark.slow  # compiling takes a minute
def test_what_is_compiled_gives_the_losses_and_gradients_of_the_eager_model(checkpointing, what):
    eager = UMAEForPreTraining(fresh_config(decoder_num_hidden_layers=2)).train()
    compiled = copy.deepcopy(eager)
    if checkpointing:
        compiled.gradient_checkpointing_enable()
    compile_model(compiled, what)
    for _ in range(2):
        pixel_values, noise = images_for(eager.config), torch.rand(4, 16)
        losses = [model(pixel_values, noise=noise).loss for model in (eager, compiled)]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), name


def test_drop_path_leaves_evaluation_and_a_rate_of_zero_as_they_are_and_draws_nothing_there():
    plain = UMAEModel(fresh_config())
    dropping = UMAEModel(fresh_config(drop_path_rate=0.5))
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    dropping.load_state_dict(plain.state_dict())
    pixel_values = images_for(plain.config)
    state = torch.get_rng_state()
    expected = plain.train()(pixel_values).last_hidden_state
    assert torch.equal(dropping.eval()(pixel_values).last_hidden_state, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(dropping.train()(pixel_values).last_hidden_state, expected)


def test_drop_path_leaves_out_more_of_the_later_layers_and_keeps_the_mean():
    scales = drop_path_scales(0.4, 5, 4000, torch.device("cpu"))
    assert scales.shape == (5, 2, 4000, 1, 1)
    for layer, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        for branch in scales[layer]:
            assert abs((branch == 0).float().mean() - rate) < 0.03
            assert torch.allclose(branch[branch > 0], torch.tensor(1 / (1 - rate)))
    assert not torch.equal(scales[4, 0], scales[4, 1]), "attention and feed-forward apart"


def test_a_layer_all_of_whose_branches_are_left_out_passes_its_tokens_on():
    layer = UMAEModel(fresh_config()).train().encoder["layer"][0]
    tokens = torch.randn(3, 17, 32)
    scales = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1).repeat(2, 1, 1, 1)
    after = layer(tokens, branch_scales=scales)
    assert torch.equal(after[0], tokens[0]) and torch.allclose(after[1:], layer(tokens)[1:], atol=1e-6)


def test_the_decoder_drops_no_path(monkeypatch):
    model = UMAEForPreTraining(fresh_config(drop_path_rate=0.5)).train()
    decoder = model.decoder.decoder_layers[0]
    given = []
    decoder.register_forward_pre_hook(
        lambda module, inputs, named: given.append(named.get("branch_scales")), with_kwargs=True
    )
    model(images_for(model.config), noise=torch.rand(4, 16))
    assert given == [None]


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_drop_path_is_one_graph_and_the_same_for_the_same_seed(checkpointing):
    model = UMAEForImageClassification(fresh_config(drop_path_rate=0.5, pooling="mean", final_layernorm=False)).train()
    pixel_values, labels = images_for(model.config), torch.tensor([0, 1, 0, 1])

    def gradients(forward):
        torch.manual_seed(1)
        model.zero_grad()
        forward(pixel_values, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        found = gradients(model)
    else:
        torch._dynamo.reset()
        found = gradients(torch.compile(model, backend="eager", fullgraph=True))  # a graph break is an error
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    ("pooling", "regularizer", "training"),
    [
        ("mean", "coding_rate", False),
        ("cls", "uniformity", True),
        pytest.param("cls", "uniformity", False, marks=pytest.mark.slow),
        pytest.param("mean", "coding_rate", True, marks=pytest.mark.slow),
    ],
)
def test_the_forward_pass_is_one_graph(pooling, regularizer, training):
    model = UMAEForPreTraining(fresh_config(pooling=pooling, regularizer=regularizer)).train(training)
    pixel_values, noise = images_for(model.config), torch.rand(4, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # a graph break is an error
    compiled(pixel_values, noise=noise).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(pixel_values, noise=noise).loss.backward()
    assert all(torch.equal(parameter.grad, g) for parameter, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model_class", "changes"),
    [
        (UMAEModel, {"num_channels": 2}),
        (UMAEForImageClassification, {"pooling": "mean"}),
        pytest.param(UMAEForPreTraining, {"regularizer": "coding_rate"}, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_program_of_torch_export_is_the_model_at_any_batch_size(model_class, changes, strict):
    model = model_class(fresh_config(num_hidden_layers=1, **changes)).eval()

    def inputs(count: int) -> dict[str, torch.Tensor]:
        noise = {"noise": torch.rand(count, 16)} if model_class is UMAEForPreTraining else {}
        return {"pixel_values": images_for(model.config, count), **noise}

    sizes = {name: {0: torch.export.Dim("batch")} for name in inputs(1)}
    program = torch.export.export(model, (), inputs(2), dynamic_shapes=sizes, strict=strict)
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    exported = torch.export.load(file).module()
    for count in (1, 5):
        batch_of = inputs(count)
        found, expected = exported(**batch_of), model(**batch_of)
        assert type(found) is type(expected) and found.keys() == expected.keys()
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


@TERMS
def test_a_batch_in_equal_parts_has_the_regularizer_and_the_gradient_of_the_whole(term):
    features = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(term(features), features)
    parts = features.split(3)
    whole = sum(feature_second_moment(part.detach()) for part in parts) / 4
    values = [term(part, second_moment=whole) for part in parts]
    (found,) = torch.autograd.grad(sum(values) / 4, features)
    for value in values:
        assert value.item() == pytest.approx(term(features).item(), rel=1e-12)
    assert torch.allclose(found, expected, rtol=1e-10, atol=0)


def test_without_weight_the_gradients_are_those_of_vitmae_bit_for_bit():
    ours = pretraining_model(uniformity_weight=0.0).eval()  # in training the same sums run over fewer terms
    config = ViTMAEConfig(**golden_inputs.config_arguments(SETUP), norm_pix_loss=True)
    theirs = ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa")
    values = golden_inputs.with_position_tables(SETUP, golden_inputs.weights(SETUP))
    values = {name: torch.tensor(v) for name, v in values.items() if not name.startswith(("fc_", "classifier"))}
    ours_to_theirs = dict(zip(golden_inputs.to_legacy(values), values, strict=True))
    tolerance = 0.0
    if theirs.state_dict().keys() != values.keys():  # older versions: other names, and an ulp here and there
        values = golden_inputs.to_legacy(values)
        ours_to_theirs, tolerance = {name: name for name in values}, 1e-6
    theirs.load_state_dict(values)
    pixel_values, noise = batch()
    first, second = ours(pixel_values, noise=noise), theirs(pixel_values, noise=noise)
    first.loss.backward()
    second.loss.backward()
    assert torch.allclose(first.logits, second.logits, rtol=0, atol=tolerance)
    assert first.loss.item() == pytest.approx(second.loss.item(), rel=tolerance)
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            expected = their_parameters[ours_to_theirs[name]].grad
            assert torch.allclose(parameter.grad, expected, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_regularizers_stay_float32_under_autocast(dtype, pooling):
    model = pretraining_model(pooling=pooling, regularizer="coding_rate").train()
    pixel_values, noise = batch()
    with torch.autocast("cpu", dtype=dtype):
        output = model(pixel_values, noise=noise)
    output.loss.backward()
    features = torch.nn.functional.normalize(output.features.detach().float(), dim=-1)
    assert output.uniformity_loss.dtype == torch.float32
    assert output.uniformity_loss.item() == pytest.approx((features @ features.T).square().mean().item(), abs=1e-6)
    assert output.coding_rate_loss.dtype == torch.float32
    assert output.coding_rate_loss.item() == pytest.approx(coding_rate_loss(features.double()).item(), abs=5e-6)


@TERMS
def test_a_regularizer_of_half_precision_features_is_computed_in_float32(term):
    features = torch.tensor(golden_inputs.features(1, 64, 48, 10.0)).bfloat16()
    exact = term(features.double())
    assert term(features).dtype == torch.float32
    assert term(features).item() == pytest.approx(exact.item(), abs=1e-6)


def test_uniformity_lies_between_even_spread_and_collapse():
    identity = torch.eye(8)
    assert uniformity_loss(identity).item() == pytest.approx(1 / 8)
    assert uniformity_loss(identity.repeat(5, 1)).item() == pytest.approx(1 / 8)  # 1/D, however many
    assert uniformity_loss(torch.ones(5, 8)).item() == pytest.approx(1.0)
    assert uniformity_loss(torch.zeros(5, 8)).item() == 0.0


def test_coding_rate_lies_between_even_spread_and_collapse():
    identity, scale = torch.eye(8), CODING_RATE_SCALE
    assert coding_rate_loss(identity).item() == pytest.approx(-8 * math.log(1 + scale / 8))
    assert coding_rate_loss(identity.repeat(5, 1)).item() == pytest.approx(-8 * math.log(1 + scale / 8))
    assert coding_rate_loss(torch.eye(8, 99)).item() == pytest.approx(-8 * math.log(1 + scale / 8)), "N below D"
    assert coding_rate_loss(torch.ones(5, 8)).item() == pytest.approx(-math.log(1 + scale))
    assert coding_rate_loss(torch.zeros(5, 8)).item() == 0.0


@pytest.mark.parametrize("shared", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("count", [40, 2000])
def test_uniformity_is_the_second_order_of_the_coding_rate(shared, count):
    """As Tan et al. (2024) say of M-MAE, and log(1 + x) = x - x**2 / 2 + x**3 / 3 - ...: each sum is a bound."""
    features = torch.tensor(golden_inputs.features(2, count, 48, shared)).double()
    moment, scale = feature_second_moment(features), CODING_RATE_SCALE
    second = -scale + scale**2 / 2 * uniformity_loss(features)
    third = scale**3 / 3 * (moment @ moment @ moment).trace()
    assert second - third < coding_rate_loss(features) < second


def test_the_gradient_of_spread_features_is_that_of_eight_ninths_of_the_uniformity():
    features = torch.tensor(golden_inputs.features(2, 2000, 48, 0.0)).double().requires_grad_()
    (found,) = torch.autograd.grad(coding_rate_loss(features), features)
    (expected,) = torch.autograd.grad(8 / 9 * uniformity_loss(features), features)
    largest = torch.linalg.eigvalsh(feature_second_moment(features.detach()))[-1].item()
    assert found.norm() < expected.norm() and CODING_RATE_SCALE * largest < 0.05
    assert (found - expected).norm() < 3 * CODING_RATE_SCALE * largest * expected.norm()


@TERMS
def test_a_feature_that_is_not_finite_makes_the_regularizer_so(term):
    features = torch.randn(6, 4)
    features[2, 1] = torch.inf
    assert term(features).isnan()


@TERMS
def test_a_regularizer_leaves_the_callers_matmul_precision_as_it_was(term):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        features = torch.randn(4, 8, requires_grad=True)
        term(features).backward()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@TERMS
@pytest.mark.parametrize("shape", [(6, 4), (3, 5)])
def test_the_gradient_of_a_regularizer_is_right(term, shape):
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(term, (features,))
    assert torch.autograd.gradgradcheck(term, (features,))


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_the_loss_has_the_weighted_term_that_the_configuration_names(regularizer):
    model = pretraining_model(uniformity_weight=0.5, regularizer=regularizer)
    pixel_values, noise = batch()
    output = model(pixel_values, noise=noise)
    assert torch.equal(output.uniformity_loss, uniformity_loss(output.features)), "whichever it is"
    if regularizer == "uniformity":
        assert output.coding_rate_loss is None
    else:
        assert torch.equal(output.coding_rate_loss, coding_rate_loss(output.features))
    assert torch.equal(output.loss, output.reconstruction_loss + 0.5 * output[f"{regularizer}_loss"])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x, mask_ratio=0.0), "hides no patch"),
        (lambda m, x: m(x, mask_ratio=0.99), "keeps no patch of 16"),
        (lambda m, x: m(x[:, :1]), r"\(batch, 1, 16, 16\)"),
        (lambda m, x: m(x, noise=torch.rand(4, 9)), r"noise is \(4, 9\)"),
        (lambda m, x: m(torch.randn(2, 3, 18, 16), interpolate_pos_encoding=True), "patch size"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, message):
    model = UMAEForPreTraining(fresh_config())
    with pytest.raises(ValueError, match=message):
        call(model, images_for(model.config))


def test_a_configuration_spoilt_after_construction_is_refused_by_the_model():
    config = fresh_config()
    config.patch_size = 5
    with pytest.raises(ValueError, match="patch_size 5 does not divide image_size 16"):
        UMAEModel(config)


# ---------------------------------------------------------------------------------------------------- classification


def test_classifier_takes_over_a_pretrained_encoder(tmp_path):
    pretrained = UMAEForPreTraining(fresh_config())
    pretrained.save_pretrained(tmp_path)
    model, loading = UMAEForImageClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert sorted(loading["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert not loading["unexpected_keys"]
    for name, tensor in pretrained.vit.state_dict().items():
        assert torch.equal(tensor, model.vit.state_dict()[name])
    output = model(images_for(model.config), labels=torch.tensor([0, 1, 2, 4]))
    assert output.logits.shape == (4, 5)
    assert output.loss.item() == pytest.approx(torch.tensor(5.0).log().item(), abs=1e-2)  # a head that knows nothing


def classifier_for(num_labels: int, problem_type: str | None = None) -> UMAEForImageClassification:
    torch.manual_seed(0)
    model = UMAEForImageClassification(fresh_config(num_labels=num_labels, problem_type=problem_type))
    torch.nn.init.normal_(model.classifier.weight)
    return model


CLASSES = torch.tensor([0, 2, -100, 1])
SHARES = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.25, 0.0, 0.75]])
NUMBERS = 3 * SHARES - 1
FITTING = {
    "classes": (3, CLASSES, "single_label_classification", F.cross_entropy),
    "shares": (3, SHARES, "multi_label_classification", F.binary_cross_entropy_with_logits),
    "a number": (1, NUMBERS[:, 0], "regression", lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
}


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize(("num_labels", "labels", "problem_type", "loss"), FITTING.values(), ids=FITTING)
def test_the_loss_of_a_classifier_is_torchs_own_for_the_problem_type_said_or_inferred(
    num_labels, labels, problem_type, loss, said
):
    model = classifier_for(num_labels, problem_type if said else None)
    output = model(images_for(model.config), labels=labels)
    assert torch.equal(output.loss, loss(output.logits, labels))
    assert model.config.problem_type == (problem_type if said else None), "the configuration belongs to the caller"


def test_several_numbers_are_regressed_where_the_problem_type_says_so():
    model = classifier_for(3, "regression")
    output = model(images_for(model.config), labels=NUMBERS)
    assert torch.equal(output.loss, F.mse_loss(output.logits, NUMBERS))


@pytest.mark.slow
def test_the_loss_of_a_classifier_is_part_of_one_graph():
    model = classifier_for(3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # a graph break is an error
    pixel_values = images_for(model.config)
    for labels in (CLASSES, SHARES):
        assert torch.equal(compiled(pixel_values, labels=labels).loss, model(pixel_values, labels=labels).loss)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels", "message"),
    [
        (3, "single_label_classification", SHARES, r"float32 \(4, 3\); .*expected int64 \(4,\)"),
        (3, "single_label_classification", CLASSES[:2], r"int64 \(2,\); .*expected int64 \(4,\)"),
        (3, None, CLASSES.int(), r"int32 \(4,\); for problem_type 'single_label_classification' .*expected int64"),
        (3, None, torch.tensor([0, 1, 2, 3]), "labels lie in 0 to 3; .* expected 0 to 2"),
        (3, None, torch.tensor([0, 1, 2, -1]), "labels lie in -1 to 2; .* expected 0 to 2"),
        (3, "multi_label_classification", CLASSES, r"int64 \(4,\); .*expected floating point \(4, 3\)"),
        (3, "multi_label_classification", SHARES.bool(), r"bool \(4, 3\); .*expected floating point"),
        (3, None, SHARES[:, 0], r"float32 \(4,\); for problem_type 'multi_label_classification' and num_labels 3"),
        (3, None, NUMBERS, "labels lie in -1 to 2; .* expected 0 to 1"),
        (3, None, SHARES * torch.nan, "labels lie in nan to nan; .* expected 0 to 1"),
        (3, "regression", NUMBERS[:, 0], r"float32 \(4,\); .* expected floating point \(4, 3\)"),
        (1, None, CLASSES, r"int64 \(4,\); for problem_type 'regression' and num_labels 1 expected floating point"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value),
)
def test_labels_that_do_not_fit_the_problem_type_are_refused(num_labels, problem_type, labels, message):
    model = classifier_for(num_labels, problem_type)
    with pytest.raises(ValueError, match=message):
        model(images_for(model.config), labels=labels)


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("model_class", [UMAEModel, UMAEForPreTraining, UMAEForImageClassification])
def test_saving_and_loading_keeps_every_bit(tmp_path, model_class, pooling):
    model = model_class(fresh_config(pooling=pooling, image_size=[16, 32]))
    model.save_pretrained(tmp_path)
    loaded, loading = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.config.image_height_width == (16, 32)


def test_weights_in_the_names_of_the_published_checkpoints_load_as_they_are(tmp_path):
    """`facebook/vit-mae-base` is written in these names."""
    from safetensors.torch import save_file

    ViTMAEConfig(**golden_inputs.config_arguments(SETUP)).save_pretrained(tmp_path)
    weights = our_weights()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, loading = UMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_forward_with_features_only_returns_what_encode_features_returns():
    model = UMAEForPreTraining(fresh_config()).eval()
    pixel_values, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    for mask_ratio, tokens in ((None, 1 + 4), (0.5, 1 + 8), (0.0, 1 + 16)):
        expected = model.encode_features(pixel_values, noise, mask_ratio)
        output = model(pixel_values, noise=noise, mask_ratio=mask_ratio, features_only=True)
        assert output.keys() == expected.keys() == {"features", "last_hidden_state"}
        assert all(torch.equal(output[name], expected[name]) for name in expected)
        assert output.last_hidden_state.shape[1] == tokens


def test_feature_maps_are_the_patches_at_their_positions():
    model = UMAEModel(fresh_config()).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        (last,), (first, also_last) = model.feature_maps(pixel_values), model.feature_maps(pixel_values, (1, 2))
        output = model(pixel_values, output_hidden_states=True)
    rows, columns = model.config.grid
    assert last.shape == (2, model.config.hidden_size, rows, columns)
    for row in range(rows):
        for column in range(columns):
            patch = output.last_hidden_state[:, 1 + row * columns + column]
            torch.testing.assert_close(last[:, :, row, column], patch)
    torch.testing.assert_close(also_last, last)
    torch.testing.assert_close(first[:, :, 0, 1], model.layernorm(output.hidden_states[1])[:, 2])


def test_feature_maps_have_the_shape_of_larger_images():
    model = UMAEModel(fresh_config()).eval()
    (maps,) = model.feature_maps(torch.randn(1, 3, 32, 48), interpolate_pos_encoding=True)
    assert maps.shape == (1, model.config.hidden_size, 8, 12)
    with pytest.raises(ValueError, match=r"expected .*; resize the images"):
        model.feature_maps(torch.randn(1, 3, 32, 48))
    for layers in ((0,), (3,), ()):
        with pytest.raises(ValueError, match="expected one or more numbers from 1 to 2"):
            model.feature_maps(torch.randn(1, 3, 16, 16), layers)


@pytest.mark.parametrize("kind", [UMAEModel, UMAEForPreTraining, UMAEForImageClassification])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_made_or_loaded_in_half_precision_is_in_it_as_a_whole_and_runs(kind, dtype, tmp_path):
    config = fresh_config(num_labels=3)
    torch.manual_seed(0)
    whole = kind(config).eval()
    whole.save_pretrained(tmp_path)
    inputs = {"pixel_values": torch.rand(2, 3, 16, 16)}
    if kind is UMAEForPreTraining:
        inputs["noise"] = torch.arange(32).view(2, 16) / 32
    halves = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    expected = whole(**inputs)[0]
    for model in (kind.from_pretrained(tmp_path, dtype=dtype), kind._from_config(config, dtype=dtype).eval()):
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(tensors, dtype)
        output = model(**halves)[0]
        assert output.isfinite().all()
        if model.config.name_or_path:
            assert (output - expected).abs().max() < 0.05 * expected.abs().max() + 0.05
