"""Configuration: frozen dataclasses, Python files, dotted overrides, JSON.

A config says WHAT is trained and on what data; `MeshConfig` alone says WHERE, and is left out of
a run's identity, so that the same run on other hardware is the same run. Every mistake in a
config is a `UserError` that names the field, the value and the nearest right one.
"""

import contextlib
import dataclasses
import importlib.util
import math
import types
import typing

from sae_jax import recipe_files
from sae_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """The dictionary. Fields left at None take the architecture's default (`sae.resolve`);
    a field that the architecture does not use must stay None."""

    architecture: str = "topk"
    kind: str = "autoencoder"  # or transcoder, skip_transcoder, crosscoder: what x and y are
    d_sae: int = 4096
    d_in: int | None = None  # width of the inputs; None: the store's
    d_out: int | None = None  # width of the targets; None: the store's
    site_widths: tuple[int, ...] | None = None  # of a crosscoder's sites; None: the store's

    # topk, batchtopk, matryoshka
    k: int | None = None  # latents kept for each token; on average over the batch
    k_start: int | None = None  # k at the first step, linear to k; None: k all along
    k_anneal_fraction: float | None = None  # of all steps, until k is reached
    multi_topk: bool | None = None  # topk: add L(4k) / 8, for codes of any k
    prefix_widths: tuple[int, ...] | None = None  # matryoshka: growing, the last is d_sae

    # relu, relu_l1_unit, jumprelu, gated
    sparsity_coefficient: float | None = None  # lambda
    sparsity_warmup_fraction: float | None = None  # of all steps, linear from 0
    target_l0: float | None = None  # adapt lambda until L0 is this; jumprelu's quadratic loss
    p_end: float | None = None  # L1 family: anneal the penalty's exponent from 1 to this
    p_anneal_start: float | None = None  # part of all steps after which the annealing starts
    sparsity_loss: str | None = None  # jumprelu: l0 | tanh | quadratic
    initial_threshold: float | None = None  # jumprelu
    bandwidth: float | None = None  # jumprelu: of the kernel of its straight-through gradient
    gradient_to: str | None = None  # jumprelu's straight-through gradient: threshold | all
    tanh_scale: float | None = None  # jumprelu: c of tanh(c * latent * decoder norm)
    preactivation_coefficient: float | None = None  # jumprelu: lambda_P

    # dead latents, in any architecture
    aux_k: int | None = None  # dead latents in the auxiliary loss; None: d_in / 2
    aux_coefficient: float | None = None  # 0: no auxiliary loss
    resample_every_tokens: int | None = None  # 0: dead latents are not resampled
    resample_times: int | None = None

    apply_b_dec_to_input: bool | None = None  # encode x - b_dec instead of x
    unit_norm_decoder: bool | None = None
    decoder_init_norm: float | None = None  # of decoder rows that are not kept at norm 1
    b_dec_init: str | None = None  # geometric_median | mean | zero
    normalize: str = "sqrt_d"  # one scalar a site, so that E||x||^2 is: sqrt_d d | unit 1; | none
    compute_dtype: str = "float32"  # of matmul operands; parameters and sums stay float32
    dead_after_tokens: int = 10_000_000  # a latent that has not fired for so long is dead


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, in which order. All of it is part of the run's identity."""

    store: str = ""  # directory of the activation store, or "world:NAME,key=value,..."
    site: str = ""  # "": the only site of the store; a crosscoder's sites: "a,b,c"
    target_site: str = ""  # what a transcoder predicts
    batch_size: int = 2048  # tokens, over all devices
    seed: int = 0
    epochs: int = 1  # passes over the training rows that may be used
    holdout_fraction: float = 0.05  # of the sequences, kept for evaluation
    virtual_shards: int = 64  # of the data order; divides batch_size
    window_rows: int = 262_144  # rows shuffled together
    include_excluded: bool = False  # train on BOS and other high-norm positions too
    drop_nonfinite: bool = False  # leave out rows with NaN or infinity instead of refusing


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with warm-up. `learning_rate` None: the architecture's rule for its d_sae."""

    learning_rate: float | None = None
    schedule: str = "linear_tail"  # constant | cosine | linear_tail | warmup_stable_decay
    warmup_fraction: float = 0.02  # of all steps
    decay_fraction: float = 0.2  # last part of all steps, for linear_tail and w.s.d.
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # global norm of the gradient


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, from which seed, and what is written down."""

    tokens: int = 10_000_000
    seed: int = 0
    init: str = ""  # an SAE to start from, of any format that is read here; "": a fresh one
    on_nonfinite: str = "stop"  # stop | skip the step
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. `run` shards the runs of a sweep's pack, `data` the batch,
    `model` d_sae. -1 on one axis: whatever devices are left."""

    run: int = 1
    data: int = -1
    model: int = 1
    zero: bool = False  # ZeRO: float32 masters and Adam's moments sharded over `data` too


@dataclasses.dataclass(frozen=True)
class Config:
    sae: SAEConfig = SAEConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()


def to_dict(config) -> dict:
    return dataclasses.asdict(config)


def identity(config: Config) -> dict:
    """The config without hardware: what must agree for two runs to be the same run."""
    return {name: section for name, section in to_dict(config).items() if name != "mesh"}


def from_dict(values: dict, cls=Config, prefix: str = ""):
    """The dataclass `cls` from nested plain values. Raises UserError on an unknown field or a
    value of another type."""
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or 'config'} must be a section, not {values!r}")
    hints = typing.get_type_hints(cls)
    out = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(_unknown_field(prefix + name, [prefix + h for h in hints]))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            out[name] = from_dict(value, hint, f"{prefix}{name}.")
        else:
            out[name] = _typed(value, hint, prefix + name)
    return cls(**out)


def override(config: Config, assignments: dict[str, str]) -> Config:
    """`config` with dotted fields replaced, each given as text: {"sae.k": "32"}."""
    return assign(config, {path: _parse(t, _hint(path), path) for path, t in assignments.items()})


def assign(config: Config, assignments: dict[str, object]) -> Config:
    """`config` with dotted fields replaced: {"sae.k": 32}."""
    values = to_dict(config)
    for path, value in assignments.items():
        section, _, name = path.partition(".")
        values[section][name] = typed(path, value)
    return from_dict(values)


def typed(path: str, value):
    """`value` as the dotted field has it; UserError for an unknown field or another type."""
    return _typed(value, _hint(path), path)


def _hint(path: str):
    """The type of a dotted field."""
    sections = typing.get_type_hints(Config).items()
    hints = {f"{s}.{f}": h for s, cls in sections for f, h in typing.get_type_hints(cls).items()}
    if path not in hints:
        raise UserError(_unknown_field(path, list(hints)))
    return hints[path]


def load_file(spec: str) -> Config:
    """Returns what `get_config` of a Python file returns.

    spec: "FILE.py", or "FILE.py:arg" for `get_config(arg)`. In place of FILE.py stands the name of
    a recipe, as in "openai_topk:tiny". Raises UserError if there is no such file, or if it fails.
    """
    config = call_in_file(spec, "get_config", "a config file defines one that returns Config")
    if not isinstance(config, Config):
        path = spec.partition(":")[0]
        raise UserError(f"get_config() of {path} returned {type(config).__name__}, not Config")
    return config


def call_in_file(spec: str, name: str, what: str):
    """`name()` of a Python file, or `name(arg)` for "FILE.py:arg". `what` tells the user of a file
    without it what it is for."""
    path, _, arg = spec.partition(":")
    module = load_module(path)
    if not hasattr(module, name):
        raise UserError(f"{path} has no {name}(); {what}")
    with _mistakes_in(path):
        return getattr(module, name)(arg) if arg else getattr(module, name)()


def load_module(path: str) -> types.ModuleType:
    """Returns the module of a Python file, or of a recipe by its name, freshly executed.

    Raises UserError if there is neither, or if the file fails."""
    file = recipe_files.find(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    with _mistakes_in(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _mistakes_in(path: str):
    """Whatever the user's own file raises is a mistake in that file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from error


def difference(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Lines "section.field: a -> b" for every field in which two plain configs differ."""
    lines = []
    for name in sorted(a.keys() | b.keys()):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += difference(left, right, f"{prefix}{name}.")
        elif left != right:
            lines.append(f"{prefix}{name}: {left!r} -> {right!r}")
    return lines


def _unknown_field(path: str, known: list[str]) -> str:
    return f"unknown field {path!r}; {nearest(path, known)}"


def _parse(text: str, hint, path: str):
    """Text of the command line to a value of type `hint`."""
    kinds = _kinds(hint)
    if type(None) in kinds and text.lower() == "none":
        return None
    if tuple in kinds:
        return tuple(_parse(part, int, path) for part in text.strip("()[] ").split(",") if part)
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{path} must be true or false, not {text!r}")
        return text.lower() == "true"
    if int in kinds:
        try:
            return int(text.replace("_", ""))
        except ValueError:
            pass  # 1e6 and 2M-style floats are tried below, and refused if not whole
    if int in kinds or float in kinds:
        try:
            return _typed(float(text), hint, path)
        except ValueError:
            raise UserError(f"{path} must be a number, not {text!r}") from None
    return text


def _typed(value, hint, path: str):
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return None
    if tuple in kinds:
        if not isinstance(value, tuple | list):
            raise UserError(f"{path} must be whole numbers, such as 256,512,1024, not {value!r}")
        return tuple(_typed(part, int, path) for part in value)
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, (*kinds, int, float)):
        raise UserError(f"{path} must be {_name(kinds)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path} must be a finite number, not {value!r}")
    if int in kinds and isinstance(value, float):
        if value != int(value):
            raise UserError(f"{path} must be a whole number, not {value!r}")
        return int(value)
    if float in kinds and isinstance(value, int):
        return float(value)
    if str in kinds and not isinstance(value, str):
        raise UserError(f"{path} must be text, not {value!r}")
    return value


def _kinds(hint) -> tuple[type, ...]:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(kind) or kind for kind in kinds)  # tuple[int, ...]: tuple


def _name(kinds) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return " or ".join("none" if k is type(None) else names[k] for k in kinds)
