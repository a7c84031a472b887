"""The verbs of ``proteus model`` that only look, but for the listing, which must be quick."""

from __future__ import annotations

import argparse
import datetime
import json
from typing import TYPE_CHECKING, Any

from proteus_pipeline.cli.verbs import facts, plain, print_json, registry, shown
from proteus_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from proteus_pipeline.registry.compatibility import Compatibility
    from proteus_pipeline.registry.differences import MappingDifference, TensorChange
    from proteus_pipeline.registry.events import Event, History

_SHOWN = 20


def show(args: argparse.Namespace) -> int:
    manager = registry(args)
    version = manager.resolve(args.reference)
    told = facts(version) | {"dependents": [v.reference for v in manager.dependents(version.reference)]}
    if args.json:
        print_json(told)
        return 0
    for key, value in told.items():
        text = shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        print(f"{key:<14} {text if len(text) < 400 else text[:397] + '...'}")
    return 0


def history(args: argparse.Namespace) -> int:
    manager = registry(args)
    found = manager.history(args.name)
    if not found.events:
        manager.resolve(args.name)  # raises the error that says what there is
    if args.at:
        current = found.current_at(_seconds(args.at))
        if args.json:
            print_json({"name": found.name, "at": args.at, "current": current})
        else:
            print(f"{found.name}@v{current}" if current else f"no version of {found.name} was current then")
        return 0
    if args.json:
        print_json({"home": str(manager.root), "name": found.name, "events": _events(found)})
        return 0
    print(f"{found.name} in {manager.root}")
    for event, current in zip(_events(found), found.currents, strict=True):
        why = "".join(f"; {event[key]}" for key in ("reason", "breaking") if event[key])
        mark = "(current)" if current == event["version"] else f"(current: v{current})" if current else "(none current)"
        print(shown(f"  {event['time']}  v{event['version']:<12} {event['kind']:<12} by {event['by']}  {mark}{why}"))
    return 0


def _events(history: History) -> list[dict[str, Any]]:
    commits = {e.commit: v for v, e in history.known.items()}
    return [
        {
            "kind": e.kind,
            "version": e.version or commits.get(e.commit),
            "tag": e.tag,
            "time": datetime.datetime.fromtimestamp(e.time, datetime.UTC).isoformat(timespec="seconds"),
            "by": e.author,
            "reason": e.reason,
            "breaking": _breaking(e),
            "current": current,
            "damage": e.damage.what if e.damage else None,
        }
        for e, current in zip(history.events, history.currents, strict=True)
    ]


def _breaking(event: Event) -> str:
    return f"breaks: {event.record.breaking}" if event.record and event.record.breaking else ""


def _seconds(text: str) -> int:
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--at {text!r} is no date", "write it as 2026-01-31 or 2026-01-31T18:00:00+01:00") from error
    if len(text) <= len("2026-01-31"):
        date = date.replace(hour=23, minute=59, second=59)  # a day means its end
    return int(date.timestamp())


def diff(args: argparse.Namespace) -> int:
    difference = registry(args).diff(args.old, args.new)
    if args.json:
        print_json(plain(difference))
        return 0
    print(f"{difference.old} -> {difference.new}")
    if difference.empty:
        print("  no difference")
    if difference.records is None:
        print("  one of them has no record to compare")
    else:
        for part in ("metadata", "configuration", "dependencies", "architecture", "components"):
            _print_mapping(part, getattr(difference.records, part))
    shown = difference.tensors[:_SHOWN]
    if shown:
        print(f"  tensors: {len(difference.tensors)} differ")
    for change in shown:
        print(f"    {_tensor(change)}")
    if len(difference.tensors) > len(shown):
        print(f"    and {len(difference.tensors) - len(shown)} more; --json lists them")
    return 0


def _print_mapping(part: str, difference: MappingDifference) -> None:
    lines = [f"+ {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in difference.added.items()]
    lines += [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in difference.removed.items()]
    lines += [
        f"~ {key}: {json.dumps(c.old, ensure_ascii=False)} -> {json.dumps(c.new, ensure_ascii=False)}"
        for key, c in difference.changed.items()
    ]
    if lines:
        print(f"  {part}:")
    for line in lines:
        print(f"    {shown(line)}")


def _tensor(change: TensorChange) -> str:
    """Return a changed tensor as a line."""
    text = f"{change.kind:<9} {change.name}"
    if change.kind in {"changed", "retyped"}:
        largest = "no number to compare" if change.max_abs is None else f"max {change.max_abs:.2e}"
        relative = "" if change.relative is None else f", relative {change.relative:.2e}"
        text += f"  {largest}{relative}"
    if change.kind == "retyped":
        text += f"  {change.old_dtype} -> {change.new_dtype}"
    if change.kind == "reshaped":
        text += f"  {list(change.old_shape or ())} -> {list(change.new_shape or ())}"
    return text


def check(args: argparse.Namespace) -> int:
    from proteus_pipeline.registry.compatibility import allows

    manager = registry(args)
    old, new = manager.resolve(args.old), manager.resolve(args.new)
    measured = manager.check(old.reference, new.reference, tolerance=args.tolerance)
    ok = old.name != new.name or allows(old.version, new.version, measured.level)
    if args.json:
        print_json({"old": old.reference, "new": new.reference, "allowed": ok} | measured.to_record())
    else:
        _print_check(old.reference, new.reference, measured, ok=ok)
    return 0 if ok else 3


def _print_check(old: str, new: str, measured: Compatibility, *, ok: bool) -> None:
    print(f"{old} -> {new} asks for a {measured.level.upper()} step" + ("" if ok else ", and its number promises less"))
    for reason in measured.reasons:
        print(f"  {reason}")
    if measured.drift:
        d = measured.drift
        print(
            f"  drift on the panel: relative L2 {d.max_relative_l2:.2e} per residue, {d.max_relative_l2_pooled:.2e} pooled; "
            f"least cosine {d.min_cosine:.9f}; a PATCH may have {measured.tolerance:g}"
        )


def stats(args: argparse.Namespace) -> int:
    manager = registry(args)
    metrics = manager.metrics()
    if args.json:
        print_json({"home": str(manager.root)} | metrics.to_json())
        return 0
    m = metrics
    print(f"registry {manager.root}")
    print(f"  {m.versions} versions of {m.models} models; {m.updates_per_30_days} registered in the last 30 days")
    print(
        f"  {m.registrations} registrations, {m.adoptions} adoptions, {m.rollbacks} rollbacks, {m.deletions} deletions, "
        f"{m.restorations} restorations; {m.conflicts} conflicts in this clone"
    )
    print(f"  {m.storage_bytes / 1e6:.1f} MB of weights in the DVC cache, {m.backup_bytes / 1e6:.1f} MB in backups")
    return 0
