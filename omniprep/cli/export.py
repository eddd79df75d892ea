"""Commands that let other libraries open what OmniPrep has made."""

from pathlib import Path
from typing import Annotated

import typer

from omniprep.cli.options import DatasetArgument, plain_errors
from omniprep.terminal import show

app = typer.Typer(no_args_is_help=True, help="Let other libraries open a dataset or a model.")


@app.callback()
def _group() -> None:
    """Let other libraries open a dataset or a model."""


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


@app.command("omni")
def export_omni(
    model: Annotated[Path, typer.Argument(help="Exported Thinker: OUT/PHASE/model of a training run.", show_default=False)],
    *,
    into: Annotated[str, typer.Option(help="Released Omni checkpoint that it was trained from: a folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the copy of that checkpoint, with the new Thinker in it.")],
) -> None:
    """Put a trained Thinker back into a whole Omni checkpoint, beside the released Talker and vocoder.

    Example: [bold]omniprep export omni build/train/sft/sft/model --into Qwen/Qwen2.5-Omni-3B --out my-omni[/bold]
    """
    with plain_errors():
        from omniprep.errors import ConfigError
        from omniprep.train.export import checkpoint_folder, put_into_omni

        if not (model / "config.json").is_file():
            raise ConfigError(f"{model}: no config.json; expected the folder `model` of a phase that is done")
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out}: is not empty; name another folder")
        put_into_omni(model, source=checkpoint_folder(into), folder=out)
        show(f"{out}: {into} with the Thinker of {model}")
