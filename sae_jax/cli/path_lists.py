"""Defines flags for lists of paths, which may have commas in them."""

import os

from absl import flags

flags.disclaim_key_flags()  # --help shows them with those of the command


class _Parser(flags.ListParser):
    def parse(self, argument) -> list[str]:
        if not isinstance(argument, str) or '"' in argument:  # quoted, as in CSV
            return super().parse(argument)
        parts, names = argument.split(","), []
        while parts:
            joined = (",".join(parts[:count]) for count in range(len(parts), 1, -1))
            name = next(filter(_exists, joined), parts[0])
            del parts[: name.count(",") + 1]
            names.append(name.strip())
        return names if argument else []


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def define(name: str, text: str, values: flags.FlagValues, required: bool = False) -> None:
    """Defines a flag for paths with commas between them.

    The name of a file that is there is one path, whatever commas it has.

    Args:
      name: the flag's name.
      text: its help.
      values: the flags that it is added to.
      required: whether it must be given.
    """
    serializer = flags.CsvListSerializer(",")
    flags.DEFINE(_Parser(), name, None, text, values, serializer, required=required)
