"""Writes the next run's config, as a Python file that `sae-jax train` takes."""

import dataclasses
import math
import pprint
import shlex
import textwrap
from typing import Annotated

import msgspec
import numpy as np

from sae_jax import config as configs
from sae_jax import paths
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.json_files import checked, read_json
from sae_jax.laws.results import distinct
from sae_jax.paths import AnyPath
from sae_jax.sae import MatryoshkaConfig
from sae_jax.train.directory import find_store, read_config

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e300)]

FILE = "next_run.py"
_DOC = """Planned by `sae-jax fit` for {flops:.4g} FLOPs: {d_sae} latents, {tokens:,} tokens.

  sae-jax train {file} --workdir=DIRECTORY

{notes}
"""
_TEXT = """{doc}

from sae_jax.config import Config, from_dict

VALUES = {values}


def get_config() -> Config:
    return from_dict(VALUES)
"""


def base(file: str | None, overrides: dict[str, str]) -> Config:
    """Returns the config that the next run starts from: that of `file`, or the defaults, with
    overrides.
    """
    return configs.override(configs.load_file(file) if file else Config(), overrides)


def make(planned: dict, folders: list[AnyPath], start: Config | None) -> tuple[Config, list[str]]:
    """Returns a config with the planned size, tokens and k, and notes on it.

    All else is from `start`; without it from the run nearest to the plan, where they are of
    sweeps, or else from the defaults.

    Args:
      planned: the prediction of `predict.predict`.
      folders: the directories of the runs that the law was fitted to, where they are of sweeps.
      start: the config to start from, or None.

    Raises UserError where the sweep has no finished run.
    """
    low, high = planned["interval"]
    notes = [f"Expected loss {planned['loss']:.5g}, 95% of runs between {low:.5g} and {high:.5g}."]
    if start is None and folders:
        start, note = _nearest(folders, planned)
        notes.append(note)
    elif start is None:
        start = Config()
        notes.append("It has the defaults but for these; say --config.data.store=STORE.")
    config = _planned(start, planned)
    epochs = config.data.epochs
    notes.append(
        f"data.epochs is {epochs}: if the store has fewer tokens than that gives, training says "
        "so, and how many epochs it would take."
    )
    return config, notes


def save(planned: dict, config: Config, notes: list[str], out: str | AnyPath) -> None:
    """Writes OUT/next_run.py with what `make` returned for a plan."""
    file = paths.path(out) / FILE
    doc = _DOC.format(
        flops=planned["flops"],
        d_sae=planned["d_sae"],
        tokens=config.train.tokens,
        file=shlex.quote(f"--config={file}"),
        notes=textwrap.fill(" ".join(notes), 98),
    )
    text = _TEXT.format(
        doc=_docstring(doc),
        values=pprint.pformat(configs.to_dict(config), width=96, sort_dicts=False),
    )
    paths.write(file, text)


def _docstring(text: str) -> str:
    """Returns a docstring in Python that stands for `text`, whatever names of files are in it."""
    escaped = "".join(char if char == "\n" else repr(char)[1:-1] for char in text)
    return '"""' + escaped.replace('"', '\\"') + '"""'


def _planned(start: Config, planned: dict) -> Config:
    """Returns `start` with the planned size, tokens and k."""
    d_sae, batch = planned["d_sae"], start.data.batch_size
    changes = {"d_sae": d_sae}
    if isinstance(start.sae, MatryoshkaConfig):
        parts = [width / start.sae.d_sae for width in start.sae.prefix_widths]
        changes["prefix_widths"] = tuple(max(1, round(part * d_sae)) for part in parts)
    if planned.get("k") is not None:
        changes["k"] = planned["k"]
    sae = dataclasses.replace(start.sae, **changes)
    tokens = max(planned["tokens"] // batch, 1) * batch
    train = dataclasses.replace(start.train, tokens=tokens)
    return dataclasses.replace(start, sae=sae, train=train)


@dataclasses.dataclass(frozen=True)
class _Finished:
    """What a result.json says of a run that the next one may be like."""

    d_sae: _Positive
    tokens: _Positive
    lr: _Positive
    k: _Positive | None = None


def _nearest(folders: list[AnyPath], planned: dict) -> tuple[Config, str]:
    """Returns the config of the finished run that is nearest to the plan, and a note on it.

    Its learning rate follows the sweep's own rule for the planned size, where there is one.
    """
    finished = {}
    for run in sorted(folders, key=str):
        file = run / "result.json"
        if file.is_file():
            finished[run] = checked(read_json(file), _Finished, file)
    if not finished:
        raise UserError(
            f"{folders[0].parent} has no finished run to take the next one's config from"
        )

    def distance(result: _Finished) -> float:
        pairs = [(getattr(result, name), planned.get(name)) for name in ("d_sae", "tokens", "k")]
        return sum(math.log(ours / theirs) ** 2 for ours, theirs in pairs if ours and theirs)

    nearest = min(finished, key=lambda path: distance(finished[path]))
    config = read_config(nearest)
    config = dataclasses.replace(config, data=find_store(nearest, config.data))
    note = f"All else is as in {nearest.name} of the sweep."
    rate = _learning_rate(list(finished.values()), planned["d_sae"])
    if rate is None:
        return (
            config,
            f"{note} Its learning rate is kept: in the sweep it follows no power of d_sae.",
        )
    adam = dataclasses.replace(config.optimizer, learning_rate=rate[0])
    note += f" The learning rate follows the sweep's rule, d_sae^{rate[1]:.3g}."
    return dataclasses.replace(config, optimizer=adam), note


def _learning_rate(finished: list[_Finished], d_sae: int) -> tuple[float, float] | None:
    """Returns the rate for `d_sae` and its exponent, where the sweep's rates are one power of the
    size; else None.
    """
    log_n = np.log([result.d_sae for result in finished])
    log_rate = np.log([result.lr for result in finished])
    if len(distinct(np.exp(log_n))) < 2:
        return None
    slope, at_one = np.polyfit(log_n, log_rate, 1)
    if np.ptp(log_rate) < 1e-9 or np.abs(at_one + slope * log_n - log_rate).max() > 1e-6:
        return None
    return float(np.exp(at_one + slope * math.log(d_sae))), float(slope)
