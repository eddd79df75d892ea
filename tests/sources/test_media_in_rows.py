"""Media that travel inside a row come out as they went in, and the quarantine can name them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.records import AudioPart, Conversation, Document, ImagePart, MediaBlob, TextPart, VideoPart
from omniprep.sources.huggingface import HuggingFaceSource
from omniprep.sources.media_store import MediaConfig, MediaStore
from omniprep.sources.parquet import ParquetSource
from omniprep.sources.partitions import Row
from omniprep.sources.webdataset import WebDatasetSource


@pytest.fixture(autouse=True)
def quiet_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def read_all(source: Any, rows_per_partition: int = 2) -> list[Row]:
    return [row for part in source.partitions(rows_per_partition=rows_per_partition) for row in source.read(part)]


def png(colour: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(data, "PNG")
    return data.getvalue()


def wav() -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.zeros(800, np.float32), 8000, format="WAV")
    return data.getvalue()


def first_part(row: Row, source: Any) -> Any:
    record = source.to_record(row.value)
    return record.messages[0].content[0] if isinstance(record, Conversation) else record.parts[0]


@pytest.mark.parametrize("shape", ["bytes", "struct", "path", "list"])
def test_parquet_media_are_bytes_structs_or_paths(tmp_path: Path, shape: str) -> None:
    image = {
        "bytes": png(1),
        "struct": {"bytes": png(1), "path": "1.png"},
        "path": "1.png",
        "list": [{"bytes": png(1), "path": None}],
    }
    rows = [{"messages": [{"role": "user", "content": "<image>?"}], "images": image[shape]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "1.png").write_bytes(png(1))
    source = ParquetSource(name="s", path=str(tmp_path / "a.parquet"))
    (row,) = read_all(source)
    part = first_part(row, source)
    assert isinstance(part, ImagePart)
    media = MediaStore(MediaConfig()).resolve(part.image, base=row.base)
    with media.open() as handle:
        assert handle.read() == png(1)


def test_native_parts_in_parquet_lose_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    content = [{"type": "image", "image": {"bytes": png(1), "path": None}}, {"type": "text", "text": "?"}]
    rows = [{"messages": [{"role": "user", "content": content}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = ParquetSource(name="s", path=str(tmp_path / "a.parquet"))
    (row,) = read_all(source)
    record = source.to_record(row.value)
    assert isinstance(record, Conversation)
    assert record.messages[0].content == (ImagePart(image=MediaBlob(bytes=png(1))), TextPart(text="?"))


def test_raw_names_the_media_that_blobs_hold() -> None:
    row = Row(index=0, place="a[0]", value={"images": [{"path": "1.png", "bytes": b"one"}], "n": 1, "text": "é"})
    sha256 = hashlib.sha256(b"one").hexdigest()
    assert json.loads(row.raw) == {
        "images": [{"path": "1.png", "bytes": {"sha256": sha256, "num_bytes": 3}}],
        "n": 1,
        "text": "é",
    }
    assert dict(row.blobs) == {sha256: b"one"}
    text_row = Row(index=0, place="a:1", value={"n": 1}, line=b'{"n":1}')
    assert text_row.raw == b'{"n":1}'
    assert not text_row.blobs


def test_features_of_datasets_stay_undecoded(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    rows = [
        {"image": {"bytes": png(k), "path": None}, "audio": {"bytes": None, "path": str(tmp_path / "a.wav")}, "text": "x"}
        for k in range(3)
    ]
    # Audio encodes only with torchcodec: give it what it would have stored.
    features = datasets.Features({"image": datasets.Image(), "audio": datasets.Audio(), "text": datasets.Value("string")})
    dataset = datasets.Dataset(pa.Table.from_pylist(rows).cast(features.arrow_schema))
    assert isinstance(dataset.features["audio"], datasets.Audio)
    dataset.save_to_disk(str(tmp_path / "saved"))
    source = HuggingFaceSource(name="s", path=str(tmp_path / "saved"))
    read = read_all(source)
    assert [row.value["image"] for row in read] == [{"bytes": png(k)} for k in range(3)]
    assert [row.value["audio"] for row in read] == [{"bytes": wav(), "path": "a.wav"}] * 3  # `save_to_disk` embeds files
    assert [row.place for row in read] == [f"saved:train[{k}]" for k in range(3)]
    record = source.to_record(read[1].value)
    assert record == Document(
        parts=(
            ImagePart(image=MediaBlob(bytes=png(1))),
            AudioPart(audio=MediaBlob(path="a.wav", bytes=wav())),
            TextPart(text="x"),
        )
    )


def test_a_local_builder_is_loaded_and_its_files_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"{k}.png").write_bytes(png(k))
    lines = [json.dumps({"file_name": f"{k}.png", "text": f"no {k}"}) for k in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = HuggingFaceSource(name="s", path=str(tmp_path / "images"))
    read = read_all(source)
    assert [row.value["text"] for row in read] == ["no 0", "no 1", "no 2"]
    part = first_part(read[2], source)
    assert MediaStore(MediaConfig()).resolve(part.image, base=read[2].base).num_bytes == len(png(2))


def test_rows_of_mixed_types_are_read_from_a_json_dataset(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "?"}], "meta": {"a": 1}},
        {"messages": [{"role": "user", "content": "!"}], "meta": {"b": "x"}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = HuggingFaceSource(name="s", path="json", data_files=(str(tmp_path / "a.jsonl"),))
    assert [row.value for row in read_all(source)] == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "none"}, "cannot be loaded"),
        ({"path": "saved", "dataset_split": "valid"}, "has the splits test, train; got dataset_split='valid'"),
        ({"path": "json", "data_files": ("none.jsonl",)}, "cannot be loaded"),
    ],
)
def test_what_datasets_cannot_load_is_a_config_error(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    one = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"test": one, "train": one}).save_to_disk(str(tmp_path / "saved"))
    source = HuggingFaceSource(name="s", **options).below(tmp_path)
    with pytest.raises(ConfigError, match=message):
        source.partitions(rows_per_partition=1)


def write_tar(path: Path, members: dict[str, bytes]) -> WebDatasetSource:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return WebDatasetSource(name="s", path=str(path))


@pytest.mark.parametrize("name", ["jpg", "0001.jpg", "x/0001.jpg"])
def test_a_part_names_a_member_by_extension_file_or_name(tmp_path: Path, name: str) -> None:
    row = {"messages": [{"role": "user", "content": [{"image": name}, {"text": "jpg"}]}]}
    source = write_tar(tmp_path / "a.tar", {"x/0001.jpg": b"one", "x/0001.json": json.dumps(row).encode()})
    (read,) = read_all(source)
    record = source.to_record(read.value)
    assert isinstance(record, Conversation)
    assert record.messages[0].content == (ImagePart(image=MediaBlob(path="x/0001.jpg", bytes=b"one")), TextPart(text="jpg"))
    assert read.place == "a.tar/x/0001"


def test_lists_tracks_and_long_extensions_name_members_too(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"video": ["0.png", "1.png"], "sample_fps": 2, "audio_track": {"path": "left.wav"}}]}
        ]
    }
    members = {"a.json": json.dumps(row).encode(), "a.0.png": b"zero", "a.1.png": b"one", "a.left.wav": b"sound"}
    source = write_tar(tmp_path / "a.tar", members)
    (read,) = read_all(source)
    part = first_part(read, source)
    assert isinstance(part, VideoPart)
    assert [ref.bytes for ref in part.video if isinstance(ref, MediaBlob)] == [b"zero", b"one"]
    assert MediaStore(MediaConfig()).resolve(part.audio_track, base=read.base).data == b"sound"  # type: ignore[arg-type]


def test_members_that_no_part_names_fill_the_marks(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "<image><audio>?"}, {"from": "gpt", "value": "!"}]}
    source = write_tar(tmp_path / "a.tar", {"a.wav": b"sound", "a.webp": b"picture", "a.json": json.dumps(row).encode()})
    (read,) = read_all(source)
    record = source.to_record(read.value)
    assert isinstance(record, Conversation)
    assert record.messages[0].content == (
        ImagePart(image=MediaBlob(path="a.webp", bytes=b"picture")),
        AudioPart(audio=MediaBlob(path="a.wav", bytes=b"sound")),
        TextPart(text="?"),
    )


def test_a_name_that_is_no_member_is_a_path_beside_the_tar(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": [{"image": "other.png"}, {"image": "png"}]}]}
    source = write_tar(tmp_path / "a.tar", {"a.png": b"one", "a.json": json.dumps(row).encode()})
    (tmp_path / "other.png").write_bytes(b"other")
    (read,) = read_all(source)
    assert MediaStore(MediaConfig()).resolve(first_part(read, source).image, base=read.base).path == tmp_path / "other.png"


def test_media_and_text_without_json_are_a_document(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", {"a.jpg": b"one", "a.txt": "Büro".encode(), "b.txt": b"\xff", "c.txt": b"two"})
    first, bad, last = read_all(source)
    assert source.to_record(first.value) == Document(
        parts=(ImagePart(image=MediaBlob(path="a.jpg", bytes=b"one")), TextPart(text="Büro"))
    )
    assert bad.error is not None
    assert bad.error.detail == "b.txt: not valid UTF-8 at byte 0"
    assert source.to_record(last.value) == Document(parts=(TextPart(text="two"),))


def test_an_empty_member_is_an_empty_medium(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", {"a.jpg": b"", "a.txt": b"x"})
    (read,) = read_all(source)
    with pytest.raises(RejectSample) as caught:
        MediaStore(MediaConfig()).resolve(first_part(read, source).image, base=read.base)
    assert caught.value.reason is Reason.MEDIA_EMPTY
