"""Defines flags that serve a page at a port: --serve, --serve=PORT and --noserve."""

from absl import flags

_MOST = 65_535

flags.disclaim_key_flags()  # --help shows them with those of the command


class _Parser(flags.ArgumentParser):
    syntactic_help = "a port"

    def __init__(self, default: int):
        self._default = default

    def parse(self, argument) -> int | None:
        if argument in ("true", "false", None):
            return self._default if argument == "true" else None
        if not str(argument).isdecimal() or not 0 <= int(argument) <= _MOST:
            raise ValueError(f"a port is a number from 1 to {_MOST}, or 0 for any free one")
        return int(argument)


def define(name: str, port: int, text: str, values: flags.FlagValues) -> None:
    """Defines a flag that is a port, None where it is not given.

    Args:
      name: the flag's name.
      port: the port where no number is given.
      text: what is served, as the beginning of its help.
      values: the flags that it is added to.
    """
    flag = flags.Flag(
        _Parser(port),
        flags.ArgumentSerializer(),
        name,
        None,
        f"{text}, at port {port}, or at the one that is given.",
        boolean=True,
    )
    flags.DEFINE_flag(flag, flag_values=values)
