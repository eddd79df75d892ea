"""The end of a build: receipts become the manifest, if no record is missing and not too many were rejected."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from omniprep import __version__
from omniprep.errors import DatasetError
from omniprep.prepare_partition import Job
from omniprep.profile import QWEN2_5_OMNI
from omniprep.receipts import Receipt, files_are_there, receipt_name, sweep
from omniprep.recipe import Recipe
from omniprep.shards.manifest import MANIFEST_NAME, Manifest, Totals, add_up, manifest_bytes, read_manifest
from omniprep.storage.folder import Conflict, Folder, open_folder

_DEFAULT_REJECT_RATE = 0.5
_THREADS = 16
_MIN_REJECTED = 100
"""A small trial in which everything fails is not stopped by the default limit."""


def seal(recipe: Recipe, jobs: Sequence[Job], receipts: Sequence[Receipt], *, version: str | None) -> Manifest:
    """Add up the receipts, check that no record was lost, and write the manifest.

    `version` is that of the manifest when the build began. Raises `DatasetError` if the counts disagree, more was
    rejected than the recipe allows, or somebody else sealed the folder meanwhile.
    """
    for job, receipt in zip(jobs, receipts, strict=True):
        if not job.partition.num_rows == receipt.num_rows == receipt.num_stored + receipt.num_rejected:
            raise DatasetError(
                f"partition {job.stem}: {job.partition.num_rows} rows planned, {receipt.num_rows} read, "
                f"{receipt.num_stored} stored, {receipt.num_rejected} rejected; not sealed, for records would be missing"
            )
    num_rows, num_rejected = sum(receipt.num_rows for receipt in receipts), sum(receipt.num_rejected for receipt in receipts)
    check_rate(recipe, receipts, num_rejected=num_rejected, num_rows=num_rows)
    folder = open_folder(recipe.output)
    _check_files(folder, receipts)
    folder.sync(receipt_name(receipt.stem) for receipt in receipts)
    manifest = _write_manifest(folder, _add_up(recipe, receipts), version=version)
    sweep(folder, receipts)  # last: at no moment does a manifest name what is gone
    return manifest


def _write_manifest(folder: Folder, manifest: Manifest, *, version: str | None) -> Manifest:
    """Return the manifest that lies there now."""
    if version is not None:
        with suppress(DatasetError):  # a damaged manifest is written anew
            before = read_manifest(folder)
            if before.model_copy(update={"parity": ""}) == manifest:
                return before  # nothing changed: a parity stamp stays true
    try:
        folder.write_if(MANIFEST_NAME, manifest_bytes(manifest), version)
    except Conflict:
        raise DatasetError(
            f"{folder.place}: another build sealed it meanwhile; if both were of one recipe all is well: "
            "`omniprep verify` tells. Otherwise build them in folders of their own"
        ) from None
    return manifest


def _check_files(folder: Folder, receipts: Sequence[Receipt]) -> None:
    """Look once more whether all is there: an object store has no lock that would have kept a second build out."""
    with ThreadPoolExecutor(_THREADS) as threads:
        there = threads.map(lambda receipt: files_are_there(folder, receipt), receipts)
        missing = [receipt.stem for receipt, whole in zip(receipts, there, strict=True) if not whole]
    if missing:
        raise DatasetError(
            f"{folder.place}: files of {len(missing)} finished partitions are gone ({', '.join(missing[:5])}); was another build "
            "writing there, or were they deleted? Not sealed; run the same command again"
        )


def check_rate(recipe: Recipe, receipts: Iterable[Receipt], *, num_rejected: int, num_rows: int) -> None:
    """Raise `DatasetError` if so many records are rejected already that the whole cannot stay below the limit."""
    stated = recipe.run.max_reject_rate
    limit = _DEFAULT_REJECT_RATE if stated is None else stated
    if num_rejected <= limit * num_rows or (stated is None and num_rejected < _MIN_REJECTED):
        return
    reasons = Counter(_sum_counts(receipt.rejects for receipt in receipts)).most_common(3)
    raise DatasetError(
        f"{num_rejected} of {num_rows} records are rejected ({', '.join(f'{name}: {count}' for name, count in reasons)}), "
        f"more than run.max_reject_rate={limit:g}; stopped. Look into {recipe.output}/quarantine, mend the cause and run the "
        "same command again (with --update if the recipe changed), or raise the limit: what is finished is kept"
    )


def _add_up(recipe: Recipe, receipts: Sequence[Receipt]) -> Manifest:
    shards = [shard for receipt in receipts for shard in receipt.shards]
    versions: dict[str, set[str]] = {}
    for receipt in receipts:
        for name, found in receipt.libraries.items():
            versions.setdefault(name, set()).add(found)
    form = recipe.member_format
    return Manifest(
        omniprep=__version__,
        libraries={name: " and ".join(sorted(found)) for name, found in sorted(versions.items())},
        profile=QWEN2_5_OMNI.name,
        kind=form.kind,
        rope_mode=recipe.encode.rope_mode,
        frame_format=form.frame_format,
        mel_dtype=form.mel_dtype,
        members=form.names,
        tokenizer_sha256=" and ".join(sorted({receipt.tokenizer_sha256 for receipt in receipts})),
        recipe=recipe.identity(),
        recipe_sha256=recipe.sha256,
        shards=tuple(shards),
        quarantine=tuple(receipt.quarantine for receipt in receipts if receipt.quarantine is not None),
        totals=add_up(("", shard.totals) for shard in shards).get("", Totals()),
        by_split=add_up((shard.split, shard.totals) for shard in shards),
        by_source=add_up((shard.source, shard.totals) for shard in shards),
        by_modality=add_up(pair for shard in shards for pair in shard.modalities.items()),
        num_rows=sum(receipt.num_rows for receipt in receipts),
        rejects=_sum_counts(receipt.rejects for receipt in receipts),
        rejects_by_source=_sum_counts({receipt.source: receipt.num_rejected} for receipt in receipts if receipt.num_rejected),
    )


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
