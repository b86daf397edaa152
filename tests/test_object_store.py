"""Stores, runs and sweeps in object stores: against a real server that speaks S3 (moto's), and, in
so far as it is other code (TensorStore's driver), against a stand-in for Google's."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import faulty_server
import gcs_server
import jax
import numpy as np
import pytest
import s3_server
from training import (
    assert_same_arrays,
    make_config,
    run_to_end,
    saved_arrays,
    sparse_rows,
    start,
)

import sae_jax
from sae_jax import buckets, paths
from sae_jax.activations import Store, Stream, write_store
from sae_jax.activations.writer import StoreWriter
from sae_jax.cli import main
from sae_jax.config import to_dict
from sae_jax.errors import UserError
from sae_jax.paths import ObjectPath
from sae_jax.sweep import worker
from sae_jax.sweep.directory import SweepDirectory, load
from sae_jax.train import object_checkpoints
from sae_jax.train.metrics import open_after
from sae_jax.train.object_checkpoints import ObjectCheckpointer
from sae_jax.train.run import train_run

ROOT = pathlib.Path(__file__).parents[1]
DEVICE = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@pytest.fixture
def place(s3):
    """A new folder in the bucket."""
    return paths.path(s3_server.BUCKET) / str(uuid.uuid4())


@pytest.fixture(params=["s3", "gcs"])
def either(request):
    """A new folder in a bucket of each kind."""
    request.getfixturevalue(request.param)
    bucket = {"s3": s3_server, "gcs": gcs_server}[request.param].BUCKET
    return paths.path(bucket) / str(uuid.uuid4())


@pytest.fixture(scope="module")
def store(s3):
    """Of few chunks: moto's server takes 5 ms for a request, one after another."""
    url = f"{s3_server.BUCKET}/store-{uuid.uuid4()}"
    write_store(url, [sparse_rows(8192)], context_length=128)
    return url


# ------------------------------------------------------------------------------------- files


def test_an_object_path_does_what_a_local_one_does(either, tmp_path):
    def seen(root):
        root.mkdir(parents=True, exist_ok=True)
        paths.write(root / "a.json", "one")
        (root / "b").mkdir(parents=True, exist_ok=True)
        paths.write(root / "b" / "c.x", b"two")
        paths.write(root / "a.json", "three")
        with pytest.raises(FileNotFoundError):
            (root / "none").read_bytes()
        (root / "gone").write_bytes(b"")
        (root / "gone").unlink()
        return {
            "entries": {e.name: (e.is_file(), e.is_dir()) for e in root.iterdir()},
            "made": [paths.create(root / "b" / "new", text, by=text) for text in ("my", "your")],
            "text": [(root / name).read_text() for name in ("a.json", "b/c.x", "b/new")],
            "there": [(root / name).exists() for name in ("a.json", "b/c.x", "b", "a.js", "gone")],
            "named": [(root / "x.tar").with_name("y").name, (root / "x.tar").stem, root.suffix],
            "parent": (root / "b").parent == root,
        }

    assert seen(either) == seen(tmp_path / "root")
    assert paths.path(f"{either}//b/") == either / "b"


@pytest.mark.parametrize(
    "break_it,url,says",
    [
        ({}, "az://bucket/run", "the scheme of az://bucket/run is 'az'; it must be one of: s3, gs"),
        ({}, "s3:/bucket/run", "write s3://bucket/run"),
        ({}, "s3//bucket/run", "write s3://bucket/run"),
        ({}, "s3:///run", "names no bucket; write s3://BUCKET/PATH"),
        ({}, "s3://absent/run", "there is no such bucket; make it, or correct its name"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "s3://no-secret/run", "set AWS_ACCESS_KEY_ID and AWS_"),
        pytest.param(
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
            "s3://away/run",
            "cannot reach the server http://127.0.0.1:1 (AWS_ENDPOINT_URL)",
            marks=pytest.mark.slow,  # it tries for 1.5 s
        ),
    ],
)
def test_what_is_wrong_with_a_bucket_is_one_line(s3, monkeypatch, break_it, url, says):
    for name, value in break_it.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        paths.path(url).exists()
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "server,says",
    [
        (None, "there is no such bucket"),  # this server needs none
        pytest.param("http://127.0.0.1:1", "found no credentials, .*; set AWS_ACCESS_KEY_ID and",
                     marks=pytest.mark.slow),  # it tries for 1.5 s
    ],
)  # fmt: skip
def test_missing_credentials_are_one_line_and_no_log(
    s3, monkeypatch, tmp_path, capfd, server, says
):
    """TensorStore would list on standard error the files that it looked into; what others write
    there meanwhile comes through."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server or s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=says):
        paths.path(f"s3://no-credentials{bool(server):d}/run").exists()
    assert not capfd.readouterr().err
    with buckets.library_log([]) as log:
        os.write(2, b"one\nE1130 07:38:48.776161    9767 common-io:5] Failed to open file\ntwo\n")
    assert capfd.readouterr().err == "one\ntwo\n" and len(log) == 1


def test_threads_that_open_a_bucket_at_once_do_it_once(monkeypatch):
    """What the process writes to standard error is diverted meanwhile, for all threads."""
    looks, meeting = [], threading.Barrier(8)

    def look(*_):
        looks.append(1)
        time.sleep(0.1)
        raise UserError("cannot reach it")

    def ask(_):
        meeting.wait()
        with pytest.raises(UserError, match="cannot reach it"):
            paths.path("s3://nowhere/a").is_file()

    monkeypatch.setattr(buckets, "_open", look)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    assert len(looks) == 1
    with pytest.raises(UserError):
        paths.path("s3://nowhere/a").is_file()
    assert len(looks) == 2, "tried again at the next occasion"


def test_a_late_write_of_who_had_the_metrics_before_stops_nobody(either):
    file = either / "metrics.jsonl"
    paths.write(file, '{"step": 1}\n')
    metrics = open_after(file, 1)
    paths.write(file, '{"step": 1}\n{"step": 9}\n')
    metrics.add('{"step": 2}\n')
    metrics.flush()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    paths.write(file, "another's")
    metrics.add('{"step": 3}\n')
    with pytest.raises(UserError, match="another process writes"):
        metrics.flush()


def test_a_bucket_that_is_not_there_is_named_on_google_too(gcs):
    with pytest.raises(UserError, match="there is no such bucket; make it, or correct its name"):
        paths.write(paths.path("gs://absent/file"), "text")


def test_metrics_of_two_writers_do_not_mix(either):
    file = either / "metrics.jsonl"
    paths.write(file, '{"step": 1}\n{"step": 2}\n{"st')
    first = open_after(file, 1)
    first.add('{"step": 2}\n')
    first.flush()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    second = open_after(file, 2)
    second.add('{"step": 3}\n')
    second.flush()
    first.add('{"step": 3, "late": true}\n')
    with pytest.raises(UserError, match="another process writes"):
        first.flush()
    first.close()
    second.close()
    assert file.read_text().splitlines()[1:] == ['{"step": 2}', '{"step": 3}']


# ------------------------------------------------------------------------------------- store


def read_through(address, share: float, store: str, **options) -> tuple[float, np.ndarray]:
    """The seconds that opening, checking and reading a store takes, and the rows that were read,
    where a share of all requests is lost."""
    with faulty_server.serve(address, share, seconds=0.005, **options) as requests:
        begin = time.monotonic()
        found = Store.open(store)
        assert "all as written" in found.check()
        stream = Stream(Store.open(store), batch_size=64, virtual_shards=8, window_rows=1024)
        rows = np.concatenate(list(stream.batches()))
        seconds = time.monotonic() - begin
        lost = sum(was_lost for _, was_lost in requests)
        assert share * 0.5 <= lost / len(requests) <= share * 1.5
    return seconds, rows


@pytest.mark.slow
def test_a_network_that_loses_requests_costs_little(s3, place):
    """A lost request is sent again soon, and the others do not wait for it."""
    write_store(str(place), [sparse_rows(8192)], context_length=8, tokens=np.ones((1024, 8), int))
    clean, rows = read_through(s3, 0.0, str(place))
    faulty, again = read_through(s3, 0.2, str(place))
    np.testing.assert_array_equal(rows, again)
    assert faulty < 4 * clean + 5, (faulty, clean)


def test_a_store_that_may_not_be_read_any_more_is_not_called_damaged(s3, place):
    write_store(str(place), [sparse_rows(64)])
    with faulty_server.serve(s3, 0.0, status=403) as requests:
        store = Store.open(str(place))
        requests.share = 2.0  # of which half is 1
        with pytest.raises(UserError, match="may not do this") as said:
            store.read("", slice(0, 64))
    assert "damaged" not in str(said.value)


@pytest.mark.slow
def test_a_store_is_resumed_read_and_checked(either):
    rows = sparse_rows(512)

    def writer():
        return StoreWriter.create_or_resume(
            str(either), sites={"x": 16}, num_sequences=64, context_length=8, dtype="float32"
        )

    def write(writer, shards):
        for shard in shards:
            block = rows[shard.sequences.start * 8 : shard.sequences.stop * 8]
            writer.write_shard(shard.index, {"x": block})

    interrupted = writer()
    shards = interrupted.missing_shards()
    write(interrupted, shards[:3])
    (either / "written" / f"{shards[1].index:06d}.npz").unlink()  # as if killed before it
    with pytest.raises(UserError, match="incomplete"):
        Store.open(str(either))
    again = writer()
    assert again.missing_shards() == [shards[1], *shards[3:]]
    write(again, again.missing_shards())
    again.finish()
    found = Store.open(str(either))
    found.check()
    np.testing.assert_array_equal(found.read("x", slice(0, 512)), rows)

    file = next(either / name for name in either.files() if name.startswith("sites/x/c/3"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="sites/x cannot be read: .*make the store again"):
        Store.open(str(either)).check()
    file.unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        Store.open(str(either))


# --------------------------------------------------------------------------------------- runs


def tree(value: float) -> dict:
    rows = np.arange(48, dtype=np.float32).reshape(8, 6)
    return {"a": {"b": jax.device_put(rows + value, DEVICE)}, "c": jax.device_put(value, DEVICE)}


def test_only_whole_checkpoints_count(either, monkeypatch):
    monkeypatch.setattr(object_checkpoints, "_CHUNK_BYTES", 64)  # 2 of the 8 rows
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE), tree(0))
    with contextlib.closing(ObjectCheckpointer(either, keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step))
        checkpoints.wait()
        assert checkpoints.steps == [2, 3]
        write = checkpoints._commit
        checkpoints._commit = lambda step, about: (
            (either / "4" / "c").rmtree(),
            write(step, about),
        )
        checkpoints.save(4, tree(4))
        with pytest.raises(UserError, match="4/c/c was removed .* does another process train"):
            checkpoints.wait()
        assert checkpoints.steps == [2, 3]
    assert not (either / "1").exists()
    assert len((either / "3" / "a" / "b" / "c").files()) == 4
    (either / "3" / "complete.json").unlink()  # as a kill in the middle of the upload leaves it
    (either / "4" / "c").mkdir()
    paths.write(either / "4" / "c" / "zarr.json", "{}")
    assert ObjectCheckpointer(either, keep=None).steps == [2]
    assert (either / "3").exists(), "who only reads removes nothing"
    with contextlib.closing(ObjectCheckpointer(either, keep=2)) as checkpoints:
        assert checkpoints.steps == [2]
        assert [entry.name for entry in either.iterdir()] == ["2"]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), checkpoints.shapes(2)) == (
            jax.tree.map(lambda x: (x.shape, x.dtype), like)
        )
        got = checkpoints.load(2, like)
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), got, tree(2)))
        chunk = either / "2" / "a" / "b" / "c" / "0" / "0"
        whole = chunk.read_bytes()
        for damaged in (whole[:-8], bytes([whole[0] ^ 1]) + whole[1:]):
            chunk.write_bytes(damaged)
            with pytest.raises(ValueError):
                checkpoints.load(2, like)
    chunk.unlink()
    assert ObjectCheckpointer(either, keep=None).steps == []


def unfinished(run: ObjectPath) -> set[str]:
    """Checkpoints that are being written."""
    files = (run / "checkpoints").files()
    whole = {name.partition("/")[0] for name in files if name.endswith("/complete.json")}
    return {name.partition("/")[0] for name in files} - whole


def whole(run: ObjectPath) -> int:
    """The last whole checkpoint."""
    files = (run / "checkpoints").files()
    names = (name.partition("/") for name in files)
    return max((int(step) for step, _, rest in names if rest == "complete.json"), default=0)


def wait_until(condition, processes, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def object_arrays(run: ObjectPath) -> dict[str, np.ndarray]:
    """As training.saved_arrays."""
    with contextlib.closing(ObjectCheckpointer(run / "checkpoints", keep=None)) as checkpoints:
        step = max(checkpoints.steps)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=DEVICE),
            checkpoints.shapes(step),
        )
        leaves = jax.tree_util.tree_leaves_with_path(checkpoints.load(step, like))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return arrays | {"step of the folder": np.asarray(step)}


def losses(run) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def without_times(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in ("wall_seconds", "devices")}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.long)])
def test_a_run_killed_on_s3_ends_as_one_undisturbed_on_disk(store, place, tmp_path, kills):
    config = make_config(
        store, steps=160, data={"epochs": 2}, train={"log_every": 5, "checkpoint_every": 20}
    )
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # shown when the test fails
    moments = random.Random(seed)
    in_a_save = 0
    for target in [0, *sorted(moments.sample(range(20, 140), kills - 1))]:
        process = start(place, config)
        wait_until(lambda t=target: whole(place) >= t and unfinished(place), [process])
        time.sleep(moments.uniform(0, 0.1) if target else 0)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        in_a_save += bool(unfinished(place))
        print("killed after", whole(place), "while saving", unfinished(place))
    assert in_a_save, "no kill hit a save"
    code, _, err = run_to_end(place, config)
    assert code == 0, err
    assert "resumed" in err

    undisturbed = tmp_path / "run"
    result = train_run(config, undisturbed).result
    assert_same_arrays(object_arrays(place), saved_arrays(undisturbed))
    assert losses(place) == losses(undisturbed)
    saved = json.loads((place / "result.json").read_text())
    assert without_times(saved) == without_times(result)
    assert not unfinished(place)
    x = sparse_rows(4)
    here, there = sae_jax.load(undisturbed), sae_jax.load(str(place))
    np.testing.assert_array_equal(here.encode(x), there.encode(x))
    reports = []
    for run in (place, undisturbed):
        assert main(["eval", f"--run={run}"]) == 0
        report = json.loads((run / "eval.json").read_text())
        reports.append({name: value for name, value in report.items() if name != "settings"})
        assert (run / "eval_training.png").read_bytes().startswith(b"\x89PNG")
    assert reports[0] == reports[1]


@pytest.mark.long
def test_two_processes_killed_on_s3_end_as_two_on_disk(store, place, tmp_path):
    """Each writes and reads its own shards."""
    config = make_config(
        store,
        steps=120,
        data={"epochs": 1},
        train={"log_every": 5, "checkpoint_every": 20},
        mesh={"data": 2, "model": 2},
    )

    def start_two(run):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = [f"--coordinator=localhost:{port}", "--num_processes=2", "--cpu_devices=2"]
        return [start(run, config, *flags, f"--process_id={i}") for i in range(2)]

    pair = start_two(place)
    wait_until(lambda: whole(place) >= 20 and unfinished(place), pair)
    for process in pair:
        process.kill()
    for process in pair:
        process.communicate()
    for run in (place, tmp_path / "run"):
        for process in start_two(run):
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    assert_same_arrays(object_arrays(place), saved_arrays(tmp_path / "run"))
    assert losses(place) == losses(tmp_path / "run")


# ------------------------------------------------------------------------------------- sweep

SWEEP = """
from sae_jax.config import Config, from_dict
def get_config(): return from_dict({config!r})
def get_sweep(): return [{{"train.seed": 0}}, {{"train.seed": 1}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign,code", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_worker_whose_store_is_away_ends_when_it_is_told_to(s3, place, tmp_path, sign, code):
    write_store(tmp_path / "store", [sparse_rows(8192)], context_length=128)
    base = make_config(
        str(tmp_path / "store"),
        steps=10**6,
        data={"epochs": 10**5},
        train={"log_every": 5, "checkpoint_every": 100},
    )
    file = tmp_path / "directory.py"
    file.write_text(SWEEP.format(config=to_dict(base)))
    with faulty_server.serve(s3, 0.0):
        worker = subprocess.Popen(
            [sys.executable, "-m", "sae_jax", "sweep", f"--config={file}", f"--workdir={place}"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        runs = [place / "runs" / run.id for run in load(str(file), {})]
        wait_until(lambda: any(whole(run) for run in runs), [worker])
    time.sleep(5)  # so that a step that is to be saved has come
    worker.send_signal(sign)
    _, err = worker.communicate(timeout=60)
    assert worker.returncode == code and "Traceback" not in err, err


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)]
)
def test_a_sweep_goes_on_without_a_worker_that_dies_or_sleeps(store, place, tmp_path, sign):
    base = make_config(store, steps=60, train={"log_every": 5, "checkpoint_every": 10})
    file = tmp_path / "directory.py"
    file.write_text(SWEEP.format(config=to_dict(base)))
    command = [sys.executable, "-m", "sae_jax", "sweep", f"--config={file}", "--passes=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen(
            [*command, f"--workdir={place}", "--lease_seconds=2"], env=environment, **pipes
        )
        for _ in range(2)
    ]
    runs = load(str(file), {})
    places = [place / "runs" / run.id for run in runs]

    def claims():
        return [name.rpartition(".")[0] for name in (place / "leases").files()]

    def owners():
        texts = [entry.read_text() for entry in (place / "leases").iterdir()]
        held = [text.splitlines()[0] for text in texts if text != "given back"]
        return [int(text.rpartition(" ")[2]) for text in held]

    wait_until(lambda: owners() and any(10 <= whole(run) < 60 for run in places), workers)
    workers.sort(key=lambda worker: worker.pid != owners()[0])
    workers[0].send_signal(sign)

    if sign == signal.SIGSTOP:
        wait_until(lambda: len(claims()) == 3, workers)
        workers[0].send_signal(signal.SIGCONT)
        _, err = workers[0].communicate(timeout=200)
        assert workers[0].returncode == 0 and "Traceback" not in err, err
    _, err = workers[1].communicate(timeout=200)
    assert workers[1].returncode == 0 and "Traceback" not in err, err
    workers[0].communicate()
    assert len(claims()) == 3 and len(set(claims())) == 2, "the lost pass was claimed again"

    undisturbed = SweepDirectory.start(tmp_path / "sweep", runs, 2)
    worker.work(undisturbed, lease_seconds=60)
    assert (place / "results.csv").read_text() == ((undisturbed.path / "results.csv").read_text())
    for run, on_s3 in zip(runs, places, strict=True):
        assert losses(on_s3) == losses(undisturbed.run_path(run))
