"""S3 and what speaks its protocol, through s3fs: its session and credentials, but the requests one by one.

`s3fs.put_file` keeps half a gigabyte of parts in memory, forgets an upload that is interrupted, and starts from the first part
when the last one failed; its readers fetch 50 MB at a time. Here a part is tried again alone, an upload that failed is
aborted, a read is one request for the bytes asked for, and each answer's ETag says whether it is still the same file.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from omniprep.storage.folder import StorageError
from omniprep.storage.fsspec_store import FsspecStore, Head, changed
from omniprep.storage.retry import code_of, status_of

PART_BYTES = 8 << 20
"""Size of an upload's parts, each of which is in memory while it is sent. S3 wants 5 MiB at least, and 10,000 parts at most."""
_MAX_PARTS = 10_000

Retry = Callable[[Callable[[], Any]], Any]
"""Calls it, again where that helps."""


class S3Store(FsspecStore):
    """Objects of S3, by `bucket/key`."""

    def head(self, path: str) -> Head | None:
        """Return size and ETag of an object, or None if it is absent; no listing is asked."""
        try:
            answer = self._call("head_object", path)
        except FileNotFoundError:
            return None
        return Head(int(answer["ContentLength"]), str(answer.get("ETag", "")))

    def get(self, path: str, start: int, end: int | None, *, stamp: str = "") -> tuple[bytes, str]:
        """Return bytes [start, end) and the ETag. Raises `FileNotFoundError`, and `Conflict` if it is not of `stamp`."""
        from fsspec.asyn import sync

        if start == end:
            return b"", stamp
        options = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        if stamp:
            options["IfMatch"] = stamp
        bound_s = self.bound_s(None if end is None else end - start)
        try:
            answer: tuple[bytes, str] = sync(self.filesystem.loop, self._get, path, options, timeout=bound_s)
        except OSError as error:
            if status_of(error) == 412:
                raise changed(path) from None
            if status_of(error) == 416:  # the range starts at the end of the object
                return b"", stamp
            raise
        return answer

    async def _get(self, path: str, options: dict[str, str]) -> tuple[bytes, str]:
        bucket, key, _ = self.filesystem.split_path(path)
        answer = await self.filesystem._call_s3("get_object", Bucket=bucket, Key=key, **options)
        async with answer["Body"] as body:
            return await body.read(), str(answer.get("ETag", ""))

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object with one request."""
        self._call("put_object", path, num_bytes=len(data), Body=data)

    def put_parts(self, path: str, read: Callable[[int], bytes], num_bytes: int, retry: Retry) -> None:
        """Write an object in parts: it is there, whole, once the last request is answered. An upload that fails is aborted."""
        part_bytes = max(PART_BYTES, math.ceil(num_bytes / _MAX_PARTS))
        upload = str(retry(lambda: self._call("create_multipart_upload", path))["UploadId"])
        parts: list[dict[str, Any]] = []
        try:
            while data := read(part_bytes):
                number = len(parts) + 1
                answer = retry(
                    lambda data=data, number=number: self._call(  # type: ignore[misc]
                        "upload_part", path, num_bytes=len(data), Body=data, PartNumber=number, UploadId=upload
                    )
                )
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            self._complete(path, upload, parts, num_bytes, retry)
        except BaseException:
            self._abort(path, upload)
            raise

    def _complete(self, path: str, upload: str, parts: list[dict[str, Any]], num_bytes: int, retry: Retry) -> None:
        try:
            retry(lambda: self._call("complete_multipart_upload", path, UploadId=upload, MultipartUpload={"Parts": parts}))
        except FileNotFoundError:  # no such upload: an earlier try was done, and its answer lost
            head = retry(lambda: self.head(path))
            if head is None or head.num_bytes != num_bytes or not head.stamp.strip('"').endswith(f"-{len(parts)}"):
                raise

    def _abort(self, path: str, upload: str) -> None:
        """Free the parts. Where this fails too, the bucket's rule for unfinished uploads does it."""
        with suppress(Exception):
            self._call("abort_multipart_upload", path, UploadId=upload)

    def version(self, path: str) -> str | None:
        """Return the ETag, or None if the object is absent."""
        head = self.head(path)
        return None if head is None else head.stamp

    def put_if(self, path: str, data: bytes, version: str | None) -> None:
        """Write an object if it is still of `version`: S3 itself decides. Raises `Conflict`.

        Some that speak its protocol take the condition and ignore it: there, the caller's look before is all there is.
        """
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            self._call("put_object", path, num_bytes=len(data), Body=data, **condition)
        except OSError as error:
            if status_of(error) == 412 or (version is not None and code_of(error.__cause__ or error) == "NoSuchKey"):
                raise changed(path) from None
            if status_of(error) != 501:
                raise
            self.put(path, data)  # the store knows no conditions

    def remove(self, path: str) -> None:
        """Remove an object; one that is not there is no error."""
        self._call("delete_object", path)

    def _call(self, method: str, path: str, *, num_bytes: int = 0, **options: Any) -> Any:
        bucket, key, _ = self.filesystem.split_path(path)
        if not key:
            raise StorageError(f"s3://{bucket}: expected a folder or file in the bucket, got the bucket itself")
        return self._bounded(self.filesystem.call_s3, method, num_bytes=num_bytes, Bucket=bucket, Key=key, **options)
