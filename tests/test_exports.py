"""What `umae convert` writes for others, against the models that it came from."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from golden_models import fresh_config
from processes import ROOT, hub_user, run
from safetensors.torch import load_file
from torch import nn
from transformers import ViTImageProcessorPil

from configuration_umae import UMAEConfig
from modeling_umae import UMAEForImageClassification, UMAEForPreTraining, UMAEModel
from umae.convert import command, encoder_from_pretrained
from umae.data.decoding import Reading
from umae.data.inputs import evaluation_processor, load_processor

STATISTICS = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
CLASSES = {0: "cat", 1: "dog", 2: "é"}


def saved(model, folder: Path, processor=None) -> Path:
    """A folder of a model with no parameter left as a fresh one has it, with its processor and a card."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    processor = processor or evaluation_processor(
        model.config.image_height_width, image_mean=STATISTICS[0], image_std=STATISTICS[1]
    )
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A model\n")
    return folder


def converted(source: Path, out: Path, *more: str) -> Path:
    command.main([str(source), str(out), *more])
    return out


def images_of(config: UMAEConfig, count: int) -> torch.Tensor:
    return torch.randn(count, config.num_channels, *config.image_height_width)


@torch.no_grad()
def outputs_of(model, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(model(pixel_values).items())


def test_a_converted_folder_keeps_the_image_processor(tmp_path):
    source = saved(UMAEForPreTraining(fresh_config()), tmp_path / "run")
    processor = load_processor(str(converted(source, tmp_path / "out")))
    assert (list(processor.image_mean), list(processor.image_std)) == STATISTICS


FROM_THE_HUB = """
from pathlib import Path
from huggingface_hub import HfApi
from umae.convert import command
api = HfApi()
for name in ("tester/model", "tester/bare"):
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path="run")
    Path("run/README.md").unlink(missing_ok=True)
    command.main([name, name.removeprefix("tester/"), "--format", "timm"])
"""


def test_a_model_on_the_hub_brings_its_processor_and_the_licence_of_its_card_if_it_has_one(server, tmp_path):
    saved(UMAEModel(fresh_config()), tmp_path / "run")
    run("-c", FROM_THE_HUB, cwd=tmp_path, **hub_user())
    of_model, of_bare = (
        json.loads((tmp_path / name / "config.json").read_text())["pretrained_cfg"] for name in ("model", "bare")
    )
    assert (of_model["mean"], of_model["std"], of_model["license"]) == (*STATISTICS, "cc-by-4.0")
    assert (of_bare["mean"], of_bare["std"], of_bare.get("license")) == (*STATISTICS, None)


# --------------------------------------------------------------------------------------------------------------- ONNX


def session(file: Path):
    return pytest.importorskip("onnxruntime").InferenceSession(file)


def check_onnx(model, file: Path) -> dict[str, str]:
    """Returns the metadata."""
    running, config = session(file), model.config
    names = [output.name for output in running.get_outputs()]
    assert [entry.name for entry in running.get_inputs()] == ["pixel_values"]
    for count in (1, 3):
        pixel_values = images_of(config, count)
        expected = outputs_of(model, pixel_values)
        assert names == list(expected)
        for name, found in zip(names, running.run(None, {"pixel_values": pixel_values.numpy()}), strict=True):
            assert (torch.tensor(found) - expected[name]).abs().max() < 1e-4, name
    return running.get_modelmeta().custom_metadata_map


@pytest.mark.slow
def test_an_onnx_file_is_the_encoder_at_any_batch_size_and_says_how_to_preprocess(tmp_path):
    model = UMAEForPreTraining(fresh_config(num_hidden_layers=1))
    file = converted(saved(model, tmp_path / "run"), tmp_path / "new" / "out.onnx")
    metadata = check_onnx(model.vit, file)
    assert (metadata["source"], metadata["license"], metadata["image_size"]) == ("run", "cc-by-4.0", "[16, 16]")
    assert (json.loads(metadata["image_mean"]), json.loads(metadata["image_std"])) == STATISTICS
    assert json.loads(metadata["crop_size"]) == {"height": 16, "width": 16} and "id2label" not in metadata
    assert str(ROOT).encode() not in file.read_bytes(), "the paths of this machine are nobody's business"
    assert [entry.name for entry in file.parent.iterdir()] == ["out.onnx"]


@pytest.mark.slow
def test_an_onnx_file_of_a_classifier_of_several_channels_has_its_logits_and_classes(tmp_path):
    config = fresh_config(pooling="mean", num_channels=5, image_size=[16, 24], num_labels=3, id2label=CLASSES)
    model, tenths = UMAEForImageClassification(config), [0.1] * 5
    processor = evaluation_processor(config.image_height_width, Reading(5, [0, 4095]), tenths, tenths)
    metadata = check_onnx(model, converted(saved(model, tmp_path / "run", processor), tmp_path / "out.onnx"))
    assert json.loads(metadata["id2label"]) == {str(label): name for label, name in CLASSES.items()}
    assert (metadata["num_channels"], json.loads(metadata["intensity_range"])) == ("5", [0, 4095])
    assert json.loads(metadata["image_mean"]) == tenths


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_onnx_without_its_packages_is_refused_by_the_extra_that_brings_them(tmp_path, monkeypatch, missing):
    pytest.importorskip("onnx")
    source = saved(UMAEModel(fresh_config()), tmp_path / "run")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"^{missing} is not installed, .* install umae with its extra `onnx`"):
        converted(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


# --------------------------------------------------------------------------------------------------------------- timm


class Block(nn.Module):
    """As in timm's vision_transformer.py, its parts by their names there."""

    def __init__(self, width: int, heads: int, ratio: float, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, qkv_bias), "proj": nn.Linear(width, width)})
        inner = int(width * ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        qkv = (
            self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (3, B, h, N, d)
        attended = nn.functional.scaled_dot_product_attention(*qkv)
        x = x + self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TimmViT(nn.Module):
    """timm's `VisionTransformer` (1.0), as far as a folder of ours asks for it, with the defaults of its arguments."""

    SIZES = {"vit_tiny_patch16_224": (192, 12, 3, 16), "vit_base_patch32_224": (768, 12, 12, 32)}

    def __init__(
        self, embed_dim, depth, num_heads, patch_size, img_size=224, in_chans=3, mlp_ratio=4.0, qkv_bias=True,
        global_pool="token", final_norm=True, num_classes=1000,
    ):  # fmt: skip
        super().__init__()
        (height, width), (rows, columns) = ((s, s) if isinstance(s, int) else s for s in (img_size, patch_size))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, (rows, columns), (rows, columns))})
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + height // rows * (width // columns), embed_dim))
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth)])
        norm, self.averages = nn.LayerNorm(embed_dim, eps=1e-6), global_pool == "avg"
        self.norm = norm if final_norm and not self.averages else nn.Identity()
        self.fc_norm = norm if final_norm and self.averages else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    @classmethod
    def of(cls, folder: Path) -> "TimmViT":
        """As `timm.create_model("local-dir:...", pretrained=True)`."""
        config = json.loads((folder / "config.json").read_text())
        sizes = dict(
            zip(("embed_dim", "depth", "num_heads", "patch_size"), cls.SIZES[config["architecture"]], strict=True)
        )
        model = cls(**{**sizes, **config["model_args"]}, num_classes=config["num_classes"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    def forward_features(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward(self, x):
        x = self.forward_features(x)
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1) if self.averages else x[:, 0]))


TIMM = {
    "pre-training": (UMAEForPreTraining, {}),
    "class token": (UMAEForImageClassification, {"num_labels": 3, "id2label": CLASSES, "qkv_bias": False}),
    # 52 * (60 / 52) is less than 60
    "mean": (
        UMAEForImageClassification,
        {"pooling": "mean", "final_layernorm": False, "hidden_size": 52, "intermediate_size": 60},
    ),
    "no last norm": (
        UMAEModel,
        {"final_layernorm": False, "image_size": [16, 24], "patch_size": [4, 8], "num_channels": 5},
    ),
}  # fmt: skip


def timm_case(name: str, folder: Path):
    """(model, folder) of one of TIMM."""
    model_class, changes = TIMM[name]
    model = model_class(fresh_config(**changes))
    channels = model.config.num_channels
    processor = None
    if channels != 3:
        processor = evaluation_processor(
            model.config.image_height_width, Reading(channels), [0.5] * channels, [0.5] * channels
        )
    out = converted(saved(model, folder / "run", processor), folder / "out", "--format", "timm")
    return model, out


@torch.no_grad()
def check_timm(model, theirs) -> None:
    """`theirs` has timm's methods, and gives what our model gives."""
    pixel_values = images_of(model.config, 3)
    ours = outputs_of(model, pixel_values)
    encoder = getattr(model, "vit", model)
    tokens = encoder(pixel_values)
    expected = ours["logits"] if isinstance(model, UMAEForImageClassification) else tokens.pooler_output
    assert torch.allclose(theirs.forward_features(pixel_values), tokens.last_hidden_state, atol=1e-5)
    assert torch.allclose(theirs(pixel_values), expected, atol=1e-5)


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_folder_gives_the_tokens_features_and_logits_of_its_model(tmp_path, name):
    model, out = timm_case(name, tmp_path)
    check_timm(model, TimmViT.of(out))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_itself_gives_the_tokens_features_and_logits_of_the_model(tmp_path, name):
    timm = pytest.importorskip("timm")
    model, out = timm_case(name, tmp_path)
    check_timm(model, timm.create_model(f"local-dir:{out}", pretrained=True).eval())


def test_a_timm_folder_reads_back_as_the_same_encoder(tmp_path):
    out = timm_case("pre-training", tmp_path)[1]
    converted(out / "model.safetensors", tmp_path / "back", "--num_attention_heads", "4")
    found, expected = (encoder_from_pretrained(folder).state_dict() for folder in (tmp_path / "back", tmp_path / "run"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def timm_json(model, folder: Path, processor=None) -> dict:
    out = converted(saved(model, folder / "run", processor), folder / "out", "--format", "timm")
    return json.loads((out / "config.json").read_text())


def test_a_registered_size_needs_no_arguments(tmp_path):
    config = timm_json(UMAEForPreTraining(UMAEConfig.sized("tiny", decoder_num_hidden_layers=1)), tmp_path)
    assert (config["architecture"], config["model_args"]) == ("vit_tiny_patch16_224", {})
    transform = config["pretrained_cfg"]
    assert (transform["mean"], transform["std"], transform["license"]) == (*STATISTICS, "cc-by-4.0")
    names = ("input_size", "crop_pct", "crop_mode", "interpolation")
    assert [transform[name] for name in names] == [[3, 224, 224], 0.875, "center", "bicubic"]


def test_a_timm_folder_names_the_classes_in_their_order(tmp_path):
    _, changes = TIMM["class token"]
    config = timm_json(UMAEForImageClassification(fresh_config(**changes)), tmp_path)
    assert (config["num_classes"], config["label_names"]) == (3, list(CLASSES.values()))


@pytest.mark.parametrize(("side", "resized"), [(112, 128), (384, 450)])
def test_timm_resizes_to_the_side_of_the_processor(tmp_path, side, resized):
    """timm's evaluation resizes the shortest edge to floor(side / crop_pct), and 384 / (384 / 450) is less than 450."""
    processor = evaluation_processor((side, side))
    processor.size = {"shortest_edge": resized}
    config = timm_json(UMAEModel(fresh_config(image_size=side, patch_size=16)), tmp_path, processor)
    assert math.floor(side / config["pretrained_cfg"]["crop_pct"]) == resized


def test_a_processor_that_does_not_keep_the_ratio_is_timms_squash(tmp_path):
    transform = timm_json(UMAEModel(fresh_config()), tmp_path, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    transform = transform["pretrained_cfg"]
    assert [transform[name] for name in ("crop_mode", "crop_pct", "interpolation")] == ["squash", 1.0, "bilinear"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "mean"}, 'pooling is "mean" of tokens that are normalised before; .* with the class token'),
        ({"hidden_act": "relu"}, "hidden_act is relu, .* has gelu and 1e-06"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05; timm"),
    ],
    ids=str,
)
def test_what_timm_cannot_compute_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        timm_json(UMAEModel(fresh_config(**changes)), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["out.onnx", "out.safetensors"])
def test_the_format_of_a_folder_is_refused_for_a_file(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is a file by its name, and --format is that of a folder"):
        command.main([str(tmp_path), str(tmp_path / name), "--format", "timm"])
