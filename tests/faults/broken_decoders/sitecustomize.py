"""Decoders that fail: read by every Python process that starts with this folder on PYTHONPATH, so without hooks in OmniPrep.

`OMNIPREP_TEST_FAULTS` names a JSON file: `{"0003.jpg": "segfault", "0007.wav": "gate"}`, what happens when a medium of that
name is decoded. Only pictures and sounds pass here.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

PLAN = os.environ.get("OMNIPREP_TEST_FAULTS")
DECODERS = ("decode_audio", "decode_image")
MODULE = "omniprep.encode.media_items"


def fail(action, media):
    match action:
        case "segfault":
            import ctypes

            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "hang in C":
            import itertools

            sum(itertools.repeat(0))
        case "hang in Python":
            while True:
                time.sleep(0.01)
        case "eat memory":
            eaten = [bytearray(b"x") * (1 << 20)]
            while True:
                eaten.append(bytearray(b"x") * (1 << 20))
        case "become a pipe":  # after it was looked at: the real decoder opens it
            media.path.unlink()
            os.mkfifo(media.path)
        case "gate":  # leave the process's id, wait to be let through
            folder = Path(PLAN).parent
            (folder / f"at-{Path(media.name).name}").write_text(str(os.getpid()))
            while not (folder / "open").exists():
                time.sleep(0.005)
        case _:
            time.sleep(float(action))


def broken(decode):
    def decode_or_fail(media, *arguments, **options):
        action = json.loads(Path(PLAN).read_text()).get(Path(media.name).name)
        if action is not None:
            fail(action, media)
        return decode(media, *arguments, **options)

    return decode_or_fail


class Finder:
    """Breaks the decoders of one module as soon as it is imported."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for decoder in DECODERS:
                setattr(module, decoder, broken(getattr(module, decoder)))

        spec.loader.exec_module = exec_module
        return spec


if PLAN:
    sys.meta_path.insert(0, Finder())
