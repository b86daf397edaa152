"""Defines flags for large numbers."""

import re

from absl import flags

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class _Parser(flags.ArgumentParser):
    syntactic_help = "a number, such as 1000000, 1_000_000, 1e6 or 1M"

    def parse(self, argument) -> int:
        text = str(argument).replace("_", "").replace(",", "").lower()
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmb]?)", text)
        number = float(match[1]) * _UNITS[match[2]] if match else 0.5
        if number != int(number):
            raise ValueError(f"not a whole number; write {self.syntactic_help}")
        return int(text) if text.isdecimal() else int(number)


def define(name: str, default: int | None, text: str, values: flags.FlagValues) -> None:
    """Defines an integer flag that also takes 1_000_000, 1e6, 10.5K, 2M and 1B.

    Args:
      name: the flag's name.
      default: its default.
      text: its help.
      values: the flags that it is added to.
    """
    serializer = flags.ArgumentSerializer()
    flags.DEFINE(_Parser(), name, default, text, flag_values=values, serializer=serializer)
