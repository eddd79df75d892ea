"""The command line. Exit codes: 0 all is well, 1 something was found, 2 wrong use, 130 interrupted, 143 terminated."""

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from omniprep import __version__
from omniprep.errors import ConfigError, OmniPrepError
from omniprep.terminal import (
    Shower,
    describe_manifest,
    say,
    show,
    show_json,
    show_loader_bench,
    show_plan,
    show_result,
    show_rich,
)

if TYPE_CHECKING:
    from omniprep.receipts import ClaimMode

EXIT_FINDINGS, EXIT_BAD_USE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From raw conversations with media to verified training shards.",
)

bench = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
export = typer.Typer(no_args_is_help=True, help="Let other libraries open a dataset.")
app.add_typer(bench, name="bench")
app.add_typer(export, name="export")

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


def main() -> None:
    """Run the command line."""
    app()


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


def _version(wanted: bool) -> None:
    if wanted:
        show(f"omniprep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """From raw conversations with media to verified training shards."""


@app.command()
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
        with ExitStack() as stack, _kept_on_interrupt(loaded.output, stack):
            mode: ClaimMode = "overwrite" if overwrite else "update" if update else "continue"
            manifest = build(loaded, mode=mode, show=Shower("prepare", stack))
        show_result(manifest, describe_manifest(manifest, loaded.output), as_json=as_json)
        if not manifest.totals.num_records:
            why = f"all {manifest.num_rows} were rejected" if manifest.num_rows else "the sources hold no rows"
            say(f"error: no record was stored: {why}")
            raise typer.Exit(EXIT_FINDINGS)


@contextmanager
def _kept_on_interrupt(output: str, stack: ExitStack) -> Iterator[None]:
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


@app.command()
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
        with ExitStack() as stack, _kept_on_interrupt(dataset, stack):
            manifest = try_again(dataset, run={**run, "guard": guard or None}, inputs=inputs, show=Shower("retry", stack))
        num_left = sum(manifest.rejects.values())
        told = f"{num_before - num_left:,} of {num_before:,} rejected records are in the shards now"
        show_result(manifest, f"{told}\n{describe_manifest(manifest, dataset)}", as_json=as_json)
        if num_left:
            raise typer.Exit(EXIT_FINDINGS)


@app.command()
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


@app.command()
def verify(
    dataset: DatasetArgument,
    against: Annotated[
        Optional[Literal["transformers"]],  # noqa: UP045
        typer.Option(help="Also derive samples anew with the installed transformers and compare."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --against: how many records, spread over the dataset; default: all."),
    ] = None,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --against: where the recipe's relative paths start; default: where it was built."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that a dataset is what its manifest says: digests, index, schema, and every rule of every record.

    Example: [bold]omniprep verify build/sft --against transformers[/bold]
    """
    with plain_errors():
        from dataclasses import asdict

        from omniprep.shards.manifest import read_manifest
        from omniprep.verify import verify as check

        findings = list(check(dataset))
        parity = ""
        if against is not None:
            from omniprep.verify_reference import verify_against_transformers

            compared = verify_against_transformers(dataset, limit=limit, inputs=inputs)
            parity = str(compared)
            parity += "".join(f"\n{count} without a reference: {why}" for why, count in sorted(compared.skipped.items()))
            findings += compared.findings
        manifest = read_manifest(dataset)
        if as_json:
            values = {"num_records": manifest.totals.num_records, "parity": parity}
            show_json({**values, "findings": [asdict(found) for found in findings]})
        else:
            for finding in findings:
                show(str(finding))
            records = f"{manifest.totals.num_records:,} records in {len(manifest.shards)} shards"
            show(f"{records}: {len(findings)} findings" if findings else f"{records}: all is as it must be")
            if parity:
                show(parity)
        if findings:
            raise typer.Exit(EXIT_FINDINGS)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    *,
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Compare this one record: text, ids, labels, positions, media."),
    ] = None,
    match: Annotated[Literal["key", "id", "content"], typer.Option(help="What makes two records the same one.")] = "key",
    limit: Annotated[int, typer.Option(min=0, help="Examples of each kind of change.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Say what changed between two datasets. Exit code 0 if they are equal, 1 if not.

    Example: [bold]omniprep diff build/sft build/sft-new[/bold]
    """
    with plain_errors():
        from omniprep import diff as compare

        if key is not None:
            record = compare.diff_record(a, b, key)
            show_result(record, compare.describe_record(record), as_json=as_json)
            equal = record.equal
        else:
            found = compare.diff(a, b, match=match, limit=limit)
            show_result(found, compare.describe(found), as_json=as_json)
            equal = found.equal
        if not equal:
            raise typer.Exit(EXIT_FINDINGS)


@app.command()
def inspect(
    dataset: DatasetArgument,
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Key or id of a record, stored or rejected; without one, an overview."),
    ] = None,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="What is in the quarantine: counts, and details of one kind as one line.")
    ] = False,
) -> None:
    """Show a dataset, or one record: its text with the loss mask, segments, positions, timing; or why it was rejected.

    Example: [bold]omniprep inspect build/sft chat-00000017[/bold]
    """
    with plain_errors():
        if rejected:
            from omniprep.quarantine_report import describe, summarize

            show(describe(summarize(dataset)))
            return
        from itertools import islice

        from omniprep.encode.thinker import EncodeConfig
        from omniprep.inspect import dataset_summary, find_rejection, rejection_view, sample_view
        from omniprep.shards.manifest import read_manifest
        from omniprep.shards.reader import find_sample, index_rows
        from omniprep.tokens.vocab import load_tokenizer

        manifest = read_manifest(dataset)
        if key is None:
            show_rich(dataset_summary(dataset, manifest, list(islice(index_rows(dataset), 20))))
        else:
            found = find_rejection(dataset, manifest, key)
            if found is not None:
                show_rich(rejection_view(found))
            else:
                show_rich(sample_view(find_sample(dataset, key), load_tokenizer(EncodeConfig().tokenizer)))


@app.command()
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


@app.command()
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


@bench.command("loader")
def bench_loader(
    dataset: DatasetArgument,
    *,
    num_workers: Annotated[str, typer.Option(help="Worker processes of the DataLoader, a run for each number.")] = "0,1,2",
    num_threads: Annotated[int, typer.Option(min=0, max=256, help="Threads that make batches, in each process.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a bin at most.")] = 8192,
    batching: Annotated[Literal["packed", "padded", "single"], typer.Option(help="How samples become batches.")] = "packed",
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of a run at most; an epoch may have fewer.")] = 200,
    consumer_tokens_per_s: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=1e-3, help="Speed of the training to be fed: sleep so long for each batch; default: none."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Read the same shards with webdataset and HF datasets streaming, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say how fast batches come from a dataset, what CPU time they cost, and whether a training would wait for them.

    Everything is read once before it is measured: the figures are those of a warm page cache. Needs PyTorch.

    Example: [bold]omniprep bench loader build/sft --num-workers 0,2 --consumer-tokens-per-s 20000[/bold]
    """
    with plain_errors():
        from omniprep import bench_loader as benchmark
        from omniprep.config import parse_config
        from omniprep.stream.plan import PlanConfig

        plan = parse_config(PlanConfig, {"max_tokens": max_tokens, "batching": batching}, place="command line")
        try:
            found = benchmark.bench_loader(
                dataset,
                plan,
                num_workers=benchmark.worker_counts(num_workers),
                num_threads=num_threads,
                num_batches=num_batches,
                consumer_tokens_per_s=consumer_tokens_per_s,
                compare=compare,
            )
        except KeyboardInterrupt:
            say("interrupted; nothing was written")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if as_json:
            show_json(found.model_dump(mode="json"))
        else:
            show_loader_bench(found)


@export.command("energon")
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
