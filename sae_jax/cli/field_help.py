"""Lists the fields of a config, with their defaults and documentation, for --help."""

import dataclasses
import textwrap
from collections.abc import Iterable

from sae_jax.config import Config
from sae_jax.fields import documentation
from sae_jax.sae import ARCHITECTURES, SAEConfig


def text() -> str:
    """Returns the fields of every section, and those of every architecture, a line or more each."""
    config = Config()
    lines = ["Fields of the config, with their defaults:"]
    for section in ("data", "optimizer", "train", "mesh"):
        cls = type(getattr(config, section))
        lines += ["", *_lines(section, cls, _defaults(cls))]
    shared = [field.name for field in dataclasses.fields(SAEConfig)]
    first = _defaults(type(config.sae))
    whose = config.sae.architecture
    lines += ["", f"The SAE, whatever its architecture (the defaults are those of {whose}):"]
    lines += _lines("sae", type(config.sae), shared)
    for name, architecture in ARCHITECTURES.items():
        defaults = _defaults(architecture.Config)
        own = [field for field in defaults if field not in shared]
        others = [f for f in shared if defaults[f] != first[f] and f != "architecture"]
        lines += ["", f"With --config.sae.architecture={name}:"]
        lines += _lines("sae", architecture.Config, own)
        if others:
            lines += ["  other defaults:", *[f"  --config.sae.{f}={defaults[f]}" for f in others]]
    return "\n".join(lines)


def _defaults(cls: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _lines(section: str, cls: type, names: Iterable[str]) -> list[str]:
    documented, defaults = documentation(cls), _defaults(cls)
    lines = []
    for name in names:
        lines.append(f"  --config.{section}.{name}={defaults[name]}")
        lines += textwrap.wrap(
            documented.get(name, ""), 94, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return lines
