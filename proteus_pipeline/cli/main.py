"""``proteus``: thin verbs, and the one place where errors become exit codes."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from proteus_pipeline.cli.verbs import fitted
from proteus_pipeline.errors import ProteusError

TYPE_CHECKING = False  # typing takes 5 ms to import, a tenth of what a quick command may take
if TYPE_CHECKING:
    from collections.abc import Sequence

_EPILOG = """\
examples:
  proteus run                                     run the pipeline; what is known is not computed again
  proteus run embedding.layer=4 probe.folds=10    with other choices, which params.yaml then holds
  proteus embed my.fasta -o my.npz                embeddings of a file of your own
  proteus model list                              versions of the models
  proteus verify                                  check a committed result, in a fresh clone
  proteus report --open                           the page of the results, in a browser

exit codes: 0 ok, 1 error, 2 usage, 3 drift or stale, 4 integrity, 5 conflict
"""


_VERBS = ("run", "embed", "model", "cache", "verify", "report", "stage")


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the command line: the whole of it, or no more than a command of these words needs.

    Building the other verbs would take half of a quick command's time.
    """
    top = argparse.ArgumentParser(
        prog="proteus",
        description="git for protein language models, and a memory for what they computed",
        epilog=_EPILOG,
        formatter_class=fitted(argparse.RawDescriptionHelpFormatter),
    )
    top.add_argument("--version", dest="print_version", action="store_true", help="print the version and exit")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", prog="proteus")  # prog: else help is laid out to find it
    only, below = (*[word for word in words if not word.startswith("-")], "", "")[:2]
    for name in (only,) if only in _VERBS else _VERBS:
        module = import_module(f"proteus_pipeline.cli.{name}")
        if name == "model":
            module.add_to(verbs, below)
        else:
            module.add_to(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    top = parser(words)
    args, rest = top.parse_known_args(words)
    # argparse takes positionals in one run only: overrides after an option (-o OUT KEY=VALUE) are left over.
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    if args.print_version:
        from importlib.metadata import version

        print(f"proteus {version('proteus_pipeline')}")
        return 0
    if not hasattr(args, "run"):
        top.print_help()
        return 2
    try:
        _prepare(args)
        code: int = args.run(args)
        sys.stdout.flush()
    except ProteusError as error:
        if args.debug:
            raise
        print(f"proteus: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("proteus: interrupted; what was finished is kept, run it again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head) has gone: nothing is wrong here, and nobody is left to tell.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if args.debug:
            raise
        name = f" {error.filename}" if error.filename else ""
        print(f"proteus:{name}: {error.strerror or error}; --debug shows where", file=sys.stderr)
        return 1
    return code


def _prepare(args: argparse.Namespace) -> None:
    """Set up what a command that may work for long needs."""
    if getattr(args, "quick", False):
        return
    import logging
    import signal

    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    # A cluster's or a container's stop is an interruption too: what is finished is published before the end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
