"""The command line. Exit codes: 0 all is well, 1 something was found, 2 wrong use, 130 interrupted, 143 terminated."""

from typing import Annotated

import typer

from omniprep import __version__
from omniprep.cli import bench, build, export, look, train
from omniprep.terminal import show

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From raw conversations with media to verified training shards.",
)
for command in (build.prepare, build.retry, build.plan, look.verify, look.diff, look.inspect, build.encode, build.schema):
    app.command()(command)
app.add_typer(train.app, name="train")
app.add_typer(bench.app, name="bench")
app.add_typer(export.app, name="export")


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        show(f"omniprep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """From raw conversations with media to verified training shards."""
