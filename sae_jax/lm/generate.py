"""Writes texts with a language model: greedily or at random, clean or edited.

for text in lm.generate(model, ["Once upon a time"], temperature=0.7, samples=3):
    print(text.text)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sae_jax.errors import UserError
from sae_jax.lm.edits import At, Edit, ReadingEdit, as_pytree
from sae_jax.lm.language_model import LanguageModel
from sae_jax.lm.sampling import Rules

Prompt = str | Sequence[int]
"""A text, before which BOS is put where it does not begin with it, or the ids of tokens."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """Holds a text that a model wrote.

    Attributes:
      prompt: what it follows, as it was given.
      sample: its number among the samples of this prompt, from 0.
      tokens: the ids of the new tokens, with the EOS that ended them.
      text: the new tokens' text, without that EOS. None: the model has no tokenizer.
      stopped: why there are no more: eos, max_new_tokens, or max_context, the model's longest.
    """

    prompt: Prompt
    sample: int
    tokens: list[int]
    text: str | None
    stopped: str


def generate(
    model: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    edits: Mapping[str, Edit | ReadingEdit] | None = None,
    stop_at_eos: bool = True,
    samples: int = 1,
    batch_size: int = 32,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Returns texts that go on from prompts.

    Keys and values of past tokens are kept, so that a new token costs one pass of its own. A text
    depends on its prompt, the seed and its sample's number, and not on what else is in the batch.

    Edits work in every pass. In the prompt they see all its positions, with padding to the left of
    a shorter prompt, and then each new token alone (B, 1, width); so they must treat each row and
    position by itself. A mask (B, T) of `lm.at` is for the tokens of the prompts, T being the
    longest prompt's length and each row's mask beginning at its first token; what is new is then
    not edited. A function of positions, lm.at(lambda position: position > 0, edit), is asked at
    prompt and new positions alike.

    Raises UserError for a prompt of no tokens (a text has BOS at least), or that leaves no room in
    the model's context, for a setting out of its range, and for edits as `lm.forward` does.

    Args:
      model: a model that `lm.open_model` opened.
      prompts: texts, or lists of token ids. One text may stand alone.
      max_new_tokens: the most new tokens of a text, EOS included.
      temperature: what logits are divided by before a token is drawn. 0: the likeliest is taken.
      top_p: tokens are drawn from the likeliest that have this probability together. 1: all.
      seed: of the random numbers.
      edits: edits by site, as in `lm.forward`.
      stop_at_eos: whether a text ends after an end-of-sequence token of the model's files.
      samples: how many texts to write for each prompt.
      batch_size: how many texts are written at once. It changes no text, but memory and speed.
      on_token: is called with a text's index in the result and its newest token, after each step.
        The device then waits for it.

    Returns:
      The texts, all samples of the first prompt first.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check_settings(max_new_tokens, temperature, top_p, samples, batch_size)
    ids = [_ids(model, prompt, number) for number, prompt in enumerate(prompts)]
    eos = model.eos if stop_at_eos else ()
    rules = Rules(max_new_tokens, float(temperature), float(top_p), seed, eos)
    edits = {site: as_pytree(edit) for site, edit in (edits or {}).items()}
    for site, edit in edits.items():
        _check_masks(edit, ids, site)
    new_edits = {site: edit for site, edit in edits.items() if _reaches_new_tokens(edit)}
    texts = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)]
    made = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        rows = [prompt for prompt, _ in batch]

        def prompt_edits(shape, rows=rows):
            return {site: _padded(edit, ids, rows, shape) for site, edit in edits.items()}

        def tell(grown, tokens, start=start):
            for row, token in zip(grown, tokens, strict=True):
                on_token(start + int(row), int(token))

        made += model.continuations(
            [ids[row] for row in rows],
            [sample for _, sample in batch],
            rules,
            prompt_edits,
            new_edits,
            tell if on_token else None,
        )
    return [
        as_generated(model, prompts[prompt], ids[prompt], sample, new.tolist(), rules)
        for (prompt, sample), new in zip(texts, made, strict=True)
    ]


def _check_settings(max_new_tokens, temperature, top_p, samples, batch_size) -> None:
    whole = {"max_new_tokens": max_new_tokens, "samples": samples, "batch_size": batch_size}
    for name, value in whole.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"temperature is {temperature}; it must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1 (all tokens)")


def _ids(model: LanguageModel, prompt: Prompt, number: int) -> list[int]:
    if isinstance(prompt, str):
        tokenizer = model.tokenizer
        ids = tokenizer.encode(prompt)
        if ids[:1] != [tokenizer.bos]:
            ids = [tokenizer.bos, *ids]
    else:
        ids = [int(i) for i in prompt]
    if not ids:
        raise UserError(f"prompt {number} has no tokens; give it BOS at least")
    if wrong := [i for i in ids if not 0 <= i < model.vocab_size]:
        raise UserError(
            f"prompt {number} has token {wrong[0]}; the model has 0 to {model.vocab_size - 1}"
        )
    if len(ids) >= model.max_context:
        raise UserError(
            f"prompt {number} has {len(ids)} tokens, which leaves no room for new ones in the "
            f"model's context of {model.max_context}; shorten it"
        )
    return ids


def _check_masks(edit, ids: list[list[int]], site: str) -> None:
    while isinstance(edit, At):
        shape = (len(ids), max(len(row) for row in ids))
        if not callable(edit.positions) and np.shape(edit.positions) != shape:
            raise UserError(
                f"the mask of the edit of {site} has shape {np.shape(edit.positions)}; in "
                f"generation it is {shape}, for each prompt's tokens, or a function of positions"
            )
        edit = edit.edit


def _reaches_new_tokens(edit) -> bool:
    while isinstance(edit, At):
        if not callable(edit.positions):
            return False
        edit = edit.edit
    return True


def _padded(edit, ids: list[list[int]], rows: list[int], shape: tuple[int, int]):
    """Returns an edit whose masks are those of the prompts in `rows`, padded at the left.

    shape: that of the padded prompts; there may be rows for nothing after the others.
    """
    if not isinstance(edit, At):
        return edit
    positions = edit.positions
    if not callable(positions):
        mask, positions = np.asarray(positions, bool), np.zeros(shape, bool)
        for padded, row in zip(positions, rows, strict=False):
            length = len(ids[row])
            padded[shape[1] - length :] = mask[row, :length]
    return At(positions, _padded(edit.edit, ids, rows, shape))


def as_generated(
    model: LanguageModel,
    prompt: Prompt,
    ids: Sequence[int],
    sample: int,
    new: list[int],
    rules: Rules,
) -> Generated:
    """Returns the text of new tokens.

    Args:
      model: the model that wrote them.
      prompt: what they follow, as it was given.
      ids: its token ids.
      sample: the text's number among those of its prompt.
      new: the ids of the new tokens, with an EOS that ended them.
      rules: where the text had to stop.
    """
    ended = bool(new) and new[-1] in rules.eos
    if ended:
        stopped = "eos"
    else:
        stopped = "max_new_tokens" if len(new) == rules.max_new_tokens else "max_context"
    text = None
    if model.has_tokenizer:
        # After what comes before: some decoders leave out the space at the start of a text.
        head = model.tokenizer.decode(ids)
        spoken = new[:-1] if ended else new
        text = model.tokenizer.decode([*ids, *spoken])
        text = text[len(head) :] if text.startswith(head) else model.tokenizer.decode(spoken)
    return Generated(prompt, sample, new, text, stopped)
