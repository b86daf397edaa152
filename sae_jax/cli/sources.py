"""Defines flags for lists of files and datasets, whose names may have commas."""

import csv

from absl import flags


class _Parser(flags.ArgumentParser):
    syntactic_help = "a comma separated list; a file may have a comma in its name"

    def parse(self, argument) -> list[str]:
        if isinstance(argument, list):
            return argument
        if '"' in argument:  # quoted as in a .csv
            return [name.strip() for name in next(csv.reader([argument], strict=True))]
        names, parts = [], argument.split(",") if argument else []
        while parts:
            # The longest name of something that is there, else what is before the first comma.
            counts = (n for n in range(len(parts), 1, -1) if _exists(",".join(parts[:n])))
            count = next(counts, 1)
            names.append(",".join(parts[:count]).strip())
            parts = parts[count:]
        return names


def _exists(name: str) -> bool:
    from sae_jax import paths

    return not paths.is_remote(name) and paths.local(name.strip()).exists()


def define(name: str, text: str, values: flags.FlagValues, required: bool = False) -> None:
    """Defines a flag for a list of files, directories and datasets, without a default.

    Args:
      name: the flag's name.
      text: its help.
      values: the flags that it is added to.
      required: whether the flag must be given.
    """
    flags.DEFINE(
        _Parser(),
        name,
        None,
        text,
        flag_values=values,
        serializer=flags.CsvListSerializer(","),
        required=required,
    )
