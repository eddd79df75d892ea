"""Two builds that begin at one moment where there are no locks: the second at every point of the first's beginning."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from omniprep.errors import ConfigError
from omniprep.receipts import Claim, ClaimMode, open_build, read_claim
from omniprep.storage.folder import FileWriter, open_folder
from omniprep.storage.remote import RemoteFolder

MINE, OTHER = {"seed": 1}, {"seed": 2}


@dataclass(frozen=True)
class Watched(RemoteFolder):
    """A folder in which something happens before each request."""

    before: Callable[[], None] = lambda: None

    def _do(self, name: str, call: Any) -> Any:
        self.before()
        return super()._do(name, call)

    def create(self, name: str) -> FileWriter:
        self.before()
        return super().create(name)


def begins(folder: RemoteFolder, identity: dict[str, int], *, mode: ClaimMode = "continue") -> str:
    """Return why a build is refused, "" if it begins."""
    try:
        with open_build(folder, identity, mode=mode):
            return ""
    except ConfigError as error:
        return str(error)


def both_begin(mine: dict[str, int], other: dict[str, int]) -> Iterator[tuple[str, str, Claim | None]]:
    """Let the other build begin before each request of mine; yield why they were refused, and the claim that lies there then."""
    for moment in range(100):
        place = f"memory://{uuid.uuid4().hex}/set"
        told: list[str] = []
        passed = 0

        def before(moment: int = moment, place: str = place, told: list[str] = told) -> None:
            nonlocal passed
            passed += 1
            if passed == moment + 1:
                told.append(begins(RemoteFolder(place), other))

        refused = begins(Watched(place, before=before), mine)
        if not told:
            assert moment > 5, "requests of a build that begins"
            return
        yield refused, told[0], read_claim(open_folder(place))
    pytest.fail("a build that begins does not ask a hundred times")


def test_two_builds_of_one_recipe_both_begin() -> None:
    for refused, other_refused, claim in both_begin(MINE, MINE):
        assert (refused, other_refused) == ("", "")
        assert claim == Claim(recipe=MINE)


def test_of_two_builds_of_different_recipes_one_begins() -> None:
    who = []
    for refused, other_refused, claim in both_begin(MINE, OTHER):
        assert (refused == "") != (other_refused == "")
        assert "was built from another recipe (seed: " in refused + other_refused
        assert claim == Claim(recipe=OTHER if refused else MINE)
        who.append(refused == "")
    assert who == sorted(who), "the other while mine had not claimed the folder, mine from then on"
    assert set(who) == {True, False}


def test_a_recipe_that_cannot_be_read_is_written_anew() -> None:
    folder = RemoteFolder(f"memory://{uuid.uuid4().hex}/set")
    assert begins(folder, MINE) == ""
    folder.write("receipts/recipe.json", b'{"recipe": ')
    folder.write("receipts/lock", b"")
    assert begins(folder, OTHER) == ""
    assert read_claim(folder) == Claim(recipe=OTHER)
