"""Language models that are built by hand, whose effects have a closed form.

The residual stream has a constant so much larger than the rest that no change of the rest changes a
norm's scale by more than float32 rounds. So the norms are linear, and so is what follows a site, up
to the MLP's ReLU and the softmax.
"""

import math

import jax
import numpy as np
import tokenizers

from sae_jax import lm

CONSTANT = 3e4
WORDS = ["<s>", "A", "x", "y", "B", "z"]  # each a token, with a space between
V = len(WORDS)
CURRENT, PREVIOUS, OUT = (1 + i * V for i in range(3))  # where the residual stream has each word
D = 1 + 3 * V
UNIT = CONSTANT / math.sqrt(D)  # what a norm divides by
HEAD = 8


def make_model(directory, num_layers, fill):
    """Writes a model whose parameters `fill(params)` sets: all others are 0, and norms' 1.

    A token's embedding is the constant, and 1 at the word's place in CURRENT.
    """
    config = lm.DecoderConfig(
        vocab_size=V, d_model=D, num_layers=num_layers, num_heads=1, num_kv_heads=1, head_dim=HEAD,
        d_mlp=4, max_context=8, norm_eps=1e-6, activation="relu", gated_mlp=False,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), lm.layout(config))
    for part in (params, *params["layers"]):
        for name in part:
            if name.endswith("norm"):
                part[name] += 1.0
    params["embed"][:, 0] = CONSTANT
    params["embed"][np.arange(V), CURRENT + np.arange(V)] = 1.0
    fill(params)
    directory.mkdir(parents=True)
    lm.save_model(directory, config, params, np.float32, bos_token_id=0)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="z")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>"])
    backend.save(str(directory / "tokenizer.json"))
    return lm.JaxModel(directory)


def ids(text):
    return np.array([0, *(WORDS.index(word) for word in text.split())])


def bigram(strength):
    """After A the logit of B is `strength`, and all others are 0."""

    def fill(params):
        params["unembed"][CURRENT + WORDS.index("A"), WORDS.index("B")] = strength * UNIT

    return fill


def skip_circuit(strength, direct, loud):
    """Two layers: after "A ?" the logit of B is `strength`.

    A head of layer 0 writes the word before to PREVIOUS, and a neuron of layer 1 that reads A there
    writes to OUT at B. The word x is `loud` times as strong as the others, and adds
    direct * loud to B's logit by itself.
    """

    def fill(params):
        first, second = params["layers"]
        # Queries and keys are constant, the keys one position ahead; pair 0 turns by 1 a position.
        sharpness = math.sqrt(2000 * HEAD**0.5 / D)
        first["w_q"][0, 0, 0, 0] = sharpness
        first["w_k"][0, 0, [0, HEAD // 2]] = sharpness * np.array([math.cos(1), math.sin(1)])
        for word in range(V):
            first["w_v"][CURRENT + word, 0, word] = UNIT
            first["w_o"][0, 0, word, PREVIOUS + word] = 1.0
        second["w_up"][PREVIOUS + WORDS.index("A"), 0] = UNIT
        second["w_down"][0, OUT + WORDS.index("B")] = strength
        x = WORDS.index("x")
        params["embed"][x, CURRENT + x] = loud
        params["unembed"][CURRENT + x, WORDS.index("B")] = direct * UNIT
        for word in range(V):
            params["unembed"][OUT + word, word] = UNIT

    return fill
