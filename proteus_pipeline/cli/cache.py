"""``proteus cache``: the embedding cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_to(verbs: Any) -> None:
    this = verbs.add_parser("cache", help="the embedding cache: stats")
    this.set_defaults(run=lambda _: this.print_help() or 2)
    these = this.add_subparsers(metavar="VERB")
    stats = these.add_parser("stats", help="what is in the cache, and how it was used")
    stats.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as cache.path=PATH")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run=_stats)


def _stats(args: argparse.Namespace) -> int:
    from proteus_pipeline.config.composition import PARAMS, compose, read_params
    from proteus_pipeline.config.overrides import parse
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.stages.project import Project

    project = Project.find()
    params = read_params(project.work / PARAMS)
    settings = compose(project.work, params, changes=parse(args.overrides)).settings.cache
    path = project.home / Path(settings.path).expanduser()
    stats = EmbeddingCache(path).stats()
    if args.json:
        print(json.dumps({"path": str(path)} | stats))
        return 0
    ratio = stats["raw_bytes"] / stats["bytes"] if stats["bytes"] else 1.0
    asked = stats["hits"] + stats["derived"] + stats["misses"]
    rate = f", {100 * (stats['hits'] + stats['derived']) / asked:.0f}% without the model" if asked else ""
    print(f"cache {path}")
    print(f"  {stats['entries']} entries in {stats['segments']} segments")
    print(f"  {stats['bytes'] / 1e6:.1f} MB on disk, {stats['raw_bytes'] / 1e6:.1f} MB of numbers ({ratio:.2f}x)")
    print(f"  {stats['hits']} hits, {stats['derived']} derived, {stats['misses']} misses{rate}")
    return 0
