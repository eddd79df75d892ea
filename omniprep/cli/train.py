"""Commands that train models on datasets."""

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from omniprep.cli.options import EXIT_INTERRUPTED, AddressOption, JsonOption, plain_errors
from omniprep.terminal import say, show, show_json, show_rich

app = typer.Typer(no_args_is_help=True, help="Train models on datasets.")


@app.callback()
def _group() -> None:
    """Train models on datasets."""


@app.command("thinker")
def train_thinker(
    recipe: Annotated[Path, typer.Argument(help="Training recipe (YAML).", show_default=False)],
    *,
    changes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value of the recipe; may be given several times."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would train: parameters, memory, steps, tokens. Loads no weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier run has left in `output`.")] = False,
    ray_workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Train in so many workers of Ray Train instead of in this process."),
    ] = None,
    gpus: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--gpus/--no-gpus", help="Whether each worker of Ray gets a GPU; default: on a cluster, or if there is one."
        ),
    ] = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a Thinker: align, pretrain, fine-tune, or optimise for preferences, as the recipe says.

    A run that was stopped goes on from its last checkpoint when the same command is run again, on any number of ranks.
    Several processes or machines: [bold]torchrun --nproc-per-node 8 -m omniprep train thinker RECIPE[/bold]

    Example: [bold]omniprep train thinker pipelines/train_sft.yaml --set data.plan.max_tokens=4096[/bold]
    """
    with plain_errors():
        from omniprep.train import dry_run as dry
        from omniprep.train import thinker
        from omniprep.train.loop import Stopped
        from omniprep.train.recipe import load_train_recipe, parse_change

        loaded = load_train_recipe(recipe, changes=dict(map(parse_change, changes or ())))
        if dry_run:
            found = dry.dry_run(loaded)
            if _prints():
                show_json(found.model_dump(mode="json")) if as_json else show_rich(dry.describe_dry_run(found))
            return
        try:
            if ray_workers is not None:
                from omniprep.train.on_ray import train_in_ray

                results = train_in_ray(loaded, num_workers=ray_workers, use_gpu=gpus, address=address, overwrite=overwrite)
            else:
                results = thinker.train(loaded, overwrite=overwrite)
        except Stopped as stopped:
            if _prints():
                say(str(stopped))
            raise typer.Exit(128 + stopped.signal) from None
        except KeyboardInterrupt:
            say("interrupted in the middle of a step; checkpoints are kept, the same command goes on from the last one")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if not _prints():
            return
        if as_json:
            show_json(results)
        else:
            show("\n".join(thinker.describe_result(result) for result in results))


def _prints() -> bool:
    """Return whether this is the process of torchrun's that speaks for all, or the only one."""
    return os.environ.get("RANK", "0") == "0"
