"""Checkpoints of any family as a configuration and tensors of ours. The family is detected from the content."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, ViTConfig, ViTMAEConfig

from configuration_umae import UMAEConfig
from umae.convert.names import from_original, rename
from umae.convert.weights import first_five, read_weights

# By the model_type of a config.json
FAMILIES: dict[str, type[PreTrainedConfig]] = {"umae": UMAEConfig, "vit": ViTConfig, "vit_mae": ViTMAEConfig}


# Keys of checkpoints that are ignored: ViT's pooler, the mask token of masked image modelling, U-MAE's online
# classifier, the counter of a batch norm.
NOT_OURS = re.compile(r"^vit\.pooler\.|^vit\.embeddings\.mask_token$|^fc\.|num_batches_tracked$")

# Fields that the configurations of ViT and ViTMAE share with ours, and those of ViTMAE alone.
SHARED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias", "initializer_range",
)  # fmt: skip
MAE_FIELDS = (
    "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size",
    "mask_ratio", "norm_pix_loss",
)  # fmt: skip


def read_model(
    source: str | Path,
    revision: str | None = None,
    num_attention_heads: int | None = None,
    decoder_num_attention_heads: int = 16,
) -> tuple[UMAEConfig, dict[str, torch.Tensor]]:
    """The configuration and the weights of a checkpoint, converted to a U-MAE.

    Args:
        source: a folder or a model on the Hub (U-MAE, ViT, ViTMAE), or a file of the original code.
        revision: branch, tag or commit on the Hub.
        num_attention_heads, decoder_num_attention_heads: for a file, which does not contain them; by default
            those of the published models.

    Returns:
        The configuration, and float32 tensors under the names of `UMAEForPreTraining` and `UMAEForImageClassification`
        (`vit.*`, `decoder.*`, `classifier.*`).

    Raises:
        ValueError: there is no such checkpoint, it is of another family, or its files are invalid.
    """
    if Path(source).is_file():
        tensors, settings = read_weights(Path(source))
        config = original_config(tensors, settings, num_attention_heads, decoder_num_attention_heads)
        ours = from_original(tensors)
        if config.pooling == "cls":  # then its fc_norm is untrained
            ours = {key: tensor for key, tensor in ours.items() if not key.startswith("vit.fc_norm.")}
    else:
        fields = read_config(source, revision)
        ours = {rename(key): tensor for key, tensor in _tensors_of(source, revision).items()}
        if not any(key.startswith("vit.") for key in ours):  # an encoder alone
            ours = {key if key.startswith("classifier.") else f"vit.{key}": tensor for key, tensor in ours.items()}
        config = _config_of(source, fields, ours)
    return config, {key: tensor.float() for key, tensor in ours.items() if not NOT_OURS.search(key)}


def read_config(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The fields of a checkpoint's config.json, whose `model_type` is one of FAMILIES.

    Raises:
        ValueError: there is no such checkpoint, it is of another family, or its files are invalid.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
    except OSError as error:
        raise ValueError(
            f"there is no model {str(name_or_path)!r}, neither as a folder with a config.json nor on the Hub ({error})"
        ) from error
    except (RecursionError, TypeError, AttributeError) as error:  # transformers' errors for other JSON
        raise ValueError(f"{name_or_path}: config.json holds no plain names and values ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{name_or_path}: config.json holds a {type(fields).__name__}, expected names and values")
    if not fields:
        raise ValueError(f"{name_or_path} has no config.json; give a finished run, or one of its checkpoints step-N")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{name_or_path} is a model of type {model_type!r:.80}; accepted are {', '.join(FAMILIES)}")
    for index in Path(name_or_path).glob("*.index.json"):
        _check_index(index)
    return fields


def _check_index(index: Path) -> None:
    """Raise `ValueError` unless all files in a checkpoint's index are in the folder of the index."""
    try:
        files = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} does not say which file holds which tensor ({error})") from error
    outside = [name for name in files if name != Path(name).name or name == ".."]
    if outside:
        raise ValueError(f"{index} names files outside of its folder: {first_five(outside)}")


def _tensors_of(name_or_path: str | Path, revision: str | None) -> dict[str, torch.Tensor]:
    """All tensors of a folder or of a model on the Hub, from safetensors files if it has any."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        folder = Path(name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=pattern))
            except OSError as error:
                raise ValueError(f"the weights of {name_or_path} cannot be downloaded ({error})") from error
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob(pattern)):
            tensors |= read_weights(file)[0]
        if tensors:
            return tensors
    raise ValueError(f"{name_or_path} holds no weights, neither model.safetensors nor pytorch_model.bin")


def _config_of(source: str | Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> UMAEConfig:
    """A U-MAE configuration from the fields of any family, with its classes if `tensors` have a classifier."""
    try:
        config = FAMILIES[fields["model_type"]].from_dict(fields)
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{source}: config.json is no valid configuration ({error})") from error
    if isinstance(config, UMAEConfig):
        return config
    names = SHARED_FIELDS + (MAE_FIELDS if isinstance(config, ViTMAEConfig) else ())
    classes: dict[str, Any] = {}
    if "classifier.weight" in tensors:
        classes = {"id2label": config.id2label, "label2id": config.label2id}
    return UMAEConfig(**{name: getattr(config, name) for name in names}, **classes, uniformity_weight=0.0)


def original_config(
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    num_attention_heads: int | None = None,
    decoder_num_attention_heads: int = 16,
) -> UMAEConfig:
    """The configuration of a checkpoint of the original code.

    All sizes but the number of heads come from the tensors. Pooling is "mean" if there is an `fc_norm` that is trained
    or followed by a head. Mask ratio, objective and drop path come from the settings, if there are any.

    Raises:
        ValueError: the tensors are not those of such a model.
    """
    head = next((tensors[name] for name in ("head.1.weight", "head.weight") if name in tensors), None)
    pools_mean = head is not None and "fc_norm.weight" in tensors  # then the tokens are not normalised before
    weight, bias = tensors.get("fc_norm.weight"), tensors.get("fc_norm.bias")
    trained = False
    if weight is not None and bias is not None:
        trained = not torch.equal(weight, torch.ones_like(weight)) or bool(bias.any())
    fields = _sizes_of(tensors, num_attention_heads) | _training_of(settings)
    if "decoder_embed.weight" in tensors:
        fields["decoder_num_attention_heads"] = decoder_num_attention_heads
    if head is not None:
        fields["num_labels"] = head.shape[0] if head.ndim == 2 else 0
    return UMAEConfig(
        **fields,
        pooling="mean" if trained or pools_mean else "cls",
        final_layernorm=not pools_mean,
    )


PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 16}  # of ViT-B, L and H, by their width


def _sizes_of(tensors: dict[str, torch.Tensor], num_attention_heads: int | None) -> dict[str, Any]:
    """The fields of UMAEConfig that follow from the shapes of the original's tensors."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in tensors or tensors[name].ndim != dimensions:
            raise ValueError(
                f"found no {name} of {dimensions} dimensions among {first_five(tensors)}; expected a pre-training "
                f"checkpoint of facebookresearch/mae or zhangq327/U-MAE"
            )
        return tensors[name].shape

    def layers(prefix: str) -> int:
        return len({name.split(".")[1] for name in tensors if name.startswith(prefix + ".")})

    width, channels, *patch = shape("patch_embed.proj.weight", 4)
    side = math.isqrt(shape("pos_embed", 3)[1] - 1)
    if num_attention_heads is None and width not in PUBLISHED_HEADS:
        raise ValueError(
            f"a file does not contain its number of attention heads, and width {width} is none of the published "
            f"ones ({', '.join(map(str, PUBLISHED_HEADS))}); give num_attention_heads"
        )
    sizes = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "image_size": side * patch[0] if patch[0] == patch[1] else [side * patch[0], side * patch[1]],
        "num_hidden_layers": layers("blocks"),
        "num_attention_heads": num_attention_heads or PUBLISHED_HEADS[width],
        "intermediate_size": shape("blocks.0.mlp.fc1.weight", 2)[0],
    }
    if "decoder_embed.weight" in tensors:
        sizes |= {
            "decoder_hidden_size": shape("decoder_embed.weight", 2)[0],
            "decoder_num_hidden_layers": layers("decoder_blocks"),
            "decoder_intermediate_size": shape("decoder_blocks.0.mlp.fc1.weight", 2)[0],
        }
    return sizes


def _training_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of UMAEConfig about training, if the original's settings have them.

    Without `lamb` there was no uniformity term. The weight is divided by the number of processes, because the original
    divides the gradient of the term by it.
    """
    names = {"mask_ratio": "mask_ratio", "norm_pix_loss": "norm_pix_loss", "drop_path": "drop_path_rate"}
    fields = {ours: settings[name] for name, ours in names.items() if name in settings}
    weight, processes = settings.get("lamb", 0.0), settings.get("world_size", 1)
    if not (isinstance(weight, int | float) and isinstance(processes, int) and processes >= 1):
        raise ValueError(f"the settings in the checkpoint have lamb {weight!r:.80}, world_size {processes!r:.80}")
    is_used = settings.get("reg") in ("spectral", "entropy")
    return {**fields, "uniformity_weight": weight / processes if is_used else 0.0}
