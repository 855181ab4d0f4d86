"""Fine-tuning on images that have several classes each, or none, as listed in a CSV file.

    python examples/several_classes.py runs/mine photos photos.csv runs/mine_tags

Every line of `photos.csv` is a file in the folder `photos` and its classes: `beach/17.jpg,sea people`. They are written
to `photos/metadata.jsonl`, which `datasets` reads. A fifth of the images is held out to evaluate on.
"""

import csv
import json
import sys
from pathlib import Path

from transformers import pipeline

import umae


def train(encoder: str, folder: str, table: str, output_dir: str, **arguments) -> umae.Run:
    with open(table, newline="") as lines, open(Path(folder, "metadata.jsonl"), "w") as metadata:
        for name, classes in csv.reader(lines):
            metadata.write(json.dumps({"file_name": name, "labels": classes.split()}) + "\n")
    return umae.finetune(
        model_name_or_path=encoder, dataset_name=folder, heldout="20%", output_dir=output_dir, **arguments
    )


def tags(run: str | Path, image: str, least: float = 0.5) -> dict[str, float]:
    """The classes of an image that are at least this likely, with their probabilities."""
    classify = pipeline("image-classification", model=str(run), trust_remote_code=True)
    found = classify(classify.image_processor.open_image(image), top_k=None)
    return {one["label"]: one["score"] for one in found if one["score"] >= least}


if __name__ == "__main__":
    run = train(*sys.argv[1:])
    print((run.folder / "finetune.json").read_text())  # mAP and F1 of the images that were held out
