"""Four CPU devices for every test in this process, and what is compiled is compiled once."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile

os.environ.setdefault("NPROC", "16")  # XLA's threads; fewer than devices and collectives hang

# By environment, so that the processes that tests start read what others have compiled: most of a
# test's time is XLA's. For arrays this small, optimising takes longer than running: without it the
# tests of training take three quarters of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sae_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# A shell's background job ignores Ctrl-C, and what it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import gcs_server  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import s3_server  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Forgets compiled programs before they are too many: each has memory maps of its own, of which
    Linux allows a process 65,530, and XLA crashes where it gets no more."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(params=[(1, 1), (4, 1), (1, 4), (2, 2)], ids=lambda s: f"data{s[0]}-model{s[1]}")
def mesh(request):
    """The ambient mesh of each shape that four devices allow."""
    data, model = request.param
    mesh = jax.make_mesh(
        (1, data, model), ("run", "data", "model"), devices=jax.devices()[: data * model]
    )
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="session")
def s3():
    """The address of a server that speaks S3; it has the bucket s3_server.BUCKET."""
    with s3_server.serve() as address:
        yield address


@pytest.fixture(scope="session")
def gcs():
    """A stand-in for Google's server; it has the bucket gcs_server.BUCKET."""
    with gcs_server.serve():
        yield
