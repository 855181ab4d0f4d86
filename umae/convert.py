"""Checkpoints of other families as ours, each by a table of renames; nothing is left over or missing in silence.

python -m umae.convert mae_pretrain_vit_base.pth FOLDER
"""

import argparse
import json
import math
import pickle
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTMAEModel, ViTModel
from transformers.utils import logging

from configuration_umae import POOLINGS, UMAEConfig
from modeling_umae import UMAEForPreTraining, UMAEModel
from umae.checkpoints import write_folder
from umae.transforms import evaluation_processor

ACCEPTED = ("umae", "vit", "vit_mae")  # the model_type of a checkpoint's config.json

# Of transformers' encoders in memory (since 5.17; before, their names were ours) to ours, applied in this order.
RENAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

# Of facebookresearch/mae and zhangq327/U-MAE (pre-training) to ours, applied in this order.
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

# What an encoder has no use for: decoders, heads, ViT's pooler, the mask token of masked image modelling.
NOT_THE_ENCODER = re.compile(r"^(vit\.)?(decoder|classifier|pooler)\.|embeddings\.mask_token$")

# Fields that all three configurations share. The decoder's stay at their defaults: it is not loaded.
FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias", "initializer_range",
)  # fmt: skip


def encoder_from_pretrained(name_or_path: str, pooling: str | None = None, revision: str | None = None) -> UMAEModel:
    """The encoder of a U-MAE, ViT or ViTMAE checkpoint, in float32 and evaluation mode.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or a model on the Hub.
        pooling: what `pooler_output` is, see `set_pooling`; by default what the checkpoint was trained with, and
            "cls" for ViT and ViTMAE.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no such model, it is of another kind, or its weights are not exactly those of its
            configuration. Keys that are missing, left over or of another shape are listed.
    """
    kind = model_type(name_or_path, revision)
    if kind == "umae":
        encoder = _load(UMAEModel, name_or_path, revision)
    elif kind == "vit":
        encoder = _from_vit(_load(ViTModel, name_or_path, revision, add_pooling_layer=False))
    else:
        encoder = _from_vit(_load(ViTMAEModel, name_or_path, revision))
    return set_pooling(encoder, pooling or encoder.config.pooling).eval()


def model_type(name_or_path: str, revision: str | None = None) -> str:
    """The family of a checkpoint, one of ACCEPTED.

    Raises:
        ValueError: there is no such checkpoint, it is of another family, or its files are not as they should be.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
    except OSError as error:
        raise ValueError(
            f"there is no model {str(name_or_path)!r}, neither as a folder with a config.json nor on the Hub ({error})"
        ) from error
    except (RecursionError, TypeError, AttributeError) as error:  # what transformers raises at other JSON
        raise ValueError(f"{name_or_path}: config.json holds no plain names and values ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name_or_path}: config.json holds a {type(config).__name__}, expected names and values")
    if not config:
        raise ValueError(f"{name_or_path} has no config.json; give a finished run, or one of its checkpoints step-N")
    kind = config.get("model_type")
    if kind not in ACCEPTED:
        raise ValueError(f"{name_or_path} is a model of type {kind!r:.80}; accepted are {', '.join(ACCEPTED)}")
    for index in Path(name_or_path).glob("*.index.json"):
        _check_index(index)
    return kind


def _check_index(index: Path) -> None:
    """Raise `ValueError` unless all files that hold a checkpoint's tensors lie beside it."""
    try:
        files = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} does not say which file holds which tensor ({error})") from error
    outside = [name for name in files if name != Path(name).name or name == ".."]
    if outside:
        raise ValueError(f"{index} names files outside of its folder: {_first_five(outside)}")


def set_pooling(encoder: UMAEModel, pooling: str) -> UMAEModel:
    """Change, in place, which feature `pooler_output` is.

    "cls" is the class token, `last_hidden_state[:, 0]`. "mean" is `fc_norm` of the mean of the patch tokens: with the
    scale that was learned if the encoder was trained with it, else a plain layer norm, as facebookresearch/mae probes.
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


def _load(model_class: type[PreTrainedModel], name_or_path: str, revision: str | None, **kwargs) -> PreTrainedModel:
    """`from_pretrained` in float32, where weights that do not fit are an error instead of a warning."""
    with _no_warnings():  # they would list every tensor of a decoder
        model, found = model_class.from_pretrained(
            name_or_path,
            revision=revision,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    left_over = [key for key in found["unexpected_keys"] if not NOT_THE_ENCODER.search(key)]
    _check_keys(name_or_path, found["missing_keys"], left_over, [key for key, *_ in found["mismatched_keys"]])
    return model


def _from_vit(model: ViTModel | ViTMAEModel) -> UMAEModel:
    """Our encoder with the weights of transformers' ViT; its learned position table takes the place of ours."""
    fields = {name: getattr(model.config, name) for name in FIELDS}
    encoder = UMAEModel(UMAEConfig(**fields, mask_ratio=0.0))
    weights = {rename(key): value for key, value in model.state_dict().items()}
    found = encoder.load_state_dict(weights, strict=False)
    _check_keys(model.config.model_type, found.missing_keys, found.unexpected_keys, ())
    return encoder


def from_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the original MAE or U-MAE code, `torch.load(...)["model"]`, under our names.

    The fused `attn.qkv` (3 * D rows) becomes query, key and value. Nothing is left out: the names of what only the
    original has (its online classifier `fc`) stay as they are, for the caller to drop or to refuse.
    """
    ours = {}
    for key, tensor in tensors.items():
        name = rename(key, ORIGINAL_RENAMES)
        if ".attn.qkv." in name and tensor.ndim > 0 and len(tensor) % 3 == 0:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            ours[name] = tensor
    return ours


def rename(key: str, renames: tuple[tuple[str, str], ...] = RENAMES) -> str:
    """A parameter's name after all renames of a table."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _check_keys(name, missing, left_over, mismatched) -> None:
    problems = {"missing": missing, "left over": left_over, "of another shape": mismatched}
    found = "; ".join(f"{what}: {_first_five(keys)}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"{name}: the weights are not those of the model that its sizes describe; {found}")


def _first_five(names) -> str:
    shown = ", ".join(sorted(f"{name!s:.80}" for name in names)[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# ----------------------------------------------------------------------------------------------------------------------
# Files of the original code


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, safetensors or a pickle by `torch.save`, and the settings that the latter may hold.

    Nothing in a pickle is run. Of the original's settings, `argparse.Namespace`, only the plain values are looked at.

    Raises:
        ValueError: the file cannot be read; it is a pickle that asks for more than tensors and plain values (what it
            asks for is named); a key is no name of a tensor; a tensor is empty or holds NaN or infinite values.
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
            SafetensorError) as error:  # fmt: skip  # what damaged files raise
        raise ValueError(f"{path} cannot be read: {type(error).__name__} {error}; expected a checkpoint") from error
    settings = getattr(content.get("args"), "__dict__", {}) if isinstance(content, dict) else {}
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} holds a {type(tensors).__name__}, expected tensors by their names")
    _check_tensors(path, tensors)
    return tensors, settings


def _wanted_global(path: Path, error: pickle.UnpicklingError) -> str | None:
    """What a pickle that torch has refused asks for: `posix.system`."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return named[1]
    words = []  # protocol 4, which torch does not read, puts module and name on the stack
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
    """Raise `ValueError`, with the first five, where keys are no names, or values no tensors that hold numbers."""

    def is_short(tensor: torch.Tensor) -> bool:  # one number, said to be a billion
        return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()

    names = [key for key in tensors if not (isinstance(key, str) and re.fullmatch(r"\w+(\.\w+)*", key, re.ASCII))]
    others = [key for key, value in tensors.items() if not _is_plain(value)]
    problems = {"keys that are no names of tensors": names, "values that are no tensors": others}
    if not any(problems.values()):
        problems["tensors that are empty"] = [key for key, value in tensors.items() if value.numel() == 0]
        short = [key for key, value in tensors.items() if is_short(value)]
        problems["tensors that are larger than what is stored"] = short
        problems["tensors with NaN or infinite values"] = [
            key for key, value in tensors.items() if key not in short and not value.isfinite().all()
        ]
    found = "; ".join(f"{what}: {_first_five(keys)}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"{path} is no sound checkpoint; {found}")


def model_from_original(
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    num_attention_heads: int | None = None,
    decoder_num_attention_heads: int = 16,
) -> UMAEForPreTraining | UMAEModel:
    """The model of the original MAE's or U-MAE's pre-training, from the tensors of its checkpoint.

    All sizes but the number of heads are those of the tensors; without a decoder it is an encoder alone. U-MAE's online
    classifier is left out, and so is its `fc_norm` unless it has been trained, which means that it pooled the mean.

    Args:
        settings: as `read_weights` returns them; mask ratio and objective are taken from there.
        num_attention_heads: of the encoder; by default those of the published sizes.
        decoder_num_attention_heads: 16 in all published ones.

    Raises:
        ValueError: the tensors are not exactly those of such a model, in names and shapes.
    """
    ours = from_original(tensors)
    for name in ("fc.weight", "fc.bias"):
        ours.pop(name, None)
    norm = [ours.get("vit.fc_norm.weight"), ours.get("vit.fc_norm.bias")]
    trained = None not in norm and not (torch.equal(norm[0], torch.ones_like(norm[0])) and not norm[1].any())
    if not trained:
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("vit.fc_norm.")}
    config = UMAEConfig(
        **_sizes_of(tensors, num_attention_heads),
        pooling="mean" if trained else "cls",
        **({"decoder_num_attention_heads": decoder_num_attention_heads} if "decoder_embed.weight" in tensors else {}),
        **_objective_of(settings),
    )
    model_class = UMAEForPreTraining if "decoder_embed.weight" in tensors else UMAEModel
    if model_class is UMAEModel:
        ours = {name.removeprefix("vit."): tensor for name, tensor in ours.items()}
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    shared = expected.keys() & ours.keys()
    _check_keys(
        "the checkpoint",
        expected.keys() - shared,
        ours.keys() - shared,
        [name for name in shared if expected[name].shape != ours[name].shape],
    )
    model = model_class(config)
    model.load_state_dict(ours)
    return model.eval()


PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 16}  # of ViT-B, L and H, by their width


def _sizes_of(tensors: dict[str, torch.Tensor], num_attention_heads: int | None) -> dict[str, Any]:
    """The sizes in UMAEConfig that the shapes of the original's tensors tell."""

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
            f"a checkpoint does not tell its number of attention heads, and width {width} is none of the published "
            f"ones ({', '.join(map(str, PUBLISHED_HEADS))}); give --num_attention_heads"
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


def _objective_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The objective's fields in UMAEConfig, as far as the original's settings have them.

    The original divides the gradient of its term by the number of processes; so is the weight.
    """
    fields = {name: settings[name] for name in ("mask_ratio", "norm_pix_loss") if name in settings}
    if "lamb" in settings:
        weight, processes = settings["lamb"], settings.get("world_size", 1)
        if not (isinstance(weight, int | float) and isinstance(processes, int) and processes >= 1):
            raise ValueError(f"the settings in the checkpoint have lamb {weight!r:.80}, world_size {processes!r:.80}")
        fields["uniformity_weight"] = weight / processes if settings.get("reg") in ("spectral", "entropy") else 0.0
    return fields


# ----------------------------------------------------------------------------------------------------------------------
# python -m umae.convert


def main(argv: Sequence[str]) -> None:
    """Make a checkpoint of facebookresearch/mae or zhangq327/U-MAE a folder that `from_pretrained` loads."""
    parser = argparse.ArgumentParser(prog="python -m umae.convert", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("source", type=Path, help="checkpoint file of the original code, with or without decoder")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist yet")
    parser.add_argument("--num_attention_heads", type=int, help="of the encoder, if its width is none of ViT-B, L or H")
    parser.add_argument("--decoder_num_attention_heads", type=int, default=16, help="(default 16)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out.exists():
            raise ValueError(f"{arguments.out} exists, and is left as it is; name another folder")
        heads = (arguments.num_attention_heads, arguments.decoder_num_attention_heads)
        model = model_from_original(*read_weights(arguments.source), *heads)
        write_folder(arguments.out, lambda folder: _save(model, folder))
    except (ValueError, OSError) as error:
        raise SystemExit(f"umae.convert: {error}") from error
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{arguments.out}: {type(model).__name__} with {millions:.1f} million weights")


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    evaluation_processor(model.config.image_height_width).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
