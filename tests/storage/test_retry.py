"""Which errors are worth another try, and how long it waits."""

import errno
import http.client
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import ClientError, NoCredentialsError, ReadTimeoutError
from hypothesis import given
from hypothesis import strategies as st
from s3fs.errors import translate_boto_error

from omniprep.errors import OmniPrepError
from omniprep.storage.folder import StorageError
from omniprep.storage.remote import store_of
from omniprep.storage.retry import is_transient, status_of, with_retries
from tests.s3_server import S3


def s3_error(status: int, code: str) -> Exception:
    answer: Any = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "PutObject"))


def http_error(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        s3_error(500, "InternalError"),
        s3_error(503, "SlowDown"),
        s3_error(503, "ServiceUnavailable"),
        s3_error(400, "RequestTimeout"),
        s3_error(409, "ConditionalRequestConflict"),
        s3_error(502, "502"),
        http_error(429),
        http_error(504),
        caused(FileNotFoundError("http://a"), http_error(503)),  # as fsspec's http tells it
        caused(FileNotFoundError("http://a"), aiohttp.ClientConnectionError()),
        aiohttp.ClientPayloadError(),
        aiohttp.ServerDisconnectedError(),
        ReadTimeoutError(endpoint_url="x"),
        TimeoutError(),
        ConnectionResetError(),
        http.client.IncompleteRead(b""),
        OSError(errno.ENETUNREACH, "unreachable"),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        s3_error(403, "AccessDenied"),
        s3_error(404, "NoSuchKey"),
        s3_error(412, "PreconditionFailed"),
        s3_error(400, "InvalidBucketName"),
        s3_error(501, "NotImplemented"),
        http_error(401),
        caused(FileNotFoundError("http://a"), http_error(404)),
        caused(ConnectionResetError(), http_error(403)),  # an answer weighs more than what happened around it
        NoCredentialsError(),
        FileNotFoundError("a"),
        PermissionError("a"),
        OSError(errno.ENOSPC, "full"),
        ValueError("a"),
        StorageError("tried six times already"),
    ],
    ids=repr,
)
def test_what_will_not_pass_is_not(error: Exception) -> None:
    assert not is_transient(error)
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        with_retries(call, what="a", sleep=pytest.fail)
    assert caught.value is error
    assert len(calls) == 1


def failing(num_times: int) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= num_times:
            raise s3_error(503, "SlowDown")
        return "done"

    return call, calls


@given(draws=st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_a_pause_is_anything_up_to_a_bound_that_doubles(draws: list[float]) -> None:
    pauses: list[float] = []
    drawn = iter(draws)
    call, calls = failing(9)
    result = with_retries(call, what="a", attempts=10, max_delay_s=5, sleep=pauses.append, random=lambda: next(drawn))
    assert result == "done"
    assert len(calls) == 10
    assert pauses == [draw * bound for draw, bound in zip(draws, [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5], strict=True)]


def test_after_the_last_attempt_it_says_what_and_how_often() -> None:
    pauses: list[float] = []
    call, calls = failing(99)
    with pytest.raises(OmniPrepError) as caught:
        with_retries(call, what="s3://b/a", attempts=3, sleep=pauses.append)
    assert isinstance(caught.value, StorageError)
    assert str(caught.value) == (
        "s3://b/a: [Errno 16] m, 3 times in a row; the store does not answer as it should: check the network and the endpoint, "
        "then run the same command again: what is finished is kept"
    )
    assert status_of(caught.value) == 503
    assert (len(calls), len(pauses)) == (3, 2)


def test_a_throttled_store_is_asked_again_after_growing_random_pauses(s3: S3) -> None:
    s3.put("a", b"content")
    s3.fail(lambda request: request.method == "GET", status=503, code="SlowDown", times=4)
    store, path = store_of(f"{s3.url}/a", timeout_s=5)
    pauses: list[float] = []
    data, _ = with_retries(lambda: store.get(path, 0, None), what="a", sleep=pauses.append)
    assert data == b"content"
    assert [request.status for request in s3.requests] == [503, 503, 503, 503, 200]
    assert len(pauses) == 4
    assert all(0 <= pause <= 0.2 * 2**k for k, pause in enumerate(pauses))
    assert len(set(pauses)) == 4
