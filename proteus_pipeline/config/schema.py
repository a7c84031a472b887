"""Every setting, with its type. Their defaults and what they mean stand in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class DataSettings:
    fasta: str = MISSING
    labels: str | None = None
    label_key: str = MISSING
    unknown: str = MISSING
    stops: str = MISSING
    gaps: str = MISSING
    duplicates: str = MISSING
    long: str = MISSING
    max_length: int = MISSING
    overlap: int = MISSING


@dataclass
class EmbeddingSettings:
    layer: int = MISSING
    pooling: str = MISSING
    precision: str = MISSING
    numerics: str = MISSING
    stored: str = MISSING


@dataclass
class ProbeSection:
    task: str = MISSING
    folds: int = MISSING
    seed: int = MISSING
    regularisation_c: float = MISSING


@dataclass
class CacheSettings:
    path: str = MISSING
    accept: str = MISSING
    shared: str | None = None
    max_bytes: int | None = None
    policy: str = MISSING
    redis: str | None = None
    local_bytes: int = MISSING
    write_back: bool = MISSING


@dataclass
class RuntimeSettings:
    """What changes no number: it enters no key, and no stage's params."""

    device: str = MISSING
    threads: int | None = None
    tokens_per_batch: int = MISSING
    max_memory_gb: float | None = None


@dataclass
class ClusterSettings:
    """Where ``engine=dask`` computes; nothing here changes a number either."""

    kind: str = MISSING
    workers: int = MISSING
    threads: int | None = None
    shard_tokens: int = MISSING
    wait_minutes: float = MISSING
    scheduler: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = MISSING
    queue: str | None = None
    account: str | None = None
    walltime: str = MISSING
    cores: int = MISSING
    memory: str = MISSING
    interface: str | None = None
    directives: list[str] = MISSING


@dataclass
class StageModel:
    model: str | None = None


@dataclass
class StageModels:
    embed: StageModel = field(default_factory=StageModel)
    compare: StageModel = field(default_factory=StageModel)


@dataclass
class Settings:
    """The whole configuration."""

    model: str = MISSING
    candidate: str | None = None
    engine: str = MISSING
    stages: StageModels = field(default_factory=StageModels)
    data: DataSettings = field(default_factory=DataSettings)
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    probe: ProbeSection = field(default_factory=ProbeSection)
    cache: CacheSettings = field(default_factory=CacheSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
