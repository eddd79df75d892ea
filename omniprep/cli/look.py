"""Commands that look at datasets: verify, diff, inspect."""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from omniprep.cli.options import EXIT_FINDINGS, DatasetArgument, JsonOption, plain_errors
from omniprep.terminal import show, show_json, show_result, show_rich


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
