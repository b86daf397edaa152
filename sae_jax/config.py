"""Configuration: frozen dataclasses, Python files, dotted overrides, JSON.

A config says what is trained and on what data. `MeshConfig` alone says on which hardware. It is
left out of a run's identity, so that the same run on other hardware is the same run. Every mistake
in a config is a `UserError` that names the field, the value and the nearest right one. The section
`sae` is the config of one architecture, and has its fields (`sae_jax.sae`).
"""

import dataclasses

from sae_jax.errors import UserError, nearest
from sae_jax.fields import check_types, parse, typed, types_of
from sae_jax.python_files import call_in_file, split
from sae_jax.sae import ARCHITECTURES, SAEConfig, TopKConfig
from sae_jax.sae.registry import architecture_file, by_name, find

_ARCHITECTURE = "sae.architecture"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What data are read, and in which order. All of it is part of the run's identity."""

    store: str = ""
    """Directory of the activation store, or "world:NAME,key=value,..." for a synthetic one."""
    site: str = ""
    """Site of the store. Empty: its only one. A crosscoder's sites: "a,b,c"."""
    target_site: str = ""
    """Site that a transcoder predicts."""
    batch_size: int = 2048
    """Tokens of a step, over all devices."""
    seed: int = 0
    """Seed of the data's order."""
    epochs: int = 1
    """Passes over the training rows that the run may use."""
    holdout_fraction: float = 0.05
    """Part of the sequences that is kept for evaluation."""
    virtual_shards: int = 64
    """Shards of the data's order, whatever the hardware. It divides batch_size."""
    window_rows: int = 262_144
    """Rows that are shuffled together."""
    include_excluded: bool = False
    """Whether to train on BOS and other positions of high norm too."""
    drop_nonfinite: bool = False
    """Whether rows with NaN or infinity are left out, instead of refused."""

    def __post_init__(self):
        check_types(self, "data.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The settings of Adam and of the learning rate's schedule."""

    learning_rate: float | None = None
    """Peak learning rate. None: the architecture's rule for its d_sae; in a short run with a
    target_l0 it is larger, so that the run reaches it."""
    schedule: str = "linear_tail"
    """Schedule of the learning rate: constant, cosine, linear_tail or warmup_stable_decay."""
    warmup_fraction: float = 0.02
    """Part of all steps in which the learning rate grows linearly from 0."""
    decay_fraction: float = 0.2
    """Last part of all steps, in which linear_tail and warmup_stable_decay decay to 0."""
    b1: float = 0.9
    """Adam's decay of the mean of gradients."""
    b2: float = 0.999
    """Adam's decay of the mean of squared gradients."""
    eps: float = 1e-8
    """What Adam adds to the root of the mean squared gradient."""
    clip_norm: float | None = 1.0
    """Global norm to which the gradient is clipped. None: it is not."""

    def __post_init__(self):
        check_types(self, "optimizer.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is trained, from which seed, and how often it is logged and saved."""

    tokens: int = 10_000_000
    """Tokens to train on."""
    seed: int = 0
    """Seed of the fresh parameters."""
    init: str = ""
    """An SAE to start from, of any format that is read here. Empty: a fresh one."""
    branch_from: str = ""
    """A checkpoint to go on from, RUN/checkpoints/STEP, with its optimiser and its place in the
    data. Empty: the run begins at step 0."""
    on_nonfinite: str = "stop"
    """What a NaN or infinite loss does: stop the run, or skip the step."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""
    keep_trunk: bool = True
    """Whether the checkpoint where the learning rate begins to fall is saved and kept besides:
    from it a longer run can go on."""

    def __post_init__(self):
        check_types(self, "train.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. On one axis -1 stands for whatever devices are left."""

    run: int = 1
    """Devices that share the runs of a sweep's pack."""
    data: int = -1
    """Devices that share each batch."""
    model: int = 1
    """Devices that share the dictionary, d_sae."""
    zero: bool = False
    """ZeRO: whether float32 parameters and Adam's moments are shared over `data`, too."""

    def __post_init__(self):
        check_types(self, "mesh.")


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a run, in five sections."""

    sae: SAEConfig = TopKConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_types(self, "")


def to_dict(config: Config) -> dict:
    """Returns a config as nested plain values.

    If a user's own file defines the architecture, there is the key `architecture_file` too.
    """
    values = dataclasses.asdict(config)
    file = architecture_file(config.sae)
    return values | ({"architecture_file": file} if file else {})


def without_hardware(config: Config) -> dict:
    """Returns `to_dict` of a config without its mesh."""
    values = to_dict(config)
    del values["mesh"]
    return values


def identity(config: Config) -> dict:
    """Returns what must agree for two runs to be the same run.

    It is the config as nested plain values, without hardware and places of files.
    """
    values = without_hardware(config)
    values.pop("architecture_file", None)
    del values["train"]["keep_trunk"]
    if not config.train.branch_from:  # runs of versions without it keep their ids
        del values["train"]["branch_from"]
    return values


def from_dict(values: dict, cls=Config, prefix: str = "", folder=None, trust_code: bool = True):
    """Returns the dataclass `cls` from nested plain values, as `to_dict` makes them.

    Args:
      values: the values, by the names of the fields.
      cls: a config or a section of one.
      prefix: what messages put before the name of a field.
      folder: where the values were read, if in a file.
      trust_code: whether a file that defines a user's own architecture may be run (see
        `sae.registry.find`).

    Raises UserError for an unknown field and for a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or 'config'} must be a section, not {values!r}")
    if cls is SAEConfig:
        return _sae_section(values)
    if cls is Config:
        values = dict(values)
        file = values.pop("architecture_file", None)
        if file is not None and isinstance(values.get("sae"), dict):
            find(values["sae"].get("architecture", ""), file, folder, trust_code)
    hints = types_of(cls)
    out = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(_unknown_field(prefix + name, [prefix + h for h in hints]))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            out[name] = from_dict(value, hint, f"{prefix}{name}.")
        else:
            out[name] = typed(value, hint, prefix + name)
    return cls(**out)


def _sae_section(values: dict) -> SAEConfig:
    name = values.get("architecture", TopKConfig.architecture)
    cls = by_name(typed(name, str, _ARCHITECTURE)).Config
    return cls(**cls.fields_in_file(values))


def override(config: Config, assignments: dict[str, str]) -> Config:
    """Returns `config` with dotted fields replaced, each given as text: {"sae.k": "32"}.

    It does what `assign` does with the values that the texts stand for.
    """
    name = assignments.get(_ARCHITECTURE, config.sae.architecture)
    sae = by_name(name).Config
    hints = {path: _hint(path, sae) for path in assignments}
    return assign(config, {path: parse(v, hints[path], path) for path, v in assignments.items()})


def assign(config: Config, assignments: dict[str, object]) -> Config:
    """Returns `config` with dotted fields replaced: {"sae.k": 32}.

    If `sae.architecture` is replaced, the section `sae` becomes that of the new architecture. It
    keeps the values of fields that both architectures have and that are not the old one's defaults.
    The other fields get the new one's defaults.

    Raises UserError for an unknown field, a field of another architecture, and a value of another
    type.
    """
    changes: dict[str, dict] = {}
    for path, value in assignments.items():
        typed_field(path, value)
        section, _, name = path.partition(".")
        changes.setdefault(section, {})[name] = value
    sections = {}
    for section, fields in changes.items():
        before = getattr(config, section)
        if section == "sae":
            sections[section] = _changed_sae(before, fields)
        else:
            sections[section] = dataclasses.replace(before, **fields)
    return dataclasses.replace(config, **sections)


def _changed_sae(before: SAEConfig, changes: dict) -> SAEConfig:
    cls = by_name(changes.get("architecture", before.architecture)).Config
    kept = types_of(cls)
    values = {
        field.name: getattr(before, field.name)
        for field in dataclasses.fields(before)
        if type(before) is cls
        or field.name in kept
        and getattr(before, field.name) != field.default
    }
    return cls(**values | changes)


def typed_field(path: str, value):
    """Returns `value` as the dotted field `path` holds it, for example 3.0 for 3 in a float field.

    A field of `sae` may be that of any architecture. Raises UserError for an unknown field and for
    a value of another type.
    """
    return typed(value, _hint(path), path)


def _hint(path: str, sae: type[SAEConfig] | None = None):
    """Returns the type of a dotted field.

    Where several architectures have the field, it is the type in the class `sae`, if given.
    """
    hints = {f"{s}.{f}": h for s, cls in types_of(Config).items() for f, h in types_of(cls).items()}
    known = [cls.Config for cls in ARCHITECTURES.values()]
    first = [] if sae is None else [sae]
    for cls in [*known, *first]:
        hints |= {f"sae.{name}": hint for name, hint in types_of(cls).items()}
    if path not in hints:
        raise UserError(_unknown_field(path, list(hints)))
    return hints[path]


def load_file(spec: str) -> Config:
    """Returns what `get_config` of a Python file returns.

    `spec` is "FILE.py", or "FILE.py:arg" for `get_config(arg)`. It may have the name of a recipe in
    place of FILE.py, as in "openai_topk:tiny". Raises UserError if there is no such file, or if it
    fails.
    """
    config = call_in_file(spec, "get_config", "a config file defines one that returns Config")
    if not isinstance(config, Config):
        path, _ = split(spec)
        raise UserError(f"get_config() of {path} returned {type(config).__name__}, not Config")
    return config


def difference(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Returns a line "section.field: a -> b" for each field in which two plain configs differ."""
    lines = []
    for name in sorted(a.keys() | b.keys()):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += difference(left, right, f"{prefix}{name}.")
        elif left != right:
            lines.append(f"{prefix}{name}: {left!r} -> {right!r}")
    return lines


def _unknown_field(path: str, known: list[str]) -> str:
    name = path.rpartition(".")[2]
    if same := [field for field in known if field.rpartition(".")[2] == name]:
        return f"unknown field {path!r}; did you mean {' or '.join(map(repr, same))}?"
    return f"unknown field {path!r}; {nearest(path, known)}"
