import json
import resource

import pytest
import torch
from golden_models import fresh_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from modeling_umae import UMAEForPreTraining, UMAEModel
from umae import UMAEConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must lie in \[0, 1\)"),
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"image_size": 30, "patch_size": 7}, "patch_size 7 does not divide image_size 30 .*use image_size 28"),
        ({"image_size": (32, 30), "patch_size": 8}, r"patch_size 8 does not divide image_size 30 \(width\)"),
        ({"image_size": [32, 32, 3]}, "image_size must be a whole number of pixels, 1 to 262144, or a pair"),
        ({"image_size": 0}, "image_size"),
        ({"patch_size": 4.0}, "patch_size"),
        ({"uniformity_weight": -0.01}, "uniformity_weight"),
        ({"uniformity_weight": float("nan")}, "uniformity_weight"),
        ({"uniformity_weight": "0.01"}, "uniformity_weight"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4"),
        ({"decoder_hidden_size": 18}, "decoder_hidden_size must be a multiple of 4"),
        ({"hidden_size": 64, "num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"hidden_size": 10**9}, "hidden_size must be a whole number from 1 to 262144, got 1000000000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be a whole number from 0 to 1000, got 1000000"),
        ({"num_labels": 10**9}, "num_labels must be a whole number from 0 to 262144"),
        ({"hidden_size": 2**16, "num_attention_heads": 16}, r"make 2\.1e\+11 weights, expected at most 1e\+11"),
        ({"image_size": 2**18, "patch_size": 1}, "68719476736 patches, expected at most 1048576"),
        ({"num_channels": 2**18, "patch_size": 2**10, "image_size": 2**11}, "weights, expected at most"),
        ({"uniformity_weight": 10**400}, "uniformity_weight must be a finite number"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"pooling": "max"}, "pooling must be one of cls, mean"),
        ({"regularizer": "entropy"}, "regularizer must be one of uniformity, coding_rate, got 'entropy'"),
        ({"regularizer": None}, "regularizer must be one of uniformity, coding_rate, got None"),
        ({"problem_type": "ranking"}, "problem_type must be one of regression, single_label_classification, multi_"),
        ({"norm_pix_loss": "yes"}, "norm_pix_loss"),
        ({"image_size": 8, "patch_size": 4, "mask_ratio": 0.8}, "mask_ratio 0.8 keeps no patch of 4"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        UMAEConfig(**fields)


def test_mask_ratio_that_keeps_no_patch_is_counted_as_the_original_counts():
    """10 patches at 0.9: 10 * (1 - 0.9) is 0.99999..., so none is kept."""
    with pytest.raises(ValueError, match="keeps no patch of 10"):
        UMAEConfig(image_size=(8, 20), patch_size=4, mask_ratio=0.9)


def test_setting_a_field_later_is_checked_too(tmp_path):
    UMAEConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mask_ratio"):
        UMAEConfig.from_pretrained(tmp_path, mask_ratio=1.5)


def test_configuration_survives_json(tmp_path):
    config = UMAEConfig(image_size=(32, 64), patch_size=(4, 8), pooling="mean", uniformity_weight=0.5)
    config.save_pretrained(tmp_path)
    loaded = UMAEConfig.from_pretrained(tmp_path)
    assert loaded.grid == (8, 8) and loaded.pooling == "mean" and loaded.uniformity_weight == 0.5


def test_a_configuration_from_before_drop_path_has_none(tmp_path):
    UMAEConfig().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("drop_path_rate") == 0.0
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert UMAEConfig.from_pretrained(tmp_path).drop_path_rate == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"hidden_size": "768"}, "hidden_size must be a whole number from 1 to 262144, got '768'"),
        ({"image_size": json.loads("[" * 100 + "]" * 100)}, r"image_size must be .* got \[\["),
        ({"_attn_implementation": "somebody/code"}, "asks for code of the Hub, _attn_implementation 'somebody/code'"),
        ({"attn_implementation": "somebody/code"}, "asks for code of the Hub, attn_implementation 'somebody/code'"),
    ],
    ids=["wide", "deep", "classes", "text", "nested", "code", "code of the older name"],
)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForPreTraining, AutoModelForImageClassification])
def test_a_hostile_file_is_refused_before_memory_is_asked_for(tmp_path, changes, message, auto_class):
    UMAEModel(fresh_config()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


FIELDS = sorted(UMAEConfig.__annotations__)
POWERS = st.integers(0, 18).map(lambda power: 2**power)  # sizes that divide each other
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | POWERS | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4)
    | st.dictionaries(st.sampled_from(("image_size", "patch_size", "hidden_size", "num_hidden_layers")), POWERS)
)
def test_any_values_are_refused_by_a_fields_name_or_make_a_model_of_bounded_size(fields):
    try:
        config = UMAEConfig(**fields)
    except ValueError as error:
        assert any(name in str(error) for name in FIELDS)
        return
    rows, columns = config.grid
    assert config.hidden_size**2 * 4 * config.num_hidden_layers <= 1e11
    assert 1 <= rows * columns <= 2**20 and 0 <= config.num_hidden_patches < rows * columns
    assert config.hidden_size % config.num_attention_heads == 0 and 0 <= config.mask_ratio < 1
    again = UMAEConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    patch=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    ratio=st.floats(0, 1, exclude_max=True),
)
def test_an_accepted_configuration_keeps_at_least_one_patch(rows, columns, patch, ratio):
    fields = {"image_size": (rows * patch[0], columns * patch[1]), "patch_size": patch, "mask_ratio": ratio}
    if int(rows * columns * (1 - ratio)) < 1:
        with pytest.raises(ValueError, match="keeps no patch"):
            UMAEConfig(**fields)
    else:
        assert UMAEConfig(**fields).grid == (rows, columns)


# Of the encoders, in millions, without heads: DeiT (Touvron et al., 2021) and ViT (Dosovitskiy et al., 2021)
MILLIONS = {"tiny": 5.5, "small": 21.7, "base": 85.8, "large": 303.3, "huge": 630.8}


@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_by_name_are_the_usual_encoders_with_smaller_decoders(size):
    with torch.device("meta"):
        model = UMAEForPreTraining(UMAEConfig.sized(size, patch_size=14 if size == "huge" else 16))
    encoder = sum(parameter.numel() for parameter in model.vit.parameters()) / 1e6
    decoder = sum(parameter.numel() for parameter in model.parameters()) / 1e6 - encoder
    assert encoder == pytest.approx(MILLIONS[size], rel=0.01)
    assert decoder < 0.35 * encoder


def test_the_base_size_is_the_default_configuration():
    assert UMAEConfig.sized().to_dict() == UMAEConfig.sized("base").to_dict() == UMAEConfig().to_dict()


@given(
    width=st.integers(1, 400).map(lambda quarter: 4 * quarter),
    heads=st.none() | st.just(1),
    decoder=st.none() | st.integers(1, 100).map(lambda quarter: 4 * quarter),
)
def test_sizes_that_are_not_given_fit_those_that_are(width, heads, decoder):
    fields = {"hidden_size": width, "num_attention_heads": heads, "decoder_hidden_size": decoder}
    fields = {name: value for name, value in fields.items() if value is not None}
    config = UMAEConfig.sized(**fields)  # which refuses heads that do not divide the width
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.intermediate_size == 4 * width
    assert config.decoder_intermediate_size == 4 * config.decoder_hidden_size
    if decoder is None:
        assert config.decoder_hidden_size <= max(32, width) and config.decoder_hidden_size % 32 == 0


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="model_size must be one of tiny, small, base, large, huge, got 'giant'"):
        UMAEConfig.sized("giant")
    for wrong in ("96", 0, -4, 2.5):
        with pytest.raises(ValueError, match="hidden_size must be a whole number"):
            UMAEConfig.sized(hidden_size=wrong)
    with pytest.raises(ValueError, match="decoder_hidden_size must be a whole number"):
        UMAEConfig.sized(decoder_hidden_size="8")
