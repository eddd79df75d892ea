"""What the commands have in common: exit codes, arguments, and what becomes of errors and interruptions."""

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from omniprep.errors import ConfigError, OmniPrepError
from omniprep.terminal import say

EXIT_FINDINGS, EXIT_BAD_USE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
DatasetArgument = Annotated[str, typer.Argument(help="Folder or URL of a finished dataset.", show_default=False)]
ExecutorOption = Annotated[
    Optional[Literal["ray", "serial"]],  # noqa: UP045 - typer reads Optional
    typer.Option(help="Ray, or this process alone."),
]
WorkersOption = Annotated[Optional[int], typer.Option(min=1, help="Partitions at a time; default: one a CPU.")]  # noqa: UP045
AddressOption = Annotated[Optional[str], typer.Option(help="Ray cluster to join; default: start Ray here.")]  # noqa: UP045
LimitOption = Annotated[Optional[int], typer.Option(min=1, help="Use only the first rows of each source.")]  # noqa: UP045
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's mistake into a line on stderr and an exit code; bugs keep their traceback."""
    try:
        yield
    except OmniPrepError as error:
        say(f"error: {error}")
        raise typer.Exit(EXIT_BAD_USE if isinstance(error, ConfigError) else EXIT_FINDINGS) from None
    except BrokenPipeError:  # the reader of a pipe, `| head`, has enough
        sys.stderr.close()
        raise typer.Exit(0) from None


@contextmanager
def kept_on_interrupt(output: str, stack: ExitStack) -> Iterator[None]:
    """Say, when a build is interrupted or terminated, that what is finished is kept; close the stack before that."""
    terminated = False

    def terminate(*_: object) -> None:
        # SIGTERM is what a cluster sends before it takes a machine away. An exception of a class of its own would not tell it
        # from Ctrl-C: what a handler raises in the middle of one of Ray's calls becomes a KeyboardInterrupt that Ray makes.
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        stack.close()
        what, code = ("terminated", EXIT_TERMINATED) if terminated else ("interrupted", EXIT_INTERRUPTED)
        say(f"{what}; finished partitions are kept in {output}. The same command goes on from here.")
        raise typer.Exit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)
