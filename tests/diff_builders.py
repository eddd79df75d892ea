"""Datasets of which only the manifest and the indices exist, and what a plain comparison of their rows would say."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniprep.shards.index import index_bytes
from omniprep.shards.manifest import Manifest, ShardInfo, Totals, add_up, manifest_bytes

MEMBERS = ("frames.mjpg", "json", "mel.npy", "tokens.npy")


@dataclass(frozen=True)
class Row:
    """What of an index row the comparison looks at; the rest is the same in every row."""

    key: str
    content: str
    id: str = ""
    split: str = "train"
    num_tokens: int = 30
    json_bytes: int = 400

    def as_index_row(self) -> dict[str, Any]:
        zeros = ("num_mel_frames", "num_patches", "num_audio_items", "num_images", "num_videos")
        flags = ("has_audio", "has_image", "has_video", "has_video_with_sound")
        return {
            **dict.fromkeys(zeros, 0),
            **dict.fromkeys(flags, False),
            "key": self.key,
            "id": self.id,
            "source": "chat",
            "row": 0,
            "split": self.split,
            "offset": 0,
            "size": 4096,
            "member_offsets": [512, 1024, 2048, 3072],
            "member_sizes": [0, self.json_bytes, 128, 600],
            "num_tokens": self.num_tokens,
            "num_supervised": 5,
            "audio_s": 0.0,
            "video_s": 0.0,
            "content_sha256": hashlib.sha256(self.content.encode()).hexdigest(),
        }


def write_dataset(folder: Path, rows: list[Row], *, rows_per_shard: int = 4) -> str:
    """Write manifest and indices; shards of equal rows have equal digests, as those of a real dataset have."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, len(rows), rows_per_shard):
        part = [row.as_index_row() for row in rows[start : start + rows_per_shard]]
        name = f"train-{start // rows_per_shard:05d}"
        data = index_bytes(part, members=MEMBERS)
        (folder / f"{name}.parquet").write_bytes(data)
        totals = Totals(num_records=len(part), num_tokens=sum(row["num_tokens"] for row in part))
        shards.append(
            ShardInfo(
                name=f"{name}.tar",
                split="train",
                source="chat",
                partition=start // rows_per_shard,
                num_bytes=1,
                sha256=hashlib.sha256(repr(part).encode()).hexdigest(),
                index_sha256=hashlib.sha256(data).hexdigest(),
                totals=totals,
                modalities={"text": totals},
            )
        )
    totals = add_up(("", shard.totals) for shard in shards).get("", Totals())
    manifest = Manifest(
        omniprep="0",
        libraries={},
        profile="test",
        kind="sequence",
        rope_mode="aligned",
        frame_format="jpeg",
        mel_dtype="float16",
        members=MEMBERS,
        tokenizer_sha256="",
        recipe={"sources": [{"name": "chat"}]},
        recipe_sha256="",
        shards=tuple(shards),
        quarantine=(),
        totals=totals,
        by_split={"train": totals},
        by_source={"chat": totals},
        by_modality={"text": totals},
        num_rows=len(rows),
        rejects={},
        rejects_by_source={},
    )
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    return str(folder)


def by_key(a: list[Row], b: list[Row]) -> Counter[str]:
    """Return what a comparison by key must count, row by row; rows that both have are no matter of shards."""
    left, right = ({row.key: row for row in rows} for rows in (a, b))
    both = [(left[key], right[key]) for key in left if key in right]
    gone = sorted((row for row in a if row.key not in right), key=lambda row: row.key)
    new = sorted((row for row in b if row.key not in left), key=lambda row: row.key)
    renamed = []
    for row in gone:
        partner = next((other for other in new if other.content == row.content), None)
        if partner is not None:
            new.remove(partner)
            renamed.append((row, partner))
    pairs = both + renamed
    return +Counter(
        removed=len(gone) - len(renamed),
        added=len(new),
        renamed=len(renamed),
        changed=sum(one.content != other.content for one, other in pairs),
        moved=sum(one.split != other.split for one, other in pairs),
        relabelled=sum(
            one.content == other.content and one.split == other.split and (one.id, one.json_bytes) != (other.id, other.json_bytes)
            for one, other in both
        ),
        num_same=sum(one.content == other.content for one, other in pairs),
    )
