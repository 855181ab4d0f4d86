"""Convert checkpoints to and from U-MAE by tables of renames; a missing or unexpected key is an error.

umae convert mae_pretrain_vit_base.pth runs/mae             # any checkpoint below, to a U-MAE folder
umae convert runs/mine mine.safetensors                     # a U-MAE, to the names of facebookresearch/mae

Reads files of facebookresearch/mae and zhangq327/U-MAE, and U-MAE, ViTMAE and ViT of any transformers version, from a
folder or the Hub. The family is detected from the content.
"""

import argparse
import json
import math
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTMAEConfig

from configuration_umae import POOLINGS, UMAEConfig
from modeling_umae import (
    UMAEForImageClassification,
    UMAEForPreTraining,
    UMAEModel,
    resize_position_table,
    sincos_position_table,
)
from umae.data.decoding import Reading
from umae.data.inputs import evaluation_processor
from umae.files import write_folder

Model = TypeVar("Model", bound=PreTrainedModel)

# By the model_type of a config.json
FAMILIES: dict[str, type[PreTrainedConfig]] = {"umae": UMAEConfig, "vit": ViTConfig, "vit_mae": ViTMAEConfig}

# From the names of transformers' ViT and ViTMAE to ours, applied in this order. Before 5.17 they were the same; since
# then the names in memory differ, and files contain `decoder_encoder.layer`.
RENAMES = (
    (r"\bdecoder_encoder\.layer\.", "decoder_layers."),
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

# From the names of facebookresearch/mae and zhangq327/U-MAE to ours, applied in this order, and back.
ORIGINAL_RENAMES = (
    (r"^(cls_token)$", r"vit.embeddings.\1"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^norm\.", "vit.layernorm."),
    (r"^fc_norm\.", "vit.fc_norm."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token$|decoder_(embed|pos_embed|norm|pred)\b)", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
BACK_TO_ORIGINAL = (
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.encoder\.layer\.", "blocks."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^vit\.fc_norm\.", "fc_norm."),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)

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


def encoder_from_pretrained(name_or_path: str, pooling: str | None = None, revision: str | None = None) -> UMAEModel:
    """The encoder of any checkpoint that `read_model` knows, in float32 and evaluation mode.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, a file of the original code, or a model on the Hub.
        pooling: what `pooler_output` is, see `set_pooling`; by default what the checkpoint was trained with, and
            "cls" for ViT and ViTMAE.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: as `read_model`, and if the weights do not fit the encoder of its configuration exactly. Keys that
            are missing, left over or of another shape are listed.
    """
    config, tensors = read_model(name_or_path, revision)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(("decoder.", "classifier."))}
    encoder = load_exactly(UMAEModel(config), tensors, name_or_path)
    return set_pooling(encoder, pooling or config.pooling).eval()


def set_pooling(encoder: UMAEModel, pooling: str) -> UMAEModel:
    """Change `encoder.config.pooling`, the feature in `pooler_output`, in place; returns the encoder.

    "cls" is the class token, `last_hidden_state[:, 0]`. "mean" is `fc_norm` of the mean of the patch tokens in
    `last_hidden_state`, with its trained weights if the encoder has them, else with initial ones. These tokens are
    normalised by the encoder's last norm, unless it has `final_layernorm=False`, as models with `global_pool` of
    facebookresearch/mae have; see `leave_out_final_layernorm`.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if pooling == "mean" and encoder.config.pooling == "cls":
        fc_norm = nn.LayerNorm(encoder.config.hidden_size, eps=encoder.config.layer_norm_eps)
        encoder.fc_norm = fc_norm.to(encoder.device, encoder.dtype)
    elif pooling == "cls" and encoder.config.pooling == "mean":
        del encoder.fc_norm
    encoder.config.pooling = pooling
    return encoder


def leave_out_final_layernorm(encoder: UMAEModel) -> UMAEModel:
    """Leave the tokens as the last layer returns them, in place; returns the encoder.

    With `set_pooling(encoder, "mean")` it then has the feature that facebookresearch/mae calls `global_pool`,
    `models_vit.py`.
    """
    encoder.layernorm = nn.Identity()
    encoder.config.final_layernorm = False
    return encoder


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
        raise ValueError(f"{index} names files outside of its folder: {_first_five(outside)}")


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


def rename(key: str, renames: tuple[tuple[str, str], ...] = RENAMES) -> str:
    """A parameter's name after all renames of a table."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def load_exactly(
    model: Model, tensors: dict[str, torch.Tensor], name: str | Path, may_be_fresh: tuple[str, ...] = ()
) -> Model:
    """Load tensors, with the names of `read_model`, into a model, in place; returns the model.

    Args:
        name: the checkpoint's name in error messages.
        may_be_fresh: prefixes of keys that may be missing; their weights are not changed.

    Raises:
        ValueError: keys are missing, left over or of another shape; the first five of each are listed.
    """
    if isinstance(model, UMAEModel):
        tensors = {key.removeprefix("vit."): tensor for key, tensor in tensors.items()}
    expected = model.state_dict()
    problems = {
        "missing": [key for key in expected if key not in tensors and not key.startswith(may_be_fresh or ("\0",))],
        "left over": [key for key in tensors if key not in expected],
        "of another shape": [key for key in expected if key in tensors and expected[key].shape != tensors[key].shape],
    }
    wrong_keys = "; ".join(f"{problem}: {_first_five(keys)}" for problem, keys in problems.items() if keys)
    if wrong_keys:
        raise ValueError(f"{name}: the weights do not fit the model that its configuration describes; {wrong_keys}")
    model.load_state_dict(tensors, strict=False)
    return model


def resize_positions(
    tensors: dict[str, torch.Tensor], grid: tuple[int, int], config: UMAEConfig, log: Callable[[str], object]
) -> dict[str, torch.Tensor]:
    """The tensors of `read_model` with position tables for images of another size and patches of the same size.

    The encoder's table, which may be trained, is interpolated (bicubic, as in facebookresearch/mae); the decoder's is
    fixed and computed again.

    Args:
        grid: (rows, columns) of patches of the weights.
        config: of the model that the tensors are loaded into.
        log: called with one line if a table was changed.
    """
    encoder, decoder = "vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"
    is_table = encoder in tensors and tensors[encoder].shape == (1, 1 + grid[0] * grid[1], config.hidden_size)
    if grid == config.grid or not is_table:  # any other shape is an error in `load_exactly`
        return tensors
    (rows, columns), (new_rows, new_columns) = grid, config.grid
    text = f"position table is interpolated from {rows} x {columns} to {new_rows} x {new_columns} patches"
    tables = {encoder: resize_position_table(tensors[encoder], grid, config.grid)}
    if decoder in tensors:
        tables[decoder] = sincos_position_table(config.decoder_hidden_size, config.grid)
    log(f"the encoder's {text}" + (", the decoder's made anew" if decoder in tensors else ""))
    return tensors | tables


def _first_five(names: Collection[object]) -> str:
    first_names = ", ".join(sorted(f"{name!s:.80}" for name in names)[:5])
    return first_names + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, safetensors or a pickle by `torch.save`, and the settings that a pickle may contain.

    No code in a pickle is run. Of the original's settings, `argparse.Namespace`, only plain values are read.

    Raises:
        ValueError: the file cannot be read; it is a pickle that asks for more than tensors and plain values (the
            message names it); a key is no name of a tensor; a tensor is empty or holds NaN or infinite values.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = _wanted_global(path, error)
        if wanted is None:
            raise ValueError(f"{path} is no checkpoint: neither safetensors nor written by torch.save") from error
        raise ValueError(
            f"{path} was not opened: it is a pickle that asks for {wanted}, which could run code. Ask its author for "
            f"safetensors; there is no flag that opens it"
        ) from error
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, struct.error,
            SafetensorError) as error:  # fmt: skip  # the errors of damaged files
        raise ValueError(f"{path} cannot be read: {type(error).__name__} {error}; expected a checkpoint") from error
    settings = getattr(content.get("args"), "__dict__", {}) if isinstance(content, dict) else {}
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} holds a {type(tensors).__name__}, expected tensors by their names")
    _check_tensors(path, tensors)
    return tensors, settings


def _wanted_global(path: Path, error: pickle.UnpicklingError) -> str | None:
    """The global that a pickle asks for and torch does not allow: `posix.system`; None if there is none."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return named[1]
    words: list[str] = []  # protocol 4, which torch does not read, puts module and name on the stack
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                stream = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            stream = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
            words += [argument] if isinstance(argument, str) else []
    except (ValueError, StopIteration):
        pass
    return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _check_tensors(path: Path, tensors: dict) -> None:
    """Raise `ValueError`, with the first five keys, where keys are no names or values no finite, complete tensors."""

    def is_short(tensor: torch.Tensor) -> bool:  # strides of 0: one number, expanded to a billion
        return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()

    def is_name(key: object) -> bool:
        return isinstance(key, str) and re.fullmatch(r"\w+(\.\w+)*", key, re.ASCII) is not None

    problems = {
        "keys that are no names of tensors": [key for key in tensors if not is_name(key)],
        "values that are no tensors": [key for key, value in tensors.items() if not _is_plain(value)],
    }
    if not any(problems.values()):
        problems["tensors that are empty"] = [key for key, value in tensors.items() if value.numel() == 0]
        short = [key for key, value in tensors.items() if is_short(value)]
        problems["tensors that are larger than what is stored"] = short
        problems["tensors with NaN or infinite values"] = [
            key for key, value in tensors.items() if key not in short and not value.isfinite().all()
        ]
    wrong_keys = "; ".join(f"{problem}: {_first_five(keys)}" for problem, keys in problems.items() if keys)
    if wrong_keys:
        raise ValueError(f"{path} is no valid checkpoint; {wrong_keys}")


def from_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the original MAE or U-MAE code, `torch.load(...)["model"]`, under our names.

    The fused `attn.qkv` (3 * D rows) becomes query, key and value; the batch norm before the head of a linear probe,
    which has no parameters, becomes part of the classifier. Keys that only the original has keep their names.
    """
    ours = {}
    for key, tensor in tensors.items():
        name = rename(key, ORIGINAL_RENAMES)
        if ".attn.qkv." in name and tensor.ndim > 0 and len(tensor) % 3 == 0:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            ours[name] = tensor
    probe = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
    if all(name in ours for name in probe) and ours[probe[2]].shape[1:] == ours[probe[0]].shape == ours[probe[1]].shape:
        mean, variance, weight, bias = (ours.pop(name) for name in probe)
        weight = weight / (variance + 1e-6) ** 0.5  # torch.nn.BatchNorm1d(affine=False, eps=1e-6)
        ours |= {"classifier.weight": weight, "classifier.bias": bias - weight @ mean}
    elif {"head.weight", "head.bias"} <= ours.keys():
        ours |= {"classifier.weight": ours.pop("head.weight"), "classifier.bias": ours.pop("head.bias")}
    return ours


def to_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the names of the original code, which timm and most other tools read."""
    original = {}
    for key, tensor in tensors.items():
        if ".attention.attention.query." in key:
            parts = [tensors[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            key, tensor = key.replace(".attention.attention.query.", ".attn.qkv."), torch.cat(parts)
        elif ".attention.attention." in key:
            continue
        original[rename(key, BACK_TO_ORIGINAL)] = tensor
    return original


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
                f"found no {name} of {dimensions} dimensions among {_first_five(tensors)}; expected a pre-training "
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


def main(argv: Sequence[str]) -> None:
    """Convert a checkpoint of MAE, U-MAE or ViT to a folder that `from_pretrained` loads."""
    parser = argparse.ArgumentParser(prog="umae convert", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("source", help="file of the original code, or folder or Hub name of a U-MAE, ViTMAE or ViT")
    parser.add_argument("out", type=Path, help="folder to write, or file that ends in .safetensors; must not exist yet")
    parser.add_argument("--num_attention_heads", type=int, help="of a file's encoder, if its width is not published")
    parser.add_argument("--decoder_num_attention_heads", type=int, default=16, help="of a file's decoder (default 16)")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists, and is left as it is; name another target")
    heads = (arguments.num_attention_heads, arguments.decoder_num_attention_heads)
    config, tensors = read_model(arguments.source, None, *heads)
    model = load_exactly(_class_for(tensors)(config), tensors, arguments.source).eval()
    if arguments.out.suffix == ".safetensors":
        temporary = arguments.out.with_name(f"{arguments.out.name}.tmp")
        save_file({name: tensor.contiguous() for name, tensor in to_original(tensors).items()}, temporary)
        temporary.rename(arguments.out)
    else:
        write_folder(arguments.out, lambda folder: _save(model, folder))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{arguments.out}: {type(model).__name__} with {millions:.1f} million weights")


def _class_for(tensors: dict[str, torch.Tensor]) -> type[PreTrainedModel]:
    if "classifier.weight" in tensors:
        return UMAEForImageClassification
    return UMAEForPreTraining if any(key.startswith("decoder.") for key in tensors) else UMAEModel


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    size, channels = model.config.image_height_width, model.config.num_channels
    processor = evaluation_processor(size)
    if channels != 3:  # of which no checkpoint says how it was normalised
        processor = evaluation_processor(size, Reading(channels), (0.5,) * channels, (0.5,) * channels)
        print(f"{channels} channels, without a mean and a deviation: preprocessor_config.json has 0.5; put in its own")
    processor.save_pretrained(folder)
