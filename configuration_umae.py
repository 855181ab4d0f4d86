"""The configuration of a U-MAE model: typed fields and their validation, nothing else."""

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

POOLINGS = ("cls", "mean")
REGULARIZERS = ("uniformity", "coding_rate")
# Width, layers and attention heads of the encoder: ViT-Ti and ViT-S as in DeiT (Touvron et al., 2021), the others as in
# ViT (Dosovitskiy et al., 2021)
MODEL_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")  # of transformers

_SIDES = ("image_size", "patch_size")
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "mask_ratio")
_WEIGHTS = ("uniformity_weight", "initializer_range", "layer_norm_eps")
_FLAGS = ("qkv_bias", "norm_pix_loss", "final_layernorm")

# Limits far above any ViT so far (22 billion weights, 48 layers): a larger configuration is an error before any memory
# is allocated.
MOST_PATCHES, MOST_WEIGHTS, LARGEST_SIZE = 2**20, 10**11, 2**18
_WHOLE_NUMBERS = {  # minimum and maximum
    **dict.fromkeys(
        ("hidden_size", "num_attention_heads", "intermediate_size", "num_channels",
         "decoder_hidden_size", "decoder_num_attention_heads", "decoder_intermediate_size"), (1, LARGEST_SIZE),
    ),
    **dict.fromkeys(("num_hidden_layers", "decoder_num_hidden_layers"), (0, 1000)),
    "num_labels": (0, LARGEST_SIZE),
}  # fmt: skip


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


class UMAEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Sizes and training objective of a U-MAE (Zhang, Wang & Wang, "How Mask Matters", NeurIPS 2022).

    The defaults give ViT-B/16 with MAE's decoder. Field names are those of transformers' `ViTMAEConfig`; the last five
    are our own.

    Args:
        hidden_size (int, defaults to 768): width of the encoder; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (int, defaults to 12): transformer layers of the encoder.
        num_attention_heads (int, defaults to 12): attention heads of the encoder.
        intermediate_size (int, defaults to 3072): width of the encoder's feed-forward layers.
        hidden_act (str, defaults to "gelu"): activation of the feed-forward layers.
        hidden_dropout_prob (float, defaults to 0.0): dropout after attention and feed-forward, in [0, 1).
        attention_probs_dropout_prob (float, defaults to 0.0): dropout of the attention weights, in [0, 1).
        initializer_range (float, defaults to 0.02): standard deviation of the initial class and mask tokens.
        layer_norm_eps (float, defaults to 1e-6): epsilon of every layer norm.
        image_size (int or (height, width), defaults to 224): pixels of the images.
        patch_size (int or (height, width), defaults to 16): pixels of a patch; divides `image_size`.
        num_channels (int, defaults to 3): channels of the images.
        qkv_bias (bool, defaults to True): whether queries, keys and values have a bias.
        decoder_hidden_size (int, defaults to 512): width of the decoder; a multiple of 4 and of its heads.
        decoder_num_hidden_layers (int, defaults to 8): transformer layers of the decoder.
        decoder_num_attention_heads (int, defaults to 16): attention heads of the decoder.
        decoder_intermediate_size (int, defaults to 2048): width of the decoder's feed-forward layers.
        mask_ratio (float, defaults to 0.75): share of the patches hidden from the encoder, in [0, 1); 0 hides none.
        norm_pix_loss (bool, defaults to True): reconstruct pixels normalised within each patch.
        uniformity_weight (float, defaults to 0.01): lambda, the weight of the regularizer, whichever it is; 0 gives
            plain MAE.
        regularizer ("uniformity" or "coding_rate", defaults to "uniformity"): what keeps the features from collapsing,
            U-MAE's uniformity term or M-MAE's total coding rate.
        pooling ("cls" or "mean", defaults to "cls"): the feature of an image is its class token, or the
            layer-normalised mean of its patch tokens.
        final_layernorm (bool, defaults to True): whether the encoder normalises its tokens. facebookresearch/mae
            fine-tunes without, and normalises their mean alone.
        drop_path_rate (float, defaults to 0.0): share of the images that skip a branch (attention or feed-forward)
            of the encoder's last layer in training, in [0, 1); it grows linearly from 0 at the first layer.
        out_features, out_indices (lists of str or int): which maps a `UMAEBackbone` returns, by name or number.

    Raises:
        ValueError: a field is invalid, or fields do not fit together. The message names the field, what was found
            and what to do. Single fields are checked whenever they are set, combinations at construction and again
            when a model is built.
    """

    model_type = "umae"
    _auto_class = "AutoConfig"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    uniformity_weight: float = 0.01
    regularizer: str = "uniformity"
    pooling: str = "cls"
    final_layernorm: bool = True
    drop_path_rate: float = 0.0

    # Of a backbone; without annotations, as they are no fields
    _out_features = None
    _out_indices = None

    def __post_init__(self, **kwargs):
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        self.check_combinations()
        if features is not None or indices is not None:
            self.set_output_features_output_indices(features, indices)

    @property
    def stage_names(self) -> list[str]:
        """Names of a backbone's maps: `stem`, the embeddings, then `stage1` and so on, what each layer returns."""
        return ["stem", *(f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1))]

    @property
    def out_features(self) -> list[str]:
        """Names of the maps that a backbone returns."""
        return self._out_features or [self.stage_names[-1]]

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self.set_output_features_output_indices(names, None)

    @property
    def out_indices(self) -> list[int]:
        """Their numbers in `stage_names`."""
        return self._out_indices or [self.num_hidden_layers]

    @out_indices.setter
    def out_indices(self, indices: list[int] | tuple[int, ...] | None) -> None:
        self.set_output_features_output_indices(None, None if indices is None else list(indices))

    def to_dict(self):
        """As transformers; `out_features` and `out_indices` only where they were set."""
        fields = super().to_dict()
        return {name: fields[name] for name in fields if not (name.startswith("out_") and fields[name] is None)}

    @classmethod
    def sized(cls, size: str | None = None, **fields) -> "UMAEConfig":
        """A configuration whose sizes fit each other: those that are not given follow from those that are.

        Feed-forward layers are four times as wide as their layers. Attention heads have 64 dimensions in the encoder,
        below a width of 192 and in the decoder 32, where that divides the width. The decoder has two thirds of the
        encoder's width, at most 512, and 8 layers (4 below a width of 768, 2 below 192): MAE's own for ViT-B, ViT-L and
        ViT-H.

        Args:
            size: one of MODEL_SIZES, by default "base".
            fields: of the configuration; they override the size's.

        Raises:
            ValueError: an unknown size, or an invalid field.
        """
        if size is not None and size not in MODEL_SIZES:
            raise ValueError(f"model_size must be one of {', '.join(MODEL_SIZES)}, got {size!r:.80}")
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        fields = {**(dict(zip(names, MODEL_SIZES[size], strict=True)) if size else {}), **fields}
        width = fields.setdefault("hidden_size", cls.hidden_size)
        if not _is_int(width) or width < 1:
            return cls(**fields)  # which says what is wrong
        dimensions = 64 if width >= 192 and width % 64 == 0 else 32
        fields.setdefault("num_attention_heads", _heads(width, dimensions))
        fields.setdefault("intermediate_size", 4 * width)
        decoder_width = fields.setdefault("decoder_hidden_size", min(max(32, round(width / 48) * 32), 512))
        if not _is_int(decoder_width) or decoder_width < 1:
            return cls(**fields)
        fields.setdefault("decoder_num_hidden_layers", 8 if width >= 768 else 4 if width >= 192 else 2)
        fields.setdefault("decoder_num_attention_heads", _heads(decoder_width, 32))
        fields.setdefault("decoder_intermediate_size", 4 * decoder_width)
        return cls(**fields)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(config_dict.get(name)):  # transformers would download and run it
                raise ValueError(
                    f"config.json asks for code of the Hub, {name} {config_dict[name]!r:.80}; if you trust it, remove "
                    f"the line and give attn_implementation to from_pretrained"
                )
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, name, value):
        _check_field(name, value)
        super().__setattr__(name, value)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Pixels of an image, (height, width)."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """Pixels of a patch, (height, width)."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, (rows, columns)."""
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def num_hidden_patches(self) -> int:
        """Patches of an image that are hidden from the encoder in pre-training."""
        rows, columns = self.grid
        return rows * columns - int(rows * columns * (1 - self.mask_ratio))

    def check_combinations(self) -> None:
        """Raise `ValueError` where fields that are valid by themselves do not fit together."""
        for axis, side, patch in zip(
            ("height", "width"), self.image_height_width, self.patch_height_width, strict=True
        ):
            if side % patch:
                raise ValueError(
                    f"patch_size {patch} does not divide image_size {side} ({axis}); "
                    f"use image_size {max(side // patch, 1) * patch} or another patch_size"
                )
        for size, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            width, parts = getattr(self, size), getattr(self, heads)
            if width % parts:
                raise ValueError(f"{heads} {parts} does not divide {size} {width}; choose {size} as a multiple of it")
        self._check_total()
        rows, columns = self.grid
        if self.num_hidden_patches == rows * columns:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} keeps no patch of {rows * columns}; "
                f"use one below {1 - 1 / (rows * columns):.4g} or a smaller patch_size"
            )

    def _check_total(self) -> None:
        """Raise `ValueError` if the model has more than MOST_PATCHES patches or MOST_WEIGHTS weights."""
        (rows, columns), (height, width) = self.grid, self.patch_height_width
        if rows * columns > MOST_PATCHES:
            raise ValueError(
                f"image_size {self.image_size} with patch_size {self.patch_size} is {rows * columns} patches, expected "
                f"at most {MOST_PATCHES}; use a smaller image_size or a larger patch_size"
            )
        weights = sum(
            size * (rows * columns + height * width * self.num_channels + layers * (4 * size + 2 * inner))
            for size, layers, inner in (
                (self.hidden_size, self.num_hidden_layers, self.intermediate_size),
                (self.decoder_hidden_size, self.decoder_num_hidden_layers, self.decoder_intermediate_size),
            )
        )
        if weights > MOST_WEIGHTS:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_hidden_layers {self.num_hidden_layers} and the other sizes make "
                f"{weights:.1e} weights, expected at most {MOST_WEIGHTS:.0e}; use smaller sizes"
            )


def _heads(width: int, dimensions: int) -> int:
    """As many attention heads as have at least so many dimensions each."""
    return next(heads for heads in range(max(1, width // dimensions), 0, -1) if width % heads == 0)


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _check_field(name: str, value) -> None:
    """Raise `ValueError` if `value` is not valid for the field `name` by itself."""
    if name in _WHOLE_NUMBERS:
        lowest, highest = _WHOLE_NUMBERS[name]
        if not (_is_int(value) and lowest <= value <= highest):
            raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {value!r:.80}")
    if name in ("hidden_size", "decoder_hidden_size") and value % 4:
        raise ValueError(
            f"{name} must be a multiple of 4 (sine and cosine of row and column fill it), got {value}; "
            f"use {max(value // 4, 1) * 4}"
        )
    if name in _SIDES:
        sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value,)
        if not all(_is_int(side) and 1 <= side <= LARGEST_SIZE for side in sides):
            raise ValueError(
                f"{name} must be a whole number of pixels, 1 to {LARGEST_SIZE}, or a pair (height, width), "
                f"got {value!r:.80}"
            )
    if name in _PROBABILITIES and not (_is_finite(value) and 0 <= value < 1):
        raise ValueError(f"{name} must lie in [0, 1), got {value!r:.80}")
    if name in _WEIGHTS and not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r:.80}")
    if name in _FLAGS and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    if name == "hidden_act" and not isinstance(value, str):
        raise ValueError(f"hidden_act must be the name of an activation such as gelu, got {value!r:.80}")
    if name == "pooling" and value not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {value!r:.80}")
    if name == "regularizer" and value not in REGULARIZERS:
        raise ValueError(f"regularizer must be one of {', '.join(REGULARIZERS)}, got {value!r:.80}")
    if name == "problem_type" and value not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, or None, got {value!r:.80}")


__all__ = ["UMAEConfig"]
