"""`mnemos models`: list the cached models, or remove one."""

from __future__ import annotations

import argparse
import json

from mnemos.cli.terminal import human_bytes
from mnemos.hub import cache
from mnemos.hub.known_models import KNOWN_MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--remove", metavar="NAME", help="delete this model from the cache")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.epilog = "examples:\n  mnemos models\n  mnemos models --remove smollm2-135m"


def run(arguments: argparse.Namespace) -> int:
    if arguments.remove:
        freed = cache.remove(arguments.remove)
        print(f"removed {arguments.remove}, {human_bytes(freed)} freed")
        return 0
    models = cache.cached_models()
    if arguments.json:
        print(json.dumps([{"name": m.name, "size": m.size, "path": str(m.folder)} for m in models], indent=2))
        return 0
    width = max((len(name) for name in [*KNOWN_MODELS, *(m.name for m in models)]), default=0)
    for model in models:
        print(f"{model.name:<{width}}  {human_bytes(model.size):>8}  {model.folder}")
    here = {model.name for model in models}
    for known in KNOWN_MODELS.values():
        if known.name not in here:
            print(f"{known.name:<{width}}  {human_bytes(known.size):>8}  not fetched yet (mnemos pull {known.name})")
    return 0
