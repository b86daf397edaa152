"""The `sae-jax` command: picks a command's file, parses its flags, calls its `run`.

A command is one file here with `SUMMARY` (text; its first line is shown by `sae-jax --help`),
`define(flags)` (absl flags) and `run(args, overrides) -> exit code | None`. `overrides` are the
`--config.section.field=value` assignments, which only commands that take a config accept.

Exit codes: 0 done; 2 a mistake of the user's (one line says which); 3 stopped at a non-finite
loss; 75 to be started again: stopped by SIGTERM after saving, or another process of the program has
died, or a step hung; 130 after Ctrl-C; 141 where nobody reads the output any more, as with
`| head`.
"""

import importlib
import logging
import os
import pathlib
import signal
import sys

from absl import flags
from absl import logging as absl_logging

from sae_jax.errors import UserError, choose, one_line

_MOST_CPU_DEVICES = 1024  # each is a few threads
COMMANDS = (
    "demo harvest store train eval dashboard explain steer attribute sweep status fit compare plan "
    "export import bench launch"
).split()

_TAKE_PATHS = ("status",)  # whose arguments without a flag are those of --path


def entry() -> int:
    """Runs `main` in a process whose large arrays lie on huge pages, and returns the exit code.

    After an error the process ends at once, without waiting for threads that may be stuck. SIGTERM
    ends it with code 75 where nothing is to be saved yet.

    glibc reads the setting when a process starts, so on Linux this starts the process once more.
    Without it the top-k step of `sae-jax bench` took an eighth more processor time. A process that
    has GLIBC_TUNABLES set, as in `GLIBC_TUNABLES= sae-jax bench`, is not started again.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it can be answered
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):  # a path may hold bytes that are no text
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _stop)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    code = main()
    if code and "jax" in sys.modules:
        from sae_jax.train import last_words

        last_words.leave(code)
    return code


def _stop(*_) -> None:
    """Ends the process at SIGTERM. A command that has something to save replaces this."""
    os.write(2, b"sae-jax: stopped by SIGTERM; start the same command again\n")
    os._exit(75)


def main(argv: list[str] | None = None) -> int:
    """Runs the command that `argv` (by default that of the process) names.

    Errors of the user's are printed as one line. Returns the exit code, one of those that this
    module's documentation lists.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise UserError(_unknown_command(name))
        code = _run(name, rest)
        sys.stdout.flush()
        return code
    except (UserError, flags.Error) as error:
        return _refuse(name, error)
    except OSError as error:  # no permission, no such place, disk full
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        where = f" ({error.filename})" if error.filename else ""
        return _refuse(name, f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        print(f"sae-jax {name}: interrupted; start it again to go on", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether the reader of our output has ended, as in `sae-jax ... | head`. The rest of the
    output is then thrown away.
    """
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _refuse(name: str, message: object) -> int:
    print(one_line(f"sae-jax {name}: error: {message}"), file=sys.stderr)
    return 2


def _run(name: str, rest: list[str]) -> int:
    overrides, others = _split_overrides(rest)
    _set_up_threads([name, *others])
    command = _command(name)
    values = flags.FlagValues()
    command.define(values)
    flags.DEFINE_bool("v", False, "More detail in the log.", flag_values=values)
    _define_cpu_devices(values)
    if "-h" in others or "--help" in others:
        print(_help(name, command, values))
        return 0
    for flag in values:
        values[flag].allow_overwrite = False  # the one before would be ignored
    positional = values([name, *others])[1:]
    if positional and name in _TAKE_PATHS:
        values["path"].value = [*(values.path or []), *positional]
    elif positional:
        raise UserError(f"unexpected argument {positional[0]!r}; flags are --name=value")
    if overrides and "config" not in values:
        raise UserError(
            f"this command takes no config, so --config.{next(iter(overrides))} has no place"
        )
    _set_up_logging(values.v)
    _set_up_jax(values.cpu_devices)
    return command.run(values, overrides) or 0


def _command(name: str):
    """Returns the module of a command. That of `import`, a keyword of Python, is import_.py."""
    return importlib.import_module(f"sae_jax.cli.{'import_' if name == 'import' else name}")


def _split_overrides(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    overrides, others = {}, []
    for argument in argv:
        if argument.startswith("--config."):
            path, equals, value = argument.removeprefix("--config.").partition("=")
            if not equals:
                raise UserError(f"{argument} has no value; write {argument}=VALUE")
            if path in overrides:
                raise UserError(
                    f"--config.{path} is given twice, as {overrides[path]!r} and {value!r}; give "
                    "it once"
                )
            overrides[path] = value
        else:
            others.append(argument)
    return overrides, others


def _set_up_logging(verbose: bool) -> None:
    """Shows our own log lines on standard error, and with --v those of other packages too.

    Without --v only warnings of other packages are shown. Their traces of an exception are left
    out: the code that handles it says what it means to the user.
    """
    flags.FLAGS.mark_as_parsed()
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.DEBUG if verbose else absl_logging.INFO)
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = str(pathlib.Path(__file__).parents[1])
    handler.addFilter(
        lambda record: (
            verbose
            or record.pathname.startswith(ours)
            or (record.levelno >= logging.WARNING and not record.exc_info)
        )
    )


def _define_cpu_devices(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "cpu_devices",
        None,
        "Pretend that the CPU is so many devices.",
        lower_bound=1,
        upper_bound=_MOST_CPU_DEVICES,
        flag_values=values,
    )


def _set_up_threads(argv: list[str]) -> None:
    """Sets the size of XLA's thread pool, which XLA reads from NPROC when JAX is imported.

    With fewer threads than devices XLA's collectives would wait for each other for ever.
    """
    values = flags.FlagValues()
    _define_cpu_devices(values)
    values(argv, known_only=True)
    if values.cpu_devices:
        enough = max(16, 2 * values.cpu_devices, os.cpu_count() or 1)
        os.environ.setdefault("NPROC", str(enough))


def _set_up_jax(cpu_devices: int | None) -> None:
    """Sets JAX's precision and devices. It must run before JAX's backends are started."""
    import jax

    # What is computed does not depend on JAX_ENABLE_X64.
    jax.config.update("jax_enable_x64", False)
    # Float32 means float32 on accelerators too; bfloat16 is there for who wants its speed.
    jax.config.update("jax_default_matmul_precision", "highest")
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)


def _overview() -> str:
    lines = ["sae-jax COMMAND [--flag=value ...]    (sae-jax COMMAND --help for one command)", ""]
    for name in COMMANDS:
        summary = _command(name).SUMMARY.strip()
        lines.append(f"  {name:11}{summary.splitlines()[0]}")
    return "\n".join(lines)


def _help(name: str, command, values: flags.FlagValues) -> str:
    lines = [f"sae-jax {name}: {command.SUMMARY.strip()}", "", "Flags:"]
    for module in (command.__name__, __name__):
        lines.append(values.module_help(module).partition(":\n")[2])
    if "config" in values:
        from sae_jax.cli import field_help, recipes  # slow to import

        lines += ["", *recipes.table("get_sweep" if name == "sweep" else "get_config")]
        lines += ["", field_help.text()]
    return "\n".join(lines)


def _unknown_command(name: str) -> str:
    try:
        return choose(name, COMMANDS, "the command")
    except UserError as error:
        return str(error)
