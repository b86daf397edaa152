"""Examples of all latents by `interpret.collect`, beside SAEDashboard on some of the same latents.

    pip install sae-dashboard          # in an environment of its own
    python experiments/benchmarks/collect_beside_saedashboard.py --model=DIR --text=FILE \\
        --peer_python=THAT/bin/python

Both take the same model, tokens and SAE, a TopK of random directions around the mean activation,
in turn. Of ours it says the time beside that of the encoder's FLOPs alone, at the speed of a matrix
product measured before and after in the same process, and the memory beside what was stated. Of
both it says the time a latent, and how many of the largest activations are the same; SAEDashboard
leaves out those near the ends of a context. Seconds of the cores' time (cpu) mean something on a
busy machine too. Without --peer_python ours runs alone. Fewer latents, tokens and peer latents take
minutes less.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from sae_jax import interop, interpret, lm
from sae_jax.evaluate.sources import ModelRows
from sae_jax.paths import save_json
from sae_jax.sae import TopK

_MODEL = flags.DEFINE_string("model", None, "Directory of a Llama model.", required=True)
_TEXT = flags.DEFINE_list("text", None, "As for sae-jax harvest.", required=True)
_SITE = flags.DEFINE_string("site", "resid_post.2", "What the SAE reads.")
_TOKENS = flags.DEFINE_integer("tokens", 1_000_000, "How many tokens to look at.")
_LATENTS = flags.DEFINE_integer("latents", 100_000, "Of the SAE.")
_K = flags.DEFINE_integer("k", 32, "Latents of a token.")
_CONTEXT_LENGTH = flags.DEFINE_integer("context_length", 128, "Tokens of a context.")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "A Python that has sae-dashboard.")
_PEER_LATENTS = flags.DEFINE_integer("peer_latents", 512, "How many latents SAEDashboard takes.")
_OUT = flags.DEFINE_string("out", None, "Write the figures there as JSON.")


def main(_) -> int:
    model = lm.open_model(_MODEL.value)
    tokens = lm.pack(
        lm.read_texts(_TEXT.value), model.tokenizer, _CONTEXT_LENGTH.value, _TOKENS.value
    )
    tokens = tokens[: _TOKENS.value // _CONTEXT_LENGTH.value]
    source = ModelRows(
        model, _SITE.value, tokens, what="text", excluded_tokens=model.tokenizer.special_tokens
    )
    sae = random_sae(source)
    cost = interpret.describe_cost(sae, source, tokens=tokens.size)
    print(f"{tokens.size} tokens, {sae!r}: {cost}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        figures = ours(sae, source, cost, folder)
        print(as_text(figures), flush=True)
        if _PEER_PYTHON.value:
            found = interpret.Collection(folder / "collected")
            figures |= theirs(sae, tokens, found, folder, model.tokenizer.special_tokens)
            figures["times_less"] = figures["peer_ms_a_latent"] / figures["ms_a_latent"]
            figures["times_less_cpu"] = (
                figures["peer_cpu_seconds"] / figures["peer_latents"]
                / (figures["cpu_seconds"] / sae.config.d_sae)
            )  # fmt: skip
            print(as_text(figures), flush=True)
    if _OUT.value:
        save_json(figures, pathlib.Path(_OUT.value))
    return 0


def random_sae(source: ModelRows) -> TopK:
    """A TopK SAE of random directions, around the mean of the activations."""
    sequences = min(64, source.num_rows // _CONTEXT_LENGTH.value)
    x = source.read(np.arange(sequences)).reshape(-1, source.site_widths[0])
    fresh = TopK(d_in=x.shape[1], d_sae=_LATENTS.value, k=_K.value)
    return TopK.from_parameters(
        fresh.config, fresh.parameters() | {"b_dec": jnp.asarray(x.mean(axis=0))}
    )


def ours(sae: TopK, source: ModelRows, cost: interpret.Cost, folder) -> dict:
    """Times one pass over all latents, between measurements of a matrix product's speed."""
    speeds = [matmul_speed(sae)]
    before = peak_memory()
    begin, cpu = time.perf_counter(), time.process_time()
    interpret.collect(sae, source, folder / "collected", tokens=source.num_rows)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    memory = peak_memory() - before
    speeds.append(matmul_speed(sae))
    floor, cpu_floor = cost.flops / np.mean(speeds, axis=0)
    return {
        "seconds": seconds,
        "floor_seconds": floor,
        "times_the_floor": seconds / floor,
        "cpu_seconds": cpu,
        "cpu_floor_seconds": cpu_floor,
        "times_the_cpu_floor": cpu / cpu_floor,
        "matmul_gflops": [speed[0] / 1e9 for speed in speeds],
        "memory_gb": memory / 1e9,
        "memory_stated_gb": cost.memory / 1e9,
        "ms_a_latent": 1e3 * seconds / sae.config.d_sae,
    }


def matmul_speed(sae: TopK, rows: int = 256, repeats: int = 30) -> np.ndarray:
    """FLOPs a second, and a second of a core, of the encoder's product alone, in slices of as many
    tokens as the encoder takes."""
    w = sae.w_enc[...]
    x = jnp.ones((rows, w.shape[0]))
    product = jax.jit(lambda x, w: (x @ w)[:, 0])
    product(x, w).block_until_ready()
    begin = np.array([time.perf_counter(), time.process_time()])
    for _ in range(repeats):
        product(x, w).block_until_ready()
    spent = np.array([time.perf_counter(), time.process_time()]) - begin
    return 2 * w.size * rows * repeats / spent


def theirs(sae: TopK, tokens, found: interpret.Collection, folder, special_tokens) -> dict:
    """Runs SAEDashboard on some latents, and compares the largest activations with ours."""
    where = {"site": _SITE.value, "model": _MODEL.value}
    interop.export(sae, "saelens", folder / "sae", where, model=_MODEL.value)
    np.save(folder / "tokens.npy", tokens)
    alive = np.flatnonzero(found.density > 0)
    latents = alive[np.linspace(0, len(alive) - 1, _PEER_LATENTS.value).astype(int)]
    (folder / "peer.json").write_text(
        json.dumps(
            {
                "model": _MODEL.value,
                "latents": latents.tolist(),
                "ignore": list(special_tokens),
                "hook": f"blocks.{_SITE.value.split('.')[1]}.hook_{_SITE.value.split('.')[0]}",
            }
        )
    )
    script = pathlib.Path(__file__).with_name("saedashboard_once.py")
    subprocess.run([_PEER_PYTHON.value, script, folder], check=True)
    result = json.loads((folder / "result.json").read_text())
    difference = np.abs(np.array(result["largest"]) / found.max_activation[latents] - 1)
    return {
        "peer_seconds": result["seconds"],
        "peer_cpu_seconds": result["cpu_seconds"],
        "peer_latents": len(latents),
        "peer_ms_a_latent": 1e3 * result["seconds"] / len(latents),
        "peer_largest_relative_difference": float(np.median(difference)),
        "peer_same_largest": float(np.mean(difference < 1e-3)),
    }


def peak_memory() -> int:
    """Bytes that this process had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def as_text(figures: dict) -> str:
    shown = {name: np.round(value, 4).tolist() for name, value in figures.items()}
    return "\n".join(f"{name:34} {value}" for name, value in shown.items())


if __name__ == "__main__":
    app.run(main)
