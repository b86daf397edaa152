"""Padded token ids are evaluated as their texts are alone, beside transformers, TransformerLens."""

import dataclasses
import json
import pathlib
import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import sae_jax
from sae_jax import lm
from sae_jax.activations import write_store
from sae_jax.errors import UserError
from sae_jax.evaluate import sources
from sae_jax.evaluate.padding import text_first
from sae_jax.evaluate.report import evaluate
from sae_jax.evaluate.sources import HeldOutRows, read_tokens
from sae_jax.sae import ReLU, ReLUConfig, resolve

GPT2 = pathlib.Path(__file__).parent / "fixtures" / "lm" / "gpt2"  # with learned positions
SITE, D, T = "resid_post.0", 16, 12
BOS, PAD, UNK = 1, 0, 2
LENGTHS = (12, 5, 9)


def make_directory(directory, **config):
    """The tiny GPT-2 with a tokenizer that has PAD, BOS and UNK."""
    shutil.copytree(GPT2, directory)
    values = json.loads((directory / "config.json").read_text())
    ids = {"bos_token_id": BOS, "eos_token_id": BOS, "pad_token_id": PAD} | config
    (directory / "config.json").write_text(json.dumps(values | ids))
    vocab = {"<pad>": PAD, "<s>": BOS, "<unk>": UNK} | {chr(100 + i): i for i in range(3, 41)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("padding") / "model")


@pytest.fixture(scope="module")
def model(directory):
    return lm.open_model(directory)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [[BOS, *rng.integers(3, 41, length - 1).tolist()] for length in LENGTHS]


def padded(texts, side, pad=PAD):
    rows = []
    for i, text in enumerate(texts):
        missing = T - len(text)
        before = {"left": missing, "right": 0, "both": missing // 2 + i % 2}[side]
        before = min(before, missing)
        rows.append([pad] * before + text + [pad] * (missing - before))
    return np.array(rows)


def halving():
    """An SAE whose reconstruction is half of what it reads, plus 0.1."""
    eye = jnp.eye(D)
    w_enc = jnp.concatenate([eye, -eye], axis=1)
    parameters = {"w_enc": w_enc, "w_dec": 0.5 * w_enc.T, "b_enc": jnp.zeros(2 * D),
                  "b_dec": jnp.full(D, 0.1)}  # fmt: skip
    return ReLU.from_parameters(resolve(ReLUConfig(d_sae=2 * D), D), parameters)


def numbers(model, tokens, **options):
    found = sae_jax.evaluate(halving(), model=model, token_ids=tokens, site=SITE, **options)
    return found.scalars | {"rows": found.rows.rows}


@pytest.mark.parametrize("include_excluded", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_padding_on_any_side_changes_nothing(model, texts, include_excluded):
    """What counts is each text alone: its rows, its real next tokens, at positions from 0."""
    sums = {"ce": 0.0, "predicted": 0, "rows": []}
    for text in texts:
        logits, taps = model.forward(np.array([text]), (SITE,))
        losses = np.asarray(lm.next_token_loss(logits, np.array([text])))[0]
        first = 0 if include_excluded else 1  # the position of BOS
        sums["ce"] += losses[first:].sum()
        sums["predicted"] += len(losses[first:])
        sums["rows"].append(np.asarray(taps[SITE])[0, first:])
    rows = np.concatenate(sums["rows"])
    error = rows - (0.5 * rows + 0.1)
    fvu = (error**2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    cases = [("right", PAD), ("left", PAD), ("both", PAD), ("left", -100), ("both", -100)]
    for side, pad in cases:
        found = numbers(model, padded(texts, side, pad), include_excluded=include_excluded)
        what = f"{side}, {pad}"
        assert found["predicted"] == sums["predicted"], what
        assert found["rows"] == found["replaced"] == len(rows), what
        assert found["ce_clean"] == pytest.approx(sums["ce"] / sums["predicted"], rel=1e-5), what
        assert found["fvu"] == pytest.approx(fvu, rel=1e-5), what


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_of_a_padded_batch_beside_transformers(directory, model, texts, side):
    """transformers with an attention mask, positions to match, and labels of -100.

    BOS is no label either: where padding is before it, transformers counts what PAD predicts.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    ids = torch.tensor(padded(texts, side))
    mask = (ids != PAD).long()
    labels = torch.where((ids != PAD) & (ids != BOS), ids, -100)
    real, seen, replacement = mask.bool(), {}, None

    def hook(_, args, out):
        x = out[0] if isinstance(out, tuple) else out
        seen["x"] = x
        if replacement is None:
            return out
        new = torch.where(real[..., None], replacement(x), x)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    theirs.transformer.h[0].register_forward_hook(hook)
    replacements = {"clean": None, "spliced": lambda x: 0.5 * x + 0.1, "zero": torch.zeros_like}
    losses = {}
    for name, replacement in replacements.items():  # noqa: B007, the hook reads it
        with torch.no_grad():
            losses[f"ce_{name}"] = theirs(
                input_ids=ids, attention_mask=mask, labels=labels,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            ).loss.item()  # fmt: skip
        if name == "clean":
            rows = seen["x"][real].double()
    found = numbers(model, padded(texts, side), include_excluded=True)
    assert {name: found[name] for name in losses} == pytest.approx(losses, rel=1e-5)
    lost = losses["ce_zero"] - losses["ce_clean"]
    recovered = (losses["ce_zero"] - losses["ce_spliced"]) / lost
    assert found["ce_recovered_zero"] == pytest.approx(recovered, rel=1e-4)
    unexplained = (rows - (0.5 * rows + 0.1)).pow(2).sum() / rows.var(0, correction=0).sum()
    assert found["fvu"] == pytest.approx(unexplained.item() / len(rows), rel=1e-5)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_of_a_padded_batch_beside_transformer_lens(directory, model, texts, side):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lens = pytest.importorskip("transformer_lens")
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=32, d_head=4, n_heads=4, d_mlp=4 * D, d_vocab=41,
        act_fn="gelu_new", normalization_type="LN", device="cpu",
    )  # fmt: skip
    hooked = lens.HookedTransformer(config)
    causal = transformers.GPT2LMHeadModel.from_pretrained(directory)
    hooked.load_state_dict(convert_gpt2_weights(causal, config), strict=False)
    ids = torch.tensor(padded(texts, side))
    mask = (ids != PAD).long()

    def spliced(x, hook):
        return torch.where(mask.bool()[..., None], 0.5 * x + 0.1, x)

    with torch.no_grad():
        clean = hooked(ids, return_type="loss", attention_mask=mask, padding_side=side)
        edited = hooked.run_with_hooks(
            ids, return_type="loss", attention_mask=mask, padding_side=side,
            fwd_hooks=[("blocks.0.hook_resid_post", spliced)],
        )  # fmt: skip
    found = numbers(model, padded(texts, side), include_excluded=True)
    assert found["ce_clean"] == pytest.approx(clean.item(), rel=1e-5)
    assert found["ce_spliced"] == pytest.approx(edited.item(), rel=1e-5)


@pytest.mark.slow
def test_a_store_of_padded_texts(tmp_path, model, texts):
    """Its rows are as they are; in the language model its padding is none of the text."""
    left = padded(texts, "left")
    x = np.random.default_rng(1).normal(size=(*left.shape, D)).astype(np.float32)
    x = x.reshape(-1, D)
    options = {"tokens": left, "context_length": T, "special_tokens": (PAD, BOS)}
    write_store(tmp_path / "s", {SITE: x}, **options)
    rows = HeldOutRows(lm.open_store(tmp_path / "s"), SITE, tokens=10**6, holdout_fraction=None)
    found = evaluate(halving(), rows, model)
    tokens, used, is_text = rows.sequences(10**6, model.tokenizer)
    assert (tokens[:, 0] == BOS).all() and not used[:, 0].any()
    assert found.spliced["replaced"] == used.sum() == is_text.sum() - len(tokens)
    alone = numbers(model, padded([row[row != PAD].tolist() for row in tokens], "right"))
    assert found.spliced["ce_clean"] == pytest.approx(alone["ce_clean"], rel=1e-5)


S = BOS  # where PAD is BOS or EOS too


@pytest.mark.parametrize(
    "tokens, first, is_text",
    [
        # Packed text: a BOS before it and an EOS at a row's end belong to it.
        ([[S, 5, 6, S], [S, 5, 6, 7]], [[S, 5, 6, S], [S, 5, 6, 7]], [[1] * 4] * 2),
        ([[S, 5, S, S], [S, 5, 6, S]], [[S, 5, 0, 0], [S, 5, 6, 0]], [[1, 1, 0, 0], [1, 1, 1, 0]]),
        ([[S, S, S, 5], [S, 5, 6, 7]], [[S, 5, 0, 0], [S, 5, 6, 7]], [[1, 1, 0, 0], [1] * 4]),
        ([[S, 5, 6, S], [S] * 4], [[S, 5, 6, S], [0] * 4], [[1] * 4, [0] * 4]),
        ([[S, 5, S, -100]], [[S, 5, S, 0]], [[1, 1, 1, 0]]),
    ],
)  # fmt: skip
def test_padding_that_is_bos_and_eos(model, tokens, first, is_text):
    tokenizer = dataclasses.replace(model.tokenizer, pad=None, eos=S, bos=S)
    found = text_first(np.array(tokens), tokenizer, "tokens")
    np.testing.assert_array_equal(found.tokens, first)
    np.testing.assert_array_equal(found.is_text, np.array(is_text, bool))


def test_pad_in_the_middle(model):
    """It is no text either, unless it is the unknown token."""
    tokens = np.array([[BOS, 5, PAD, PAD, BOS, 6, PAD]])
    found = text_first(tokens, model.tokenizer, "tokens")
    np.testing.assert_array_equal(found.is_text, [[1, 1, 0, 0, 1, 1, 0]])
    unknown = dataclasses.replace(model.tokenizer, pad=UNK)
    found = text_first(np.where(tokens == PAD, UNK, tokens), unknown, "tokens")
    np.testing.assert_array_equal(found.is_text, [[1, 1, 1, 1, 1, 1, 0]])


def test_ids_that_are_none_are_refused(tmp_path, model, texts):
    with pytest.raises(UserError, match="sequence 1 has -100 between its tokens"):
        numbers(model, np.array([[BOS, 5, 6], [BOS, -100, 6]]))
    with pytest.raises(UserError, match="the tokens given has token -5, but"):
        numbers(model, np.array([[BOS, 5, -5]]))
    np.save(tmp_path / "t.npy", np.array([[BOS, 5, 2**32 + 6]]))  # 6 in 32 bits
    with pytest.raises(UserError, match="has token 4294967302, but"):
        numbers(model, read_tokens(tmp_path / "t.npy"))
    with pytest.raises(UserError, match="all of them are excluded"):
        numbers(model, np.full((2, 4), PAD))


def test_token_files_whose_size_lies(tmp_path, monkeypatch):
    """Headers that ask for a terabyte, and zeros that were compressed a thousandfold."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (10**6, 10**6)}
    for name in ("t.npy", "t.npz"):
        with open(tmp_path / "array", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(1 << 20))
        if name == "t.npz":
            with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(tmp_path / "array", "tokens.npy")
        else:
            (tmp_path / "array").rename(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} (cannot be read|would unfold to)"):
            read_tokens(tmp_path / name)
    np.savez_compressed(tmp_path / "t.npz", tokens=np.ones((1000, 1024), np.int64))
    assert read_tokens(tmp_path / "t.npz").shape == (1000, 1024)
    monkeypatch.setattr(sources, "_PLAIN_BYTES", 1 << 20)
    with pytest.raises(UserError, match="t.npz would unfold to 8,192,128 bytes"):
        read_tokens(tmp_path / "t.npz")
