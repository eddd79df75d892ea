"""Commands that measure on this machine."""

from typing import Annotated, Literal, Optional

import typer

from omniprep.cli.options import EXIT_INTERRUPTED, DatasetArgument, JsonOption, plain_errors
from omniprep.terminal import say, show_json, show_loader_bench

app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")


@app.callback()
def _group() -> None:
    """Measure on this machine."""


@app.command("loader")
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
