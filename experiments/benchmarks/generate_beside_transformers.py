"""lm.generate beside transformers' generate, in turn: greedy, float32, each with its cache.

    python experiments/benchmarks/generate_beside_transformers.py --model=DIR

Both continue the same prompts, at each batch size, of the model and of a small random one. A line
has the new tokens a second of both, the median ratio of neighbouring rounds, and the share of
tokens that are the same (of random weights' close calls, float32 decides some). Needs:
pip install "sae-jax[peers]".
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.paths import save_json

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads are not to spin in our time

import torch  # noqa: E402
import transformers  # noqa: E402

_MODEL = flags.DEFINE_string("model", None, "Directory of a model; the small random one alone.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Prompts at once.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "Tokens of a prompt.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Tokens that follow.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed texts of each contestant.")
_THREADS = flags.DEFINE_integer("threads", 2, "Torch's threads.")
_OUT = flags.DEFINE_string("out", None, "Write the figures there as JSON.")


def small_model(directory: pathlib.Path) -> pathlib.Path:
    """Writes a random Llama of 4 layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def contest(directory, batch: int) -> dict:
    """Returns the tokens a second of both, and how often they agree."""
    ours = lm.open_model(str(directory))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    new = _NEW_TOKENS.value
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, ours.vocab_size, (batch, _PROMPT_TOKENS.value))
    ids = torch.tensor(prompts)

    def write_ours():
        texts = lm.generate(ours, prompts.tolist(), max_new_tokens=new, stop_at_eos=False)
        return np.array([text.tokens for text in texts])

    def write_theirs():
        texts = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip
        return texts[:, ids.shape[1] :].numpy()

    same = float((write_ours() == write_theirs()).mean())
    seconds = {"ours": [], "theirs": []}
    for _ in range(_ROUNDS.value):
        for name, write in (("ours", write_ours), ("theirs", write_theirs)):
            start = time.perf_counter()
            write()
            seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    speeds = {name: batch * new / statistics.median(each) for name, each in seconds.items()}
    return {
        "model": pathlib.Path(directory).name,
        "batch": batch,
        "tokens_per_second": speeds,
        "ratio": statistics.median(ratios),
        "same": same,
        "seconds": seconds,
    }


def main(_) -> int:
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32
    torch.set_num_threads(_THREADS.value)
    figures = []
    print(f"{'model':>12} {'batch':>5} {'ours':>8} {'theirs':>8} tokens/s {'ratio':>6} {'same':>6}")
    with tempfile.TemporaryDirectory() as temporary:
        small = small_model(pathlib.Path(temporary) / "small")
        try:
            for directory in (small, _MODEL.value) if _MODEL.value else (small,):
                for batch in map(int, _BATCHES.value):
                    figures.append(contest(directory, batch))
                    made = figures[-1]
                    ours, theirs = made["tokens_per_second"].values()
                    print(
                        f"{made['model']:>12} {batch:>5} {ours:>8.1f} {theirs:>8.1f} {'':>8} "
                        f"{made['ratio']:>6.2f} {made['same']:>6.1%}",
                        flush=True,
                    )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if _OUT.value:
        save_json(figures, pathlib.Path(_OUT.value))
    return 0


if __name__ == "__main__":
    app.run(main)
