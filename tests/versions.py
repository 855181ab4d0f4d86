"""Two versions of transformers and the same weights: what one saves, the other must open. Run by `make test-versions`.

python tests/versions.py save FOLDER
python tests/versions.py load FOLDER    # by another interpreter
"""

import sys
from pathlib import Path

import torch
import transformers
from golden_models import batch, pretraining_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from modeling_umae import UMAEForImageClassification

OUTPUTS = "outputs.safetensors"


@torch.no_grad()
def outputs(pretraining, classifier, encoder) -> dict[str, torch.Tensor]:
    pixel_values, noise = batch()
    masked = pretraining(pixel_values, noise=noise)
    return {
        "loss": masked.loss,
        "logits": masked.logits,
        "features": masked.features,
        "classes": classifier(pixel_values).logits,
        "pooled": encoder(pixel_values).pooler_output,
    }


def save(folder: Path) -> None:
    torch.manual_seed(0)
    pretraining = pretraining_model().eval()
    classifier = UMAEForImageClassification(pretraining.config).eval()
    pretraining.save_pretrained(folder / "pretraining")
    classifier.save_pretrained(folder / "classifier")
    found = outputs(pretraining, classifier, pretraining.vit)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / OUTPUTS)


def load(folder: Path) -> None:
    def remote(auto_class, name):
        model = auto_class.from_pretrained(folder / name, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), "the code that was saved is what runs"
        return model.eval()

    found = outputs(
        remote(AutoModelForPreTraining, "pretraining"),
        remote(AutoModelForImageClassification, "classifier"),
        remote(AutoModel, "pretraining"),
    )
    for name, expected in load_file(folder / OUTPUTS).items():
        assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-6), name


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    {"save": save, "load": load}[command](folder)
    print(f"transformers {transformers.__version__}: {command} {folder.name}, ok")
