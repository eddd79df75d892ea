"""Commands that let other libraries open a dataset."""

import typer

from omniprep.cli.options import DatasetArgument, plain_errors
from omniprep.terminal import show

app = typer.Typer(no_args_is_help=True, help="Let other libraries open a dataset.")


@app.callback()
def _group() -> None:
    """Let other libraries open a dataset."""


@app.command("energon")
def export_energon(dataset: DatasetArgument) -> None:
    """Write the files with which Megatron-Energon opens a dataset as it is; the shards are neither read nor changed.

    Run it again when the dataset has changed.

    Example: [bold]omniprep export energon build/sft[/bold]
    """
    with plain_errors():
        from omniprep.shards.manifest import read_manifest
        from omniprep.stream import energon

        energon.export_energon(dataset)
        totals = read_manifest(dataset).by_split
        splits = ", ".join(f"{name} {part.num_records:,}" for name, part in totals.items())
        show(f"{dataset}: Megatron-Energon can open it now; records: {splits or 'none'}")
