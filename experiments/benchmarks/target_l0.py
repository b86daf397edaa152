"""Do short runs reach a target L0, and what do they reconstruct beside TopK there?

    sae-jax sweep --config=experiments/benchmarks/target_l0.py --workdir=sweeps/target_l0
    python experiments/benchmarks/target_l0.py sweeps/target_l0

The sweep trains ReLU, JumpReLU and gated SAEs to an L0 of 4, 8, 16 and 32, and TopK with as many
latents a token, on 1M and 4M tokens of a synthetic world. Everything that is not of the comparison
has its default, learning rates too. The second command prints a table of what was reached and draws
FVU against L0, target_l0.png, beside results.csv.
"""

import pathlib
import sys

import matplotlib
from matplotlib.figure import Figure

from sae_jax import plots
from sae_jax.config import Config, DataConfig, TrainConfig
from sae_jax.sae import TopKConfig
from sae_jax.sweep import grid
from sae_jax.tables import read_csv

L0 = [4, 8, 16, 32]
TOKENS = [1_000_000, 4_000_000]
MARKERS = {"topk": "s", "relu": "o", "jumprelu": "^", "gated": "D"}
COLOURS = dict(zip(MARKERS, (plots.INK, plots.BLUE, plots.ORANGE, "#4a9c5d"), strict=True))


def get_config() -> Config:
    return Config(
        sae=TopKConfig(d_sae=256),
        data=DataConfig(store="world:superposition,width=32,features=512"),
        train=TrainConfig(log_every=100),
    )


def get_sweep() -> grid.Grid:
    topk = grid.product(grid.sweep("sae.architecture", ["topk"]), grid.sweep("sae.k", L0))
    adapted = grid.product(
        grid.sweep("sae.architecture", [name for name in MARKERS if name != "topk"]),
        grid.sweep("sae.target_l0", [float(l0) for l0 in L0]),
    )
    return grid.product(grid.chain(topk, adapted), grid.sweep("train.tokens", TOKENS))


def main(directory: pathlib.Path) -> None:
    rows = [row for _, row in read_csv(directory / "results.csv") if row["status"] == "done"]
    print("architecture    tokens  target     L0  off by  reached  at limit      FVU  lr")
    for row in rows:
        target = float(row["target_l0"] or row["k"])
        off = float(row["eval_l0"]) / target - 1
        print(
            f"{row['architecture']:12}{int(row['tokens']):10,}{target:8g}{float(row['eval_l0']):7.2f}"
            f"{off:+8.1%}{row['target_reached'] or '-':>9}{row['coefficient_at_limit'] or '-':>10}"
            f"{float(row['eval_fvu']):9.4f}  {float(row['lr']):.1e}"
        )
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        for axes, budget in zip(figure.subplots(1, 2, sharey=True), TOKENS, strict=True):
            for name, marker in MARKERS.items():
                found = sorted(
                    (float(row["eval_l0"]), float(row["eval_fvu"]))
                    for row in rows
                    if row["architecture"] == name and abs(int(row["tokens"]) / budget - 1) < 0.1
                )
                if found:
                    axes.loglog(
                        *zip(*found, strict=True), marker=marker, markersize=5, linewidth=1.2,
                        color=COLOURS[name], label=name,
                    )  # fmt: skip
            axes.set(title=f"{budget / 1e6:g}M tokens", xlabel="L0 on held-out rows")
            axes.set_xticks(L0, [str(l0) for l0 in L0])
            axes.minorticks_off()
        figure.axes[0].set_ylabel("fraction of variance unexplained")
        figure.axes[0].legend()
        plots.save(figure, directory / "target_l0.png")
    print(directory / "target_l0.png")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
