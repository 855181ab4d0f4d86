"""LoRA: adapt a pre-trained encoder to labelled images by training a few matrices beside its frozen weights.

    pip install peft
    python examples/lora.py runs/mine labelled_images runs/mine_lora

Only the adapter and the head are saved. `load` puts them on the encoder again.
"""

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import umae


class Labelled(torch.utils.data.Dataset):
    def __init__(self, images: umae.Images, processor: umae.UMAEImageProcessor):
        self.images, self.processor, self.labels = images, processor, images.labels()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixel_values = self.processor(self.images.read(index), return_tensors="pt").pixel_values[0]
        return {"pixel_values": pixel_values, "labels": self.labels[index]}


def classifier(encoder: str, names: list[str]) -> umae.UMAEForImageClassification:
    """The encoder under a new head."""
    return umae.UMAEForImageClassification.from_pretrained(encoder, id2label=dict(enumerate(names)))


def train(encoder: str, images: str, output_dir: str, **arguments) -> PeftModel:
    data = Labelled(umae.load_images(images), umae.load_processor(encoder))
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(classifier(encoder, data.images.label_names), lora)
    model.print_trainable_parameters()
    defaults = {"num_train_epochs": 20, "per_device_train_batch_size": 64, "learning_rate": 5e-3, "warmup_steps": 0.1}
    defaults |= {"gradient_checkpointing": True}  # less memory for more time
    settings = TrainingArguments(output_dir, **{**defaults, **arguments})
    Trainer(model, settings, train_dataset=data).train()
    model.save_pretrained(output_dir)
    return model.eval()


def load(encoder: str, names: list[str], adapter: str) -> PeftModel:
    return PeftModel.from_pretrained(classifier(encoder, names), adapter).eval()


if __name__ == "__main__":
    train(*sys.argv[1:])
