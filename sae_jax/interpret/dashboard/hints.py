"""Says of every latent on which tokens it peaks, for lists of latents that nobody has named."""

import collections
import functools

from sae_jax import lm
from sae_jax.interpret.collection import Collection
from sae_jax.interpret.text import token_text

_SHOWN = 4


def hints(collection: Collection, tokenizer: lm.Tokenizer) -> dict[int, str]:
    """Returns, by latent, the tokens on which its highest peaks lie, the most frequent first.

    There are at most four, with a middle dot between them. A latent that never fires has none.
    """
    text = functools.cache(lambda token: token_text(tokenizer, token).strip() or "␣")
    found = {}
    for latent, tokens in enumerate(collection.peak_tokens().tolist()):
        peaks = collections.Counter(text(token) for token in tokens if token >= 0)
        if peaks:
            found[latent] = " · ".join(token for token, _ in peaks.most_common(_SHOWN))
    return found
