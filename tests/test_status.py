"""`sae-jax status`: where runs, sweeps and stores stand, and the page of their curves."""

import contextlib
import dataclasses
import http.client
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid

import faulty_server
import numpy as np
import pytest
import s3_server
from training import make_config, make_store, sparse_rows

from sae_jax import paths
from sae_jax.activations import progress
from sae_jax.activations.writer import StoreWriter
from sae_jax.cli import main
from sae_jax.config import to_dict
from sae_jax.errors import UserError
from sae_jax.sweep import grid, leases, live_page, places, status, watch
from sae_jax.sweep.directory import SweepDirectory, expand
from sae_jax.train import watching
from sae_jax.train.results import planned

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(params=["here", "s3"])
def place(request, tmp_path):
    """A new folder on this machine, and one in an object store."""
    if request.param == "here":
        return tmp_path / "place"
    request.getfixturevalue("s3")
    return paths.path(s3_server.BUCKET) / str(uuid.uuid4())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


def write(file, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    paths.write(file, text)


def line(step: int, **values) -> str:
    values = {"loss": 100 / step, "tokens": 64 * step, "tokens_per_second": 640.0} | values
    return json.dumps({"step": step} | values) + "\n"


def make_run(path, config, *steps: int, **files: dict) -> None:
    write(path / "config.json", json.dumps(to_dict(config)))
    write(path / "metrics.jsonl", "".join(map(line, steps)))
    for name, values in files.items():
        write(path / f"{name}.json", json.dumps(values))


def test_growing_metrics_are_read_once(place):
    """What is new, and all of it again where a run goes on from a checkpoint."""
    file = place / "metrics.jsonl"
    metrics = watching.GrowingMetrics(file)

    def read():
        lines, restarted = metrics.read_new()
        return [values["step"] for values in lines], restarted

    assert read() == ([], False)
    whole = "".join(map(line, range(1, 8)))
    write(file, whole + '{"step": 8, "lo')
    assert read() == ([1, 2, 3, 4, 5, 6, 7], False)
    assert read() == ([], False)
    write(file, whole + line(8) + "no line\n" + line(9))
    assert read() == ([8, 9], False)
    write(file, whole)
    assert read() == ([1, 2, 3, 4, 5, 6, 7], True), "shorter"
    write(file, whole.replace("640", "641") + line(8))
    assert read() == ([1, 2, 3, 4, 5, 6, 7, 8], True), "longer, and written anew"
    write(file, whole.replace("640", "641") + line(8) + line(9))
    assert read() == ([9], False)


def test_a_run_is_done_failed_going_on_or_stale(store, tmp_path, capsys):
    config = make_config(store, steps=50)
    runs = {name: tmp_path / "runs" / name for name in ("done", "failed", "going", "stale")}
    make_run(runs["done"], config, 50, result={"eval_loss": 1.0})
    make_run(runs["failed"], config, 5, failed={"reason": "the loss became NaN"})
    make_run(runs["going"], config, 10, 20)
    make_run(runs["stale"], config, 25)
    for file in runs["stale"].iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    write(tmp_path / "runs" / "a_model" / "config.json", '{"model_type": "llama"}')
    write(tmp_path / "runs" / "tool" / "meta.json", '{"title": "x"}')
    assert main(["status", str(tmp_path / "runs")]) == 0
    shown = dict(
        text.split("/runs/", 1)[1].split(": ", 1) for text in capsys.readouterr().out.splitlines()
    )
    assert shown["done"] == "done, step 50 of 50, loss 2"
    assert shown["failed"] == "failed, step 5 of 50, loss 20: the loss became NaN"
    assert shown["going"] == "started, step 20 of 50, loss 5, 0:00:03 left, written 0:00:00 ago"
    assert "written 1:00:00 ago: stale, start it again" in shown["stale"]
    assert "left" not in shown["stale"]
    assert "missing required field `train`" in shown["a_model"], "what is no run stops nothing"
    assert "is not a store's" in shown["tool"]
    assert main(["status", str(tmp_path / "runs" / "a_model")]) == 2
    (tmp_path / "up" / "further").mkdir(parents=True)
    (tmp_path / "runs").rename(tmp_path / "up" / "further" / "runs")
    capsys.readouterr()
    assert main(["status", str(tmp_path / "up")]) == 2
    assert f"one further down, such as {tmp_path}/up/further" in capsys.readouterr().err


def test_a_store_tells_its_speed_and_what_is_left(place):
    writer = StoreWriter.create_or_resume(
        str(place), sites={"x": 16}, num_sequences=64, context_length=8, dtype="float32"
    )
    shards = writer.missing_shards()
    assert len(shards) == 8
    rows = sparse_rows(512)
    for shard in shards[:3]:
        block = rows[shard.sequences.start * 8 : shard.sequences.stop * 8]
        writer.write_shard(shard.index, {"x": block})
    begin = time.time()
    for number in range(3):  # one every 10 s, the last 5 s ago
        _date(place / "written" / f"{number:06d}.npz", begin - 25 + 10 * number)
    found = progress.read_progress(place)
    assert (found.shards, found.rows, found.stale) == (3, 192, False)
    assert found.rows_per_second == pytest.approx(6.4)
    assert found.seconds_left == pytest.approx(50)
    assert found.silent == pytest.approx(5, abs=4)
    for number in range(3):
        _date(place / "written" / f"{number:06d}.npz", begin - 1025 + 10 * number)
    found = progress.read_progress(place)
    assert found.stale and found.seconds_left is None
    for number in range(3):  # 10 minutes each, of which a rest of 12 hours between is no part
        writer.write_shard(3 + number, {"x": rows[:64]})
    for number, minutes in enumerate((765, 755, 745, 25, 15, 5)):
        _date(place / "written" / f"{number:06d}.npz", begin - 60 * minutes)
    found = progress.read_progress(place)
    assert found.rows_per_second == pytest.approx(64 / 600) and not found.stale
    if isinstance(place, pathlib.Path):
        return
    for number in range(6):  # as writers of before left them
        _date(place / "written" / f"{number:06d}.npz", None)
    found = progress.read_progress(place)
    assert (found.rows, found.silent, found.stale) == (384, None, False)


def test_a_store_may_be_finished_while_it_is_looked_at(tmp_path, monkeypatch):
    writer = StoreWriter.create_or_resume(
        str(tmp_path), sites={"x": 16}, num_sequences=8, context_length=8, dtype="float32"
    )
    rows = sparse_rows(64)
    for shard in writer.missing_shards():
        size = shard.sequences.stop - shard.sequences.start
        writer.write_shard(shard.index, {"x": rows[: 8 * size]})

    def finish(folder, notes):
        writer.finish()
        raise UserError("the notes are gone")

    monkeypatch.setattr(progress, "_times", finish)
    found = progress.read_progress(tmp_path)
    assert found.meta.complete and found.rows == 64
    monkeypatch.undo()
    assert progress.read_progress(tmp_path).rows == 64


def _date(notes, when: float | None) -> None:
    """Gives the notes of a shard the time at which they were written, None for none."""
    if isinstance(notes, pathlib.Path):
        os.utime(notes, (when, when))
        return
    arrays = dict(np.load(io.BytesIO(notes.read_bytes())))
    arrays.pop("time")
    arrays |= {} if when is None else {"time": np.float64(when)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    notes.write_bytes(buffer.getvalue())


@pytest.mark.slow
def test_the_silent_are_told_from_the_first_look_on(s3, caplog):
    """Who is dead by its own clock, whatever this reader has seen of it, and who follows it."""
    place = paths.path(s3_server.BUCKET) / str(uuid.uuid4())
    reader = leases.Leases(place, 60)
    dead = leases.Leases(place, 0.6)._files.create("a.1", "0.6 host 7")
    _write_beat(place / "a.1", 14)
    for _ in range(2):
        held = reader.holder("a")
        assert held.alive and held.silent and held.heard_of == "heard of 14 s ago by its clock"
    assert reader.claim("a") is None
    time.sleep(0.7)
    with caplog.at_level("INFO"), reader.claim("a"):
        assert re.search("took over a from host 7, heard of 1[45] s ago", caplog.text)
    caplog.clear()
    with caplog.at_level("INFO"), reader.claim("a"), reader.claim("b"):
        assert not caplog.text, "it was given back"
    beaten = leases.Leases(place, 60)
    with reader.claim("c") as lease:
        beaten.holder("c")
        lease._claim.beat()
        _write_beat(place / "c.1", 90)
        held = beaten.holder("c")
        assert held.told is None and not held.silent, "a touch that was seen is no matter of clocks"
    del dead


def _write_beat(file, seconds: float) -> None:
    """Makes a lease say that its last heartbeat was so many seconds ago."""
    text, _, beat = file.read_text().partition("\n")
    file.write_bytes(f"{text}\n{beat.split(' ')[0]} {time.time() - seconds:.0f}".encode())


def test_an_object_stores_lease_tells_by_its_clock_who_is_silent(s3):
    place = paths.path(s3_server.BUCKET) / str(uuid.uuid4())
    with leases.Leases(place, 60).claim("a"):
        held = leases.Leases(place, 60).holder("a")
        assert held.alive and not held.silent and "by its clock" in held.heard_of
        _write_beat(place / "a.1", 90)
        held = leases.Leases(place, 60).holder("a")
        assert held.alive, "a clock is no reason to take work over"
        assert held.silent and held.told == pytest.approx(90, abs=3)


def pretend(place, store, seeds: int = 3) -> SweepDirectory:
    """A sweep of which each third run is done, each third under way, and each third waits."""
    runs = expand(make_config(store), grid.sweep("data.seed", range(seeds)))
    directory = SweepDirectory.start(place, runs)
    for number, run in enumerate(directory.runs):
        path = directory.run_path(run)
        if number % 3 == 0:
            make_run(path, run.config, *range(1, 51), result=planned(run.config))
        if number % 3 == 1:
            make_run(path, run.config, *range(1, 21))
    return directory


def test_the_time_left_of_a_sweep_counts_what_waits(store, tmp_path):
    directory = pretend(tmp_path / "S", store)
    with leases.Leases(tmp_path / "S" / "leases").claim(f"pass-{directory.runs[1].id}"):
        shown = status.view(directory, leases.Leases(tmp_path / "S" / "leases"))
    # 30 of 50 steps at 10 a second by the one worker, and then the 50 of the pass that waits.
    assert "1 done; of those started 1 in training; 0:00:08 left" in shown
    assert "1 waiting, 1 started, 1 done" in shown and "range of last losses" in shown
    shown = status.view(directory, leases.Leases(tmp_path / "S" / "leases"))
    assert "0 in training, 1 stale: a worker that is there takes over" in shown
    assert " left" not in shown.splitlines()[0]


@pytest.mark.slow
def test_looks_at_a_sweep_in_an_object_store_cost_few_requests(s3, store, monkeypatch):
    monkeypatch.setattr(watch, "_SECONDS", {True: 0.0})
    place = paths.path(s3_server.BUCKET) / str(uuid.uuid4())
    directory = pretend(place, store, seeds=12)
    with faulty_server.serve(s3, 0.0) as requests:
        paths.path(place).is_file()  # opens the bucket

        def cost(look) -> int:
            before = len(requests)
            look()
            return len(requests) - before

        of_status = cost(lambda: status.view(directory, leases.Leases(place / "leases")))
        # The states, the metrics of what began, the leases, and the results of what is done.
        assert of_status <= 12 + 2 * 8 + 1 + 2 * 4
        watched = watch.Watch(watch.SweepRuns(place).find)
        assert cost(lambda: watched.since(0)) <= 2 * 12
        assert cost(lambda: watched.since(0)) <= 1 + 2 * 8, "never again for what is done"
        going = directory.run_path(directory.runs[1]) / "metrics.jsonl"
        write(going, going.read_text() + line(21))
        watched.since(0)
        assert cost(lambda: watched.since(0)) <= 1 + 2 * 8 - 1, "no state of what grew"


@contextlib.contextmanager
def served(runs, monkeypatch):
    """Yields a function that gets a path of the page."""
    monkeypatch.setattr(watch, "_SECONDS", {False: 0.0})
    server, address = live_page.open_server(watch.Watch(lambda: runs), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def get(path: str, **headers: str):
        request = urllib.request.Request(address + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers, answer.read()

    try:
        yield get
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_page_reads_what_is_new(store, tmp_path, monkeypatch):
    run = tmp_path / "<b>run</b>"
    make_run(run, make_config(store, steps=50), 1, 2)
    with served([watch.Watched(run.name, run, 50, "k=<i>2</i>")], monkeypatch) as get:
        headers, page = get("/")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"://" not in page and b"innerHTML" not in page, "one page, of text"

        def news(since: int):
            found = json.loads(get(f"/data.json?since={since}")[1])
            (of_run,) = found["runs"]
            at = found["columns"].index("step")
            return found, of_run, [values[at] for values in of_run["lines"]]

        first, of_run, steps = news(0)
        assert (of_run["name"], of_run["swept"]) == (run.name, "k=<i>2</i>")
        assert (of_run["state"], of_run["step"], of_run["steps"]) == ("started", 2, 50)
        assert of_run["left"] == pytest.approx(4.8) and of_run["reset"] and steps == [1, 2]
        write(run / "metrics.jsonl", "".join(map(line, (1, 2, 3))))
        second, of_run, steps = news(first["revision"])
        assert not of_run["reset"] and steps == [3]
        assert news(second["revision"])[2] == []
        write(run / "metrics.jsonl", line(1, loss=3.0) + line(4, loss=None))
        third, of_run, steps = news(second["revision"])
        assert of_run["reset"] and steps == [1, 4]
        write(run / "result.json", "{}")
        news(0), news(0)
        assert news(third["revision"])[1]["state"] == "done"
        for path, headers, code in (("/x", {}, 404), ("/", {"Host": "evil.example"}, 403)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(path, **headers)
            assert refused.value.code == code
            refused.value.close()


def test_the_page_follows_a_sweep_that_grows_and_a_folder_of_runs(store, tmp_path, monkeypatch):
    """New runs come behind those that are there; what is trained again begins anew."""
    monkeypatch.setattr(watch, "_SECONDS", {False: 0.0})
    place, config = tmp_path / "all" / "S", make_config(store)
    directory = pretend(place, store)
    first, second, _ = directory.runs
    watched = watch.Watch(places.Followed([tmp_path / "all"]).find)
    found = watched.since(0)
    assert [run["state"] for run in found["runs"]] == ["done", "started", "waiting"]
    new = expand(config, grid.sweep("data.seed", range(3, 5)))
    again = dataclasses.replace(first, round=1)
    dropped = dataclasses.replace(second, dropped=True)
    directory.rewrite([again, dropped, directory.runs[2], *new])
    (directory.run_path(first) / "result.json").unlink()
    make_run(directory.run_path(first), config, 1)
    make_run(tmp_path / "all" / "alone", config, 1, 2)
    found = watched.since(found["revision"])
    states = [(run["state"], run["step"], run["reset"]) for run in found["runs"]]
    assert states[:3] == [("started", 1, True), ("dropped", 20, False), ("waiting", 0, False)]
    assert states[3:] == [("waiting", 0, True)] * 2 + [("started", 2, True)]
    assert found["runs"][3]["swept"] == "data.seed=3"
    of_sweep = watch.Watch(watch.SweepRuns(place).find)
    for name, other, problem in (("sweep.json", "away", True), ("away", "sweep.json", False)):
        of_sweep.since(0)
        (place / name).rename(place / other)
        said = of_sweep.since(0)
        assert ("holds no sweep" in said["problem"]) == problem and len(said["runs"]) == 4
    make_run(tmp_path / "all" / "alone", config, *range(1, 51))
    run = watched.since(found["revision"])["runs"][5]
    assert (run["state"], run["left"]) == ("started", None), "its last rows are evaluated"
    make_run(tmp_path / "all" / "alone", config, *range(1, 51), result={})
    assert watched.since(found["revision"])["runs"][5]["state"] == "done", "at once"


def test_what_is_trained_again_is_followed_while_its_old_directory_is_still_there(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(watch, "_SECONDS", {False: 0.0})
    directory = pretend(tmp_path / "S", store)
    watched = watch.Watch(watch.SweepRuns(directory.path).find)
    first = directory.runs[0]
    assert watched.since(0)["runs"][0]["state"] == "done"
    directory.rewrite([dataclasses.replace(first, round=1), *directory.runs[1:]])
    watched.since(0)  # which sees sweep.json, and what ended before
    place = directory.run_path(first)
    place.rename(tmp_path / "aside")
    watched.since(0)
    make_run(place, first.config, 1, 2)
    watched.since(0)
    run = watched.since(0)["runs"][0]
    assert (run["state"], run["step"]) == ("started", 2)


def test_the_time_left_is_by_the_median_of_the_last_lines(store, tmp_path, monkeypatch):
    """The line behind a checkpoint is slow."""
    run, speeds = tmp_path / "run", [640.0, 640.0, None, 640.0, 20.0]
    make_run(run, make_config(store, steps=50))
    lines = [line(step, tokens_per_second=rate) for step, rate in enumerate(speeds, 16)]
    write(run / "metrics.jsonl", "".join(lines))
    assert watching.status(run).seconds_left == pytest.approx(3.0)
    with served([watch.Watched("run", run, 50)], monkeypatch) as get:
        (of_run,) = json.loads(get("/data.json")[1])["runs"]
    assert of_run["left"] == pytest.approx(3.0)
    write(run / "metrics.jsonl", lines[-1])
    assert watching.status(run).seconds_left == pytest.approx(96.0)


def test_a_run_that_cannot_be_read_keeps_no_other_waiting(store, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_SECONDS", {False: 0.0})
    runs = [watch.Watched(name, tmp_path / name, 50) for name in ("away", "there")]
    for run in runs:
        make_run(run.path, make_config(store, steps=50), 1)
    away = runs[0].path / "metrics.jsonl"
    away.rename(away.with_name("moved"))
    away.mkdir()
    watched = watch.Watch(lambda: runs)
    found = watched.since(0)
    assert f"cannot read {away}" in found["problem"]
    assert [run["step"] for run in found["runs"]] == [0, 1]
    away.rmdir()
    away.with_name("moved").rename(away)
    found = watched.since(found["revision"], found["server"])
    assert not found["problem"]
    assert [len(run["lines"]) for run in found["runs"]] == [1, 0]
    found = watched.since(found["revision"], "another server's")
    assert [(len(run["lines"]), run["reset"]) for run in found["runs"]] == [(1, True)] * 2


def test_what_is_no_number_to_draw_is_left_out(store, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    make_run(run, make_config(store, steps=50), 1)
    odd = line(2, loss=float("nan"), fvu=float("inf"), tokens_per_second=1e-310)
    odd = odd.replace("Infinity", "1e999")
    write(run / "metrics.jsonl", line(1, tokens_per_second=1e-310) + odd)
    with served([watch.Watched("run", run, 50)], monkeypatch) as get:
        found = json.loads(get("/data.json")[1])
        (of_run,) = found["runs"]
        last = dict(zip(found["columns"], of_run["last"], strict=True))
        assert (last["step"], last["loss"], last["fvu"], of_run["left"]) == (2, None, None, None)
        write(run / "metrics.jsonl", line(1) + odd + line(10**400))
        (of_run,) = json.loads(get("/data.json")[1])["runs"]
        assert (of_run["step"], of_run["left"]) == (0, None) and len(of_run["lines"]) == 3
    assert not capsys.readouterr().err


def test_a_closed_tab_is_no_error_and_another_is_one_line(caplog, capsys):
    server, _ = live_page.open_server(watch.Watch(list), 0)
    with server:
        for error in (BrokenPipeError(32, "Broken pipe"), ValueError("two\nlines")):
            try:
                raise error
            except Exception:
                server.handle_error(None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "the page of the curves: two lines"
    ]
    assert "Traceback" not in capsys.readouterr().err


def test_of_long_curves_every_so_manieth_point_is_drawn(store, tmp_path, monkeypatch):
    make_run(tmp_path / "run", make_config(store), *range(1, 5001))
    with served([watch.Watched("run", tmp_path / "run", 50)], monkeypatch) as get:
        (run,) = json.loads(get("/data.json?since=0")[1])["runs"]
    assert run["last"][0] == 5000, "whatever is drawn"
    steps = [values[0] for values in run["lines"]]
    assert run["step"] == 5000 and 1000 <= len(steps) <= 2000
    assert set(np.diff(steps)) == {4}


@pytest.mark.slow
def test_a_taken_port_and_ctrl_c_are_one_line(store, tmp_path):
    make_run(tmp_path / "run", make_config(store), 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-m", "sae_jax", "status", str(tmp_path / "run")]
    server = subprocess.Popen(
        [*program, "--serve=0"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(server.communicate)
        stack.callback(server.kill)
        port = re.search(r"http://127.0.0.1:(\d+)", server.stdout.readline())[1]
        connection = http.client.HTTPConnection("127.0.0.1", int(port))
        stack.callback(connection.close)
        connection.request("GET", "/data.json")
        assert json.loads(connection.getresponse().read())["runs"][0]["step"] == 1
        with pytest.raises(UserError, match=f"port {port} of this machine is taken; give another"):
            live_page.open_server(watch.Watch(list), int(port))
        server.send_signal(signal.SIGINT)  # with the connection open
        _, err = server.communicate(timeout=60)
        assert (server.returncode, err.count("\n")) == (130, 1)
        assert "sae-jax status: interrupted" in err
