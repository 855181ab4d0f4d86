"""All that has to be known of a GPU, in one command that can be tried on a CPU before.

    python -m benchmarks.gpu                          # on one GPU; again for what did not fit into the time
    python -m benchmarks.gpu --part fast              # one part
    python -m benchmarks.gpu --tiny                   # every item on a CPU, in tiny sizes

Right: is what is computed on the GPU what a CPU computes, and does training keep its promises there? Fast: images per
second, and where the time goes. Fed: does loading keep up? Judged: what checkpoints and evaluations cost.

Every item leaves a line in OUTPUT_DIR/records.jsonl when it ends. Items that are done are not run again, failed ones
are. The report is benchmarks/results/gpu_<date>_<device>.md (with --tiny in OUTPUT_DIR).

Needed beside torch, transformers, accelerate, Pillow, numpy and PyYAML: for all parts but `fast` the wheels of
datasets, pyarrow, pandas, dill, multiprocess, xxhash and fsspec; for the programs also scikit-learn, scipy, joblib,
threadpoolctl, matplotlib (with contourpy, cycler, fonttools, kiwisolver, pyparsing), Jinja2, MarkupSafe, psutil and
filelock. `fed` also measures simplejpeg and torchvision where they are installed. On a machine without a network:

    pip download -d wheels datasets scikit-learn matplotlib Jinja2 psutil filelock simplejpeg    # elsewhere
    pip install --no-index --find-links wheels datasets scikit-learn matplotlib Jinja2 psutil filelock simplejpeg
"""

import argparse
import importlib
import math
import platform
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu.items import Bench, Item, Records, run_items

PARTS = ("right", "fast", "fed", "judged")
SECONDS = 540  # of a part
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "datasets", "numpy", "pillow", "scikit-learn", "simplejpeg",
    "torchvision",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in tiny sizes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"), help="work folder (default runs/gpu)")
    parser.add_argument("--images", type=Path, help="folder of photographs (JPEG); made ones by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a part at most (default {SECONDS})")
    parser.add_argument("--items", default="", help="only items in whose names this regular expression is found")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; add --tiny to try every item on the CPU")
    return args


def main() -> None:
    args = parse()
    device = "cpu" if args.tiny else "cuda"
    output = args.output_dir.resolve()
    bench = Bench(device, args.tiny, output / "files", args.images and args.images.resolve())
    bench.folder.mkdir(parents=True, exist_ok=True)
    records = Records(output / "records.jsonl")
    records.add({"command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])})
    target = (output if args.tiny else measure.RESULTS) / measure.file_name("gpu", device)
    for part in [args.part] if args.part else PARTS:
        items = items_of(part, bench, records)
        chosen = [item for item in items if re.search(args.items, item.name)]
        run_items(part, chosen, records, device, math.inf if args.tiny else args.seconds)
        target.write_text(report(bench, records))
    print(f"report: {target}")
    sys.exit(any(line["status"] == "failed" for part in PARTS for line in records.of(part).values()))


def items_of(part: str, bench: Bench, records: Records) -> list[Item]:
    """The items of a part. None if its module cannot be imported, which is itself recorded as an item."""
    run_items(part, [Item("import", lambda: {"module": module_of(part).__name__}, 0)], records, bench.device, math.inf)
    return module_of(part).items(bench) if records.of(part)["import"]["status"] == "done" else []


def module_of(part: str) -> ModuleType:
    """Imported when it is needed: `fast` needs no `datasets`."""
    return importlib.import_module(f"benchmarks.gpu.{part}")


# ----------------------------------------------------------------------------------------------------------------------
# The report


def report(bench: Bench, records: Records) -> str:
    """The report in Markdown, of every part that has been run so far."""
    head = [
        f"# One GPU{', tried on a CPU in tiny sizes' if bench.tiny else ''}",
        "\n".join(f"`{command}`  " for command in records.commands()),
        f"{date.today()}, {hardware(bench.device)}.\n{versions()}.",
    ]
    parts = [section(part, bench, records.of(part)) for part in PARTS if records.of(part)]
    return "\n\n".join([*head, *parts]) + "\n"


def section(part: str, bench: Bench, records: dict[str, dict[str, Any]]) -> str:
    """What one part has measured, what failed in it, and what was not run."""
    lines = [f"## {part.capitalize()}"]
    if records["import"]["status"] == "done":
        names = [item.name for item in module_of(part).items(bench)]
        results = {name: records[name]["result"] for name in names if records.get(name, {}).get("status") == "done"}
        lines += module_of(part).tables(results, bench)
        if missing := [name for name in names if name not in records]:
            lines.append(f"Not run: {', '.join(missing)}.")
    for name, record in records.items():
        if record["status"] == "failed":
            lines.append(f"**Failed: {name}**\n\n```text\n{record['error'].strip()}\n```")
    return "\n\n".join(lines)


def hardware(device: str) -> str:
    """The device with its memory, and what drives it."""
    name = measure.hardware_name(device)
    if device == "cpu":
        return f"{name}, {torch.get_num_threads()} CPU threads"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{name}, {memory:.1f} GiB, driver {driver()}, CUDA {torch.version.cuda}, {measure.hardware_name('cpu')}"


def driver() -> str:
    """The version of NVIDIA's driver, with the GPU's power limit and highest clock."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().replace("\n", "; ") or "unknown"


def versions() -> str:
    installed = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            installed.append(f"no {package}")
    return ", ".join(installed)


if __name__ == "__main__":
    main()
