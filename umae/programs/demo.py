"""Open a page in the browser that shows what a model sees, or two models side by side."""

import importlib.util
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import cached_assets_path
from transformers.utils.logging import disable_progress_bar

from arguments_umae import DemoArguments
from umae.data.images import load_images
from umae.demo.export import export
from umae.demo.index import at_most, load_index
from umae.demo.models import load_model

HOST = "127.0.0.1"  # nobody else can open the page


def run(args: DemoArguments) -> None:
    """Show the page until the program is interrupted, or export it."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the page needs gradio, which is not installed; install it: pip install "umae[demo]"')
    disable_progress_bar()  # transformers' own; the index has one
    names = [args.run, *([args.other_run] if args.other_run else [])]
    models = [load_model(name) for name in names]
    if len({model.name for model in models}) < len(models):
        models = [replace(model, name=name) for model, name in zip(models, names, strict=True)]
    images, indexes = None, []
    if args.images is not None:
        images = at_most(load_images(args.images), args.most_images)
        if images.not_read:
            print(f"not read: {images.not_read}")
    if args.export is not None:
        export(names, models, images, Path(args.export))
        return
    if images is not None:
        cache = cached_assets_path("umae", namespace="demo")
        indexes = [load_index(model, images, cache) for model in models]
    with tempfile.TemporaryDirectory(prefix="umae-demo-") as folder:
        # Before gradio is imported, which reads them: where uploads and answers are kept, and that nothing is reported
        os.environ |= {"GRADIO_TEMP_DIR": str(Path(folder).resolve()), "GRADIO_ANALYTICS_ENABLED": "False"}
        from umae.demo.page import LAUNCH, build

        page = build(models, indexes)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, after which the folder is removed
        try:
            page.launch(server_name=HOST, server_port=args.port, prevent_thread_lock=True, quiet=True, **LAUNCH)
        except OSError as error:
            raise ValueError(f"port {args.port or '7860 to 7959'} is taken; give another port") from error
        print(f"{page.local_url} shows the page on this machine; Ctrl-C ends it", flush=True)
        page.block_thread()
