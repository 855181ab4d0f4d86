"""The names of a model's tensors: ours, and those of transformers' ViT and ViTMAE, the original code and timm."""

import re

import torch

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


def rename(key: str, renames: tuple[tuple[str, str], ...] = RENAMES) -> str:
    """A parameter's name after all renames of a table."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


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
