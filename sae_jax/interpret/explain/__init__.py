"""Says what latents mean, and measures how well what is said holds.

Three ways explain an `interpret.Activity` and score what was said: `by_statistics` by rules about
tokens, `by_embedding` by the vectors of a sentence encoder, and `llm` by language models behind an
API. All give `Explanation` and `Score` records, which `summarise` holds against their controls.
"""

from sae_jax.interpret.explain import llm
from sae_jax.interpret.explain.controls import record_controls
from sae_jax.interpret.explain.embedding import by_embedding
from sae_jax.interpret.explain.records import Explanation, Score
from sae_jax.interpret.explain.report import write_report
from sae_jax.interpret.explain.statistics import by_statistics
from sae_jax.interpret.explain.summary import Summary, summarise

__all__ = [
    "Explanation",
    "Score",
    "Summary",
    "by_embedding",
    "by_statistics",
    "llm",
    "record_controls",
    "summarise",
    "write_report",
]
