"""Errors and their fates.

```
OmniPrepError
├── ConfigError      the user's recipe or command line is wrong: raised before any worker starts, exit code 2
├── RejectSample     one record cannot be used: it goes to the quarantine with its reason, the run goes on
└── DatasetError     a dataset on disk is damaged or not one of ours
    └── NoDatasetError   none lies where one was named: a `ConfigError` as well, so the exit code is that of wrong use
```

Anything else that escapes is a bug and stops the run with its traceback.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a record was rejected. The list is closed; `docs/reference/reasons.md` explains each entry."""

    SCHEMA_INVALID = "schema_invalid"
    """The row is not valid JSON or does not fit the record schema."""
    RECORD_TOO_LARGE = "record_too_large"
    """More messages, parts or media than one record may have."""
    ROLE_UNKNOWN = "role_unknown"
    PLACEHOLDER_MISMATCH = "placeholder_mismatch"
    """The number of `<image>`, `<video>`, `<audio>` marks differs from the number of media given."""
    CONTROL_TOKEN = "control_token"
    """User text contains a control token's string and the recipe says `reject`."""
    TOO_MANY_TOKENS = "too_many_tokens"
    NOTHING_SUPERVISED = "nothing_supervised"
    """A training record without a single supervised token."""
    MEDIA_MISSING = "media_missing"
    MEDIA_FORBIDDEN = "media_forbidden"
    """The path leaves the declared media roots, or the URL scheme is not allowed."""
    MEDIA_UNREADABLE = "media_unreadable"
    """Opening or fetching failed (permission, network)."""
    MEDIA_EMPTY = "media_empty"
    """A file of zero bytes, or one that decodes to nothing."""
    MEDIA_TRUNCATED = "media_truncated"
    """The file ends before the picture, frames or samples that its header promises."""
    MEDIA_CORRUPT = "media_corrupt"
    """The decoder does not accept the bytes: damaged, mislabelled or of an unknown format."""
    MEDIA_NO_STREAM = "media_no_stream"
    """The container has no stream of the kind asked for."""
    MEDIA_RANGE = "media_range"
    """A cut, frame count or rate that the media cannot satisfy."""
    MEDIA_OVER_LIMIT = "media_over_limit"
    """The file states more channels, frames, pixels or time, or another sample rate, than OmniPrep takes."""
    AUDIO_TOO_SHORT = "audio_too_short"
    AUDIO_TOO_LONG = "audio_too_long"
    AUDIO_NOT_FINITE = "audio_not_finite"
    IMAGE_ASPECT = "image_aspect"
    """One side is over 200 times the other."""
    IMAGE_TOO_LARGE = "image_too_large"
    VIDEO_TOO_SHORT = "video_too_short"
    TIMED_OUT = "timed_out"
    """The record took longer than `run.guard.timeout_s`; its process was killed."""
    CRASHED = "crashed"
    """The record's process died: most often a decoder that media made crash."""
    OUT_OF_MEMORY = "out_of_memory"
    """The record took more than `run.guard.memory_bytes`; its process was killed."""
    REFERENCE_UNDEFINED = "reference_undefined"
    """`rope_mode: reference` was asked for an input that the reference cannot process."""


def printable(text: str) -> str:
    r"""Return text as one line in which nothing is left to act on a terminal: escapes, line ends, marks that turn the direction.

    >>> print(printable("图片.png" + chr(27) + "[2J"))
    图片.png\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


class OmniPrepError(Exception):
    """Base of every error that OmniPrep raises on purpose."""


class ConfigError(OmniPrepError):
    """The recipe, the command line or the installation is wrong; the message says where and what to do."""


class DatasetError(OmniPrepError):
    """A dataset on disk is damaged or not an OmniPrep dataset."""


class NoDatasetError(DatasetError, ConfigError):
    """No finished dataset lies where one was named."""


class RejectSample(OmniPrepError):
    """One record cannot be used.

    `detail` is one line for a person: where, what was expected, what came, what to do. What it quotes cannot steer a
    terminal: see `printable`. `retryable` marks causes outside the record (a network error), which a later run may not meet.
    """

    def __init__(self, reason: Reason, detail: str, *, retryable: bool = False) -> None:
        detail = printable(detail)
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions that cross a process border are rebuilt from `args`, which hold only the message.
        return _rebuild_reject_sample, (self.reason, self.detail, self.retryable)

    def at(self, place: str) -> "RejectSample":
        """Return the same rejection with `place` (a file, `messages.0.content.1`) in front of its detail."""
        return RejectSample(self.reason, f"{place}: {self.detail}", retryable=self.retryable)


def _rebuild_reject_sample(reason: Reason, detail: str, retryable: bool) -> RejectSample:
    return RejectSample(reason, detail, retryable=retryable)
