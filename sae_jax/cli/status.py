"""Tells where runs, sweeps and stores stand: `sae-jax status`."""

from absl import flags

from sae_jax.cli import ports
from sae_jax.errors import UserError

SUMMARY = """Show where runs, sweeps and stores stand, and the time left; --serve shows curves.

  sae-jax status runs/a sweeps/b store      any number of them, also at s3:// or gs://
  sae-jax status runs                       all that are in a directory
  sae-jax status sweeps/b --serve           a page of their curves, for this machine only
  sae-jax status runs/a runs/b --serve=8800

Of a run it shows state, step and loss; of a sweep these of each pass, who trains it, and which runs
have failed; of a store that is being harvested the rows that are there. The time left is at the
speed of the last lines, or shards. Stale is what nobody has written to for longer than who is at
work would leave it: the same command as before goes on with it. When a run by itself was written,
an object store does not tell; --serve does after a while. Nothing of theirs is changed.

--serve opens http://127.0.0.1:PORT until Ctrl-C; from elsewhere, ssh -L 8421:127.0.0.1:8421 HOST.
While the page is open it reads what is new: local runs every 2 seconds, those in an object store
every 20, one or two requests for each run that has not ended, and one for each sweep. Runs that a
sweep gets by --extend or --rerun appear, and new ones in a local directory.
"""

_PORT = 8421


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax status`."""
    flags.DEFINE_multi_string(
        "path",
        None,
        "A run, a sweep, a store, or a directory of such; the flag's name may be left out.",
        flag_values=values,
    )
    ports.define("serve", _PORT, "Serve a page of the curves", values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    """Prints the status of each path, or serves the page of their curves until Ctrl-C."""
    del overrides
    from sae_jax import paths
    from sae_jax.sweep.places import places_at, unless_strange
    from sae_jax.train.watching import at_once

    if not args.path or not all(args.path):
        raise UserError("name a run, a sweep or a store, as in: sae-jax status runs/a")
    named = [paths.path(text) for text in args.path]
    if args.serve is not None:
        _serve(named, args.serve)
        return
    places = [place for path in named for place in places_at(path)]
    show = {"sweep": _sweep, "store": _store, "run": _run}
    for text in at_once(lambda place: unless_strange(place, show[place.kind]), places):
        if isinstance(text, Exception):
            raise text
        print(text)


def _sweep(path) -> str:
    from sae_jax.sweep import leases, status
    from sae_jax.sweep.directory import SweepDirectory

    return status.view(SweepDirectory(path), leases.Leases(path / "leases"))


def _run(path) -> str:
    from sae_jax.progress_bar import duration
    from sae_jax.train import watching

    found = watching.status(path)
    text = f"{path}: {found.state}, step {found.step:,} of {found.steps:,}"
    text += "" if found.loss is None else f", loss {found.loss:.5g}"
    if found.state == "failed":
        return f"{text}: {watching.failure(path)}"
    if found.state != "started":
        return text
    text += "" if found.seconds_left is None else f", {duration(found.seconds_left)} left"
    if found.silent is None:
        return f"{text}, if it goes on, which an object store does not tell"
    text += f", written {duration(found.silent)} ago"
    return f"{text}: stale, start it again to go on" if found.stale else text


def _store(path) -> str:
    from sae_jax.activations.progress import read_progress
    from sae_jax.progress_bar import duration

    found = read_progress(path)
    meta = found.meta
    sites = ", ".join(sorted(meta.sites))
    live = ", live" if meta.live else ""
    if meta.complete:
        return f"{path}: done, {meta.num_rows:,} rows of {sites}{live}"
    text = (
        f"{path}: started, {found.rows:,} of {meta.num_rows:,} rows of {sites}{live}, "
        f"{found.shards:,} of {meta.num_shards:,} shards"
    )
    text += "" if not found.rows_per_second else f", {found.rows_per_second:,.0f} rows/s"
    text += "" if found.seconds_left is None else f", {duration(found.seconds_left)} left"
    text += "" if found.silent is None else f", written {duration(found.silent)} ago"
    return f"{text}: stale, start the same harvest again to go on" if found.stale else text


def _serve(named: list, port: int) -> None:
    from sae_jax.sweep import live_page
    from sae_jax.sweep.places import Followed
    from sae_jax.sweep.watch import Watch

    places = Followed(named)
    runs = places.find()
    for text in places.strange:
        print(text)
    if not runs:
        raise UserError("--serve shows the curves of runs and sweeps, and here are only stores")
    server, address = live_page.open_server(Watch(places.find), port)
    with server:
        print(f"{len(runs):,} runs at {address}; Ctrl-C ends it", flush=True)
        server.serve_forever()
