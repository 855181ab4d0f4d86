"""ONNX files of encoders and classifiers."""

import json
import logging
import tempfile
import warnings
from pathlib import Path

import torch

from image_processing_umae import UMAEImageProcessor
from modeling_umae import UMAEForImageClassification, UMAEModel

NO_SETTINGS = ("auto_map", "image_processor_type")  # of a processor's, these are about its class


def write_onnx(
    model: UMAEModel | UMAEForImageClassification, processor: UMAEImageProcessor, source: str, licence: str | None,
    out: Path,
) -> None:  # fmt: skip
    """Write a model in evaluation mode as an ONNX file, for batches of any size.

    Its input is `pixel_values`, float32 (batch, channels, height, width), normalised as the image processor does. Its
    outputs are `last_hidden_state` and `pooler_output`, or `logits` of a classifier; their shapes are those of the
    model's. Weights of more than 1.5 GB are in a second file beside it, `out.onnx.data`.

    The file's metadata holds `source`, `license` where one is given, `image_size`, the settings of the processor by
    their names in `preprocessor_config.json`, and of a classifier `id2label`. What is no text is JSON.

    Args:
        processor: of the model's images.
        source: the model's name.

    Raises:
        ValueError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, and ONNX files need it; install umae with its extra `onnx`"
        ) from error
    config = model.config
    is_classifier = isinstance(model, UMAEForImageClassification)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch to itself
        program = torch.onnx.export(
            model,
            (torch.zeros(2, config.num_channels, *config.image_height_width),),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=["logits"] if is_classifier else ["last_hidden_state", "pooler_output"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of the source, with their paths
    settings = {name: value for name, value in processor.to_dict().items() if name not in NO_SETTINGS}
    metadata = {"source": source, **({"license": licence} if licence else {}), "image_size": config.image_height_width}
    metadata |= settings | ({"id2label": config.id2label} if is_classifier else {})
    program.model.metadata_props.update(
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        program.save(Path(folder) / out.name)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the file that names them
            file.rename(out.with_name(file.name))
