"""The command `umae convert`: any checkpoint to a folder or file of another format.

umae convert mae_pretrain_vit_base.pth runs/mae             # any checkpoint, to a U-MAE folder
umae convert runs/mine mine.safetensors                     # a U-MAE, to the names of facebookresearch/mae
umae convert runs/mine mine.onnx                            # its encoder or classifier, to ONNX
umae convert runs/mine mine_timm --format timm              # or to a folder that timm loads

Reads files of facebookresearch/mae and zhangq327/U-MAE, and U-MAE, ViTMAE and ViT of any transformers version, from a
folder or the Hub.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from configuration_umae import UMAEConfig
from image_processing_umae import UMAEImageProcessor
from modeling_umae import UMAEForImageClassification, UMAEForPreTraining, UMAEModel
from umae.convert.families import read_model
from umae.convert.loading import load_exactly
from umae.convert.names import to_original
from umae.convert.onnx_file import write_onnx
from umae.convert.timm_folder import write_timm
from umae.data.decoding import Reading
from umae.data.inputs import evaluation_processor, load_processor
from umae.files import write_file, write_folder

FILES = (".onnx", ".safetensors")


def main(argv: Sequence[str]) -> None:
    """Convert a checkpoint of MAE, U-MAE or ViT to a folder that `from_pretrained` or timm loads, or to one file."""
    parser = argparse.ArgumentParser(prog="umae convert", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("source", help="file of the original code, or folder or Hub name of a U-MAE, ViTMAE or ViT")
    names = "folder to write, or file that ends in .onnx or .safetensors (the original's names); must not exist yet"
    parser.add_argument("out", type=Path, help=names)
    parser.add_argument("--format", choices=("transformers", "timm"), help="of a folder (default transformers)")
    parser.add_argument("--num_attention_heads", type=int, help="of a file's encoder, if its width is not published")
    parser.add_argument("--decoder_num_attention_heads", type=int, default=16, help="of a file's decoder (default 16)")
    arguments = parser.parse_args(argv)
    source, out = arguments.source, arguments.out
    if out.exists():
        raise ValueError(f"{out} exists, and is left as it is; name another target")
    if arguments.format and out.suffix in FILES:
        raise ValueError(f"{out} is a file by its name, and --format is that of a folder; leave one of them out")
    heads = (arguments.num_attention_heads, arguments.decoder_num_attention_heads)
    config, tensors = read_model(source, None, *heads)
    model = load_exactly(_class_for(tensors)(config), tensors, source).eval()
    if out.suffix == ".safetensors":
        original = {name: tensor.contiguous() for name, tensor in to_original(tensors).items()}
        write_file(out, lambda file: save_file(original, file))
    else:
        processor = processor_of(source, config)
        if out.suffix == ".onnx" or arguments.format == "timm":
            model = model.vit if isinstance(model, UMAEForPreTraining) else model
        if out.suffix == ".onnx":
            name = Path(source).resolve().name if Path(source).exists() else source  # no path of this machine
            write_onnx(model, processor, name, licence_of(source), out)
        elif arguments.format == "timm":
            write_timm(model, processor, licence_of(source), out)
        else:
            write_folder(out, lambda folder: _save(model, processor, folder))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{out}: {type(model).__name__} with {millions:.1f} million weights")


def _class_for(tensors: dict[str, torch.Tensor]) -> type[PreTrainedModel]:
    if "classifier.weight" in tensors:
        return UMAEForImageClassification
    return UMAEForPreTraining if any(key.startswith("decoder.") for key in tensors) else UMAEModel


def _save(model: PreTrainedModel, processor: UMAEImageProcessor, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def processor_of(source: str, config: UMAEConfig) -> UMAEImageProcessor:
    """The image processor of a checkpoint; where a file or a folder has none, MAE's for evaluation."""
    path = Path(source)
    if not path.is_file() and (not path.is_dir() or (path / "preprocessor_config.json").exists()):
        return load_processor(source)
    size, channels = config.image_height_width, config.num_channels
    if channels == 3:
        return evaluation_processor(size)
    print(f"{source} does not say how its {channels} channels were normalised; mean and deviation are 0.5, change them")
    return evaluation_processor(size, Reading(channels), (0.5,) * channels, (0.5,) * channels)


def licence_of(source: str) -> str | None:
    """The licence that a folder's or a Hub model's card states, if any."""
    card = Path(source) / "README.md"
    if not Path(source).exists():
        try:
            card = Path(hf_hub_download(source, "README.md"))
        except EntryNotFoundError:
            return None
    licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
    return licence if isinstance(licence, str) else None
