"""Pre-training by transformers' Trainer instead of `umae pretrain`, for those whose tools are built around it.

    python examples/pretrain_with_trainer.py my_images runs/by_trainer

On the same crops and masks it takes the same steps as `umae pretrain`. Evaluations of collapse, a card, and crops and
masks that do not depend on the number of processes come with `umae pretrain` only.
"""

import sys

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

import umae
from umae.data.crops import CROP_NUMBERS, crop_box
from umae.data.inputs import evaluation_processor


class Crops(torch.utils.data.Dataset):
    """Random resized crops, half of them mirrored, normalised by the image processor."""

    def __init__(self, images: umae.Images, processor: umae.UMAEImageProcessor, size: int):
        self.images, self.processor, self.size = images, processor, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.images.read(index)  # as `open_image`: RGB, upright, 16 bits scaled to 8
        top, left, height, width = crop_box(torch.rand(CROP_NUMBERS), image.height, image.width)
        box = (left, top, left + width, top + height)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"pixel_values": self.processor(image, do_resize=False, return_tensors="pt").pixel_values[0]}


def make_trainer(images: str, output_dir: str, size: int = 224, batch_size: int = 128, **sizes: int) -> Trainer:
    """A Trainer with MAE's settings for pre-training; `sizes` are those of the model, by default ViT-B/16."""
    processor = evaluation_processor(
        (size, size)
    )  # resizes and crops images of any size, for what comes after training
    model = umae.UMAEForPreTraining(umae.UMAEConfig(image_size=size, uniformity_weight=0.01, **sizes))
    arguments = TrainingArguments(
        output_dir, num_train_epochs=200, per_device_train_batch_size=batch_size, dataloader_num_workers=4,
        learning_rate=1.5e-4 * batch_size / 256, warmup_steps=0.1, lr_scheduler_type="cosine", max_grad_norm=0,
        adam_beta2=0.95, weight_decay=0.05, save_total_limit=2,
    )  # fmt: skip
    dataset = Crops(umae.load_images(images), processor, size)
    return Trainer(model, arguments, train_dataset=dataset, processing_class=processor)


if __name__ == "__main__":
    trainer = make_trainer(*sys.argv[1:])
    trainer.train()
    trainer.save_model()  # with the image processor: a folder that every command of `umae` reads
