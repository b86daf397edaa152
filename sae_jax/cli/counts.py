"""Defines flags for numbers: large whole ones, and finite ones."""

import math
import re

from absl import flags

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_MOST = 10**15  # more tokens than there are

flags.disclaim_key_flags()  # --help shows them with those of the command


class _Parser(flags.ArgumentParser):
    syntactic_help = "a number, such as 1000000, 1_000_000, 1e6 or 1M"

    def parse(self, argument) -> int:
        text = str(argument).replace("_", "").replace(",", "").lower()
        match = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([kmb]?)", text)
        number = float(match[1]) * _UNITS[match[2]] if match else 0.5
        if not number.is_integer():
            raise ValueError(f"not a whole number; write {self.syntactic_help}")
        if not 1 <= number <= _MOST:
            raise ValueError(f"it must be from 1 to {_MOST:,}")
        return int(number)


class _FiniteParser(flags.FloatParser):
    def convert(self, argument) -> float:
        number = super().convert(argument)
        if not math.isfinite(number):
            raise ValueError("not a finite number")
        return number


def define(name: str, default: int | None, text: str, values: flags.FlagValues) -> None:
    """Defines an integer flag, 1 or more, that also takes 1_000_000, 1e6, 10.5K, 2M and 1B.

    Args:
      name: the flag's name.
      default: its default.
      text: its help.
      values: the flags that it is added to.
    """
    serializer = flags.ArgumentSerializer()
    flags.DEFINE(_Parser(), name, default, text, flag_values=values, serializer=serializer)


def define_float(
    name: str, default: float | None, text: str, values: flags.FlagValues, **bounds: float
) -> None:
    """Defines a flag that is a finite number.

    Args:
      name: the flag's name.
      default: its default.
      text: its help.
      values: the flags that it is added to.
      **bounds: `lower_bound` and `upper_bound`, both allowed.
    """
    serializer = flags.ArgumentSerializer()
    parser = _FiniteParser(**bounds)
    flags.DEFINE(parser, name, default, text, flag_values=values, serializer=serializer)
