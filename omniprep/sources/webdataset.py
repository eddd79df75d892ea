"""WebDataset tars: the members that share a name up to its first dot are one row.

`key.json` is the row; `key.jpg`, `key.mp4`, `key.left.wav`... are media that it names:

* a media value equal to a member's name (`00/a.jpg`), file name (`a.jpg`) or extension (`jpg`, `left.wav`) is that member;
* a JSON that names no member at all gets its media members as `images`, `videos` and `audios`, in the order of the tar;
* without a JSON, the media members and the text of `key.txt` make a document, in the order of the tar.

A plain tar is read with one seek a partition, a compressed one from its start.
"""

import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

from omniprep.errors import ConfigError, Reason, RejectSample, printable
from omniprep.sources.base import FilesSource
from omniprep.sources.files import check_unchanged, compression_of, find_files, one_line, open_input
from omniprep.sources.jsonl import parse_json
from omniprep.sources.partitions import InputFile, Partition, Row, Slice, Unit, cut

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"})
AUDIO_SUFFIXES = frozenset({"wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac", "aif", "aiff", "wma", "amr"})
VIDEO_SUFFIXES = frozenset({"mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "ts", "flv", "wmv", "3gp", "npy"})
MAX_SAMPLE_BYTES = 2 << 30
"""All members of a sample are in memory at once."""
MAX_SAMPLE_MEMBERS = 10_000
_MAX_STATED_BYTES = 64 << 30
_MAX_EXTENSION_BYTES = 1 << 20
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MEMBER_FACTS = ("path", "size", "linkpath")
"""What a global header may not state: a partition starts reading behind it."""
_MEDIA_KEYS = frozenset(
    {"image", "images", "image_url", "audio", "audios", "audio_url", "video", "videos", "video_url", "audio_track", "url", "path"}
)


class _Member(NamedTuple):
    name: str
    data: bytes | None
    """None while planning."""


class _Sample(NamedTuple):
    key: str
    offset: int
    members: list[_Member]
    error: str | None
    checksum: int


class WebDatasetSource(FilesSource):
    """Rows of WebDataset tars (`.tar`, `.tar.gz`, `.tar.zst`)."""

    kind: Literal["webdataset"] = "webdataset"

    def partitions(self, *, rows_per_partition: int) -> list[Partition]:
        """Return slices of `rows_per_partition` samples, the same on every call. Raises `ConfigError`."""
        units = (
            Unit(file, sample.offset, row, row, 1, sample.checksum)
            for file in find_files(self.path, place=f"source {self.name!r}")
            for row, sample in enumerate(_file_samples(file))
        )
        return cut(units, source=self.name, rows_per_partition=rows_per_partition, limit=self.limit)

    def read(self, partition: Partition) -> Iterator[Row]:
        """Yield the partition's rows, in order; a bad one with its error."""
        index = partition.first_row
        for piece in partition.slices:
            check_unchanged(piece)
            base = self._base_of(piece.path)
            num_read = 0
            for sample in _slice_samples(piece):
                place = printable(f"{piece.name}/{sample.key}")
                try:
                    value: Any = _row_value(sample)
                    error = None
                except RejectSample as reject:
                    value, error = {member.name: member.data for member in sample.members}, reject
                yield Row(index=index, place=place, value=value, error=error, base=base)
                index += 1
                num_read += 1
            if num_read != piece.num_rows:
                raise ConfigError(f"{piece.path}: had {piece.num_rows} samples here when planned, has {num_read}; run again")


def _file_samples(file: InputFile) -> Iterator[_Sample]:
    with open_input(file.path) as handle:
        for sample in _samples(handle, start=0, seekable=compression_of(file.path) is None, with_data=False):
            if sample.error is not None and sample.key == "byte 0":
                raise ConfigError(f"{file.path}: cannot be read as a tar: {sample.error}")
            yield sample


def _slice_samples(piece: Slice) -> Iterator[_Sample]:
    seekable = compression_of(piece.path) is None
    with open_input(piece.path) as handle:
        start = piece.offset if seekable else 0
        skipped = 0 if seekable else piece.row
        samples = _samples(handle, start=start, seekable=seekable, with_data=True, num_skipped=skipped)
        for _, sample in zip(range(piece.num_rows), samples, strict=False):
            yield sample


class _DamagedHeaderError(Exception):
    """Not one of `tarfile`'s own, which it takes for the end of the archive. `offset` is where reading finds it again."""

    offset: int | None = None


class _Header(tarfile.TarInfo):
    """A member's header. Nothing that it says is believed before it is checked: sizes may be negative, or more than there is."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        info = super().frombuf(buf, encoding, errors)
        if not 0 <= info.size <= _MAX_STATED_BYTES:
            raise _DamagedHeaderError(f"a member of {info.size} bytes")
        if info.type in _EXTENSIONS and info.size > _MAX_EXTENSION_BYTES:
            raise _DamagedHeaderError(f"a header extension of {info.size} bytes")
        return info

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        start = archive.offset
        try:
            return super().fromtarfile(archive)
        except _DamagedHeaderError as damage:
            damage.offset = start
            raise
        except tarfile.HeaderError as error:
            if type(error).__name__ not in ("InvalidHeaderError", "TruncatedHeaderError"):
                raise  # the end of the archive, with or without its mark
            raise _damaged(f"{one_line(error)} at byte {start}", start) from None
        except (ValueError, ArithmeticError, LookupError, RecursionError) as error:  # of extensions, which tarfile believes
            raise _damaged(f"a header extension at byte {start}: {one_line(error):.100}", start) from None


def _damaged(detail: str, offset: int) -> _DamagedHeaderError:
    damage = _DamagedHeaderError(detail)
    damage.offset = offset
    return damage


def _samples(handle: BinaryIO, *, start: int, seekable: bool, with_data: bool, num_skipped: int = 0) -> Iterator[_Sample]:
    """Yield samples from byte `start` on.

    Damage is told by an error: of the sample whose data are cut short, or of one more where a header is not readable.
    """
    num_bytes = handle.seek(0, 2) if seekable else None
    handle.seek(start) if seekable else None
    number = -1  # of the open sample; those before `num_skipped` are not yielded
    key = None
    offset, checksum, error = start, 0, None
    sample_bytes, too_much = 0, None
    members: list[_Member] = []
    archive: Any = None
    try:
        archive = tarfile.open(fileobj=handle, mode="r:" if seekable else "r|", tarinfo=_Header)  # noqa: SIM115 - holds only `handle`
        while (info := archive.next()) is not None:
            archive.members = []  # tarfile keeps every header that it has seen
            _check_extensions(info, archive)
            if not info.isfile():
                continue
            name = info.name.encode("utf-8", "backslashreplace").decode()  # bytes that are no UTF-8 come as surrogates
            new_key, _ = split_name(name)
            if new_key != key:
                if number >= num_skipped:
                    yield _Sample(str(key), offset, members, too_much, checksum)
                key, members, offset, checksum, number = new_key, [], info.offset, 0, number + 1
                sample_bytes, too_much = 0, None
            if num_bytes is not None and not info.issparse() and info.offset_data + info.size > num_bytes:
                raise tarfile.ReadError(f"{name} ends after {num_bytes - info.offset_data} of {info.size} bytes")
            checksum = zlib.crc32(f"{name}/{info.size}/{info.mtime}/{info.chksum}".encode(), checksum)
            sample_bytes += info.size
            too_much = too_much or _too_much(info, name, sample_bytes, len(members))
            if too_much is None:
                wanted = with_data and number >= num_skipped
                members.append(_Member(name, archive.extractfile(info).read() if wanted else None))
    except _DamagedHeaderError as damage:
        if number >= num_skipped:
            yield _Sample(str(key), offset, members, too_much, checksum)
        offset = start if damage.offset is None else damage.offset
        key, members, error, number = f"byte {offset}", [], str(damage), number + 1
    except (tarfile.TarError, EOFError, zlib.error, OSError) as damage:
        key, error, number = key or f"byte {start}", one_line(damage), max(number, 0)
    if key is not None and number >= num_skipped:
        told = f"the tar is damaged: {error}; what follows is lost" if error else too_much
        yield _Sample(key, offset, members, told, checksum)


def _check_extensions(info: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    """Refuse what extended headers changed: a size that leads backwards, facts of all members stated in front of them."""
    if not 0 <= info.size <= _MAX_STATED_BYTES and not info.issparse():
        raise _damaged(f"a member of {info.size} bytes", info.offset)
    stated = [name for name in archive.pax_headers if name in _MEMBER_FACTS or name.startswith("GNU.sparse")]
    if stated:
        raise tarfile.ReadError(f"a global header that states `{stated[0]:.40}` of all members")


def _too_much(info: tarfile.TarInfo, name: str, sample_bytes: int, num_members: int) -> str | None:
    """Return why a sample cannot be taken whole, None if it can."""
    if info.issparse():
        return f"{name:.200}: a sparse member; write it whole"
    if sample_bytes > MAX_SAMPLE_BYTES:
        return f"{name:.200}: with this member the sample has {sample_bytes} bytes, expected at most {MAX_SAMPLE_BYTES}"
    if num_members >= MAX_SAMPLE_MEMBERS:
        return f"{name:.200}: the sample has over {MAX_SAMPLE_MEMBERS} members"
    return None


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name as webdataset does: the key ends at the first dot of the file name.

    >>> split_name("a.b/000.left.jpg")
    ('a.b/000', 'left.jpg')
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def _row_value(sample: _Sample) -> dict[str, Any]:
    """Return a sample's row, with the media that it names in place of their names. Raises `RejectSample`."""
    if sample.error is not None:
        raise RejectSample(Reason.SCHEMA_INVALID, sample.error)
    names = [member.name for member in sample.members]
    if len(set(names)) < len(names):
        raise RejectSample(Reason.SCHEMA_INVALID, f"two members of the same name among {', '.join(names):.200}")
    by_extension = {split_name(member.name)[1]: member for member in sample.members}
    row = by_extension.get("json")
    if row is None:
        return _document(sample)
    value, error = parse_json(row.data or b"")
    if error is not None:
        raise error.at(row.name)
    if not isinstance(value, dict):
        raise RejectSample(Reason.SCHEMA_INVALID, f"{row.name}: expected a JSON object, got {type(value).__name__}")
    media = {name: member for extension, member in by_extension.items() if _kind(extension) for name in _names(member, extension)}
    filled: dict[str, Any]
    try:
        filled, num_named = _with_members(value, media)
    except RecursionError:
        raise RejectSample(Reason.SCHEMA_INVALID, f"{row.name}: nested too deeply") from None
    if not num_named:
        listed: dict[str, list[Any]] = {}
        for extension, member in by_extension.items():
            kind = _kind(extension)
            if kind is not None:
                listed.setdefault(f"{kind}s", []).append(_blob(member))
        filled = {**listed, **filled}
    return filled


def _names(member: _Member, extension: str) -> tuple[str, ...]:
    return member.name, member.name.rpartition("/")[2], extension


def _kind(extension: str) -> str | None:
    suffix = extension.rpartition(".")[2].lower()
    kinds = {"image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES, "video": VIDEO_SUFFIXES}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), None)


def _blob(member: _Member) -> dict[str, Any]:
    return {"path": member.name, "bytes": member.data or b""}


def _with_members(value: Any, media: dict[str, _Member], *, is_media: bool = False) -> tuple[Any, int]:
    """Replace names of members by the members, under media keys only; return how many were replaced."""
    if isinstance(value, str):
        return (_blob(media[value]), 1) if is_media and value in media else (value, 0)
    if isinstance(value, list):
        pairs = [_with_members(item, media, is_media=is_media) for item in value]
        return [item for item, _ in pairs], sum(num for _, num in pairs)
    if isinstance(value, dict):
        if is_media and isinstance(value.get("path"), str) and value["path"] in media:
            return _blob(media[value["path"]]), 1
        found = {key: _with_members(item, media, is_media=key in _MEDIA_KEYS) for key, item in value.items()}
        return {key: item for key, (item, _) in found.items()}, sum(num for _, num in found.values())
    return value, 0


def _document(sample: _Sample) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for member in sample.members:
        extension = split_name(member.name)[1]
        kind = _kind(extension)
        if kind is not None:
            parts.append({"type": kind, kind: _blob(member)})
        elif extension == "txt":
            try:
                parts.append({"type": "text", "text": (member.data or b"").decode("utf-8")})
            except UnicodeDecodeError as error:
                raise RejectSample(Reason.SCHEMA_INVALID, f"{member.name}: not valid UTF-8 at byte {error.start}") from None
    if not parts:
        names = ", ".join(member.name for member in sample.members)
        raise RejectSample(Reason.SCHEMA_INVALID, f"expected a .json, .txt or media member; got {names:.200}")
    return {"parts": parts}
