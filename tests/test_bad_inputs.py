"""The table of bad inputs: each ends with exit code 2 and one line that names the thing.

A row is a command, the files that are broken for it, and what the line must name. `tree` makes
small valid inputs of every format that the command line reads, once. A row breaks some of them,
runs its command in this process, and puts back what was there. Whatever was there must be as it was
when the command has ended, byte for byte.
"""

import hashlib
import itertools
import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
from training import make_config, make_store, sparse_rows

from sae_jax import cli
from sae_jax import config as configs
from sae_jax.activations import open_stream
from sae_jax.sweep.directory import Run, SweepDirectory
from sae_jax.train import preparation, results
from sae_jax.train.run import train_run

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
EXPORTS = {  # the folder in the tree, and the fixture that is copied there
    "saelens": "saelens-topk-autoencoder",
    "sparsify": "sparsify-topk-autoencoder",
    "dictionary_learning": "dictionary_learning-batchtopk-autoencoder",
    "gemma_scope": "gemma_scope-jumprelu-autoencoder",
    "gemma_scope_2": "gemma_scope_2-jumprelu-autoencoder",
    "openai": "openai-relu-autoencoder",
    "ours": "sae_jax-topk-autoencoder",
}


class Row(NamedTuple):
    """A command line, what its error names ("a|b": one of them), and what becomes of files of the
    tree: bytes or text; a dict, which is merged into the JSON there; a function of the bytes; or
    None: there is none.
    """

    command: str
    says: str
    files: dict[str, bytes | str | dict | Callable[[bytes], bytes] | None] = {}


def rows(*made: tuple) -> list[Row]:
    return [Row(*row) for row in made]


def each(command: str, values: list[str], says: str) -> list[Row]:
    """A row for each value that is put into the command at VALUE."""
    return [Row(command.replace("VALUE", shlex.quote(value)), says) for value in values]


def naming(field: str, value: str) -> str:
    """What a line names that is about a field: it, or a value that is a name itself."""
    return f"{field}|{value}" if len(value) > 4 else field


def flag_rows(command: str, bad: dict[str, str]) -> list[Row]:
    """A row for each bad value of each flag; `bad` has them with spaces between, '' for nothing."""
    return [
        Row(f"{command} --{flag}={'' if value == '_' else value}", naming(flag, value))
        for flag, values in bad.items()
        for value in values.split(" ")
    ]


# --------------------------------------------------------------- what is given on the command line

RUNS = "fit --results=table.csv --law=power --out=o"
COMPARE = "compare --results=table.csv --x=flops --y=loss --out=o"
TRAIN = "train --workdir=w --config.data.store=store"
WHOLE_RUN = (
    f"{TRAIN} --config.train.tokens=640 --config.data.batch_size=64 "
    "--config.data.virtual_shards=8 --config.sae.d_sae=32 --config.sae.k=4"
)
EVAL = "eval --run=run"
HARVEST = "harvest --model=model --text=text.txt --sites=resid_post.0 --out=o"
SWEEP = "sweep --workdir=w --config=grid.py"
DASHBOARD = "dashboard --run=run --model=model"
NEURONPEDIA = "dashboard --run=run --neuronpedia=np --np_model=m --np_source=0-s"
STEER = "steer --run=run --latent=1 --prompt=a"
EXPLAIN = "explain --run=run"
JUDGED = f"{EXPLAIN} --by=llm --judge=m"

COMMANDS = rows(
    ("trian", "did you mean 'train'"),
    ("fit extra", "extra"),
    ("train workdir=a", "workdir=a"),
    ("train --workdri=a", "workdri"),
    ("train", "--workdir"),
    ("train --workdir=w", "--config.data.store"),
    ("train --workdir=w --config.data.store", "no value"),
    ("train --workdir= --config.data.store=store", "--workdir"),
    ("eval", "--run"),
    ("eval --run=run --sae=ours", "--run"),
    ("eval --run=", ""),
    ("sweep", "--workdir"),
    ("sweep --workdir=w", "--config"),
    ("eval --results=run", "holds no sweep"),
    ("eval --results=nothing", "nothing"),
    ("eval --results=sweep --run=run", "--run"),
    ("eval --run=run --select=k=3", "--results"),
    ("eval --run=sweep", "is a sweep"),
    ("eval --results=sweep --out=all.json", "all.json"),
    ("eval --run=run --overwrite --out=model/config.json", "is no evaluation"),
    ("attribute", "--run"),
    ("attribute --run=run --sae=ours", "--run"),
    ("attribute --run=run", "--prompt"),
    ("attribute --run=run --prompt=a", "--target"),
    ("attribute --run=run --prompt=a --target=b --loss", "--loss"),
    ("attribute --run=run --prompt=a --loss --baseline=b", "--baseline"),
    ("attribute --run=run --prompt=a --loss", "--model"),
    ("attribute --run=run --prompt=a --loss --site=a --site=b", "--site"),
    ("attribute --sae=nothing --model=model --prompt=a --loss", "nothing"),
    ("attribute --sae=ours --model=model --prompt=a --loss --site=mlp_in.0 --out=many", "many"),
    ("attribute --sae=ours --model=model --prompt=a --loss --site=mlp_in.99", "mlp_in.99"),
    ("attribute --sae=ours --model=nothing --prompt=a --loss --site=mlp_in.0", "nothing"),
    ("dashboard", "--run"),
    ("dashboard --run=run --sae=ours", "--run"),
    ("dashboard --sae=ours", "--out"),
    ("dashboard --run=nothing", "nothing"),
    ("dashboard --run=sweep", "is a sweep"),
    ("dashboard --run=run --host=0.0.0.0", "--serve"),
    ("dashboard --run=run --serve=port", "port"),
    ("dashboard --run=run --latents=1", "--single"),
    ("dashboard --run=run --latents=1,x --single=o.html", "--latents=1,x"),
    ("dashboard --run=run --single=o.html --serve", "--single"),
    ("dashboard --sae=ours --out=o --single=o.html", "--run"),
    ("dashboard --run=run", "--model=DIR"),
    ("dashboard --run=run --tokenizer=nothing", "nothing"),
    (DASHBOARD, "has no tokens"),
    (f"{DASHBOARD} --labels=nothing.csv", "nothing.csv"),
    (f"{DASHBOARD} --labels=table.csv", "table.csv"),
    (f"{DASHBOARD} --labels=text.json", "text.json"),
    (f"{DASHBOARD} --out=text.txt", "text.txt"),
    (f"{DASHBOARD} --out=s3://bucket/o", "s3://bucket/o"),
    ("steer --run=run --prompt=a", "--latent"),
    ("steer --latent=1 --prompt=a", "--run"),
    ("steer --sae=ours --latent=1", "--prompt"),
    ("steer --run=run --latent=x --prompt=a", "--latent=x"),
    (f"{STEER} --factors=1,two", "--factors=1,two"),
    (f"{STEER} --factors=nan", "--factors=nan"),
    ("explain", "--run"),
    ("explain --run=nothing", "nothing"),
    ("explain --run=sweep", "is a sweep"),
    ("explain --sae=ours", "--out"),
    (f"{EXPLAIN} --out=text.txt", "--out=text.txt is a file"),
    (f"{EXPLAIN} --out=s3://bucket/o", "s3://bucket/o"),
    (f"{EXPLAIN} --model=nothing", "nothing"),
    (f"{EXPLAIN} --by=stats", "'statistics'"),
    (f"{EXPLAIN} --by=embedding", "--sentences"),
    (f"{EXPLAIN} --controls=neuron", "'neurons'"),
    (f"{EXPLAIN} --fdr=2", "--fdr=2"),
    (f"{EXPLAIN} --least_f1=7", "--least_f1=7"),
    (f"{EXPLAIN} --latents=", "--latents="),
    (f"{EXPLAIN} --latents=1-5", "--latents=1-5"),
    (f"{EXPLAIN} --sample=0", "--sample=0"),
    (f"{EXPLAIN} --dry_run", "--by=llm"),
    (f"{EXPLAIN} --steer=DNA", "--proxies"),
    (f"{EXPLAIN} --labelled_text=text.jsonl", "--proxies"),
    (f"{EXPLAIN} --by=llm", "--judge"),
    (f"{JUDGED} --explainer=none", "--score=statistics"),
    (f"{JUDGED} --explainer=bricken", "bricken2023"),
    (f"{JUDGED} --explainer=nothing.md", "nothing.md"),
    (f"{JUDGED} --scorers=detect", "'detection'"),
    (f"{JUDGED} --scorers=simulation", "--simulator"),
    (f"{JUDGED} --score=llm", "--score"),
    (f"{JUDGED} --price=1", "--price=1"),
    (f"{STEER} --mode=pin --factors=1", "--factors"),
    (f"{STEER} --mode=clmp", "clmp"),
    (f"{STEER} --positive=text.txt", "--negative"),
    (f"{STEER} --concept=(", "--concept=("),
    (f"{STEER} --positions=prompt --text=text.txt", "--positions=prompt"),
    (f"{STEER} --top_p=0", "--top_p"),
    (f"{STEER}", "--model"),
    (f"{STEER} --model=nothing", "nothing"),
    ("dashboard --run=run --np_model=m", "--neuronpedia=DIR"),
    ("dashboard --run=run --push", "--neuronpedia=DIR"),
    ("dashboard --run=run --neuronpedia=np", "--np_source"),
    ("dashboard --run=run --neuronpedia=np --np_model=GPT2 --np_source=0-s", "GPT2"),
    ("dashboard --run=run --neuronpedia=np --np_model=m --np_source=mine", "'mine'"),
    ("dashboard --run=run --neuronpedia=np --np_model=m --np_source=0-../s", "'0-../s'"),
    (f"{NEURONPEDIA} --push --np_layout=bulk", "--np_layout=upload"),
    (f"{NEURONPEDIA} --dry_run", "--push"),
    (f"{NEURONPEDIA} --serve", "--serve"),
    (f"{NEURONPEDIA} --np_layout=saedashboard --np_title=a", "--np_layout=bulk"),
    (f"{NEURONPEDIA} --np_labeller=a", "--labels"),
    ("status", "status runs/a"),
    ("status nothing", "nothing"),
    ("status --path=", "status runs/a"),
    ("status text.txt", "text.txt"),
    ("status run --serve=port", "port"),
    ("status run --serve=70000", "65535"),
    ("status store --serve", "--serve"),
    ("sweep --status", "--workdir"),
    ("sweep --workdir=nothing --status", "nothing"),
    ("sweep --workdir=nothing --rerun=failed", "nothing"),
    ("sweep --workdir=sweep --rerun=failed", "has failed"),
    ("sweep --workdir=sweep --rerun=", "has no run"),
    ("sweep --workdir=sweep --drop=nothing", "nothing"),
    ("sweep --workdir=sweep --drop=ID", "no run left"),
    ("sweep --workdir=sweep --drop=ID --dry_run", "leave --drop out"),
    ("sweep --workdir=sweep --drop=ID --rerun=ID", "name base"),
    ("sweep --workdir=sweep --restore=ID", "no run of it is dropped"),
    ("sweep --workdir=sweep --restore=failed", "has failed"),
    ("sweep --workdir=sweep --drop=d_sae=64", "of d_sae there is 128"),
    ("sweep --workdir=sweep --drop=ID --config=same.py", "--config"),
    ("sweep --workdir=sweep --extend", "--config"),
    ("sweep --workdir=sweep --extend --config=grid.py", "leaves out 1 run"),
    ("sweep --workdir=sweep --config.sae.k=3", "sae.k"),
    ("sweep --workdir=sweep --config.mesh.data=x", "mesh.data"),
    ("train --workdir=w --extend_tokens=1e4", "--branch_from"),
    ("train --workdir=run --extend_tokens=1e4", "--branch_from=run"),
    ("train --workdir=run --branch_from=run", "no branch"),
    ("train --workdir=w --branch_from=run --extend_tokens=64", "2 already"),
    ("train --workdir=w --branch_from=run --extend_tokens=1e4 --config.sae.k=1", "sae.k"),
    ("train --workdir=w --branch_from=run --extend_tokens=1e4 --config=config.py", "--config"),
    ("train --workdir=w --branch_from=run/checkpoints/9 --config.train.tokens=640", "step 9"),
    ("train --workdir=w --branch_from=run --config.train.tokens=64", "train.tokens"),
    *((f"train --workdir=w --branch_from=run --config.train.tokens=640 --config.{field}", field[:6])
      for field in ("sae.d_sae=64", "data.seed=1", "sae.normalize=none", "train.seed=2")),
    *((f"train --workdir=w --branch_from={place}", place)
      for place in ("nothing", "store", "text.txt", "ours", "s3x://a/b")),
    ("fit", "--results"),
    ("fit --results=table.csv", "--law"),
    ("fit --results=table.csv --law=power", "--out"),
    ("fit --results=table.csv --law=power --out=", "--out"),
    ("fit --law=power --out=o --results=", "--results"),
    ("compare", "--results"),
    ("compare --results=table.csv", "--out"),
    (f"{COMPARE} --style=config.py", "--figure"),
    (f"{COMPARE} --at=1e-9,2e-9", "no group's frontier"),
    (f"{COMPARE} --figure=o.pdf --style=config.py", "config.py"),
    (f"{RUNS} --config=config.py", "--predict_flops"),
    (f"{RUNS} --config.sae.k=3", "--predict_flops"),
    (f"{RUNS} --law=power", "--law"),
    (f"{TRAIN} --config.sae.k=3 --config.sae.k=4", "--config.sae.k"),
    (f"{RUNS} --results=nothing.csv", "nothing.csv"),
    (f"{RUNS} --select=flops>1e99", "flops>1e99"),
    (f"{RUNS} --by=flops", "--by=flops"),
    (f"{RUNS} --by=flops --panel=loss --figure=o.pdf", "--panel"),
    *each(f"{RUNS} --select=VALUE", ["nothing=1", "flops", "loss<x"], "--select"),
    *each(f"{RUNS} --by=VALUE", ["nothing", "flops,nothing", ","], "--by"),
    *each(f"{RUNS} --predict_at=VALUE", ["flops", "flops=x", "flops=nan", "=3", ""],
          "--predict_at"),
    ("harvest", "text"),
    ("harvest --text=text.txt --sites=resid_post.0", "out"),
    ("harvest --text=text.txt --out=o", "sites"),
    ("harvest --text= --sites=resid_post.0 --out=o", "text"),
    ("harvest --text=text.txt --sites= --out=o", "sites"),
    ("harvest --text=text.txt --sites=resid_post.0 --out=", "out"),
    ("harvest --model= --text=text.txt --sites=resid_post.0 --out=o", ""),
    ("demo --out=", "--out"),
    ("demo --d_sae=8 --out=o", "sae.k"),
    ("launch --copy=slurmm", "did you mean 'slurm'"),
    ("launch --copy=slurm --out=", "--out"),
    ("launch --copy=slurm --out=text.txt", "text.txt"),
    ("store", "--path"),
    ("store --path=store --from=rows.npy", "--path"),
    ("store --from=rows.npy", "--out"),
    ("store --path=nothing", "nothing"),
    ("store --path=text.txt", "text.txt"),
    ("store --path=run", "run"),
    ("import --path=ours", "--out"),
    ("import --out=o", "--path"),
    ("import --path=nothing --out=o", "nothing"),
    ("import --path=ours --out=o --format=saelenss", "saelens"),
    ("import --path=ours --out=o --format=saelens", "saelens"),
    ("import --path=saelens --out=store", "store"),
    ("import --path=text.txt --out=o", "text.txt"),
    ("import --path=model --out=o", "model"),
    ("export", "--out"),
    ("export --out=o", "--checkpoint"),
    ("export --out=o --checkpoint=run", "--format"),
    ("export --out=o --checkpoint=run --results=sweep --format=saelens", "--checkpoint"),
    ("export --out=o --checkpoint=run --format=saelenss", "did you mean 'saelens'"),
    ("export --out=store --checkpoint=run --format=saelens", "store"),
    ("export --out=text.txt --checkpoint=run --format=saelens", "text.txt"),
    ("export --out=o --checkpoint=nothing --format=saelens", "nothing"),
    ("export --out=o --checkpoint=run --format=openai", "openai"),
    ("export --out=o --checkpoint=run/checkpoints/999 --format=saelens", "999"),
    ("export --out=o --checkpoint=run --format=saelens --select=k=2", "--select"),
    ("export --out=o --checkpoint=run --format=saelens --public", "--public"),
    ("export --out=o --push_to=user/name", "o is no export"),
    ("export --out=o --checkpoint=run --format=saelens --push_to=a/b/c/d", "a/b/c/d"),
    ("export --out=o --results=nothing --format=saelens", "nothing"),
    ("export --out=store --results=sweep --format=saelens", "store"),
    ("plan --find=time --mesh=1,1,1", "--mesh"),
    ("plan --find=time", "--topology"),
    ("plan --find=luck", "find"),
    ("plan --find=time --compiles=0 --top=3 --topology=h100:1x2", "--top"),
    ("plan --batch_sizes=64 --mesh=1,1,1", "--mesh"),
    ("plan --batch_sizes=64", "--topology"),
    ("plan --topology=h100:1x1 --batch_sizes=7", "virtual_shards"),
    ("plan --config.data.virtual_shards=0 --config.sae.d_in=64", "virtual_shards"),
    ("plan --topology=h100:1x1 --batch_sizes=x", "data.batch_size"),
    ("plan --topology=h100:1x1 --dtypes=float8", "compute_dtype"),
    ("plan --sites=resid_post.0", "--sites"),
    ("plan --passes=2", "--passes"),
    ("plan --config=grid.py", "--topology"),
    ("plan --config=grid.py --topology=h100:1x2 --dtypes=bfloat16", "--dtypes"),
    ("plan --sweep --topology=h100:1x2", "--config"),
    ("plan --harvest --sites=resid_post.0", "--tokens"),
    ("plan --harvest --tokens=1000", "--sites"),
    ("plan --harvest --tokens=1000 --sites=nowhere.0 --model=model", "nowhere"),
    ("plan --harvest --tokens=1 --sites=resid_post.0 --model=model", "--tokens"),
    ("plan --harvest --tokens=1000 --sites=resid_post.0 --model=nothing", "nothing"),
    ("plan --harvest --tokens=1000 --sites=resid_post.0 --model=torch:model", "torch:model"),
    ("plan --harvest --tokens=1000 --sites=resid_post.0 --model=model --out=text.txt", "text.txt"),
    ("plan --harvest --tokens=1000 --sites=resid_post.0 --model=model --dtype=x", "--dtype"),
    ("plan --harvest --tokens=1000 --sites=resid_post.0 --config=grid.py", "--config"),
    ("plan --config=nothing.py", "nothing.py"),
    ("bench --reading --store=nothing", "nothing"),
    ("bench --harvest --model=nothing --text=text.txt", "nothing"),
    ("bench --architecture=gatedd", "architecture"),
    ("bench --config.sae.k=3", "no config"),
    ("eval --run=run --config.sae.k=3", "no config"),
    ("eval --run=run --tokens_file=tokens.npy", "--model"),
    ("eval --run=run --text=text.txt", "--model"),
    ("eval --sae=ours --model=model --tokens_file=tokens.npy", "--site"),
    ("eval --sae=ours --model=model --site=resid_post.0 --tokens_file=nothing.npy", "nothing.npy"),
    ("eval --sae=ours --model=model --site=resid_post.0 --text=nothing.txt", "nothing.txt"),
    ("eval --sae=ours --model=model --site=resid_post.0", "--store"),
    ("eval --sae=ours --tokens_file=tokens.npy --text=text.txt", "--text"),
)  # fmt: skip

NOT_WHOLE = "0 -1 x 1.5 nan _"
NOT_A_COUNT = "0 -1 x 1.5 nan inf 1e30 1e400 _"
FLAGS = [
    *flag_rows(RUNS, {
        "seed": "-1 x 1.5 _",
        "bootstrap": "49 1e12 100001 1000000000000 x -1",
        "holdout": f"{NOT_WHOLE} 5",
        "drop_largest_losses": "-1 x 99",
        "predict_flops": "nan inf -inf -1 0 x 1e300 1e-300 1e400",
        "flops_factor": "nan inf -1 0 x 1e300",
        "law": "powr _",
        "estimator": "hubert",
        "accounting": "flop",
        "loss": "los",
        "flops": "flopps",
    }),
    *flag_rows(SWEEP, {"passes": NOT_WHOLE, "lease_seconds": "nan inf -inf 0 -1 x 1e99",
                       "heartbeat_seconds": "1 nan inf x", "watchdog_port": "-1 65536 x"}),
    *flag_rows(TRAIN, {
        "heartbeat_seconds": "1 nan inf x -1",
        "watchdog_seconds": "-1 nan inf x",
        "watchdog_port": "-1 65536 x",
        "process_id": "x 1.5",
        "num_processes": "x 1.5",
        "log": "wandbb wandb tensorboardd",
        "cpu_devices": "-2 0 x 1e9 1000000000",
    }),
    *flag_rows("train --workdir=w --branch_from=run", {"extend_tokens": NOT_A_COUNT}),
    *flag_rows(EVAL, {
        "tokens": NOT_A_COUNT,
        "lm_tokens": NOT_A_COUNT,
        "context_length": NOT_WHOLE,
        "holdout_fraction": "2 -0.1 nan inf x _",
        "sequences": "a:b 5:2 5 : -1:3 0:1 ²:³",
        "lm_sequences": "a:b 5:2 5 : -1:3 0:1",
        "model_dtype": "float64 x",
        "site": "nowhere",
        "store": "nothing",
        "model": "nothing",
        "target_site": "nowhere",
    }),
    *flag_rows(DASHBOARD, {
        "tokens": NOT_A_COUNT,
        "top": NOT_WHOLE,
        "intervals": "-1 x",
        "per_interval": NOT_WHOLE,
        "before": "-1 x",
        "seed": "-1 x",
        "site": "nowhere",
        "store": "nothing",
        "model_dtype": "float64 x",
    }),
    *flag_rows(HARVEST, {
        "tokens": NOT_A_COUNT,
        "context_length": f"{NOT_WHOLE} 1000000",
        "batch_size": NOT_WHOLE,
        "mesh_data": "-2 0 x 64",
        "mesh_model": "0 -1 x 64",
        "statistics_tokens": NOT_A_COUNT,
        "max_bytes": f"{NOT_A_COUNT} 1",
        "sites": "blocks.0.hook_mlp_in blocks.0.attn.hook_q",
        "dtype": "float64 _",
        "model_dtype": "float16 _",
    }),
    *flag_rows(NEURONPEDIA, {"np_batch": f"{NOT_WHOLE} 129", "np_layout": "x"}),
    *flag_rows("demo --out=o", {"tokens": f"{NOT_WHOLE} 1e30", "d_sae": f"{NOT_WHOLE} 10000000",
                                "epochs": f"{NOT_WHOLE} 1000000000000"}),
    *flag_rows("bench", {"batch": NOT_WHOLE, "d_in": NOT_WHOLE, "d_sae": NOT_WHOLE, "k": "0 -1 x",
                         "rounds": NOT_WHOLE, "mesh_model": "0 -1 x", "packs": "1 0 x",
                         "tokens": "0 -1 x", "context_length": "0 -1 x", "dtype": "float16",
                         "architecture": "topkk"}),
    *flag_rows("store --from=rows.npy --out=o", {"context_length": NOT_WHOLE}),
    *flag_rows("plan", {
        "topology": "h100:0x8 h100:8x0 99999999x8 h100:99999999x8 h100:8x8x8 h100 h100: :8 x cpu:0 "
                    "cpu:-1 cpu:1e9 v5p:0x4x4 v5p:99999x99999x9 cpu:٣",
        "mesh": "1,1 1,1,1,1 a,b,c 0,1,1 1,-2,1 --1,1,1 ²,1,1 1,1,99999999999 _1",
        "price": "-1 nan inf x",
        "compiles": "-1 x",
        "top": "-1 x",
        "passes": NOT_WHOLE,
    }),
]  # fmt: skip

FIELDS = {  # of a config: bad values of each, with spaces between
    "sae.d_sae": "0 -1 x 1.5 nan inf none 1e30",
    "sae.k": "0 -1 x 1.5 nan 1000000",
    "sae.architecture": "topkk _",
    "sae.kind": "encoder crosscoder transcoder",
    "sae.normalize": "sqrt",
    "sae.b_dec_init": "median",
    "sae.compute_dtype": "float64",
    "sae.aux_k": "-1 x",
    "sae.aux_coefficient": "-1 nan x",
    "sae.d_in": "0 -1 x 17",
    "sae.dead_after_tokens": "-1 x",
    "sae.multi_topk": "maybe",
    "sae.d_seo": "3",
    "data.store": "nothing run text.txt world:nothing world: s3:// ftp://a/b",
    "data.site": "nowhere a,b",
    "data.target_site": "nowhere",
    "data.batch_size": "0 -1 x 7 1.5 nan 1e30",
    "data.epochs": "0 -1 x",
    "data.holdout_fraction": "1 2 -1 nan x",
    "data.virtual_shards": "0 -1 x 7",
    "data.window_rows": "0 -1 x",
    "data.seed": "x 1.5 -1",
    "data.include_excluded": "maybe",
    "optimizer.learning_rate": "0 -1 nan inf x",
    "optimizer.schedule": "linear",
    "optimizer.warmup_fraction": "-1 2 nan x",
    "optimizer.decay_fraction": "-1 2 nan x",
    "optimizer.b1": "1 2 -1 nan x",
    "optimizer.b2": "1 2 -1 nan x",
    "optimizer.eps": "0 -1 nan x",
    "optimizer.clip_norm": "0 -1 nan x",
    "train.tokens": "0 -1 x 63 1e30 nan",
    "train.seed": "x 1.5 nan",
    "train.init": "nothing text.txt",
    "train.on_nonfinite": "go",
    "train.log_every": "0 -1 x",
    "train.checkpoint_every": "0 -1 x",
    "train.keep_checkpoints": "0 -1 x",
    "mesh.data": "0 -2 x 64",
    "mesh.model": "0 -2 x 64 3",
    "mesh.zero": "maybe",
    "mesh.run": "2 x",
    "nothing": "3",
    "sae": "3",
    "trian.tokens": "3",
}
OVERRIDES = [
    Row(f"{WHOLE_RUN} --config.{field}={'' if value == '_' else value}",
        naming(field.rpartition(".")[2], value))
    for field, values in FIELDS.items()
    for value in values.split(" ")
]  # fmt: skip

# ---------------------------------------------------------------- files of Python that users write

CONFIGS = {
    "syntax": "def get_config(:\n",
    "raises": "def get_config():\n    raise KeyError('a')\n",
    "exits": "import sys\nsys.exit(0)\n",
    "exits_within": "import sys\ndef get_config():\n    sys.exit(0)\n",
    "none": "def get_config():\n    return None\n",
    "a_dict": "def get_config():\n    return {'sae': {'k': 3}}\n",
    "nothing": "x = 1\n",
    "not_a_function": "get_config = 3\n",
    "an_argument": "def get_config(a, b):\n    return None\n",
    "import": "import a_package_that_is_not_there\n",
    "bad_field": "from sae_jax.config import *\ndef get_config():\n    return Config(sae=3)\n",
    "recursion": "def get_config():\n    return get_config()\n",
    "binary": b"\x00\xff\x00",
    "latin": "# \xe9\ndef get_config(): pass\n".encode("latin-1"),
}
GRID = """from sae_jax import config
from sae_jax.sweep import grid

def get_config():
    return config.load_file("config.py")

def get_sweep():
    return {}
"""
GRIDS = {
    "not_a_list": "3", "none": "None", "empty": "[]", "numbers": "[1, 2]", "keys": "[{3: 4}]",
    "unknown": "[{'sae.d_seo': 4}]", "typed": "[{'sae.d_sae': 'x'}]", "twice": "[{}, {}]",
    "value": "[{'sae.d_sae': -1}]", "nan": "[{'optimizer.learning_rate': float('nan')}]",
    "list": "[{'sae.d_sae': [1, 2]}]", "deep": "[{'sae': {'d_sae': 4}}]",
    "no_values": "grid.sweep('sae.d_sae', [])", "mesh": "grid.sweep('mesh.data', [1, 2])",
    "init": "[{'train.init': 'ours'}]", "store": "[{'data.store': 'nothing'}]",
    "no_store": "[{'data.store': ''}]", "tokens": "[{'train.tokens': 1}]",
    "twice_set": "grid.product(grid.sweep('sae.k', [1]), grid.sweep('sae.k', [2]))",
    "unequal": "grid.zipped(grid.sweep('sae.k', [1]), grid.sweep('sae.d_sae', [8, 9]))",
    "budget": "grid.isoflop([1.0], [8], d_in=16, batch_size=64)",
}  # fmt: skip
PYTHON = [
    *(Row(f"{TRAIN} --config=config.py", "config.py", {"config.py": text})
      for text in CONFIGS.values()),
    *(Row("sweep --workdir=w --config=config.py", "config.py", {"config.py": text})
      for text in CONFIGS.values()),
    *each(f"{TRAIN} --config=VALUE", ["nothing.py", "text.txt", "store", "opnai_topk", ":a",
          "openai_topk:nothing", "s3://a/b.py", "~nobody_is_here/a.py"], ""),
    *(Row(SWEEP, "", {"grid.py": GRID.format(text)}) for text in GRIDS.values()),
    *(Row("train --workdir=w --branch_from=run --config.train.tokens=640", "lineage",
          {"run/config.json": {"lineage": value}}) for value in (3, "x", [3], [{"run": 3}])),
    *rows(
        (f"{SWEEP} --config.sae.d_sae=32", "sae.d_sae"),
        ("sweep --workdir=store --config=grid.py", "store"),
        ("sweep --workdir=text.txt --config=grid.py", "text.txt"),
        ("sweep --workdir=sweep --config=grid.py", "another grid"),
        ("sweep --workdir=sweep --config=same.py --passes=2", "--passes"),
        ("sweep --workdir=run --config=grid.py", "run"),
        (WHOLE_RUN.replace("=w", "=store"), "store"),
        (WHOLE_RUN.replace("=w", "=text.txt"), "text.txt"),
        (WHOLE_RUN.replace("=w", "=run"), "another config"),
        (WHOLE_RUN.replace("=w", "=text.txt/w"), "text.txt"),
        (f"{RUNS} --predict_flops=1e9 --config=nothing", "nothing"),
    ),
]  # fmt: skip

# ------------------------------------------------------------------------------------------- JSON

JSON = {  # what is no usable JSON object
    "cut": b'{"a": [1, 2',
    "binary": b"\x80\xff\x00\x01\xfe",
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}
JSON_FILES = {  # by file, the command that reads it
    "run/config.json": "eval --run=run",
    "store/meta.json": "store --path=store",
    "sweep/sweep.json": "sweep --workdir=sweep --status",
    "sweep/runs/ID/result.json": "sweep --workdir=sweep --status",
    "model/config.json": HARVEST,
    "model/tokenizer.json": HARVEST,
    "model/tokenizer_config.json": HARVEST,
    "model/model.safetensors.index.json": HARVEST,
    "ours/sae.json": "import --path=ours --out=o",
    "saelens/cfg.json": "import --path=saelens --out=o",
    "sparsify/cfg.json": "import --path=sparsify --out=o",
    "dictionary_learning/config.json": "import --path=dictionary_learning --out=o",
    "gemma_scope_2/config.json": "import --path=gemma_scope_2 --out=o",
    "many/index.json": "export --results=sweep --format=saelens --out=many",
    "fitted/fit.json": "fit --results=table.csv --law=power --out=fitted",
    "table.jsonl": "fit --results=table.jsonl --law=power --out=o",
    "text.jsonl": HARVEST.replace("text.txt", "text.jsonl"),
    "text.json": HARVEST.replace("text.txt", "text.json"),
}
MEANS_SOMETHING = {  # what is right, or no JSON to begin with: by file, kinds that are no mistake
    "model/tokenizer_config.json": (),
    "text.jsonl": ("list", "number"),
}
BROKEN_JSON = [
    Row(command, f"{pathlib.PurePath(file).name}|the text", {file: content})
    for (file, command), (kind, content) in itertools.product(JSON_FILES.items(), JSON.items())
    if kind not in MEANS_SOMETHING.get(file, ())
]

SITE = "activations"  # of the store that write_store made
MODEL_FIELDS = {  # of a model's config.json: bad values
    "model_type": ["lama", None, 3],
    "num_hidden_layers": [0, -1, "x", None, 1e9, 1.5],
    "hidden_size": [0, -1, "x", 15, None],
    "num_attention_heads": [0, -1, "x", 3],
    "num_key_value_heads": [0, -1, "x", 3],
    "head_dim": [0, -1, "x"],
    "intermediate_size": [0, -1, "x", 25],
    "vocab_size": [0, -1, "x", 41],
    "max_position_embeddings": [0, -1, "x"],
    "rms_norm_eps": ["x", -1, [1]],
    "rope_parameters": ["x", [1], {"rope_type": "spiral"}, {"rope_theta": "abc"},
                        {"rope_theta": 0}, {"rope_theta": -1}],
    "tie_word_embeddings": ["yes", 3],
    "bos_token_id": ["x", {"a": 1}, 10**12, -5],
    "eos_token_id": [{"a": 1}, "x"],
    "hidden_act": ["tanhh", 3],
    "attention_bias": ["no"],
}  # fmt: skip
META_FIELDS = {  # of a store's meta.json
    "format_version": [0, 99, "x", None],
    "complete": ["no", 1, None, False],
    "context_length": [0, -1, "x", 7, 1e15],
    "num_sequences": [0, -1, "x", 10**15, 1.5],
    "chunk_sequences": [0, -1, "x", 3],
    "shard_sequences": [0, -1, "x", 3],
    "sites": [[], {}, None, "x", {SITE: 3}, {SITE: {"width": 0}}, {SITE: {"width": 17}},
              {SITE: {"width": "x"}}, {SITE: {"dtype": "int8"}}, {SITE: {"mean": []}},
              {SITE: {"mean": [0.0] * 15}}, {SITE: {"mean": "x"}},
              {SITE: {"mean": [float("nan")] * 16}}, {SITE: {"mean_squared_norm": -1}},
              {SITE: {"mean_squared_norm": "x"}}, {"../x": {}}],
    "excluded_tokens": ["x", {"a": 1}],
    "provenance": [[], 3],
}  # fmt: skip
SAE_FIELDS = {  # by file, fields of it
    "saelens/cfg.json": {
        "architecture": ["topkk", 3, [], {}],
        "d_in": [0, -1, "x", 5, None],
        "d_sae": [0, -1, "x", 7, None],
        "k": [0, -1, "x", True, 7, None, 1.5],
        "apply_b_dec_to_input": ["no", 3],
        "normalize_activations": ["layer", 3],
        "metadata": [3, [1]],
    },
    "sparsify/cfg.json": {
        "activation": ["tanh", 3],
        "k": [0, -1, "x", True, 7],
        "num_latents": [-1, "x", 7],
        "d_in": [0, -1, "x", 5],
        "transcode": ["false", 1],
        "skip_connection": ["false", 1],
    },
    "dictionary_learning/config.json": {
        "trainer": [3, [], "x", None, {"dict_class": "Nothing"}, {"dict_class": []},
                    {"k": 0}, {"k": True}, {"k": 7}],
    },
    "gemma_scope_2/config.json": {"architecture": ["relu", 3, []]},
    "ours/sae.json": {
        "format": ["theirs", 3],
        "version": [0, 99, "x"],
        "config": [3, [], {"architecture": "topkk"}, {"architecture": []}, {"d_sae": 7},
                   {"d_sae": "x"}, {"k": 7}, {"k": True}, {"d_in": 5}, {"kind": "encoder"},
                   {"unknown": 3}],
        "about": [3, []],
    },
}  # fmt: skip
RUN_FIELDS = {
    "run/config.json": {
        "sae": [3, None, {"d_sae": "x"}, {"architecture": "topkk"}, {"k": None}, {"unknown": 3},
                {"d_sae": 64}, {"d_in": 17}, {"kind": "crosscoder"}, {"architecture": "relu"}],
        "data": [3, {"store": 3}, {"store": "nothing"}, {"holdout_fraction": 2}, {"site": 3}],
        "unknown": [3],
        "train": ["x", {"seed": "x"}],
    },
    "sweep/sweep.json": {
        "passes": [0, -1, "x", 1.5, None, True],
        "runs": [[], {}, None, 3, {"ID": 3}, {"ID": {"config": 3}}, {"ID": {"swept": 3}},
                 {"../../up": {"swept": {}, "config": {}}}, {"ID": {"config": {"unknown": {}}}},
                 {"ID": {"swept": {"sae.d_seo": 3}}}, {"ID": {"config": {"sae": {"k": "x"}}}}],
        "mesh": [3, None, {"dota": 1}, {"data": "x"}],
    },
}  # fmt: skip


def field_names(file: str, field: str, value) -> str:
    """What a line may name of a wrong value: its field, or one within it, or the file or folder."""
    folder, *_, name = pathlib.PurePath(file).parts
    return "|".join(
        [field, name, f"{folder}/", f"{folder}:", *(value if type(value) is dict else [])]
    )


READERS = JSON_FILES | {"run/config.json": "eval --run=run"}
SCHEMAS = {"model/config.json": MODEL_FIELDS, "store/meta.json": META_FIELDS}
SCHEMAS |= SAE_FIELDS | RUN_FIELDS
WRONG_FIELDS = [
    Row(READERS[file], field_names(file, field, value), {file: {field: value}})
    for file, fields in SCHEMAS.items()
    for field, values in fields.items()
    for value in values
]

# ------------------------------------------------------------------------- tables, arrays and text

HEAD = "flops,loss\n"
POINTS = "".join(f"{10.0**i},{2 * 0.7**i + 0.1}\n" for i in range(6))
TABLES = {  # what is no table that a power law can be fitted to
    "empty": "",
    "head_only": HEAD,
    "no_head": POINTS,
    "two_rows": f"{HEAD}1,2\n2,1\n",
    "short_row": f"{HEAD}{POINTS}7\n",
    "long_row": f"{HEAD}{POINTS}7,8,9\n",
    "text": f"{HEAD}{POINTS}a,b\n",
    "nan": f"{HEAD}{POINTS}1,nan\n",
    "infinite": f"{HEAD}{POINTS}1,inf\n",
    "negative": f"{HEAD}{POINTS}1,-1\n",
    "zero": f"{HEAD}{POINTS}0,1\n",
    "huge": f"{HEAD}{POINTS}1e200,1\n",
    "tiny": f"{HEAD}{POINTS}1,1e-200\n",
    "empty_cell": f"{HEAD}{POINTS}1,\n",
    "long_cell": f"flops,loss,note\n1,2,{'x' * 200_000}\n",
    "twice": "flops,loss,loss\n1,2,3\n",
    "other": "a,b\n1,2\n",
    "latin": "flops,loss,\xe9\n1,2,3\n".encode("latin-1"),
    "utf16": f"{HEAD}{POINTS}".encode("utf-16"),
    "binary": b"\x80\x00\xff",
    "quote": f'{HEAD}{POINTS}"1,2\n',
    "all_failed": "flops,loss,status\n1,2,failed\n2,1,started\n",
    "constant": HEAD + "".join(f"{i + 1},2\n" for i in range(9)),
    "one_budget": HEAD + "".join(f"3,{i + 1}\n" for i in range(9)),
}
NO_TABLES = [
    "empty", "head_only", "no_head", "short_row", "long_row", "long_cell", "twice", "other",
    "latin", "utf16", "binary", "quote", "all_failed",
]  # fmt: skip
LINES = {
    "text": '{"flops": "x", "loss": 1}\n',
    "list": '[{"flops": 1}]\n',
    "a_list_within": '{"flops": [1], "loss": 1}\n',
    "boolean": '{"flops": true, "loss": 1}\n',
    "infinite": '{"flops": 1, "loss": Infinity}\n',
    "big": '{"flops": 1' + "0" * 400 + ', "loss": 1}\n',
    "cut": '{"flops": 1, "loss": 1}\n{"flops": 1, "lo',
    "surrogate": '{"flops": 1, "loss": "\\ud800"}\n',
}
SELECTS = [
    "d_sae", "d_seo=3", "d_sae=", "=3", "d_sae<x", "d_sae=999", "d_sae==3", "k>>3", "eval_l0<-1",
]  # fmt: skip
SWEEP_TABLES = {
    "empty": "",
    "no_run_id": "status,d_sae\ndone,32\n",
    "no_status": "run_id,d_sae\nID,32\n",
    "none_done": "run_id,status\nID,failed\n",
    "up": "run_id,status\n../../run,done\n",
    "absolute": "run_id,status\n/etc,done\n",
    "nothing": "run_id,status\nnothing,done\n",
    "no_name": "run_id,status\n,done\n",
    "binary": b"\x80\x00\xff",
    "short": "run_id,status\nID\n",
}
ARRAY = np.zeros((8, 4), np.float32)


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    text = str(header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + array.tobytes()


WHOLE = npy(ARRAY)
ARRAYS = {
    "empty": b"",
    "text": b"hello",
    "cut": WHOLE[:-8],
    "header_only": WHOLE[:40],
    "one_axis": npy(np.zeros(8, np.float32)),
    "text_array": npy(np.array([["a", "b"]])),
    "no_rows": npy(np.zeros((0, 4), np.float32)),
    "no_columns": npy(np.zeros((4, 0), np.float32)),
    "lying": npy(ARRAY, (8000, 4)),
    "nan": npy(np.full((8, 4), np.nan, np.float32)),
    "pickle": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    + b" " * 60 + b"\n\x80\x04K\x01.",
}  # fmt: skip


def without_the_end(data: bytes) -> bytes:
    return data[:-10]


WEIGHTS = {"empty": b"", "text": b"hello", "zeros": b"\0" * 64, "lying": b"\xff" * 8 + b"{}",
           "list": (2).to_bytes(8, "little") + b"[]", "missing": None,
           "cut": without_the_end}  # fmt: skip
WEIGHT_FILES = {
    "ours/sae.safetensors": "import --path=ours --out=o",
    "saelens/sae_weights.safetensors": "import --path=saelens --out=o",
    "sparsify/sae.safetensors": "import --path=sparsify --out=o",
    "gemma_scope_2/params.safetensors": "import --path=gemma_scope_2 --out=o",
    "model/model-00001-of-00002.safetensors": HARVEST,
    "gemma_scope/params.npz": "import --path=gemma_scope --out=o",
    "openai/autoencoder.pt": "import --path=openai --out=o",
    "dictionary_learning/ae.pt": "import --path=dictionary_learning --out=o",
}
TEXTS = {"text.jsonl": ['{"text": 3}', '{"txt": "a"}', '"a', "{", "[1", b"\xff\xfe\x00"],
         "text.json": ["{}", "[1]", '[{"txt": "a"}]', "[", b"\xff"],
         "text.txt": [b"\xff\xfe\xfa\x00", "", " \n "]}  # fmt: skip
DATA = [
    *(Row(RUNS, "table.csv", {"table.csv": text}) for text in TABLES.values()),
    *(Row(RUNS.replace(".csv", ".jsonl"), "table.jsonl", {"table.jsonl": text})
      for text in LINES.values()),
    *each(f"{RUNS.replace('power', 'VALUE')}", ["chinchilla", "isoflop", "joint", "openai_nk"],
          "table.csv"),
    *each("fit --law=power --out=o --results=VALUE", ["nothing.csv", "text.txt", "store", "run",
          "sweep", "config.py"], ""),
    *rows(
        ("fit --law=power --results=table.csv --out=text.txt", "text.txt"),
        ("fit --law=power --results=table.csv --out=model/config.json", "config.json"),
        ("compare --results=table.csv --x=flops --y=loss --out=text.txt", "text.txt"),
        ("compare --results=sweep --y=nothing --out=o", "nothing"),
    ),
    *each(f"{RUNS} --figure=VALUE", ["a.doc", "a", "a.pdf,b.txt", "store"], "--figure"),
    *each(f"{RUNS} --figure=a.pdf --style=VALUE", ["table.csv", "nothing", "store", "tokens.npy",
          "text.txt"], "--style"),
    *(Row(COMPARE, "table.csv", {"table.csv": TABLES[name]}) for name in NO_TABLES),
    *each("export --results=sweep --format=saelens --out=o --select=VALUE", SELECTS, "--select"),
    *(Row("export --results=sweep --format=saelens --out=o", "", {"sweep/results.csv": text})
      for text in SWEEP_TABLES.values()),
    *(Row("store --from=rows.npy --out=o", "rows.npy", {"rows.npy": data})
      for name, data in ARRAYS.items() if name != "nan"),  # which a store marks
    *(Row("eval --sae=ours --model=model --site=resid_post.0 --tokens_file=tokens.npy",
          "tokens.npy", {"tokens.npy": data}) for data in ARRAYS.values()),
    *(Row(command, pathlib.PurePath(file).parts[0], {file: data})
      for file, command in WEIGHT_FILES.items() for data in WEIGHTS.values()),
    *(Row(HARVEST.replace("text.txt", file), f"{file}|the text", {file: data})
      for file, contents in TEXTS.items() for data in contents),
]  # fmt: skip
SITES = each(HARVEST.replace("resid_post.0", "VALUE"), ["resid_post", "resid_post.9", "resid_pst.0",
             "resid_post.-1", "resid_post.x", "../x", "..",
             "hf:model", "resid_post.0,"], "")  # fmt: skip

TABLE = [*COMMANDS, *FLAGS, *OVERRIDES, *PYTHON, *BROKEN_JSON, *WRONG_FIELDS, *DATA, *SITES]


def named(table: list[Row]) -> dict[str, Row]:
    """The rows by name: the command or what is broken for it, numbered where that is not enough."""
    out: dict[str, Row] = {}
    for row in table:
        changes = {f: getattr(c, "__name__", repr(c)) for f, c in row.files.items()}
        broken = "".join(f" {file}={change:.40}" for file, change in changes.items())
        command = row.command.split()[0] if broken else row.command.replace(WHOLE_RUN, "train")
        name = base = (command + broken).replace("::", ":").encode("ascii", "replace").decode()
        numbers = itertools.count(2)
        while name in out:
            name = f"{base} #{next(numbers)}"
        out[name] = row
    return out


NAMED = named(TABLE)


def make_inputs(tree: pathlib.Path) -> None:
    """Writes a valid input of every format."""
    for folder, fixture in EXPORTS.items():
        shutil.copytree(FIXTURES / "exports" / fixture, tree / folder)
    shutil.copytree(FIXTURES / "lm" / "mistral", tree / "model")
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *"abcdefgh"])}
    words_only = tokenizers.models.WordLevel(words, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words_only)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tree / "model" / "tokenizer.json"))
    (tree / "model" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')

    rows = sparse_rows(1024)
    store = make_store(tree / "store", rows)
    config = make_config(os.path.relpath(store), steps=2)
    train_run(config, tree / "run")
    config = preparation.resolve(config, open_stream(config.data))
    run_id = results.run_id(config)
    sweep = SweepDirectory.start(tree / "sweep", [Run(run_id, config, {"sae.d_sae": 128})])
    shutil.copytree(tree / "run", tree / "sweep" / "runs" / run_id)
    sweep.write_results()
    (tree / "sweep" / "runs" / run_id).rename(tree / "sweep" / "runs" / "ID")
    for file in (tree / "sweep" / "sweep.json", tree / "sweep" / "results.csv"):
        file.write_text(file.read_text().replace(run_id, "ID"))

    np.save(tree / "rows.npy", rows)
    np.save(tree / "tokens.npy", np.ones((4, 8), np.int32))
    (tree / "text.txt").write_text("a b c d e f g h\n" * 40)
    (tree / "text.jsonl").write_text('{"text": "a b c d"}\n' * 40)
    (tree / "text.json").write_text('["a b c d", "e f g h"]')
    (tree / "table.csv").write_text(HEAD + POINTS)
    lines = [dict(zip(("flops", "loss"), line.split(","), strict=True)) for line in POINTS.split()]
    (tree / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tree / "fitted").mkdir()
    (tree / "fitted" / "fit.json").write_text('{"law": "power"}')
    (tree / "many").mkdir()
    (tree / "many" / "index.json").write_text('{"format": "saelens", "saes": []}')
    values = configs.to_dict(config)
    text = (
        f"from sae_jax import config\n\ndef get_config():\n    return config.from_dict({values})\n"
    )
    (tree / "config.py").write_text(text)
    (tree / "grid.py").write_text(GRID.format("[{'sae.d_sae': 64}]"))
    (tree / "same.py").write_text(GRID.format("[{'sae.d_sae': 128}]"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with the valid inputs, which is the working directory."""
    folder = tmp_path_factory.mktemp("inputs")
    before = os.getcwd()
    os.chdir(folder)
    make_inputs(folder)
    yield folder
    os.chdir(before)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """The hash of every file, by its path."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).digest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def broken(data: bytes, how) -> bytes | None:
    """What becomes of a file's bytes."""
    if isinstance(how, dict):
        return json.dumps(merged(json.loads(data), how)).encode()
    if callable(how):
        return how(data)
    return how.encode() if isinstance(how, str) else how


def merged(values, changes):
    if not (isinstance(values, dict) and isinstance(changes, dict) and changes):
        return changes
    return values | {name: merged(values.get(name), v) for name, v in changes.items()}


def write(file: pathlib.Path, data: bytes | None) -> None:
    file.unlink() if data is None else file.write_bytes(data)


@pytest.fixture
def with_broken(tree):
    """Breaks the files of a row, and afterwards makes the folder what it was."""
    everything = set(tree.rglob("*"))
    saved: dict[pathlib.Path, bytes] = {}

    def breaks(row: Row) -> None:
        for name, how in row.files.items():
            saved[tree / name] = (tree / name).read_bytes()
            write(tree / name, broken(saved[tree / name], how))

    yield breaks
    for path in sorted(set(tree.rglob("*")) - everything):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    for file, data in saved.items():
        file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in NAMED.items()])
def test_it_is_one_line_and_exit_code_2_and_nothing_is_lost(tree, with_broken, capsys, row):
    with_broken(row)
    before = contents(tree)
    code = cli.main(shlex.split(row.command))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len(lines) == 1 and "error: " in lines[0], lines
    assert any(thing in lines[0] for thing in row.says.split("|")), lines
    assert contents(tree) | before == contents(tree), "a file that was there has changed"


def test_the_table_is_large():
    assert len(NAMED) >= 500
