"""A folder of a dashboard with planted latents, for tests of its page."""

import gzip
import json
import pathlib
import shutil

import numpy as np

PAGE = pathlib.Path(__file__).parents[1] / "sae_jax/interpret/dashboard_page"
SHARD = 256
INTERVALS = 12
HOSTILE = '</script><img src=x onerror="window.hurt=1">'
CAN = ("encode", "generate", "ablate", "search")


def about(d_sae: int) -> dict:
    edges = [round(100 * i / INTERVALS) for i in range(INTERVALS, -1, -1)]
    groups = [{"name": "highest"}]
    groups += [{"name": f"{edges[i + 1]}-{edges[i]}% of the maximum"} for i in range(INTERVALS)]
    return {
        "title": "Planted latents", "model": "one layer", "site": "resid_post.0", "d_sae": d_sae,
        "rows": 1_000_000, "shard": SHARD, "groups": groups, "shards": -(-d_sae // SHARD),
        "sae": {"architecture": "topk", "k": 32, "width": 64},
        "metrics": [["variance explained", 0.812345, ""], ["L0", 32.0, "latents a token"]],
        "live": False, "can": dict.fromkeys(CAN, False),
    }  # fmt: skip


def columns(d_sae: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Densities over five decades, a tenth of them dead, and scores for half of the latents."""
    rng = np.random.default_rng(seed)
    density = 10 ** rng.normal(-3.5, 0.8, d_sae)
    density[rng.random(d_sae) < 0.1] = 0
    density = np.minimum(density, 0.9)
    maximum = np.where(density > 0, rng.lognormal(2, 0.6, d_sae), 0)
    score = np.where(rng.random(d_sae) < 0.5, rng.uniform(0.3, 1, d_sae), np.nan)
    values = {"density": density, "mean": maximum * 0.3, "max": maximum, "score": score}
    return {name: value.astype("<f4") for name, value in values.items()}


def example(pieces: list[str], peak: int, value: float, sequence: int = 0, around=0.3) -> dict:
    """An example whose latent fires at the peak, and less on the piece before it."""
    values = [[0.0] for _ in pieces]
    values[peak] = [value]
    if peak:
        values[peak - 1] = [round(value * around, 4)]
    return {"sequence": sequence, "start": 4, "peak": peak, "pieces": pieces, "values": values}


def latent(index: int, table: dict, label: str | None, texts: list[list[str]]) -> dict:
    """A latent whose examples are texts that peak at their middle pieces."""
    rng = np.random.default_rng(index)
    maximum, density = float(table["max"][index]), float(table["density"][index])
    score = float(table["score"][index])
    groups = [[] for _ in range(1 + INTERVALS)]
    if density > 0:
        groups[0] = [
            example(text, len(text) // 2, maximum * (1 - 0.03 * i), 100 + i)
            for i, text in enumerate(texts)
        ]
        for g in range(INTERVALS):
            value = maximum * (INTERVALS - g - 0.5) / INTERVALS
            groups[1 + g] = [example(text, 1, value, 200 + g) for text in texts[: 1 + g % 3]]
    words = [" the", " Golden", " bridge", "↵", " naïve", " מים", "()", " 日本", " San", "</b>"]
    promoted = [[word, round(2.5 - 0.2 * i, 3)] for i, word in enumerate(words)]
    suppressed = [[word + "x", round(-0.3 - 0.1 * i, 3)] for i, word in enumerate(words)]
    return {
        "index": index, "density": density, "mean": float(table["mean"][index]), "max": maximum,
        "label": label, "score": None if np.isnan(score) else score,
        "histogram": [int(n) for n in 4000 * np.exp(-np.arange(50) / 7) + rng.integers(0, 9, 50)],
        "promoted": promoted, "suppressed": suppressed,
        "logit_histogram": {
            "low": -3.0, "high": 3.0,
            "counts": [int(n) for n in 9000 * np.exp(-np.linspace(-3, 3, 50) ** 2)],
        },
        "groups": groups,
        "neighbours": [[(index + n) % len(table["max"]), 0.9 - 0.1 * n] for n in range(1, 6)],
        "coactive": [[(index + 10 * n) % len(table["max"]), 0.5 - 0.1 * n] for n in range(1, 4)],
        "neurons": [[3, 0.61], [17, -0.4]],
    }  # fmt: skip


def write_gzip(path: pathlib.Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(values, ensure_ascii=False).encode(), 1))


def part_of(word: str) -> int:
    """Which of 64 files has a word: its 32-bit FNV-1a hash."""
    value = 0x811C9DC5
    for byte in word.encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return value % 64


def write(directory, d_sae: int, *, shards=(0,), labelled=True) -> dict:
    """Writes a folder with `d_sae` latents, of which only those of some shards can be opened.

    Latent 3 has hostile texts and is the only one with the word "zebra"; latent 5 has a piece of
    two tokens. Returns the columns.
    """
    shutil.copytree(PAGE, directory)
    data = directory / "data"
    (data / "latents").mkdir(parents=True)
    (data / "about.json").write_text(json.dumps(about(d_sae)))
    table = columns(d_sae)
    for name, planted in {"density": 0.01, "mean": 3.0, "max": 9.0, "score": 0.9}.items():
        table[name][3:6] = planted
    order = ("density", "mean", "max", "score")
    (data / "index.bin").write_bytes(b"".join(table[name].tobytes() for name in order))
    numbers = range(0, d_sae, 2) if labelled else ()
    labels = {str(i): f"things of kind {i % 97}, number {i}" for i in numbers}
    labels["3"] = HOSTILE
    write_gzip(data / "labels.json.gz", labels)
    write_gzip(data / "hints.json.gz", {"7": "over · the"})
    plain = ["We", " went", " over", " the", " Golden", " Gate", " Bridge", " in fog", ".↵"]
    right = ["שלום", " עולם", ",", " זה", " טקסט"]
    for shard in shards:
        found = []
        for i in range(shard * SHARD, min(d_sae, (shard + 1) * SHARD)):
            texts = [plain * 2, plain, right]
            if i == 3:
                texts = [["a", " zebra", HOSTILE, " b"], *texts]
            found.append(latent(i, table, labels.get(str(i)), texts))
            if i == 5:
                split = example(["It", " is", " 🙂", "!"], 2, 9.0, 7)
                split["values"][2], split["tokens"] = [2.25, 9.0], [[], [], ["ĠðŁ", "ĻĤ"], []]
                found[-1]["groups"][0].insert(0, split)
        write_gzip(data / "latents" / f"{shard:05}.json.gz", found)
    words = {part: {} for part in range(64)}
    words[part_of("zebra")]["zebra"] = [3]
    words[part_of("עולם")]["עולם"] = list(range(0, 256, 5))
    for part, values in words.items():
        write_gzip(data / "words" / f"{part:02x}.json.gz", values)
    return table
