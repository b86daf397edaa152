"""N processes of one `sae-jax` command on this machine, as if each were a host:

  python launch/local.py --processes=4 --devices=2 -- train --workdir=runs/a --config.mesh.data=8

They find each other by a free port, and each line they write begins with the number of its
process. SIGTERM and SIGINT go to all of them, SIGHUP as SIGTERM. Where one ends badly the others
get --grace seconds to end too, and are killed then; with --restarts=R all are started again, at
most R times, unless this launcher itself was told to stop or starting again would not help.

Exit code: 0 if all ended with 0, else that of the process that ended badly first: 75 where they
were told to stop and saved, 128 + the signal where one was killed.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

_NO_USE_TO_RESTART = (0, 2, 3, 130)  # done, a mistake in the input, non-finite loss, Ctrl-C
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_write_lock = threading.Lock()


def main(argv: list[str]) -> int:
    args, command = _parse(argv)
    with _Processes() as processes:
        for restarts_left in reversed(range(args.restarts + 1)):
            processes.start(_commands(command, args.processes), _environment(args.devices))
            code = processes.wait(args.grace)
            if code in _NO_USE_TO_RESTART or processes.told_to_stop or not restarts_left:
                return code
            _say(f"ended with {code}; starting again, {restarts_left - 1} restarts left after this")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="local.py",
        description=__doc__,
        usage="local.py --processes=N [--devices=M] [--restarts=R] [--grace=SECONDS] -- COMMAND...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, help="CPU devices of each; without it, as JAX finds")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--grace", type=float, default=90.0, help="longer than a peer is missed")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    if not argv[split + 1 :]:
        parser.error("give the sae-jax command behind --, as in: -- train --workdir=runs/a")
    if args.processes < 1 or args.restarts < 0 or (args.devices or 1) < 1:
        parser.error("--processes and --devices are at least 1, --restarts at least 0")
    return args, argv[split + 1 :]


def _commands(command: list[str], processes: int) -> list[list[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "sae_jax", *command]
    together = [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
    return [[*program, *together, f"--process_id={i}"] for i in range(processes)]


def _environment(devices: int | None) -> dict[str, str]:
    if devices is None:
        return dict(os.environ)
    # With fewer threads than devices XLA's collectives wait for each other for ever.
    threads = str(max(16, 2 * devices, os.cpu_count() or 1))
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return {"NPROC": threads, **os.environ, **cpu}


class _Processes:
    """The processes that run now; signals to this one go to all of them."""

    def __init__(self):
        self.told_to_stop = False
        self._all: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> "_Processes":
        self._previous = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._kill()

    def start(self, commands: list[list[str]], environment: dict[str, str]) -> None:
        self._all, self._readers = [], []
        for i, command in enumerate(commands):
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,  # or a terminal's Ctrl-C would come twice
            )
            self._all.append(process)
            for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=_pass_on, args=(i, stream, out.buffer))
                reader.start()
                self._readers.append(reader)
        _say("; ".join(f"process {i} is pid {each.pid}" for i, each in enumerate(self._all)))
        if self.told_to_stop:  # while some had not been started
            self._forward(signal.SIGTERM, None)

    def wait(self, grace: float) -> int:
        """Until all have ended; returns the code of the one that ended badly first, or 0."""
        running = dict(enumerate(self._all))
        first_bad, deadline = 0, None
        while running:
            for i in [i for i, process in running.items() if process.poll() is not None]:
                code = running.pop(i).returncode
                if code == 0 or first_bad:
                    continue
                first_bad = code if code > 0 else 128 - code
                deadline = time.monotonic() + grace
                others = f"; the others have {grace:g} s to end" if running else ""
                _say(f"process {i} {_how(code)}{others}")
            if deadline and time.monotonic() > deadline:
                _say(f"killing {', '.join(f'process {i}' for i in running)}, still running")
                self._kill()
                deadline = None
            time.sleep(0.02)
        for reader in self._readers:
            reader.join()
        return first_bad

    def _forward(self, number: int, _) -> None:
        self.told_to_stop = True
        if number == signal.SIGHUP:  # the terminal is gone; there is time to save
            number = signal.SIGTERM
        for process in self._all:
            process.send_signal(number)  # nothing, to one that has ended

    def _kill(self) -> None:
        for process in self._all:
            process.kill()


def _how(code: int) -> str:
    if code == 75:
        return "was told to stop and saved (exit code 75)"
    return f"ended with exit code {code}" if code > 0 else f"died of {signal.Signals(-code).name}"


def _pass_on(i: int, stream, out) -> None:
    for line in stream:
        with _write_lock:
            out.write(b"[%d] %s\n" % (i, line.rstrip(b"\n")))
            out.flush()


def _say(text: str) -> None:
    with _write_lock:
        print(f"local.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
