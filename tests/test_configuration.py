import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configuration_umae import UMAEConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must lie in \[0, 1\)"),
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"image_size": 30, "patch_size": 7}, "patch_size 7 does not divide image_size 30 .*use image_size 28"),
        ({"image_size": (32, 30), "patch_size": 8}, r"patch_size 8 does not divide image_size 30 \(width\)"),
        ({"image_size": [32, 32, 3]}, "image_size must be a whole number of pixels or a pair"),
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
        ({"pooling": "max"}, "pooling must be one of cls, mean"),
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


@settings(max_examples=100, deadline=None)
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
