"""What a video file holds, from its packets: frame times, sizes, key frames, rotation.

PyAV (libav) reads every packet's header and time stamp, which costs about 1 ms per 100 frames. The times are those of
presentation, so B-frames, variable frame rate, edit lists and offsets need no guesses. Time zero is the container's
start time: the same line that `media/audio.py` puts sound on. Frames that an edit list cuts away are not counted.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from omniprep.errors import Reason, RejectSample, printable
from omniprep.types import Float64Array, Int64Array, MediaFile

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,gif,mxf,ivf,nut,h264,hevc,wtv,rm,dv,apng"
"""Containers that are opened. Playlists and the like, which make libav open other files, are not among them."""
_DECORD_FORMATS = ("mov", "matroska", "avi")
_DECORD_CODECS = ("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg")
_DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")
_MAX_PACKETS_TO_FIRST_FRAME = 300
_MAX_MOVIE_BOX = 64 << 20
MAX_FRAME_PIXELS = 1 << 26
"""8192 x 8192; decoders hold several frames of 1.5 to 8 bytes a pixel."""
MAX_PACKETS = 1_000_000
"""9 hours at 30 frames a second. A packet may be one byte in the file and costs 200 here."""
MAX_TIME_S = 1e7
"""116 days: position ids count 25 to the second, in 32 bits."""
_MIN_SHARE_STAMPED = 0.9
_DURATION_TAG = re.compile(r"(\d{1,6}):(\d{1,2}):(\d{1,2}(?:\.\d{1,12})?)$", re.ASCII)
_UNSTAMPED = np.iinfo(np.int64).min
_SEEKABLE_FORMATS = ("mov", "matroska", "avi")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoInfo:
    """A video file's facts. N is the number of frames that are shown, in presentation order."""

    width: int
    """Pixels, after rotation."""
    height: int
    rotation: int
    """Degrees counter-clockwise that decoded frames are turned by to be shown upright: 0, 90, 180 or 270."""
    source_fps: float
    """Average rate as the container states it."""
    num_frames: int
    duration_s: float
    """End of the last frame on the file's time line."""
    has_audio: bool
    audio_start_s: float | None
    """Start time of the first audio stream on the same time line, as the container states it (encoder delay included)."""
    frame_times_s: Float64Array
    """(N,) presentation times in seconds, increasing; zero is the container's start time."""
    frame_pts: Int64Array | None
    """(N,) presentation times in the stream's time base, or None where the file has none and frames are counted."""
    packet_bytes: Int64Array
    """(N,) size of each frame's packet."""
    keyframes: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """(N,) which frames decoding can start at."""
    constant_rate: bool
    """Frame i is shown at i / source_fps, within half a frame."""
    codec: str
    pixel_format: str
    decord_problem: str
    """Why decord is not right for this file, or an empty string."""
    seekable: bool
    """The container finds key frames by their time."""
    opened: tuple[Any, Any] | None = field(default=None, repr=False)
    """(container, stream) of PyAV, still open, so that reading the frames need not analyse the file again. None where that
    cannot be done, and where the facts come from a cache."""


def probe_video(media: MediaFile) -> VideoInfo:
    """Return the facts of a video file: reads all packets, decodes at most one frame (an MP4 whose tracks are upright: none).

    Raises `RejectSample`: `MEDIA_EMPTY`, `MEDIA_MISSING`, `MEDIA_UNREADABLE`, `MEDIA_CORRUPT`, `MEDIA_TRUNCATED`,
    `MEDIA_NO_STREAM`.
    """
    with reading_video(media):
        container, stream = open_video(media)
        try:
            return _probe_open(media, container, stream)
        except BaseException:
            container.close()
            raise


def _probe_open(media: MediaFile, container: Any, stream: Any) -> VideoInfo:
    packets, rotation, pixel_format = _scan(container, stream, may_be_turned=_may_be_turned(media))
    if not packets.num_read:
        raise RejectSample(Reason.MEDIA_EMPTY, "the video stream has no packets")
    if not len(packets) or not pixel_format:
        if _index_ends_behind_file(stream, media):
            raise RejectSample(Reason.MEDIA_TRUNCATED, "the file ends before its first frame; fetch it again")
        raise RejectSample(Reason.MEDIA_CORRUPT, f"no frame could be decoded ({stream.codec_context.name}); is the file damaged?")
    return _describe(media, container, stream, packets=packets, rotation=rotation, pixel_format=pixel_format)


def open_video(media: MediaFile) -> tuple[Any, Any]:
    """Open with PyAV and return (container, video stream), single-threaded. To be called within `reading_video`."""
    import av

    # An absolute path cannot be mistaken for a protocol ("concat:...").
    source = os.path.abspath(media.path) if media.path is not None else media.open()  # noqa: PTH100
    container = av.open(source, options={"format_whitelist": _FORMATS}, metadata_errors="replace")
    try:
        return container, _video_stream(container)
    except BaseException:
        container.close()
        raise


@contextmanager
def reading_video(media: MediaFile) -> Iterator[None]:
    """Turn PyAV's errors into `RejectSample` with the file's name in front."""
    import av

    if media.path is not None and not media.path.exists():
        raise RejectSample(Reason.MEDIA_MISSING, f"{media.name}: no such file")
    if media.num_bytes == 0:
        raise RejectSample(Reason.MEDIA_EMPTY, f"{media.name}: the file has no bytes")
    try:
        yield
    except RejectSample as error:
        raise error if error.detail.startswith(printable(media.name)) else error.at(media.name) from None
    except (PermissionError, IsADirectoryError) as error:
        raise RejectSample(Reason.MEDIA_UNREADABLE, f"{media.name}: {error.strerror}", retryable=True) from None
    except av.error.FFmpegError as error:
        raise _unreadable(media, error) from None


def _video_stream(container: Any) -> Any:
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise RejectSample(Reason.MEDIA_NO_STREAM, f"expected a video stream, found only: {kinds}")
    stream = streams[0]
    if stream.codec_context is None:
        raise RejectSample(Reason.MEDIA_CORRUPT, "no decoder for the video stream; transcode it, for example to H.264")
    stream.thread_type = "NONE"  # records are decoded in parallel, not frames
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # for frames that differ from the header
    if stream.codec_context.width * stream.codec_context.height > MAX_FRAME_PIXELS:
        raise RejectSample(
            Reason.MEDIA_OVER_LIMIT,
            f"frames of {stream.codec_context.width}x{stream.codec_context.height}, expected at most {MAX_FRAME_PIXELS} pixels",
        )
    return stream


def _unreadable(media: MediaFile, error: Exception) -> RejectSample:
    with media.open() as file:
        head = file.read(16)
    if head[4:8] == b"ftyp":
        return RejectSample(
            Reason.MEDIA_TRUNCATED, f"{media.name}: an MP4 file without a readable index: its end is missing or damaged"
        )
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n" or head[8:12] == b"WEBP":
        return RejectSample(
            Reason.MEDIA_CORRUPT,
            f"{media.name}: expected a video, got a picture; give it as an image part or as a list of frames",
        )
    why = getattr(error, "strerror", None) or type(error).__name__
    return RejectSample(
        Reason.MEDIA_CORRUPT, f"{media.name}: not a video file that libav knows (starts with {head[:8]!r}): {why}"
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Packets:
    """Packets of the frames that are shown, sorted by presentation."""

    pts: Int64Array | None
    sizes: Int64Array
    keys: np.ndarray[tuple[int], np.dtype[np.bool_]]
    last_duration: int
    num_read: int
    """All packets, hidden ones included."""
    num_hidden: int
    """Cut away by an edit list, or not decodable because they lean on frames before the file's first."""

    def __len__(self) -> int:
        return len(self.sizes)


def _scan(container: Any, stream: Any, *, may_be_turned: bool) -> tuple[_Packets, int, str]:
    """Return the packets, the rotation in degrees and the pixel format ("" if no frame could be decoded).

    PyAV tells the rotation only of decoded frames, so one is decoded unless it is known that nothing is turned.
    """
    import av

    pts: list[int | None] = []
    sizes, keys, hidden, durations = [], [], [], []
    first_frame = None
    must_decode = may_be_turned or stream.codec_context.pix_fmt is None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if len(pts) == MAX_PACKETS:
            raise RejectSample(Reason.MEDIA_OVER_LIMIT, f"a video of over {MAX_PACKETS} packets; cut the file")
        if must_decode and first_frame is None and len(pts) < _MAX_PACKETS_TO_FIRST_FRAME and (packet.is_keyframe or pts):
            first_frame = _decode_now(stream.codec_context, packet, av.error.FFmpegError)
        pts.append(packet.pts)
        sizes.append(packet.size)
        keys.append(packet.is_keyframe)
        hidden.append(packet.is_discard)
        durations.append(packet.duration or 0)
    packets = _sorted_packets(pts, np.array(sizes, np.int64), np.array(keys, bool), np.array(hidden, bool), durations)
    if not must_decode:
        return packets, 0, stream.codec_context.pix_fmt
    if first_frame is None:
        return packets, 0, ""
    return packets, round(first_frame.rotation / 90) * 90 % 360, first_frame.format.name


def _may_be_turned(media: MediaFile) -> bool:
    """Return False for an MP4 or QuickTime file in which no track is turned; True where that is not known.

    The track header box (ISO/IEC 14496-12, 8.3.2) holds a 3x3 matrix, of which a, b, c, d turn the picture.
    """
    with media.open() as file:
        movie = _find_box(file, b"moov", media.num_bytes)
        if movie is None or movie[1] > _MAX_MOVIE_BOX:
            return True
        file.seek(movie[0])
        content = file.read(movie[1])
    identity = (0x10000).to_bytes(4, "big") + bytes(12) + (0x10000).to_bytes(4, "big")
    position, num_tracks = content.find(b"tkhd"), 0
    while position >= 0:
        matrix = position + (56 if content[position + 4 : position + 5] == b"\x01" else 44)  # after version 1's wider times
        if content[matrix : matrix + 20] != identity:
            return True
        num_tracks += 1
        position = content.find(b"tkhd", position + 4)
    return num_tracks == 0


def _find_box(file: BinaryIO, kind: bytes, num_bytes: int) -> tuple[int, int] | None:
    """Return (offset, size) of the content of a box at the top level of an ISO media file."""
    position = 0
    while position + 8 <= num_bytes:
        file.seek(position)
        head = file.read(16)
        size, header = int.from_bytes(head[:4], "big"), 8
        if position == 0 and head[4:8] != b"ftyp":
            return None
        if size == 1:
            size, header = int.from_bytes(head[8:16], "big"), 16
        if head[4:8] == kind:
            return position + header, (size or num_bytes - position) - header
        if size < header:
            return None
        position += size
    return None


def _decode_now(codec: Any, packet: Any, errors: type[Exception]) -> Any:
    """Return the frame of one packet without waiting for those behind it, or None."""
    try:
        frames = [*codec.decode(packet), *codec.decode(None)]
    except (errors, EOFError):
        frames = []
    codec.flush_buffers()
    return frames[0] if frames else None


def _sorted_packets(
    pts: list[int | None],
    sizes: Int64Array,
    keys: np.ndarray[tuple[int], np.dtype[np.bool_]],
    hidden: np.ndarray[tuple[int], np.dtype[np.bool_]],
    durations: list[int],
) -> _Packets:
    known = [stamp for stamp in pts if stamp is not None]
    if len(known) < _MIN_SHARE_STAMPED * len(pts) or len(set(known)) < len(known):  # raw streams: count instead
        shown = ~hidden
        return _Packets(
            pts=None, sizes=sizes[shown], keys=keys[shown], last_duration=0, num_read=len(pts), num_hidden=int(hidden.sum())
        )
    # A few packets without a stamp lean on what was cut off before the file's start; no decoder shows them.
    stamps = np.array([_UNSTAMPED if stamp is None else stamp for stamp in pts], np.int64)
    hidden = hidden | (stamps == _UNSTAMPED)
    entries = stamps[keys & (stamps != _UNSTAMPED)]  # a frame that an edit list hides is decoded all the same
    if len(entries):
        hidden = hidden | (stamps < entries.min())  # leading pictures of an open group that was cut off
    order = np.argsort(stamps, kind="stable")
    order = order[~hidden[order]]
    return _Packets(
        pts=stamps[order],
        sizes=sizes[order],
        keys=keys[order],
        last_duration=durations[order[-1]] if len(order) else 0,
        num_read=len(pts),
        num_hidden=int(hidden.sum()),
    )


def _describe(media: MediaFile, container: Any, stream: Any, *, packets: _Packets, rotation: int, pixel_format: str) -> VideoInfo:
    start_s = (container.start_time or 0) / 1e6
    rate = stream.average_rate or stream.guessed_rate
    num_frames = len(packets)
    if packets.pts is not None:
        times_s = packets.pts * float(stream.time_base) - start_s
        span_s = float(times_s[-1] - times_s[0])
        fps = float(rate) if rate else (num_frames - 1) / span_s if span_s > 0 else 1.0
        last_s = packets.last_duration * float(stream.time_base) or 1 / fps
    else:
        fps = float(rate) if rate else 25.0
        times_s = np.arange(num_frames) / fps
        last_s = 1 / fps
    if not np.abs(times_s[[0, -1]]).max() + last_s < MAX_TIME_S:
        raise RejectSample(
            Reason.MEDIA_OVER_LIMIT,
            f"time stamps from {times_s[0]:g} s to {times_s[-1]:g} s, expected less than {MAX_TIME_S:g} s",
        )
    _reject_truncated(media, container, stream, packets=packets, end_s=float(times_s[-1]) + last_s, fps=fps)
    audio = container.streams.audio[0] if container.streams.audio else None
    audio_start_s = None
    if audio is not None:
        audio_start_s = 0.0 if audio.start_time is None else float(audio.start_time * audio.time_base) - start_s
    width, height = stream.codec_context.width, stream.codec_context.height
    if rotation in (90, 270):
        width, height = height, width
    seekable = container.format.name.split(",")[0] in _SEEKABLE_FORMATS
    constant = bool(np.all(np.abs(times_s - np.arange(num_frames) / fps) < 0.5 / fps))
    return VideoInfo(
        width=width,
        height=height,
        rotation=rotation,
        source_fps=fps,
        num_frames=num_frames,
        duration_s=float(times_s[-1]) + last_s,
        has_audio=audio is not None,
        audio_start_s=audio_start_s,
        frame_times_s=times_s,
        frame_pts=packets.pts,
        packet_bytes=packets.sizes,
        keyframes=packets.keys,
        constant_rate=constant,
        codec=stream.codec_context.name,
        pixel_format=pixel_format,
        decord_problem=_decord_problem(container, stream, packets, pixel_format),
        seekable=seekable,
        opened=(container, stream) if seekable else None,
    )


def _decord_problem(container: Any, stream: Any, packets: _Packets, pixel_format: str) -> str:
    """Return why decord 0.6 is not right for a file: each of these was seen to give other frames or none."""
    codec = stream.codec_context.codec.canonical_name
    problems = {
        f"container {container.format.name}": container.format.name.split(",")[0] not in _DECORD_FORMATS,
        f"codec {codec}": codec not in _DECORD_CODECS,
        f"pixel format {pixel_format}": pixel_format not in _DECORD_PIXELS,
        "hidden frames (edit list, open start)": packets.num_hidden > 0,
        "frames without time stamps": packets.pts is None,
        "several video streams": len(container.streams.video) > 1,
    }
    return "; ".join(problem for problem, present in problems.items() if present)


def _reject_truncated(media: MediaFile, container: Any, stream: Any, *, packets: _Packets, end_s: float, fps: float) -> None:
    promised = stream.frames
    if container.format.name.startswith("mov"):
        # Fewer packets than samples is normal where an edit list cuts, so ask where the index says the bytes are.
        missing = promised > packets.num_read and _index_ends_behind_file(stream, media)
    elif promised:
        missing = packets.num_read + max(2, promised // 50) < promised
    else:
        promised_s = _stated_end_s(container, stream)
        missing = promised_s is not None and end_s + max(0.5, 3 / fps) < promised_s
        promised = round((promised_s or 0) * fps)
    if missing:
        raise RejectSample(
            Reason.MEDIA_TRUNCATED,
            f"{media.name}: the file ends after {packets.num_read} of {promised} frames ({end_s:.1f} s); fetch it again",
        )


def _index_ends_behind_file(stream: Any, media: MediaFile) -> bool:
    entries = stream.index_entries
    return bool(len(entries)) and max(entry.pos + entry.size for entry in entries) > media.num_bytes


def _stated_end_s(container: Any, stream: Any) -> float | None:
    """Return when the video ends according to the header, in seconds, if the header speaks of the video."""
    tag = stream.metadata.get("DURATION")
    match = _DURATION_TAG.match(tag or "")
    if match:
        stated = 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])
        return float(stated - (container.start_time or 0) / 1e6)
    if container.duration and len(container.streams) == 1:
        return float(container.duration) / 1e6 - (container.start_time or 0) / 1e6
    return None
