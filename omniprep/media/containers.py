"""What a file says about itself in its first bytes and its chunk headers, read without a decoder.

Extensions lie; the first bytes rarely do. And decoders are polite: most play a cut-off file up to its end without a word, so
whether all promised bytes are there is asked here, of the outermost boxes alone (a few dozen bytes are read).
"""

import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, Literal

AudioOpener = Literal["soundfile", "npy", "pyav"]

_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")
_STREAMED_RIFF_SIZES = (0, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFFFFE, 0x80000000)
"""Sizes written by programs that could not seek back (ffmpeg, sox, arecord): they promise nothing."""
_MAX_BOXES = 10_000


def audio_opener(head: bytes) -> AudioOpener:
    """Return who should try first to read sound from a file that begins with `head` (16 bytes or more).

    soundfile is the cheapest for the formats that libsndfile reads; PyAV reads the rest and is the second try for all.

    >>> audio_opener(b"RIFF....WAVEfmt "), audio_opener(b"\\x00\\x00\\x00\\x20ftypM4A ")
    ('soundfile', 'pyav')
    """
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head[8:12] == b"WAVE" and head[:4] in (b"RIFF", b"RF64", b"RIFX"):
        return "soundfile"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "soundfile"
    if head.startswith((b"fLaC", b"OggS", b"ID3", b".snd", b"caff", b"riff\x2e\x91\xcf\x11")):
        return "soundfile"
    if _is_mpeg_audio(head):
        return "soundfile"
    return "pyav"


def _is_mpeg_audio(head: bytes) -> bool:
    """Say whether an MPEG audio frame starts here: 11 sync bits, then no reserved value; layer 0 is AAC in ADTS."""
    return len(head) >= 4 and _mpeg_frame_size(head[0], head[1], head[2]) > 0


# Bits a second / 1000 by bit-rate index: MPEG-1 layers 1, 2, 3, then MPEG-2 layer 1 and layers 2 and 3 (ISO 11172-3, 13818-3).
_KBITS = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 0),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 0),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256, 0),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}


@lru_cache(maxsize=1024)
def _mpeg_frame_size(sync: int, kind: int, rates: int) -> int:
    """Return the bytes of the MPEG audio frame whose header starts so, 0 if it is none (or of free bit rate).

    >>> _mpeg_frame_size(0xFF, 0xFB, 0x90)  # MPEG-1 layer 3, 128 kbit/s, 44.1 kHz: 144 * 128000 / 44100
    417
    """
    version, layer = kind >> 3 & 3, 4 - (kind >> 1 & 3)
    if sync != 0xFF or kind & 0xE0 != 0xE0 or version == 1 or layer == 4 or rates >> 2 & 3 == 3:
        return 0
    is_mpeg_1, padding = version == 3, rates >> 1 & 1
    bits = 1000 * _KBITS[is_mpeg_1, layer][rates >> 4]
    rate = (44_100, 48_000, 32_000)[rates >> 2 & 3] // {3: 1, 2: 2, 0: 4}[version]
    if layer == 1:
        return (12 * bits // rate + padding) * 4 if bits else 0
    return (144 if is_mpeg_1 or layer == 2 else 72) * bits // rate + padding if bits else 0


def is_whole_mpeg_audio(file: BinaryIO) -> bool:
    """Say whether the file is nothing but complete MPEG audio frames between its tags (about 1 % of decoding it).

    libmpg123 writes to the standard error about any other file, and libsndfile cannot quieten it.
    """
    head = file.read(10)
    position = 0
    if head[:3] == b"ID3" and len(head) == 10:
        position = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + (10 if head[5] & 0x10 else 0)
    data, start, num_frames = b"", 0, 0
    while True:
        if position + 3 > start + len(data):
            file.seek(position)
            data, start = file.read(1 << 20), position
            if len(data) < 3:  # the end, which the last frame must have reached and not passed
                return num_frames > 0 and position == file.seek(0, os.SEEK_END)
        place = position - start
        size = _mpeg_frame_size(data[place], data[place + 1], data[place + 2])
        if not size:
            return num_frames > 0 and data[place : place + 3] in (b"TAG", b"APE", b"LYR")
        position += size
        num_frames += 1


def num_missing_bytes(file: BinaryIO) -> int:
    """Return how many bytes the outermost boxes of a RIFF, AIFF, MP4 or Matroska file promise beyond its end; 0 if none.

    Files of other formats, and sizes that a program left open while streaming, promise nothing. `file` is left anywhere.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    if head[:4] in (b"RIFF", b"FORM"):
        boxes = _riff_chunks(file, "<I" if head[:4] == b"RIFF" else ">I")
    elif head[4:8] in _MP4_BOXES:
        boxes = _mp4_boxes(file)
    elif head.startswith(b"\x1a\x45\xdf\xa3"):
        boxes = _ebml_elements(file)
    else:
        return 0
    return max(0, max(boxes, default=0) - num_bytes)


def _riff_chunks(file: BinaryIO, size_format: str) -> Iterator[int]:
    """Yield the end of each chunk; the last one's padding byte is often left out and not asked for."""
    start = 12
    for _ in range(_MAX_BOXES):
        file.seek(start)
        header = file.read(8)
        if len(header) < 8:
            return
        (size,) = struct.unpack(size_format, header[4:])
        if size in _STREAMED_RIFF_SIZES:
            return
        yield start + 8 + size
        start += 8 + size + size % 2


def _mp4_boxes(file: BinaryIO) -> Iterator[int]:
    start = 0
    for _ in range(_MAX_BOXES):
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            return
        size, kind = struct.unpack(">I4s", header[:8])
        if size == 1 and len(header) == 16:
            (size,) = struct.unpack(">Q", header[8:])
        if size < 8 or not all(0x20 <= byte < 0x7F or byte == 0xA9 for byte in kind):
            return  # size 0: until the end of the file; anything else: padding or junk after the last box
        start += size
        yield start


def _ebml_elements(file: BinaryIO) -> Iterator[int]:
    start = 0
    for _ in range(4):  # the header, the segment, and what may stand between or after them
        file.seek(start)
        header = file.read(12)
        id_width = _vint_width(header[:1])
        size_width = _vint_width(header[id_width : id_width + 1])
        if not id_width or not size_width or len(header) < id_width + size_width:
            return
        size = int.from_bytes(header[id_width : id_width + size_width], "big") & ((1 << 7 * size_width) - 1)
        if size == (1 << 7 * size_width) - 1:
            return  # size unknown: written while streaming
        start += id_width + size_width + size
        yield start


def _vint_width(first: bytes) -> int:
    """Return the bytes of a variable-length EBML integer from its first byte, 0 if there is none."""
    return 9 - first[0].bit_length() if first and first[0] else 0


SAFE_DEMUXERS = (
    "3gp,aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,dv,eac3,flac,flv,gsm,h264,hevc,ivf,latm,loas,m4v,matroska,mlp,mov,"
    "mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,tak,truehd,tta,voc,w64,wav,webm,wtv,wv"
)
"""Formats that libavformat may recognise: media files proper. Play lists (HLS, DASH, concat) are left out, because they make
the library open other files and addresses that the record never named."""
