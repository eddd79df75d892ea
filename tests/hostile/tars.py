"""Tar files that `tarfile` would believe: built block by block, because no writer makes them."""


def header(name: bytes = b"a.json", size: int = 0, kind: bytes = b"0", *, size_field: bytes | None = None) -> bytes:
    """Return a header block with a right checksum."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = b"%011o\0" % size if size_field is None else size_field
    block[136:157] = b"00000000000\0" + b" " * 8 + kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def binary(number: int) -> bytes:
    """Return a size field in GNU's base 256, which may be negative or beyond any disk."""
    return (b"\xff" if number < 0 else b"\x80") + (number & ((1 << 88) - 1)).to_bytes(11, "big")


def extended(*facts: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """Return a PAX header."""
    body = b""
    for key, value in facts:
        record = b" " + key + b"=" + value + b"\n"
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length = len(str(length)) + len(record)
        body += str(length).encode() + record
    return member(b"pax", body, kind)


FIRST, LAST, END = member(b"0.json", b'{"text": "first"}'), member(b"z.json", b'{"text": "last"}'), bytes(1024)
SPARSE_1_0 = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))

ATTACKS: dict[str, tuple[bytes, list[str | None]]] = {
    "negative size": (header(b"1.json", size_field=binary(-1024)), ["a member of -1024 bytes"]),
    "negative size in an extension": (extended((b"size", b"-1024")) + member(b"1.json", b"x" * 600), ["a member of -1024 bytes"]),
    "a size of a billion gigabytes": (header(b"1.json", size_field=binary(10**18)), ["a member of 1000000000000000000 bytes"]),
    "8 GB of extension": (header(b"pax", size_field=binary(8 << 30), kind=b"x"), ["a header extension of 8589934592 bytes"]),
    "1 GB of name": (header(b"././@LongLink", 1 << 30, b"L"), ["a header extension of 1073741824 bytes"]),
    "extensions of extensions": (extended((b"a", b"b")) * 5000, ["recursion"]),
    "an extension of length 0": (member(b"pax", b"0 a=b\n", b"x") + member(b"1.json", b"{}"), ["invalid header"]),
    "a sparse map of letters": (
        extended((b"GNU.sparse.map", b"a,b"), (b"GNU.sparse.size", b"x")) + member(b"1.json", b"9" * 512),
        ["a header extension"],
    ),
    "a sparse map without lines": (extended(*SPARSE_1_0) + member(b"1.json", b"9" * 512), ["a header extension"]),
    "a terabyte of holes": (
        extended(*SPARSE_1_0, (b"GNU.sparse.name", b"1.json"), (b"GNU.sparse.realsize", b"1000000000000"))
        + member(b"s/1.json", b"1\n0\n1000000000000\n".ljust(512, b"\0")),
        ["a sparse member", None],
    ),
    "an old sparse member": (header(b"1.json", 512, b"S") + bytes(512), ["a sparse member", None]),
    "a name that is no UTF-8": (member(b"\xff\xfe.json", b'{"text": "x"}'), [None, None]),
    "a name with control characters": (member(b"\x1b[2J\n.json", b'{"text": "x"}'), [None, None]),
    "a name with a zero byte": (extended((b"path", b"a\0b.json")) + member(b"1.json", b'{"text": "x"}'), [None, None]),
    "a name that leads out": (member(b"../../etc/cron.d/x.json", b'{"text": "x"}'), [None, None]),
    "an absolute name": (member(b"/etc/cron.d/x.json", b'{"text": "x"}'), [None, None]),
    "links, devices and a pipe": (b"".join(header(b"%d.json" % k, kind=b"%d" % k) for k in (1, 2, 3, 4, 6)), [None]),
    "a tar in the tar": (member(b"1.tar", member(b"2.tar", FIRST + END) + END), ["expected a .json, .txt or media member", None]),
    "a gzip of a gzip": (member(b"1.json.gz", b"\x1f\x8b\x08" + bytes(40)), ["expected a .json, .txt or media member", None]),
    "a date that is no number": (extended((b"mtime", b"nan")) + member(b"1.json", b'{"text": "x"}'), [None, None]),
    "an owner of 5000 digits": (extended((b"uid", b"9" * 5000)) + member(b"1.json", b'{"text": "x"}'), [None, None]),
    "100,000 brackets": (member(b"1.json", b"[" * 100_000), ["nested too deeply", None]),
    "10,100 members of one name": (member(b"1.json", b"{}") + header(b"1.x") * 10_100, ["over 10000 members", None]),
}
"""Blocks that stand between two good rows, and what must be told of each row after the first: a part of its detail, or
None for a good one."""
