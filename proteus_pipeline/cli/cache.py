"""``proteus cache``: the embedding cache."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.checking import Verified
    from proteus_pipeline.embeddings.explaining import Miss
    from proteus_pipeline.stages.caching import Asked
    from proteus_pipeline.stages.project import Project

_OVERRIDES = "Hydra overrides, such as cache.path=PATH or embedding.layer=3"
_SHOWN = 20
_INTEGRITY, _DRIFT = 4, 3
_LONGEST_GRACE = 36500.0
_EPILOG = """\
examples:
  proteus cache plan proteins.fasta embedding.pooling=max
  proteus cache explain P12345
  proteus cache verify --repair
  proteus cache gc --dry-run
"""


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "cache", help="the embedding cache", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    this.set_defaults(run=lambda _: this.print_help() or 2)
    these = this.add_subparsers(metavar="VERB")
    _add(these, "stats", _stats, "what is in the cache, and how it was used")
    _add(these, "list", _list, "what is in the cache by weights and recipe, with bytes and last use")
    _add(these, "plan", _plan, "what embedding a file would take: hits, derived, misses, seconds, bytes", "[FASTA]")
    _add(these, "explain", _explain, "why each miss of a file, or of one protein, is one", "[FASTA|ID]")
    verify = _add(these, "verify", _verify, "compare everything that is stored with its checksums; exit 4 on damage")
    verify.add_argument("--repair", action="store_true", help="quarantine what is damaged, compute or pull it again")
    verify.add_argument("--from", dest="source", metavar="CACHE", help="with --repair, pull from this folder or S3 URL")
    audit = _add(these, "audit", _audit, "compute a sample of what is stored again; exit 3 on drift", "[FASTA]")
    audit.add_argument("--sample", type=int, default=20, metavar="N", help="how many (default 20)")
    invalidate = _add(these, "invalidate", _invalidate, "hide all embeddings of a version's weights", "REF")
    invalidate.add_argument("--reason", required=True, metavar="TEXT", help="why; shown by explain")
    invalidate.add_argument("--layer", type=int, metavar="N", help="only those of this layer; -1 is the last")
    invalidate.add_argument("--pooling", metavar="NAME", help="only those of this pooling")
    invalidate.add_argument("--dry-run", action="store_true", help="only say how many there are")
    gc = _add(these, "gc", _gc, "remove what no tag and no composed.yaml reaches, and write small segments together")
    gc.add_argument("--grace", type=float, default=14, metavar="DAYS", help="what is younger stays (default 14)")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    _add(these, "warm", _warm, "compute what a file would miss, and have its segments in memory", "[FASTA]")
    for name, run, text in (
        ("push", _push, "copy what another cache lacks to it: a folder, or s3://BUCKET/PREFIX"),
        ("pull", _pull, "copy what this cache lacks from another one: a folder, or s3://BUCKET/PREFIX"),
    ):
        parser = _add(these, name, run, text, "[CACHE]")
        parser.add_argument("--model", metavar="REF", help="only embeddings of this version's weights")
        parser.add_argument("--dry-run", action="store_true", help="only say how much there is")
    load = _add(these, "import", _import, "take embeddings from a .npz or a folder of fair-esm's .pt files", "FILE")
    load.add_argument("--fasta", type=Path, metavar="FASTA", help="their sequences (default: data.fasta)")


def _add(
    these: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, what: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = these.add_parser(name, help=text, description=text)
    shown = f"{what} KEY=VALUE".strip()
    parser.add_argument("words", nargs="*", metavar=shown, help=_OVERRIDES)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, takes=what)
    return parser


def _words(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Return the one word that a verb may take, and the overrides."""
    what = [w for w in args.words if "=" not in w or Path(w).exists()]
    overrides = [w for w in args.words if w not in what]
    if len(what) > bool(args.takes):
        raise ConfigError(f"{what[-1]!r} is one word too many", f"this verb takes {args.takes or 'none'} and KEY=VALUE")
    if not what and args.takes and not args.takes.startswith("["):
        raise ConfigError(f"{args.takes} is missing", "see --help")
    return (what[0] if what else None), overrides


def _project() -> Project:
    from proteus_pipeline.stages.project import Project

    return Project.find()


def _cache(args: argparse.Namespace) -> EmbeddingCache:
    from proteus_pipeline.stages.caching import settings_cache

    return settings_cache(_project(), _words(args)[1])


def _asked(args: argparse.Namespace) -> Asked:
    from proteus_pipeline.stages.caching import asked

    fasta, overrides = _words(args)
    return asked(_project(), Path(fasta) if fasta else None, overrides)


def _stats(args: argparse.Namespace) -> int:
    from proteus_pipeline.embeddings.contents import stats_beneath

    cache = _cache(args)
    stats, beneath = cache.stats(), stats_beneath(cache)
    if args.json:
        print(json.dumps({"path": str(cache.path)} | stats | ({"shared": beneath} if beneath else {})))
        return 0
    ratio = stats["raw_bytes"] / stats["bytes"] if stats["bytes"] else 1.0
    wanted = stats["hits"] + stats["derived"] + stats["misses"]
    rate = f", {100 * (stats['hits'] + stats['derived']) / wanted:.0f}% without the model" if wanted else ""
    print(f"cache {cache.path}")
    print(f"  {stats['entries']} entries in {stats['segments']} segments")
    print(f"  {stats['bytes'] / 1e6:.1f} MB on disk, {stats['raw_bytes'] / 1e6:.1f} MB of numbers ({ratio:.2f}x)")
    print(f"  {stats['hits']} hits, {stats['derived']} derived, {stats['misses']} misses{rate}")
    if cache.hot or stats["redis_hits"] or stats["redis_rejected"]:
        print(f"  {stats['redis_hits']} of the hits from Redis, {stats['redis_rejected']} values there rejected")
    if beneath:
        size = f"{beneath['entries']} entries in {beneath['segments']} segments, {(beneath['bytes'] or 0) / 1e6:.1f} MB"
        print(f"  beneath it {beneath['place']}: {size if beneath['entries'] is not None else 'can not be asked now'}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from proteus_pipeline.stages.caching import contents

    cache = _cache(args)
    found = contents(_project(), cache)
    if args.json:
        rows = [dataclasses.asdict(content) | {"versions": names} for content, names in found]
        print(json.dumps({"path": str(cache.path), "contents": rows}))
        return 0
    print(f"cache {cache.path}")
    for content, names in found:
        used = datetime.datetime.fromtimestamp(content.used, datetime.UTC).strftime("%Y-%m-%d %H:%M")
        whose = ", ".join(names) or f"weights {content.trunk[:12]}, no version here"
        print(f"  {content.entries:>9,} entries  {content.nbytes / 1e6:>10.1f} MB  used {used}  {whose}")
        print(f"            {_recipe(content.recipe)}")
    if not found:
        print("  nothing")
    return 0


def _recipe(recipe: Any) -> str:
    r = dict(recipe)
    windows = "" if not r["windows"] else f", windows {r['windows'][0]} overlapping {r['windows'][1]}"
    return (
        f"layer {r['layer']}, {r['pooling']}, {r['precision']}, {r['numerics']}, stored {r['stored']}, "
        f"engine {r['engine']}{windows}"
    )


def _plan(args: argparse.Namespace) -> int:
    from proteus_pipeline.stages.caching import plan

    this = _asked(args)
    found = plan(_project(), this)
    if args.json:
        print(json.dumps(dataclasses.asdict(found) | {"model": this.reference}))
        return 0
    seconds = "" if found.seconds is None else f", about {found.seconds:,.0f} s here"
    print(f"{found.sequences} sequences, {found.unique} different, under {this.reference}")
    print(f"  {found.hits} hits, {found.derived} derived, {found.misses} to compute: {found.tokens:,} tokens{seconds}")
    print(f"  {found.nbytes / 1e6:.1f} MB to store, before compression")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from proteus_pipeline.stages.caching import asked, explain, versions_by_trunk

    word, overrides = _words(args)
    is_file = word is not None and Path(word).exists()
    project = _project()
    this = asked(project, Path(word) if word and is_file else None, overrides)
    ids, misses = explain(this, None if is_file else word)
    names, _ = versions_by_trunk(project)
    by_sequence = {m.sequence: m for m in misses}
    missing = [(r.id, by_sequence[r.sequence]) for r in this.records if r.sequence in by_sequence and r.id in set(ids)]
    if args.json:
        rows = [{"id": i} | dataclasses.asdict(m) | {"versions": _whose(m, names)} for i, m in missing]
        print(json.dumps({"sequences": len(ids), "misses": rows}))
        return 0
    _print_misses(ids, missing, names)
    return 0


def _print_misses(ids: Sequence[str], missing: Sequence[tuple[str, Miss]], names: dict[str, list[str]]) -> None:
    from proteus_pipeline.embeddings.explaining import counts

    print(f"{len(ids)} sequences, {len(missing)} of them misses")
    for reason, number in counts(m for _, m in missing).items():
        print(f"  {number:>7,}  {reason}")
    for i, miss in missing[:_SHOWN]:
        told = "no entry of this sequence"
        if miss.nearest is not None:
            whose = ", ".join(_whose(miss, names)) or f"weights {miss.nearest['trunk'][:12]}, no version here"
            told = f"the nearest entry has {whose}; {_recipe(miss.nearest)}"
        print(f"  {i}: {' and '.join(miss.differs)}{': ' + miss.detail if miss.detail else ''}; {told}")
    if len(missing) > _SHOWN:
        print(f"  and {len(missing) - _SHOWN:,} more; --json has all")


def _whose(miss: Miss, names: dict[str, list[str]]) -> list[str]:
    return names.get(miss.nearest["trunk"], []) if miss.nearest else []


def _verify(args: argparse.Namespace) -> int:
    from proteus_pipeline.stages.caching import compute_lost, other_cache
    from proteus_pipeline.stages.compose import check_is_cache

    cache = _cache(args)
    if args.source and not args.repair:
        raise ConfigError("--from pulls what --repair quarantines", "give both")
    source = other_cache(_project(), cache, args.source) if args.source else None
    if isinstance(source, Path):
        check_is_cache(source, "--from")
    verified = cache.verify(repair=args.repair)
    left = [f for f in verified.findings if not f.repaired]
    if not args.json:
        _print_verified(cache, verified)
    pulled = computed = None
    try:
        if source:
            pulled = cache.pull(source)
            if not args.json:
                print(f"  {pulled.entries} entries pulled from {args.source}", flush=True)
        computed = compute_lost(_project(), _words(args)[1]) if args.repair and verified.findings else 0
    finally:
        # What was found is said, whether or not it could be made good.
        if args.json:
            copied = dataclasses.asdict(pulled) if pulled else None
            print(json.dumps(dataclasses.asdict(verified) | {"computed": computed, "pulled": copied}))
    if args.json:
        return _INTEGRITY if left else 0
    if left:
        print("run: proteus cache verify --repair")
    elif verified.findings:
        print(f"{computed} of the pipeline's embeddings were computed again; others are when they are asked for")
    return _INTEGRITY if left else 0


def _print_verified(cache: EmbeddingCache, verified: Verified) -> None:
    size = f"{verified.nbytes / 1e6:.1f} MB"
    print(f"cache {cache.path}: {verified.entries} entries in {verified.segments} segments, {size}, read and compared")
    for finding in verified.findings[:_SHOWN]:
        done = f"; {finding.repaired}" if finding.repaired else ""
        print(f"  {finding.kind} {finding.name}: {finding.what}{done}")
    if len(verified.findings) > _SHOWN:
        print(f"  and {len(verified.findings) - _SHOWN:,} more; --json has all", flush=True)


def _audit(args: argparse.Namespace) -> int:
    from proteus_pipeline.stages.caching import audit

    if args.sample < 1:
        raise ConfigError(f"--sample {args.sample} draws nothing", "give 1 or more")
    this = _asked(args)
    found = audit(_project(), this, args.sample)
    # Other device classes may differ in bits, and tolerant numerics anywhere.
    strict = this.recipe.numerics == "strict"
    drifted = [a for a in found if strict and a.same_class and not a.same]
    if args.json:
        print(json.dumps({"model": this.reference, "audited": [dataclasses.asdict(a) for a in found]}))
        return _DRIFT if drifted else 0
    print(f"{len(found)} stored embeddings of {len(this.records)} proteins computed again, by {this.reference}")
    for same_class, words in ((True, "this machine's device class"), (False, "other device classes")):
        of_class = [a for a in found if a.same_class == same_class]
        if of_class:
            same, worst = sum(a.same for a in of_class), max(a.relative_l2 for a in of_class)
            print(f"  of {words}: {same} of {len(of_class)} equal bit for bit; largest relative difference {worst:.1e}")
    for a in drifted[:_SHOWN]:
        print(
            f"  {a.key}: differs by {a.max_abs:.2e} at most; run: proteus cache invalidate {this.reference} --reason ..."
        )
    return _DRIFT if drifted else 0


def _invalidate(args: argparse.Namespace) -> int:
    from proteus_pipeline.stages.caching import invalidate, settings_cache, trunk_of

    reference, overrides = _words(args)
    project = _project()
    version, trunk = trunk_of(project, str(reference))
    cache = settings_cache(project, overrides)
    number = invalidate(version, cache, args.reason, layer=args.layer, pooling=args.pooling, dry_run=args.dry_run)
    if args.json:
        print(json.dumps({"model": version.reference, "trunk": trunk, "entries": number, "dry_run": args.dry_run}))
        return 0
    done = "would be hidden" if args.dry_run else "are hidden from now on" if number else "are there: nothing to hide"
    print(f"{number} entries of the weights of {version.reference} {done}")
    return 0


def _gc(args: argparse.Namespace) -> int:
    from proteus_pipeline.stages.caching import collect

    if not (math.isfinite(args.grace) and 0 <= args.grace <= _LONGEST_GRACE):
        raise ConfigError(f"--grace is {args.grace:g}", f"give a number of days from 0 to {_LONGEST_GRACE:g}")
    cache = _cache(args)
    cleaning = collect(_project(), cache, args.grace, dry_run=args.dry_run)
    if args.json:
        print(json.dumps(dataclasses.asdict(cleaning) | {"dry_run": args.dry_run}))
        return 0
    verb = "would free" if args.dry_run else "freed"
    print(f"cache {cache.path}: {verb} {cleaning.nbytes / 1e6:.1f} MB")
    for segment, why in list(cleaning.retired.items())[:_SHOWN]:
        print(f"  {segment}: {why}")
    for name in cleaning.removed[:_SHOWN]:
        print(f"  {name}: nobody needs it any more")
    if cleaning.kept:
        print(f"  {len(cleaning.kept)} segments stay for now: {', '.join(sorted(set(cleaning.kept.values())))}")
    return 0


def _warm(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.progress import EmbeddingProgress
    from proteus_pipeline.cli.stage import told
    from proteus_pipeline.stages.embed import embed_records, summary

    this = _asked(args)
    with EmbeddingProgress("warm") as progress:
        outcome = embed_records(_project(), this.composed, "embed", this.records, progress)
    segments = this.cache.preload([e.key for e in outcome.entries])
    print(json.dumps(summary(outcome)) if args.json else f"{told(outcome)}; {segments} segments in memory")
    return 0


def _push(args: argparse.Namespace) -> int:
    return _copy(args, push=True)


def _pull(args: argparse.Namespace) -> int:
    return _copy(args, push=False)


def _copy(args: argparse.Namespace, *, push: bool) -> int:
    from proteus_pipeline.stages.caching import other_cache, settings_cache, trunk_of
    from proteus_pipeline.stages.compose import check_is_cache

    word, overrides = _words(args)
    project = _project()
    cache = settings_cache(project, overrides)
    there = other_cache(project, cache, word)
    if not push and isinstance(there, Path):
        check_is_cache(there, "cache pull")
    other = there if isinstance(there, (str, Path)) else there.location
    trunk = trunk_of(project, args.model)[1] if args.model else ""
    copied = (cache.push if push else cache.pull)(there, trunk=trunk, dry_run=args.dry_run)
    if args.json:
        print(json.dumps(dataclasses.asdict(copied) | {"dry_run": args.dry_run}))
        return 0
    verb = f"{'would be ' if args.dry_run else ''}{'pushed to' if push else 'pulled from'}"
    size = f"{copied.nbytes / 1e6:.1f} MB"
    print(f"{copied.entries} entries in {copied.segments} segments, {size}, {verb} {other}; {copied.there} were there")
    return 0


def _import(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.verbs import shown
    from proteus_pipeline.stages.caching import asked
    from proteus_pipeline.stages.importing import load

    source, overrides = _words(args)
    project = _project()
    this = asked(project, args.fasta, overrides)
    done = load(project, this, Path(str(source)))
    if args.json:
        print(json.dumps(dataclasses.asdict(done)))
        return 0
    print(f"{done.imported} embeddings of {source} imported under {this.reference}, marked as unattested")
    if done.unknown:
        print(f"  {len(done.unknown)} ids of it are not in the FASTA file, {shown(done.unknown[0])} first")
    if done.skipped:
        wanted = f"layer {this.recipe.layer}, {this.recipe.pooling}"
        print(f"  {done.skipped} were skipped: by the file they are of another layer or pooling than {wanted}")
    return 0
