"""Finds what is at places that a user names: runs, sweeps and stores, or directories of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sae_jax.errors import UserError
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.sweep.watch import SweepRuns, Watched
from sae_jax.train import watching
from sae_jax.train.watching import at_once


class Place(NamedTuple):
    """A run, a sweep or a store, as `kind` says; `named` by the user, or found in a directory that
    is.
    """

    path: AnyPath
    kind: str
    named: bool


def unless_strange(place: Place, look: Callable[[AnyPath], Any]) -> Any:
    """Returns what a look at a place returns, or the exception that it raises.

    A directory may have another program's files in it, of the same names as ours. Of these it
    returns a line that says so.
    """
    try:
        return look(place.path)
    except (UserError, OSError) as error:
        return error if place.named else f"{place.path}: {error}"


def places_at(path: AnyPath) -> list[Place]:
    """Returns what is at a path, or all that are in the directory there.

    Raises UserError where there is nothing of the kind.
    """
    if found := _kind(path):
        return [Place(path, found, named=True)]
    if not path.exists():
        raise UserError(f"there is no {path}; name a run, a sweep or a store")
    entries = sorted(_entries(path), key=str)
    inside = list(zip(entries, at_once(_kind, entries), strict=True))
    if not any(kind for _, kind in inside):
        raise UserError(
            f"{path} is neither a run (config.json), a sweep (sweep.json) nor a store (meta.json), "
            f"and has none of them directly in it{_further_down(entries)}"
        )
    return [Place(entry, kind, named=False) for entry, kind in inside if kind]


def _further_down(entries: list[AnyPath]) -> str:
    """Returns a hint for a message: a directory to name instead, "" where there are none."""
    folder = next((entry for entry in entries if entry.is_dir()), None)
    return f"; name one further down, such as {folder}" if folder else ""


def _entries(path: AnyPath) -> list[AnyPath]:
    return list(path.iterdir()) if path.is_dir() else []


def _kind(path: AnyPath) -> str | None:
    names = {"sweep.json": "sweep", "meta.json": "store", "config.json": "run"}
    return next((kind for name, kind in names.items() if (path / name).is_file()), None)


class Followed:
    """Finds the runs in places that were named: those that are there now.

    A directory of runs is read again where that is cheap. In an object store its listing has every
    file of every run; there only sweeps grow.

    Attributes:
      strange: a line about each thing that is neither a run nor a sweep, though it looked so.
    """

    def __init__(self, named: list[AnyPath]):
        """Prepares to look at places; nothing is read yet."""
        self._named = named
        self._places: dict[AnyPath, list[Place]] = {}
        # Of the places that could be read.
        self._watched: dict[AnyPath, Callable[[], list[Watched]]] = {}
        self.strange: list[str] = []

    def find(self) -> list[Watched]:
        """Returns the runs. Raises UserError if a place that was named is none, or is away."""
        runs = []
        for path in self._named:
            for place in self._inside(path):
                runs += self._runs(place)
        return runs

    def _inside(self, path: AnyPath) -> list[Place]:
        known = self._places.get(path)
        if known is None or not (isinstance(path, ObjectPath) or known[0].named):
            self._places[path] = places_at(path)
        return self._places[path]

    def _runs(self, place: Place) -> list[Watched]:
        if place.path not in self._watched:
            found = unless_strange(place, lambda path: _runs_of(path, place.kind))
            if isinstance(found, Exception):
                raise found
            if isinstance(found, str):
                self.strange.append(found)
                found = list
            self._watched[place.path] = found
        return self._watched[place.path]()


def _runs_of(path: AnyPath, kind: str) -> Callable[[], list[Watched]]:
    """Returns a function that returns the runs at a path: a sweep may get more of them."""
    if kind == "store":
        return list
    if kind == "run":
        run = Watched(str(path), path, watching.read_steps(path))
        return lambda: [run]
    sweep = SweepRuns(path)
    sweep.find()  # raises what is wrong with it now
    return sweep.find
