"""How a `proteus_pipeline.ModelCacheManager` is set, each value checked by its name and range."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.eviction.policies import DEFAULT_POLICY, make_policy
from proteus_pipeline.models.encoder import TOKENS_PER_BATCH

GB = 10**9
_MOST_GB = 1e6  # a petabyte: beyond it is a mistake
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class CacheSettings:
    """What `update_cache_config` may change.

    Attributes
    ----------
    max_memory_gb
        What models may take of this machine's memory, in 10^9 bytes; None for all of it. A control group's limit caps it, and
        so does what the machine has.
    max_gpu_memory_gb
        The same of each GPU; None for nine tenths of what it has.
    eviction_policy
        ``lru``, ``lfu``, ``fifo``, ``ttl`` or ``cost``.
    ttl
        Seconds, for ``ttl``.
    compression
        Whether a version that is evicted is kept compressed, where that is faster to bring back than its source.
    patience
        For how many seconds a load waits for room that leases hold.
    tokens_per_batch
        Tokens of one batch. Room for a call of such batches is kept beside the weights.

    Raises
    ------
    ConfigError
        For a value that is out of range, with the range.

    """

    max_memory_gb: float | None = 4
    max_gpu_memory_gb: float | None = None
    eviction_policy: str = DEFAULT_POLICY
    ttl: float | None = None
    compression: bool = True
    patience: float = 10.0
    tokens_per_batch: int = TOKENS_PER_BATCH

    def __post_init__(self) -> None:
        for name in ("max_memory_gb", "max_gpu_memory_gb"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        check_number("patience", self.patience)
        if not isinstance(self.compression, bool):
            raise ConfigError(f"compression is {self.compression!r}", "use True or False")
        tokens = self.tokens_per_batch
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ConfigError(f"tokens_per_batch is {tokens!r}", "use a whole number, 1 or more")
        make_policy(self.eviction_policy, ttl=self.ttl)

    def changed(self, config: Mapping[str, Any]) -> CacheSettings:
        """Return settings with some values changed; nothing is changed where one of them is wrong.

        A `ttl` is forgotten with the policy it belongs to.

        Raises
        ------
        ConfigError
            For something else than a mapping, an unknown name, or a value out of range.

        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"a configuration is a mapping, and not {config!r}", "give {'max_memory_gb': 8}, say")
        known = [field.name for field in fields(self)]
        for name in config:
            if name not in known:
                raise ConfigError(f"{name!r} is no setting of a model cache", f"use one of {', '.join(known)}")
        values = dict(config)
        if values.get("eviction_policy", self.eviction_policy) != "ttl":
            values.setdefault("ttl", None)
        return replace(self, **values)

    def host_limit(self) -> tuple[int, str]:
        """Return the bytes of this machine's memory that models may take, and what sets that limit."""
        limits = [(memory_bytes(), "this machine's memory")]
        if self.max_memory_gb is not None:
            limits.insert(0, (max(1, int(self.max_memory_gb * GB)), "max_memory_gb"))
        if (cap := cgroup_limit()) is not None:
            limits.append((cap, "cgroup"))
        return min(limits, key=lambda limit: limit[0])

    def limit(self, device: str) -> tuple[int, str]:
        """Return the bytes that models may take of a device's memory, and what sets that limit."""
        if device == "cpu":
            return self.host_limit()
        if self.max_gpu_memory_gb is not None:
            return max(1, int(self.max_gpu_memory_gb * GB)), "max_gpu_memory_gb"
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory * 0.9), "nine tenths of the GPU"


def cgroup_limit() -> int | None:
    """Return the bytes that control groups leave to this process: the least of its own and of those around it; None for no limit.

    In a container its group is at the root of what is mounted; a service or a batch job has it where /proc/self/cgroup says.
    """
    limits = []
    for kind, group in _own_groups():
        # Version 2's file, and version 1's, which has the memory's groups in a folder of their own.
        root, name = (_CGROUPS, "memory.max") if not kind else (_CGROUPS / "memory", "memory.limit_in_bytes")
        here = root / group.lstrip("/")
        for folder in (here, *here.parents):
            limits.append(_read_limit(folder / name))
            if folder == root:
                break
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _own_groups() -> list[tuple[str, str]]:
    """Return the groups that count memory, as version 1's "memory" or version 2's "", and their paths; the roots as well."""
    found = [("", "/"), ("memory", "/")]
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "memory" in controllers.split(","):
            found.append(("memory" if controllers else "", path))
    return found


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    # Version 1 says "no limit" by a number near 2^63.
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def memory_bytes() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_number(name: str, value: object, *, above: float | None = None) -> None:
    """Raise ConfigError for a setting that is no number, or out of range."""
    number = not isinstance(value, bool) and isinstance(value, int | float)
    fits = number and (value > above if above is not None else value >= 0) and value <= _MOST_GB  # type: ignore[operator]
    if not fits:
        low = f"above {above}" if above is not None else "from 0"
        raise ConfigError(f"{name} is {value!r}", f"use a number {low}, and at most {_MOST_GB:,.0f}")
