"""The base classes of the architectures' configs: shared fields, and the checks of their values.

An architecture's own config is a subclass in the architecture's file. Its values are checked when
it is made. `sae.resolve` fills in the fields that the data's widths decide.
"""

import dataclasses
import math
from typing import Any, ClassVar

from sae_jax.errors import UserError, choose, nearest
from sae_jax.fields import check_types

KINDS = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder")
TRANSCODERS = ("transcoder", "skip_transcoder")


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """Holds the fields that all architectures share. Each architecture's config adds its own.

    Making a config raises UserError if a value is wrong or contradicts another. Fields that are
    None are filled in by `sae.resolve`, except where their documentation says what None means.
    """

    architecture: str
    """Name of the architecture, which decides what other fields there are."""
    kind: str = "autoencoder"
    """What inputs and targets are: autoencoder, transcoder, skip_transcoder or crosscoder."""
    d_sae: int = 4096
    """Number of latents: the size of the dictionary."""
    d_in: int | None = None
    """Width of the inputs. None: that of the activations."""
    d_out: int | None = None
    """Width of the targets. None: that of the activations."""
    site_widths: tuple[int, ...] | None = None
    """Widths of a crosscoder's sites. None: those of the activations; of other kinds always."""

    aux_k: int | None = None
    """Dead latents that the auxiliary loss picks for each token. None: d_out / 2."""
    aux_coefficient: float = 0.0
    """Coefficient of the auxiliary loss, which revives dead latents. 0: there is none."""
    dead_after_tokens: int | None = None
    """A latent that has not fired for so many tokens is dead. None: an eighth of the run's tokens,
    at most 10 million."""
    resample_every_tokens: int = 0
    """Tokens between two resamplings of dead latents. 0: they are not resampled."""
    resample_times: int = 4
    """How often dead latents are resampled, from the start of the run."""

    apply_b_dec_to_input: bool | None = None
    """Whether x - b_dec is encoded instead of x. None: as the architecture's paper does; for a
    transcoder, whose b_dec is an offset of another site, always false."""
    unit_norm_decoder: bool = True
    """Whether each decoder row is kept at norm 1."""
    decoder_init_norm: float = 1.0
    """Norm of fresh decoder rows, where they are not kept at norm 1."""
    b_dec_init: str = "zero"
    """Where b_dec starts: geometric_median or mean of the targets, or zero."""
    normalize: str = "sqrt_d"
    """Inputs and targets are multiplied by one number for each site, so that E||x||^2 is d
    (sqrt_d) or 1 (unit). none: they are left as they are."""
    compute_dtype: str = "float32"
    """Type of the operands of matrix products, float32 or bfloat16. Parameters, thresholds, sums
    and values of latents are float32 always. Accelerators are made for bfloat16; a CPU without
    instructions for it is slower by it."""
    extra_loss: str = ""
    """FILE.py:FUNCTION of a term that is added to the training loss: FUNCTION(sae, x, y), a
    scalar, of inputs and targets times their scales (train.step.ExtraLoss)."""

    # What the trainer asks of every architecture. One that has it makes it a field; None, 0 and
    # 1 mean that there is no such thing.
    k: ClassVar[int | None] = None
    k_start: ClassVar[int | None] = None
    k_anneal_fraction: ClassVar[float] = 0.0
    sparsity_coefficient: ClassVar[float | None] = None
    sparsity_warmup_fraction: ClassVar[float] = 0.0
    target_l0: ClassVar[float | None] = None
    p_end: ClassVar[float] = 1.0
    p_anneal_start: ClassVar[float] = 0.0

    shifts_inputs: ClassVar[bool] = True
    """What apply_b_dec_to_input is by default for inputs and targets of one site."""

    def __new__(cls, *values, **fields):
        if not isinstance(getattr(cls, "architecture", None), str):
            raise UserError(
                f"{cls.__name__} is what several architectures share; make the config of one, "
                "such as sae_jax.sae.TopKConfig(k=32)"
            )
        for name in fields:
            cls.check_field(name)
        return super().__new__(cls)

    def __post_init__(self):
        check_types(self, "sae.")
        own = type(self).architecture
        if self.architecture != own:
            raise UserError(
                f"sae.architecture is {self.architecture!r}, but {type(self).__name__} describes "
                f"{own!r}; make the config of that architecture's class"
            )
        choose(self.kind, KINDS, "sae.kind")
        choose(self.normalize, ("sqrt_d", "unit", "none"), "sae.normalize")
        choose(self.compute_dtype, ("float32", "bfloat16"), "sae.compute_dtype")
        choose(self.b_dec_init, ("geometric_median", "mean", "zero"), "sae.b_dec_init")
        self.above_zero("d_sae", "d_in", "d_out", "aux_k", "decoder_init_norm", "dead_after_tokens")
        self.not_below_zero("aux_coefficient", "resample_every_tokens", "resample_times")
        if self.apply_b_dec_to_input and self.kind in TRANSCODERS:
            raise UserError(
                f"sae.apply_b_dec_to_input=true makes no sense for sae.kind={self.kind}: b_dec is "
                "an offset of the target, not of the input; leave it out"
            )

    @classmethod
    def check_field(cls, name: str) -> None:
        """Raises UserError if the config has no field of this name.

        If another architecture has one, the error says which fields this one has. Otherwise it says
        which field is spelt most like it.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if name in known:
            return
        if name in _fields_of_all(SAEConfig):
            shared = {field.name for field in dataclasses.fields(SAEConfig)}
            own = ", ".join(field for field in known if field not in shared)
            raise UserError(
                f"sae.{name} is set, but the architecture {cls.architecture} has no such setting; "
                f"it has: {own}, and what all have"
            )
        near = nearest(f"sae.{name}", [f"sae.{field}" for field in known])
        raise UserError(f"unknown field 'sae.{name}'; {near}")

    def above_zero(self, *names: str) -> None:
        """Raises UserError if one of the fields `names` is neither None nor above 0."""
        self._check_values("above 0", lambda value: value > 0, names)

    def not_below_zero(self, *names: str) -> None:
        """Raises UserError if one of the fields `names` is neither None nor 0 or more."""
        self._check_values("0 or more", lambda value: value >= 0, names)

    def fractions(self, *names: str) -> None:
        """Raises UserError if one of the fields `names` is neither None nor from 0 to 1."""
        what = "a part of all steps, from 0 to 1"
        self._check_values(what, lambda value: 0 <= value <= 1, names)

    def up_to_d_sae(self, *names: str) -> None:
        """Raises UserError if one of the fields `names` is neither None nor at most d_sae."""
        most = f"at most sae.d_sae, {self.d_sae}"
        self._check_values(most, lambda value: value <= self.d_sae, names)

    def _check_values(self, what: str, holds, names: tuple[str, ...]) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise UserError(f"sae.{name} must be {what}, not {value}")

    def derived(self) -> dict[str, Any]:
        """Returns the values that fields which are None get once the widths are known, by name.

        An architecture's config adds its own fields.
        """
        return {
            "aux_k": max(1, self.d_out // 2),
            "apply_b_dec_to_input": self.shifts_inputs and self.kind not in TRANSCODERS,
        }

    @classmethod
    def fields_in_file(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a config as a file has them, by the names of this version.

        An architecture whose earlier versions called something otherwise overrides it.
        """
        return fields

    @property
    def adapts_to_target_l0(self) -> bool:
        """Whether training scales the sparsity coefficient until L0 is `target_l0`."""
        return self.target_l0 is not None

    @property
    def anneals(self) -> bool:
        """Whether a setting at some step depends on how many steps the run will have.

        Such settings are an annealed k, an annealed exponent of the penalty, and a coefficient that
        is scaled to reach `target_l0`.
        """
        return self.k_start is not None or self.p_end < 1 or self.adapts_to_target_l0


def _fields_of_all(cls: type[SAEConfig]) -> set[str]:
    """Returns the names of the fields of a config class and of all that extend it."""
    names = {field.name for field in dataclasses.fields(cls)}
    return names.union(*(_fields_of_all(other) for other in cls.__subclasses__()))


@dataclasses.dataclass(frozen=True)
class KConfig(SAEConfig):
    """Adds the fields of architectures that keep k latents for each token."""

    aux_coefficient: float = 1 / 32
    b_dec_init: str = "geometric_median"
    k: int = 32
    """Latents kept for each token; in batchtopk and matryoshka on average over the batch."""
    k_start: int | None = None
    """k at the first step, from where it changes linearly to k. None: it is k all along."""
    k_anneal_fraction: float = 0.0
    """Part of all steps after which k is reached, where k_start is given."""

    def __post_init__(self):
        super().__post_init__()
        self.above_zero("k", "k_start")
        self.fractions("k_anneal_fraction")
        self.up_to_d_sae("k", "k_start")


@dataclasses.dataclass(frozen=True)
class PenaltyConfig(SAEConfig):
    """Adds the fields of architectures whose loss has a sparsity penalty."""

    sparsity_coefficient: float = 1.0
    """Coefficient of the sparsity penalty, lambda."""
    sparsity_warmup_fraction: float = 0.05
    """Part of all steps in which the coefficient grows linearly from 0."""
    target_l0: float | None = None
    """Mean number of latents above zero that training aims at by scaling the coefficient. None:
    the coefficient stays as it is."""

    def __post_init__(self):
        super().__post_init__()
        self.not_below_zero("sparsity_coefficient")
        self.fractions("sparsity_warmup_fraction")
        self.above_zero("target_l0")
        self.up_to_d_sae("target_l0")
        if self.target_l0 is not None and self.sparsity_coefficient == 0:
            raise UserError(
                "sae.target_l0 is reached by scaling sae.sparsity_coefficient, which is 0; set it "
                "above"
            )
