"""The command `umae convert`: any checkpoint to a folder or file of another format.

umae convert mae_pretrain_vit_base.pth runs/mae             # any checkpoint, to a U-MAE folder
umae convert runs/mine mine.safetensors                     # a U-MAE, to the names of facebookresearch/mae

Reads files of facebookresearch/mae and zhangq327/U-MAE, and U-MAE, ViTMAE and ViT of any transformers version, from a
folder or the Hub.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from modeling_umae import UMAEForImageClassification, UMAEForPreTraining, UMAEModel
from umae.convert.families import read_model
from umae.convert.loading import load_exactly
from umae.convert.names import to_original
from umae.data.decoding import Reading
from umae.data.inputs import evaluation_processor
from umae.files import write_folder


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
