"""Trying a remote call again, with growing and random pauses, where that can help.

What can help is decided by the answer, not by the library that wraps it: s3fs, gcsfs, adlfs and aiohttp each have their own
exceptions around the same HTTP statuses, so the whole chain of causes is looked at. A status that means "you may not" or "it
is not there" is never tried again, whatever surrounds it.

The pauses have full jitter (any length up to a bound that doubles), so that a thousand workers that were throttled together do
not come back together.
"""

import errno
import random as randomness
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from omniprep.storage.folder import StorageError

T = TypeVar("T")

ATTEMPTS = 6
FIRST_DELAY_S = 0.2
MAX_DELAY_S = 20.0

_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",  # what arrived is not what was sent
        "XAmzContentSHA256Mismatch",
        "ConditionalRequestConflict",  # S3: another conditional write runs at this moment
        "OperationAborted",
        "RequestTimeout",
        "RequestTimeoutException",
        "RequestLimitExceeded",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "TooManyRequestsException",
        "BandwidthLimitExceeded",
        "ServiceUnavailable",
        "InternalError",
    }
)
"""Errors of S3 and its relatives that a status does not tell: some come as a 400 or a 409."""
_TRANSIENT_TYPES = frozenset(
    {
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "ConnectionError",  # Python's own, botocore's and requests'
        "HTTPClientError",  # botocore
        "IncompleteRead",
        "IncompleteReadError",
        "ProtocolError",  # urllib3
        "ResponseParserError",  # some throttling answers are no XML
        "ServiceRequestError",  # azure
        "ServiceResponseError",
        "TimeoutError",  # asyncio's, the socket's and fsspec's are this one
    }
)
"""Names of exception classes, own or inherited; by name, so that no library is imported to ask."""
_TRANSIENT_ERRNOS = frozenset({errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EPIPE})


def with_retries(
    call: Callable[[], T],
    *,
    what: str,
    attempts: int = ATTEMPTS,
    first_delay_s: float = FIRST_DELAY_S,
    max_delay_s: float = MAX_DELAY_S,
    sleep: Callable[[float], object] = time.sleep,
    random: Callable[[], float] = randomness.random,
) -> T:
    """Return what `call` returns, trying again after transient errors.

    `what` names the file, for messages. Other errors come through as they are; after the last attempt `StorageError`.

    >>> answers = iter([TimeoutError(), ConnectionResetError(), "done"])
    >>> def call():
    ...     answer = next(answers)
    ...     if isinstance(answer, Exception):
    ...         raise answer
    ...     return answer
    >>> with_retries(call, what="s3://bucket/a", random=lambda: 0.5, sleep=lambda seconds: print(f"{seconds:.1f} s"))
    0.1 s
    0.2 s
    'done'
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            last = error
        if attempt + 1 < attempts:
            sleep(random() * min(max_delay_s, first_delay_s * 2**attempt))
    raise StorageError(
        f"{what}: {short(last)}, {attempts} times in a row; the store does not answer as it should: "
        "check the network and the endpoint, then run the same command again: what is finished is kept"
    ) from last


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a moment later.

    >>> is_transient(ConnectionResetError()), is_transient(PermissionError())
    (True, False)
    """
    if isinstance(error, StorageError):  # has been tried often enough
        return False
    if any(code_of(link) in _TRANSIENT_CODES for link in _chain(error)):
        return True
    status = status_of(error)
    return _is_network_error(error) if status is None else status in _TRANSIENT_STATUSES


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an exception, or None if no answer came."""
    return next((status for link in _chain(error) if (status := _own_status(link)) is not None), None)


def code_of(error: BaseException) -> str:
    """Return the error code that S3 answered with (`NoSuchBucket`), or ""."""
    response = getattr(error, "response", None)
    details = response.get("Error") if isinstance(response, dict) else None
    return str(details.get("Code", "")) if isinstance(details, dict) else ""


def short(error: BaseException) -> str:
    """Return an exception in one line that can be read: its type where the message alone does not say what happened."""
    message = " ".join(str(error).split())
    name = type(error).__name__
    if not message:
        return "no answer in time" if isinstance(error, TimeoutError) else name
    return f"{message:.300}" if isinstance(error, OSError) else f"{name}: {message:.300}"


def _is_network_error(error: BaseException) -> bool:
    return any(
        getattr(link, "errno", None) in _TRANSIENT_ERRNOS or any(base.__name__ in _TRANSIENT_TYPES for base in type(link).__mro__)
        for link in _chain(error)
    )


def _own_status(error: BaseException) -> int | None:
    """Return the status as the libraries keep it: aiohttp, azure, gcsfs, requests, botocore."""
    response = getattr(error, "response", None)
    given = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    if given is None:
        # aiohttp gives a body that ends early a `code` of 400, which no server sent.
        name = "code" if type(error).__name__ == "HttpError" else "status_code"
        holders = ((error, "status"), (error, name), (response, "status_code"))
        given = next((value for holder, name in holders if (value := getattr(holder, name, None)) is not None), None)
    status = int(str(given)) if str(given).isdecimal() else 0
    return status if 400 <= status < 600 else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
