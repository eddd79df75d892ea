"""Commands that make something: datasets, plans of them, encoded files, schemas."""

from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from omniprep.cli.options import (
    EXIT_FINDINGS,
    EXIT_INTERRUPTED,
    AddressOption,
    DatasetArgument,
    ExecutorOption,
    JsonOption,
    LimitOption,
    RecipeArgument,
    WorkersOption,
    kept_on_interrupt,
    plain_errors,
)
from omniprep.errors import ConfigError
from omniprep.terminal import Shower, describe_manifest, say, show, show_json, show_plan, show_result

if TYPE_CHECKING:
    from omniprep.receipts import ClaimMode


def prepare(
    recipe: RecipeArgument,
    *,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Write to this folder or URL instead of the recipe's `output`."),
    ] = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
    limit: LimitOption = None,
    update: Annotated[
        bool, typer.Option("--update", help="The recipe has changed: do again only what the change touches.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is there, of this or another recipe, and build anew.")
    ] = False,
    media_cache: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Keep encoded media in this folder or URL, so that a change of text decodes nothing again."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build a dataset, or what is missing of it.

    A build that was stopped goes on where it was when the same command is run again. So does one whose sources have grown.

    Example: [bold]omniprep prepare pipelines/thinker_sft.yaml --workers 8[/bold]
    """
    with plain_errors():
        from omniprep.prepare import prepare as build
        from omniprep.recipe import load_recipe

        if update and overwrite:
            raise ConfigError("--update keeps what is there and --overwrite deletes it: say one of them")
        run = {"workers": workers, "executor": executor, "address": address, "media_cache": media_cache}
        loaded = load_recipe(recipe, limit=limit, output=out, **run)
        with ExitStack() as stack, kept_on_interrupt(loaded.output, stack):
            mode: ClaimMode = "overwrite" if overwrite else "update" if update else "continue"
            manifest = build(loaded, mode=mode, show=Shower("prepare", stack))
        show_result(manifest, describe_manifest(manifest, loaded.output), as_json=as_json)
        if not manifest.totals.num_records:
            why = f"all {manifest.num_rows} were rejected" if manifest.num_rows else "the sources hold no rows"
            say(f"error: no record was stored: {why}")
            raise typer.Exit(EXIT_FINDINGS)


def retry(
    dataset: DatasetArgument,
    *,
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
    timeout_s: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.1, help="Longest time for one record instead of the recipe's."),
    ] = None,
    memory_bytes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=64 << 20, help="Most memory for one record instead of the recipe's."),
    ] = None,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where the recipe's relative paths start; default: where it was built."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try a dataset's rejected records again, after their media were mended or fetched.

    What works now goes into further shards; finished shards are not touched. Exit code 1 if records are still rejected.

    Example: [bold]omniprep retry build/sft[/bold]
    """
    with plain_errors():
        from omniprep.prepare import retry as try_again
        from omniprep.shards.manifest import read_manifest

        num_before = sum(read_manifest(dataset).rejects.values())
        limits = {"timeout_s": timeout_s, "memory_bytes": memory_bytes}
        run: dict[str, object] = {"workers": workers, "executor": executor, "address": address}
        guard = {name: value for name, value in limits.items() if value is not None}
        with ExitStack() as stack, kept_on_interrupt(dataset, stack):
            manifest = try_again(dataset, run={**run, "guard": guard or None}, inputs=inputs, show=Shower("retry", stack))
        num_left = sum(manifest.rejects.values())
        told = f"{num_before - num_left:,} of {num_before:,} rejected records are in the shards now"
        show_result(manifest, f"{told}\n{describe_manifest(manifest, dataset)}", as_json=as_json)
        if num_left:
            raise typer.Exit(EXIT_FINDINGS)


def plan(
    recipe: RecipeArgument,
    *,
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe would make: tokens, bytes, hours, lengths, rejects. Reads headers only, writes nothing.

    Example: [bold]omniprep plan pipelines/thinker_sft.yaml --limit 1000[/bold]
    """
    with plain_errors():
        from omniprep.plan import plan_recipe
        from omniprep.recipe import load_recipe

        loaded = load_recipe(recipe, limit=limit, workers=workers, executor=executor, address=address)
        with ExitStack() as stack:
            try:
                found = plan_recipe(loaded, show=Shower("plan", stack))
            except KeyboardInterrupt:
                stack.close()
                say("interrupted; nothing was written")
                raise typer.Exit(EXIT_INTERRUPTED) from None
        if as_json:
            show_json(found.model_dump(mode="json"))
        else:
            show_plan(found)


def encode(
    file: Annotated[Path, typer.Argument(help="Rows: .jsonl (also .gz, .zst) or .json.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the .npz files.")],
    rope_mode: Annotated[Literal["aligned", "reference"], typer.Option(help="How positions are counted.")] = "aligned",
    reference_fps: Annotated[
        float, typer.Option(min=0.01, help="With --rope-mode reference: the fps that the processor would be called with.")
    ] = 2.0,
    add_generation_prompt: Annotated[bool, typer.Option(help="End with the opening of an assistant turn.")] = False,
    system_prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For records without a system turn; default: the model's."),
    ] = None,
    text_policy: Annotated[
        Literal["literal", "reject", "allow"], typer.Option(help="What a control token's string in a text becomes.")
    ] = "literal",
    resize: Annotated[
        Optional[Literal["exact", "fast"]],  # noqa: UP045
        typer.Option(help="The reference's pixels or quicker ones; default: exact where torch is installed."),
    ] = None,
    max_tokens: Annotated[Optional[int], typer.Option(min=1, help="Reject longer records.")] = None,  # noqa: UP045
    row_format: Annotated[str, typer.Option("--format", help="messages, sharegpt, alpaca, swift, trl, text or auto.")] = "auto",
    media_root: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Let rows name media only below these folders and the file's own; default: any local file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Encode the rows of a file into .npz files with the model's own argument names, for a look or a diff.

    Frames are kept lossless. One KEY.npz a row; a preference has KEY.chosen.npz and KEY.rejected.npz.

    Example: [bold]omniprep encode rows.jsonl --out build/npz --rope-mode reference[/bold]
    """
    with plain_errors():
        from omniprep import encode_files
        from omniprep.config import parse_config
        from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
        from omniprep.sources.jsonl import JsonlSource
        from omniprep.sources.media_store import MediaConfig, MediaStore

        pixels = {"resize": resize or ("exact" if find_spec("torch") else "fast")}
        config = {
            "rope_mode": rope_mode,
            "reference_fps": reference_fps,
            "max_tokens": max_tokens,
            "template": {"system_prompt": system_prompt, "text_policy": text_policy},
            "frame_format": "raw",
            "image": pixels,
            "video": pixels,
        }
        encoder = ThinkerEncoder(parse_config(EncodeConfig, config, place="command line"))
        source = parse_config(JsonlSource, {"name": "rows", "path": str(file), "format": row_format}, place="command line")
        store = MediaStore(MediaConfig(roots=tuple(media_root or ["/"])))
        rows = encode_files.encode_file(source, out, encoder=encoder, store=store, add_generation_prompt=add_generation_prompt)
        num_rejected = 0
        for row in rows:
            num_rejected += row.error is not None
            if as_json:
                show_json(encode_files.as_values(row))
            elif row.error is not None:
                say(f"{row.place}: {row.error}")
            else:
                show(f"{', '.join(str(path) for path in row.files)}: {row.num_tokens} tokens")
        if num_rejected:
            raise typer.Exit(EXIT_FINDINGS)


def schema(
    out: Annotated[Optional[Path], typer.Option(help="Write the schemas into this folder.")] = None,  # noqa: UP045
    name: Annotated[Optional[str], typer.Argument(help="Print this one, for example conversation.json.")] = None,  # noqa: UP045
) -> None:
    """Print or write the JSON Schemas of what goes in.

    Example: [bold]omniprep schema conversation.json[/bold]
    """
    with plain_errors():
        from omniprep.schema import dump_schema, schemas, write_schemas

        if out is not None:
            for path in write_schemas(out):
                show(str(path))
            return
        known = schemas()
        if name is None:
            show("\n".join(known))
        elif name in known:
            show(dump_schema(known[name]).rstrip())
        else:
            raise ConfigError(f"no schema {name!r}; there are {', '.join(known)}")
