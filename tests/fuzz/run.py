"""Reads damaged files of every format, many of them, and says what did not end as it must.

    python tests/fuzz/run.py --cases=100000                      all formats, so many cases in all
    python tests/fuzz/run.py --cases=5000 --format=store,model   of these
    python tests/fuzz/run.py --format=store --case=17            one case, with its trace

A case is an example of a format with one to three changes, which the seed, the format's name and
the case's number decide. Reading it may end in two ways: in the right result, or in a UserError of
one line. Anything else is a failure: another exception, NaN where a format has none, damage that a
checksum should have told, a file outside the example that was read or written, more memory or time
than the limits, a crash. Failures are counted by what they are and where in sae_jax they came up;
with each is the command that shows its first case again.

With --by_cost, formats that take longer to read get fewer cases.

Cases run in processes that are forked from this one after everything is imported, hundreds in each.
One that crashes or hangs is replaced, and its case is the failure. Stopped, it goes on with
--first=N. The examples are made in a temporary folder, or kept in --examples=FOLDER.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from multiprocessing import connection as connections

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # what tests share
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import mutators  # noqa: E402
import numpy as np  # noqa: E402
import tqdm  # noqa: E402

import sae_jax  # noqa: E402
from sae_jax.errors import UserError  # noqa: E402

PACKAGE = pathlib.Path(sae_jax.__file__).parent
_LONGEST_MESSAGE = 2000
_OUTSIDE = "/etc/hostname"  # one of the names that mutators write into files
_FORK = multiprocessing.get_context("fork")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a case may take.

    After `seconds` it is interrupted, and its process is ended if it has not answered for
    `patience` more.
    """

    seconds: float = 10.0
    memory: int = 1 << 30  # bytes, more than before the case
    patience: float = 50.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that did not end as it must.

    `what` is a class of exception or a few words, `place` where in the package it came up.
    """

    format: str
    case: int
    what: str
    place: str
    message: str
    change: str

    @property
    def kind(self) -> tuple[str, str, str]:
        """What failures with one cause share."""
        return self.format, self.what, self.place


@dataclasses.dataclass
class Report:
    """What came of the cases of a format."""

    cases: int = 0
    right: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: list[Failure] = dataclasses.field(default_factory=list)

    def kinds(self) -> list[tuple[Failure, int]]:
        """Returns the first failure of each kind and their number, the most frequent first."""
        counts = collections.Counter(failure.kind for failure in self.failures)
        first = {failure.kind: failure for failure in reversed(self.failures)}
        return [(first[kind], count) for kind, count in counts.most_common()]


class TimedOut(BaseException):
    """A case takes too long. It is no Exception, so that no reader takes it for one of its own."""


# ------------------------------------------------------------------------------------- one process


class _Example:
    """An example of a format in this process's own folder, to be damaged and put back."""

    def __init__(self, format, folder: pathlib.Path, source: pathlib.Path):
        self._format, self.folder = format, folder
        shutil.copytree(source, folder)
        files = (file for file in source.rglob("*") if file.is_file())
        self.originals = {f.relative_to(source).as_posix(): f.read_bytes() for f in files}
        self.files = format.files(sorted(self.originals))
        self.result = _read(format, folder)

    def put_back(self) -> list[str]:
        """Undoes the damage, and returns the names of files that reading left in the folder."""
        new = mutators.put_back(self.folder, self.originals)
        return [] if self._format.rewrites else new


def _read(format, folder: pathlib.Path):
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    try:
        return format.read(folder, scratch)
    finally:
        shutil.rmtree(scratch)


class _Reader:
    """Runs cases in this process, in a folder of its own."""

    def __init__(self, formats: dict, examples: pathlib.Path, own: pathlib.Path, limits: Limits):
        self._formats, self._sources, self._own = formats, examples, own
        self._limits, self._examples = limits, {}
        self._watched: str | None = None
        self._opened: set[str] = set()
        own.mkdir(parents=True)
        signal.signal(signal.SIGALRM, self._time_out)
        sys.addaudithook(self._audit)

    def run(self, name: str, seed: int, case: int) -> str | Failure:
        """Returns "right" or "refused", or the failure of a case."""
        format = self._formats[name]
        try:
            example, change, changed = self.damage(name, seed, case)
        except BaseException as error:
            what, place, message = _described(error)
            return Failure(name, case, f"no example: {what}", place, message, "")
        self._watched = None if format.place else str(example.folder)
        self._opened.clear()
        try:
            with self._limited():
                result = _read(format, example.folder)
            ending = self._judge(format, example, changed, result)
        except UserError as error:
            ending = _unfit(error)
        except BaseException as error:
            ending = _described(error)
        finally:
            self._watched = None
        if self._opened:
            ending = ("read a file outside", "?", min(self._opened))
        new = example.put_back()
        if new:
            ending = ("left files behind", "?", ", ".join(new)[:200])
        beside = [path for path in example.folder.parent.iterdir() if path != example.folder]
        for path in beside:
            ending = ("wrote outside", "?", path.name[:200])
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if isinstance(ending, str):
            return ending
        what, place, message = ending
        return Failure(name, case, what, place, message, f"{example.folder.name}/{change}")

    def damage(self, name: str, seed: int, case: int) -> tuple[_Example, str, str]:
        """Returns the example of a case, damaged, what was done to it, and to which file."""
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), case])
        sources = sorted(path.name for path in (self._sources / name).iterdir())
        chosen = sources[rng.integers(len(sources))]
        if (name, chosen) not in self._examples:
            place, source = self._own / f"{name}-{chosen}" / chosen, self._sources / name / chosen
            shutil.rmtree(place.parent, ignore_errors=True)  # of an example that cannot be read
            place.parent.mkdir()
            self._examples[name, chosen] = _Example(self._formats[name], place, source)
        example = self._examples[name, chosen]
        change = mutators.damage(rng, example.folder, example.files)
        return example, change, change.partition(": ")[0]

    @contextlib.contextmanager
    def _limited(self):
        """Ends what is within when it takes too long, and refuses it too much memory."""
        signal.setitimer(signal.ITIMER_REAL, self._limits.seconds)
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + self._limits.memory, most))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    def _time_out(self, *_):
        raise TimedOut

    def _audit(self, event: str, values: tuple) -> None:
        """Notes files that are opened beside an example that names no other places."""
        if event != "open" or not self._watched or not isinstance(values[0], str | os.PathLike):
            return
        path = os.path.normpath(values[0])
        inside = (self._watched, f"{os.path.dirname(self._watched)}/scratch")
        if path == _OUTSIDE or path.startswith(str(self._own)) and not path.startswith(inside):
            self._opened.add(path)

    def _judge(self, format, example: _Example, changed: str, result) -> str | tuple:
        for name, array in result.items():
            if format.finite and array.dtype.kind in "fc" and not np.isfinite(array).all():
                return "not finite", "?", f"{name} has NaN or infinity"
        if not format.is_sealed(changed):
            return "right"
        if result.keys() != example.result.keys():
            return "damage unnoticed", "?", "other arrays came out"
        for name, array in result.items():
            there = example.result[name]
            if array.shape != there.shape or array.tobytes() != there.tobytes():
                return "damage unnoticed", "?", f"{name} is another"
        return "right"


def _unfit(error: UserError) -> str | tuple:
    """Returns "refused" if the text of a UserError is fit to be shown, else what is wrong."""
    text, place = str(error), _place(traceback.extract_tb(error.__traceback__))
    if len(text.splitlines()) != 1:
        return "UserError of several lines", place, repr(text[:300])
    if len(text) > _LONGEST_MESSAGE:
        return "UserError of a thousand words", place, repr(text[:300])
    return "refused"


def _described(error: BaseException) -> tuple[str, str, str]:
    """Returns the class of an exception, its place in the package, and its text."""
    names = {TimedOut: "hang", MemoryError: "memory"}
    what = next(
        (name for cls, name in names.items() if isinstance(error, cls)), type(error).__name__
    )
    frames = traceback.extract_tb(error.__traceback__)
    return what, _place(frames), f"{_where(frames[-1])}: {error!r:.200}"


def _place(frames) -> str:
    ours = [frame for frame in frames if frame.filename.startswith(str(PACKAGE))]
    return _where(ours[-1]) if ours else "?"


def _where(frame) -> str:
    file = pathlib.Path(frame.filename)
    near = file.is_relative_to(PACKAGE)
    name = file.relative_to(PACKAGE.parent) if near else pathlib.Path(*file.parts[-3:])
    return f"{name}:{frame.lineno}"


def _data_bytes() -> int:
    """Returns how much writable memory of its own this process has mapped."""
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[5]) * resource.getpagesize()


def _work(connection, case, seed, formats, examples, own, limits) -> None:
    """Takes (format, first case, last + 1) from the connection until there is None."""
    log = open(own.with_name(f"{own.name}.log"), "w")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    faulthandler.enable(log)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process, and is no reader's failure
    reader = _Reader(formats, examples, own, limits)
    while task := connection.recv():
        name, first, stop = task
        start, endings = time.monotonic(), []
        for case.value in range(first, stop):
            endings.append(reader.run(name, seed, case.value))
        connection.send((name, endings, time.monotonic() - start))


def _make_examples(formats: dict, examples: pathlib.Path) -> None:
    """Makes the examples of the formats that have none yet."""
    for name, format in formats.items():
        if not (examples / name).is_dir():
            temporary = examples / f"{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            format.make(temporary)
            temporary.rename(examples / name)


# ------------------------------------------------------------------------------------ the processes


class _Worker:
    """A process that runs cases. What it is at is `task`, from which `case` tells the case."""

    def __init__(self, number: int, *arguments, root: pathlib.Path):
        self.connection, theirs = _FORK.Pipe()
        self.case = _FORK.Value("q", -1, lock=False)
        own = root / f"process-{number}"
        self._log = own.with_name(f"{own.name}.log")
        self.process = _FORK.Process(
            target=_work, args=(theirs, self.case, *arguments[:3], own, arguments[3]), daemon=True
        )
        self.process.start()
        theirs.close()
        self.task, self.seen, self.since = None, -1, time.monotonic()

    def give(self, task) -> None:
        """Starts a task."""
        self.task, self.seen, self.since = task, -1, time.monotonic()
        self.case.value = -1
        self.connection.send(task)

    def finish(self) -> None:
        """Notes that its task is done."""
        self.task = None
        self.case.value = -1

    def hangs(self, seconds: float) -> bool:
        """Whether it has been at one case for so long."""
        if self.case.value != self.seen:
            self.seen, self.since = self.case.value, time.monotonic()
        return self.seen >= 0 and time.monotonic() - self.since > seconds

    def end(self, hung: bool) -> Failure:
        """Waits for the process to end, or ends it if it hung; returns the failure of its case."""
        if hung:
            os.kill(self.process.pid, signal.SIGABRT)  # faulthandler writes where it is
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        what = "hang" if hung else f"signal {-code}" if code < 0 else f"exit {code}"
        text = self._log.read_text(errors="replace")
        found = re.findall(
            r'File "(\S+)", line (\d+)', text.rpartition("(most recent call first)")[2]
        )
        ours = [f"{file.rpartition('/sae_jax/')[2]}:{line}" for file, line in found
                if file.startswith(str(PACKAGE))]  # fmt: skip
        place = f"sae_jax/{ours[0]}" if ours else "?"
        last = text.strip().splitlines()[-1:] or [""]
        return Failure(self.task[0], self.case.value, what, place, last[0][:200], "")


def fuzz(
    formats: dict,
    cases: dict[str, int],
    seed: int = 0,
    first: int = 0,
    root: pathlib.Path | None = None,
    examples: pathlib.Path | None = None,
    processes: int | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> dict[str, Report]:
    """Runs cases of each format, and returns what came of them.

    Args:
      formats: formats by name.
      cases: how many of each, by name.
      seed: decides, with a case's number, all of it.
      first: the first case's number.
      root: a folder to work in.
      examples: a folder with the examples, or in which they are made.
      processes: how many run cases at once; by default one for each core.
      limits: what a case may take.
    """
    root = root or pathlib.Path(tempfile.mkdtemp(prefix="sae_jax_fuzz_"))
    examples = examples or root / "examples"
    maker = _FORK.Process(target=_make_examples, args=(formats, examples))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the examples could not be made")
    tasks = collections.deque()
    for name, format in formats.items():
        size = max(5, 200 // format.cost)
        last = first + cases[name]
        tasks += [(name, start, min(start + size, last)) for start in range(first, last, size)]
    reports, numbers = {name: Report() for name in formats}, iter(range(10**9))

    def new_worker() -> _Worker:
        return _Worker(next(numbers), seed, formats, examples, limits, root=root)

    count = min(processes or os.cpu_count() or 1, len(tasks))
    workers = [new_worker() for _ in range(count)]
    for worker in workers:
        worker.give(tasks.popleft())
    tqdm.tqdm.monitor_interval = 0  # no thread in a process that forks
    bar = tqdm.tqdm(total=sum(cases.values()), unit="case", disable=not sys.stderr.isatty())
    with bar:
        while workers:
            ready = connections.wait([worker.connection for worker in workers], timeout=1)
            for worker in list(workers):
                ended = hung = worker.hangs(limits.seconds + limits.patience)
                if worker.connection in ready:
                    try:
                        name, endings, seconds = worker.connection.recv()
                        _count(reports[name], endings, seconds)
                        bar.update(len(endings))
                        worker.finish()
                    except (EOFError, ConnectionResetError):
                        ended = True
                if ended:
                    workers.remove(worker)
                    name, failure = worker.task[0], worker.end(hung)
                    # Those before it in the task went unreported; they run again.
                    tasks.extendleft(_around(worker.task, failure.case))
                    _count(reports[name], [failure], 0.0)
                    bar.update(1)
                    workers.append(worker := new_worker())
                if worker.task is None or ended:
                    if tasks:
                        worker.give(tasks.popleft())
                    else:
                        worker.connection.send(None)
                        worker.process.join()
                        workers.remove(worker)
    return reports


def _around(task: tuple, case: int) -> list[tuple]:
    """Returns the task in two parts, without a case of it."""
    name, first, stop = task
    parts = [(name, first, case), (name, case + 1, stop)]
    return [part for part in parts if part[1] < part[2]]


def _count(report: Report, endings: list, seconds: float) -> None:
    report.cases += len(endings)
    report.right += endings.count("right")
    report.refused += endings.count("refused")
    report.seconds += seconds
    report.failures += [ending for ending in endings if isinstance(ending, Failure)]


def summary(reports: dict[str, Report], again: str) -> str:
    """Returns a table of the formats, and the kinds of their failures with how to see each.

    Args:
      reports: what `fuzz` returned.
      again: the command that runs a case, without its format and number.
    """
    lines = [
        f"{'format':22}{'cases':>8}{'right':>8}{'refused':>9}{'failed':>8}{'kinds':>7}{'ms':>8}"
    ]
    for name, report in reports.items():
        kinds = len({failure.kind for failure in report.failures})
        speed = 1000 * report.seconds / max(1, report.cases)
        lines.append(
            f"{name:22}{report.cases:8}{report.right:8}{report.refused:9}"
            f"{len(report.failures):8}{kinds:7}{speed:8.1f}"
        )
    for report in reports.values():
        for failure, count in report.kinds():
            lines += [
                "",
                f"{failure.format}: {failure.what} at {failure.place}, {count} times",
                f"  {failure.message}",
                f"  {failure.change:.300}",
                f"  {again} --format={failure.format} --case={failure.case}",
            ]
    return "\n".join(lines)


def show(formats: dict, name: str, seed: int, case: int, root, examples, limits: Limits) -> int:
    """Runs one case, prints what was done and what came of it, and leaves the damaged files."""

    def one() -> None:
        _make_examples({name: formats[name]}, examples)
        reader = _Reader(formats, examples, root / "again", limits)
        example, change, _ = reader.damage(name, seed, case)
        kept = root / "damaged" / example.folder.name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(example.folder, kept, symlinks=True)
        print(f"{name} {example.folder.name}/{change}\nthe damaged files: {kept}", flush=True)
        example.put_back()
        try:
            reader.damage(name, seed, case)
            with reader._limited():
                _read(formats[name], example.folder)
        except BaseException:
            traceback.print_exc()
        example.put_back()
        print(reader.run(name, seed, case), flush=True)

    shutil.rmtree(root / "again", ignore_errors=True)
    faulthandler.enable()
    process = _FORK.Process(target=one)
    process.start()
    process.join()
    return process.exitcode


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line says, and returns 1 if there was a failure."""
    from formats import FORMATS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=len(FORMATS) * 1000, help="of all formats")
    parser.add_argument("--by_cost", action="store_true", help="fewer of formats that take longer")
    parser.add_argument("--format", default=",".join(FORMATS), help="one, or several with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--case", type=int, help="show this case alone, with its trace")
    parser.add_argument("--processes", type=int, help="by default one for each core")
    parser.add_argument(
        "--seconds", type=float, default=Limits.seconds, help="that a case may take"
    )
    parser.add_argument("--memory", type=float, default=1.0, help="GiB that a case may take")
    parser.add_argument("--examples", help="a folder to keep the undamaged examples in")
    parser.add_argument("--json", help="a file for the failures")
    flags = parser.parse_args(argv)
    names = flags.format.split(",")
    if unknown := set(names) - set(FORMATS):
        parser.error(f"there is no format {min(unknown)}; there are {', '.join(FORMATS)}")
    missing = {name: FORMATS[name].missing() for name in names}
    for name in names:
        if missing[name]:
            print(f"left out: {name}, which needs {', '.join(missing[name])}")
    formats = {name: FORMATS[name] for name in names if not missing[name]}
    limits = Limits(flags.seconds, int(flags.memory * (1 << 30)))
    root = pathlib.Path(tempfile.mkdtemp(prefix="sae_jax_fuzz_"))
    if not jax.config.jax_compilation_cache_dir:  # for the processes to share
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    examples = pathlib.Path(flags.examples).absolute() if flags.examples else root / "examples"
    if flags.case is not None:
        return show(formats, names[0], flags.seed, flags.case, root, examples, limits)
    costs = {name: format.cost if flags.by_cost else 1 for name, format in formats.items()}
    unit = flags.cases / sum(1 / cost for cost in costs.values())
    cases = {name: math.ceil(unit / cost) for name, cost in costs.items()}
    reports = fuzz(formats, cases, flags.seed, flags.first, root, examples, flags.processes, limits)
    again = f"python tests/fuzz/run.py --seed={flags.seed} --examples={examples}"
    print(summary(reports, again))
    if flags.json:
        values = {name: dataclasses.asdict(report) for name, report in reports.items()}
        pathlib.Path(flags.json).write_text(json.dumps(values, indent=1))
    failed = any(report.failures for report in reports.values())
    if not failed:
        shutil.rmtree(root)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
