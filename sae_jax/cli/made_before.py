"""Tells whether what a command made before is what its flags ask for now.

What is made of an SAE and a text takes long, and is kept beside the run. Given again, with or
without the flags, a command opens it; with other flags it says what is different.
"""

import contextlib
import shutil
from collections.abc import Iterator

from sae_jax.errors import UserError
from sae_jax.json_files import checked


def check(args, place, there, settings: dict, names: list[str]) -> bool:
    """Returns whether what is there is what is asked for, and False where it is to be made again.

    Where it is, flags that are not given get the values that it was made by.

    Args:
      args: the flags.
      place: the directory that it is in.
      there: what is there, with `about.settings` and `about.d_sae`.
      settings: what it is to say of the SAE and its model; d_sae among it.
      names: the flags that it is made by, of which it has what was asked under "asked".

    Raises UserError if it is of another SAE, or was made by other flags than those given, and may
    not be made again.
    """
    before = there.about.settings | {"d_sae": there.about.d_sae}
    asked = checked(before.get("asked", {}), dict, f"what was asked for in {place}")
    moved = settings.get("result") is not None and settings["result"] == before.get("result")
    unlike = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in settings.items()
        if before.get(name, value) != value and not (moved and name == "sae")
    ]
    for name in (name for name in names if args[name].present):
        then, value = asked.get(name), args[name].value
        default = before.get(name) if then is None else None  # what a run had, and no flag said
        if then != value and str(value) not in str(default).split(","):
            unlike.append(f"{name} was {default if then is None else then!r} and is {value!r}")
    if not unlike:
        for name, value in ({"model": before.get("model")} | asked).items():
            if not args[name].present:
                args[name].value = value
        return True
    if not args.overwrite:
        other = ", or another --out" if args.sae else ""
        raise UserError(
            f"{place} was made otherwise: {'; '.join(unlike)}; give --overwrite to make it again"
            + other
        )
    return False


@contextlib.contextmanager
def replacing(place) -> Iterator:
    """Yields the directory to make something in that is to be in `place`.

    What is there already is kept until the new is whole, and then removed.
    """
    if not place.exists():
        yield place
        return
    new, old = (place.with_name(f"{age}.{place.name}") for age in ("new", "old"))
    for stopped in (new, old):  # before it took the place, or after
        if stopped.exists():
            shutil.rmtree(stopped)
    yield new
    place.rename(old)  # removing it takes long, and a part of it is of no use
    new.rename(place)
    shutil.rmtree(old)
