"""``proteus``: thin verbs, and the one place where errors become exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from proteus_pipeline.cli.examples import epilog
from proteus_pipeline.cli.terminal import painted
from proteus_pipeline.cli.verbs import fitted
from proteus_pipeline.errors import ProteusError

TYPE_CHECKING = False  # typing takes 5 ms to import, a tenth of what a quick command may take
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_EPILOG = """\
examples:
  proteus init mine --fasta my.fasta              a project of your own; then: cd mine; proteus run
  proteus run                                     run the pipeline; what is known is not computed again
  proteus run embedding.layer=4 probe.folds=10    with other choices, which params.yaml then holds
  proteus embed my.fasta -o my.npz                embeddings of a file of your own
  proteus model list                              versions of the models
  proteus verify                                  check a committed result, in a fresh clone
  proteus report --open                           the page of the results, in a browser
  proteus monitor                                 how all of that is used, as Prometheus text
  proteus doctor                                  what is missing or inconsistent here, and the remedy

Each verb has examples of its own: proteus VERB --help.

exit codes: 0 ok, 1 error, 2 usage, 3 drift or stale, 4 integrity, 5 conflict
"""


_VERBS = ("init", "run", "embed", "model", "cache", "verify", "report", "monitor", "doctor", "completion", "stage")
# How much is said: for this process, and those that DVC starts for the stages (stages/notes.py has the first).
_QUIET, _VERBOSE = "PROTEUS_QUIET", "PROTEUS_VERBOSE"


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
    _add_common(top, default=False)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", prog="proteus")  # prog: else help is laid out to find it
    only, below = (*[word for word in words if not word.startswith("-")], "", "")[:2]
    for name in (only,) if only in _VERBS else _VERBS:
        module = import_module(f"proteus_pipeline.cli.{name}")
        if name == "model":
            module.add_to(verbs, below)
        else:
            module.add_to(verbs)
    for verb, leaf in leaves(top):
        _add_common(leaf, default=argparse.SUPPRESS)
        examples = epilog(verb)
        leaf.epilog = "\n\n".join(filter(None, [examples, leaf.epilog]))
        leaf.formatter_class = fitted(argparse.RawDescriptionHelpFormatter)
    return top


def leaves(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every verb that does something, as it is written, and its parser."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to its parsers
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for name, below in action.choices.items():
                yield from leaves(below, f"{prefix} {name}".strip())
            return
    if prefix:
        yield prefix, parser


def _add_common(parser: argparse.ArgumentParser, *, default: object) -> None:
    """Add what may stand before a verb or after it; after it, no default may undo what stood before."""
    for words, text in (
        (("-q", "--quiet"), "no progress and no notes; results and errors stay"),
        (("-v", "--verbose"), "say what is done besides: each git command"),
        (("--debug",), "show the traceback of an error"),
    ):
        parser.add_argument(*words, action="store_true", default=default, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    debug = False
    try:
        args = _parsed(sys.argv[1:] if argv is None else list(argv))
        debug = args.debug
        code = _run(args)
        sys.stdout.flush()
    except ProteusError as error:
        if debug:
            raise
        _complain(" ".join(str(error).split()))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; what was finished is kept, run it again to go on")
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head) has gone: nothing is wrong here, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        name = f"{error.filename}: " if error.filename else ""
        _complain(f"{name}{error.strerror or error}; --debug shows where")
        return 1
    return code


def _parsed(words: list[str]) -> argparse.Namespace:
    """Return what a command line says; ends the process where that is wrong, as argparse does."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how its line may go on
        from proteus_pipeline.cli.completion import complete

        top = parser()
        complete(top, leaves(top))
    top = parser(words)
    args, rest = top.parse_known_args(words)
    # argparse takes positionals in one run only: overrides after an option (-o OUT KEY=VALUE) are left over.
    taking = getattr(args, "overrides", getattr(args, "words", None))
    if rest and (taking is None or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and taking is not None:
        taking += rest
    if args.print_version:
        args.run, args.quick = _version, True
    elif not hasattr(args, "run"):
        args.run, args.quick = lambda _: _help(top), True
    return args


def _help(top: argparse.ArgumentParser) -> int:
    top.print_help()
    return 2


def _version(_: argparse.Namespace) -> int:
    from importlib.metadata import version

    print(f"proteus {version('proteus_pipeline')}")
    return 0


def _complain(text: str) -> None:
    print(f"{painted('proteus:', 'red', sys.stderr)} {text}", file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    """Run a command; what one that may work for long counts, and how it ended, is kept for ``proteus monitor``."""
    from proteus_pipeline.registry.places import project_root

    quick = getattr(args, "quick", False)
    root = None if quick else project_root()
    if args.quiet:
        os.environ[_QUIET] = "1"
    if quick and not args.verbose:
        return _code(args)
    _speak(args)
    from proteus_pipeline.cli.interrupts import interruptions

    with interruptions():
        return _counted(args, root) if root else _code(args)


def _code(args: argparse.Namespace) -> int:
    code: int = args.run(args)
    return code


def _counted(args: argparse.Namespace, root: Path) -> int:
    from proteus_pipeline.metrics.catalogue import CODES
    from proteus_pipeline.registry.home import private_folder
    from proteus_pipeline.stores.counts import FOLDER, count, counting

    with counting(lambda: private_folder(root) / FOLDER):
        try:
            code = _code(args)
        except ProteusError as error:
            count("proteus_command_errors_total", code=str(error.exit_code))
            raise
        if str(code) in CODES:
            count("proteus_command_errors_total", code=str(code))
    return code


def _speak(args: argparse.Namespace) -> None:
    """Have warnings on stderr, and what is done besides where that was asked for."""
    import logging

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.DEBUG, "debug")
    if args.verbose or os.environ.get(_VERBOSE):
        os.environ[_VERBOSE] = "1"
        logging.getLogger("proteus_pipeline").setLevel(logging.DEBUG)


if __name__ == "__main__":
    sys.exit(main())
