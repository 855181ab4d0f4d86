"""Push the models of this folder to the Hub, and a collection of them: `make publish HUB=name`.

python weights/publish.py name [--private] [--dry_run]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from umae.sharing.hub import check_access, published, push

HERE = Path(__file__).resolve().parent
TITLE = "U-MAE"
DESCRIPTION = "Masked autoencoders with a uniformity term, and their twins without it."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("namespace", help="user or organisation on the Hub")
    parser.add_argument("--private", action="store_true", help="make what is new private")
    parser.add_argument("--dry_run", action="store_true", help="list the files, without pushing")
    args = parser.parse_args(argv)
    folders = {f"{args.namespace}/{config.parent.name}": config.parent for config in sorted(HERE.glob("*/config.json"))}
    for repo_id, folder in folders.items():
        print(f"{repo_id}: {', '.join(published(folder, repo_id))}")
    if args.dry_run:
        return
    try:
        for repo_id, folder in folders.items():
            check_access(repo_id, args.private)
            print("pushed to", push(published(folder, repo_id), repo_id, "Upload U-MAE model"))
        api = HfApi()
        names = {"namespace": args.namespace, "description": DESCRIPTION}
        collection = api.create_collection(TITLE, **names, private=args.private, exists_ok=True)
        for repo_id in folders:
            api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
    except (ValueError, HfHubHTTPError) as error:
        raise SystemExit(f"publish: {error}") from error
    print("listed in", collection.url)


if __name__ == "__main__":
    main()
