"""Training beside the peers' own trainers: from the same parameters, on the same data and with the
same hyperparameters, our loss is theirs at every step.

Where a peer deviates from the formula that its paper publishes we follow the paper, and the peer is
mended here: `Case.defect` says of what. Mended it follows ours; as it is it does not, which also
shows that these tests see such a difference.

Rounding makes trajectories part in the end, once a latent fires on a token on one side only. Where
latents have thresholds of their own, batches are large, so that one such event stays far below the
tolerance; where k are picked they are small, so that there is hardly any, and where k B are
picked from a whole batch, which tells more of them apart, 20 steps have to do.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import peers_parity as parity
import pytest
from peers_parity import Peer, Setting

from sae_jax.activations import open_stream
from sae_jax.config import DataConfig, OptimizerConfig
from sae_jax.sae import by_name

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # of what the peers import
]

SETTINGS = [Setting(), Setting(d_in=48, d_sae=512, k=5, warmup=50, seed=1)]
RELATIVE = 1e-3
L1, TARGET_L0 = 1.5, 6.0


@dataclasses.dataclass(frozen=True)
class Case:
    peer: Callable[[Setting, bool], Peer]  # of a setting, and whether mended
    ours: Callable[[Setting], dict]  # fields of our config
    adam: OptimizerConfig = OptimizerConfig()
    batch: int = 512
    steps: int = 200
    defect: str = ""


# -------------------------------------------------------- dictionary_learning


def april_update(setting: Setting, mended: bool) -> Peer:
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    class Mended(AutoEncoderNew):
        def forward(self, x, output_features=False):
            latents = self.encode(x)
            return self.decode(latents), latents

    return parity.dictionary_learning(
        StandardTrainerAprilUpdate,
        setting,
        dict_class=Mended if mended else AutoEncoderNew,
        l1_penalty=L1,
        sparsity_warmup_steps=setting.warmup,
    )


def gated(setting: Setting, mended: bool) -> Peer:
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    return parity.dictionary_learning(
        GatedSAETrainer, setting, l1_penalty=L1, sparsity_warmup_steps=setting.warmup
    )


def batch_top_k(setting: Setting, mended: bool) -> Peer:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    return parity.dictionary_learning(BatchTopKTrainer, setting, k=setting.k)


def matryoshka(setting: Setting, mended: bool) -> Peer:
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    return parity.dictionary_learning(
        MatryoshkaBatchTopKTrainer,
        setting,
        k=setting.k,
        group_fractions=[0.25, 0.25, 0.5],
        group_weights=[1.0, 1.0, 1.0] if mended else None,
    )


# ------------------------------------------------------------------- sae-lens


def lens(name: str, setting: Setting, *, unit_norm=False, all_dead=False, **options) -> Peer:
    import sae_lens
    import torch

    torch.manual_seed(setting.seed)
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")
    sizes = {"d_in": setting.d_in, "d_sae": setting.d_sae, "device": "cpu"}
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config(**sizes, **options))
    return parity.sae_lens(sae, setting, unit_norm=unit_norm, all_dead=all_dead)


def lens_jumprelu(mode: str, setting: Setting, **options) -> Peer:
    return lens(
        "JumpReLU",
        setting,
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_init_threshold=0.1,
        l0_warm_up_steps=setting.warmup,
        **options,
    )


def sparse(architecture: str, coefficient: float, **fields) -> Callable[[Setting], dict]:
    return lambda setting: {
        "architecture": architecture,
        "sparsity_coefficient": coefficient,
        "sparsity_warmup_fraction": setting.warmup / setting.steps,
        **fields,
    }


def our_jumprelu(coefficient: float, **fields) -> Callable[[Setting], dict]:
    return sparse("jumprelu", coefficient, initial_threshold=0.1, **fields)


def picks(architecture: str, **fields) -> Callable[[Setting], dict]:
    fields = {"architecture": architecture, "aux_coefficient": 0.0, **fields}
    return lambda setting: {"k": setting.k, **fields}


CASES = {
    "dictionary_learning StandardTrainerAprilUpdate": Case(
        april_update,
        sparse("relu", L1),
        defect="AutoEncoderNew gives latents times their decoder norms, and the trainer multiplies "
        "by these again: the penalty is f ||W_dec||^2; Conerly et al. 2024 have f ||W_dec||",
    ),
    "dictionary_learning GatedSAETrainer": Case(
        gated, sparse("gated", L1), OptimizerConfig(b1=0.0, clip_norm=None)
    ),
    "dictionary_learning BatchTopKTrainer": Case(
        batch_top_k, picks("batchtopk"), batch=128, steps=20
    ),
    "dictionary_learning MatryoshkaBatchTopKTrainer": Case(
        matryoshka,
        lambda s: picks("matryoshka", prefix_widths=(s.d_sae // 4, s.d_sae // 2, s.d_sae))(s),
        batch=128,
        steps=20,
        defect="its default weights are those of a mean over prefixes, and it takes the mean of "
        "the weighted losses: the sum is divided by the number of prefixes twice",
    ),
    "sae-lens standard": Case(
        lambda setting, _: lens(
            "Standard",
            setting,
            l1_coefficient=L1,
            l1_warm_up_steps=setting.warmup,
            apply_b_dec_to_input=False,  # Conerly et al. 2024; its default is true
        ),
        sparse("relu", L1),
    ),
    "sae-lens topk": Case(
        lambda setting, mended: lens(
            "TopK", setting, k=setting.k, decoder_init_norm=1.0, unit_norm=mended
        ),
        picks("topk"),
        batch=128,
        defect="decoder norms are free, and weigh the pick; Gao et al. 2024 (section 2.3 and A.2) "
        "keep decoder rows at norm 1",
    ),
    "sae-lens jumprelu step": Case(
        lambda setting, mended: lens_jumprelu(
            "step",
            setting,
            l0_coefficient=0.02,
            jumprelu_bandwidth=0.2,
            decoder_init_norm=1.0,
            unit_norm=mended,
        ),
        our_jumprelu(0.02, bandwidth=0.2),
        defect="decoder norms are free; Rajamanoharan et al. 2024 keep decoder rows at norm 1",
    ),
    "sae-lens jumprelu tanh": Case(
        lambda setting, mended: lens_jumprelu(
            "tanh",
            setting,
            l0_coefficient=0.05,
            jumprelu_bandwidth=2.0,
            jumprelu_ste_to_input=True,
            pre_act_loss_coefficient=0.01,
            decoder_init_norm=0.5,
            all_dead=mended,
        ),
        our_jumprelu(
            0.05,
            sparsity_loss="tanh",
            bandwidth=2.0,
            gradient_to="all",
            preactivation_coefficient=0.01,
            unit_norm_decoder=False,
        ),
        defect="the pre-activation loss is of dead latents only; that of Circuits Updates, January "
        "2025, is of every latent that does not fire",
    ),
    "sae-lens jumprelu quadratic": Case(
        lambda setting, _: lens_jumprelu(
            "quadratic",
            setting,
            l0_coefficient=0.002,
            jumprelu_bandwidth=0.2,
            target_l0=TARGET_L0,
            decoder_init_norm=1.0,
            unit_norm=True,
        ),
        our_jumprelu(0.002, sparsity_loss="quadratic", target_l0=TARGET_L0, bandwidth=0.2),
    ),
    # ----------------------------------------------------------------- sparsify
    "sparsify topk": Case(
        lambda setting, mended: parity.sparsify(setting, fvu=not mended),
        picks("topk"),
        OptimizerConfig(clip_norm=None),
        batch=64,
        defect="the loss is divided by the batch's own variance, so that a batch with outliers "
        "counts less; Gao et al. 2024 (section 2.3) have the squared error",
    ),
}
DEFECTIVE = [name for name, case in CASES.items() if case.defect]


@pytest.fixture(autouse=True)
def one_torch_thread():
    """More are slower at this size, where the machine is shared."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "setting",
    [SETTINGS[0], *(pytest.param(s, marks=pytest.mark.long) for s in SETTINGS[1:])],
    ids=lambda s: f"{s.d_in}x{s.d_sae}",
)
@pytest.mark.parametrize("name", CASES)
def test_loss_follows_the_peer(name, setting):
    ours, theirs = side_by_side(name, setting, mended=True)
    losses = [metrics["loss"] for metrics in ours]
    np.testing.assert_allclose(losses, theirs, rtol=RELATIVE)
    if len(ours) == setting.steps:
        assert ours[-1]["mse"] < 0.6 * ours[0]["mse"]
        assert 1 < ours[-1]["l0"] < setting.d_sae / 4


@pytest.mark.long
@pytest.mark.parametrize("name", DEFECTIVE)
def test_loss_does_not_follow_a_peer_that_is_not_mended(name):
    ours, theirs = side_by_side(name, SETTINGS[0], mended=False)
    losses = np.array([metrics["loss"] for metrics in ours])
    assert np.abs(losses / theirs - 1).max() > 20 * RELATIVE


def side_by_side(name: str, setting: Setting, mended: bool):
    """Our metrics and the peer's loss, step by step."""
    case = CASES[name]
    setting = dataclasses.replace(setting, batch=case.batch)
    peer = case.peer(setting, mended)
    batches = make_batches(setting)[: case.steps]
    fields = case.ours(setting) | {"d_sae": setting.d_sae, "normalize": "none"}
    config = by_name(fields.get("architecture", "topk")).Config(**fields)
    ours = list(parity.our_metrics(config, case.adam, setting, peer.parameters, batches))
    return ours, np.array([peer.step(batch) for batch in batches])


def make_batches(setting: Setting) -> list[np.ndarray]:
    """Sparse sums of 128 directions, off-centre, so that b_dec matters."""
    world = f"world:superposition,width={setting.d_in},features=128,magnitude=1,last_magnitude=0.7"
    data = DataConfig(
        store=f"{world},magnitude_std=0.2,std_spread=0.1,offset=1.5",
        batch_size=setting.batch,
        seed=setting.seed,
    )
    stream = open_stream(data)
    return [stream.read(step).astype(np.float32) for step in range(setting.steps)]
