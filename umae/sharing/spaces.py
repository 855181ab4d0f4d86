"""Share the page that `umae demo` has exported as a Hugging Face Space.

umae push-space space name/space
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import SpaceCard

from umae.sharing.hub import check_access, push, read_card

# What an exported folder consists of. Caches, the index that a trial has left, and files of your own are not published
FILES = ("README.md", "requirements.txt", "*.py")
FOLDERS = ("umae", "models", "images")


def space_files(folder: Path) -> dict[str, Path]:
    """The files of an exported page, by name.

    Raises:
        ValueError: the folder is none.
    """
    card = folder / "README.md"
    if not (folder / "app.py").is_file() or not card.is_file() or not SpaceCard(card.read_text()).data.get("sdk"):
        raise ValueError(
            f"{folder} is no page of `umae demo`: expected app.py, and README.md that names an sdk; export the page "
            f"into a new folder first"
        )
    paths = [path for pattern in FILES for path in folder.glob(pattern)]
    paths += [path for name in FOLDERS for path in (folder / name).rglob("*") if "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()}


def with_model(card: str, model: str) -> str:
    """The card of a Space that names a model, whose page on the Hub then lists the Space."""
    parsed = SpaceCard(card)
    parsed.data["models"] = sorted({*parsed.data.get("models", []), model})
    return str(parsed)


def with_link(card: str, url: str) -> str:
    """The card of a model with a link to its Space, unless it has one."""
    return card if url in card else f"{card.rstrip()}\n\n## Demo\n\n[Try this model in the browser]({url}).\n"


def main(argv: Sequence[str]) -> None:
    """Put a page that `umae demo` has exported on Hugging Face Spaces. Log in first: `hf auth login`."""
    parser = argparse.ArgumentParser(prog="umae push-space", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder that `umae demo` has exported")
    parser.add_argument("repo_id", help="Space to push to: `name/space`")
    parser.add_argument(
        "--model", help="the model on the Hub, `name/model`: the Space names it, and its card the Space"
    )
    parser.add_argument("--private", action="store_true", help="if the Space is new, make it private")
    parser.add_argument("--dry_run", action="store_true", help="list the files and show the card, without pushing")
    args = parser.parse_args(argv)
    files: dict[str, Path | bytes] = dict(space_files(args.folder))
    card = (args.folder / "README.md").read_text()
    if args.model is not None:
        card = with_model(card, args.model)
        files["README.md"] = card.encode()
    for name, file in files.items():
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        print(f"{size / 1e6:10.2f} MB  {name}")
    if args.dry_run:
        print(f"\n{card}")
        return
    model_card = None if args.model is None else read_card(args.model)  # before anything is made
    space = check_access(args.repo_id, args.private, space_sdk="gradio")
    url = push(files, space, "Upload U-MAE demo", repo_type="space")
    print("pushed to", url)
    if model_card is not None and (linked := with_link(model_card, url)) != model_card:
        print("linked from", push({"README.md": linked.encode()}, args.model, "Link the demo"))
