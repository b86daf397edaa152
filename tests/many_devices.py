"""Run by tests/test_plan.py in a process with 256 CPU devices: what `plan` says of the training
step on some of them (their numbers are the arguments), a line of JSON each, when the batch grows
with the `data` axis or the dictionary with `model`; and what the design says that it sends."""

import json
import sys

from sae_jax.plan import chips

chips.find("cpu:256")

import jax  # noqa: E402

from sae_jax.config import Config, DataConfig, MeshConfig  # noqa: E402
from sae_jax.ops.sharding import as_for_accelerators  # noqa: E402
from sae_jax.plan.estimate import estimate, resolve  # noqa: E402
from sae_jax.sae import by_name  # noqa: E402

TOKENS, LATENTS, WIDTH, K = 64, 512, 32, 4  # of one device
SMALL = 4096  # bytes: sums of scalars, biases and counts


def designed(architecture: str, zero: bool, data: int, model: int) -> dict[tuple[str, str], int]:
    """Bytes of the arrays that a step of the design puts together or sums up, by kind and axes: the
    reconstruction over `model`, gradients over `data`, top-k's candidates over `model`, and with
    ZeRO the weights over `data`."""
    tokens, latents = TOKENS, LATENTS
    weights = 4 * 2 * WIDTH * latents
    per_latent = 4 * 4 * latents
    sent = {
        ("all-reduce", "model"): 4 * WIDTH * tokens,
        ("all-reduce", "data"): weights + per_latent,
        ("all-reduce", "data+model"): 0,
    }
    if architecture == "topk":
        sent["all-reduce", "model"] += 4 * tokens  # L1
        if K * model <= 256:
            sent["all-gather", "model"] = 4 * K * model * tokens
        else:  # counts, in 8 rounds for the value and at most 8 for the latent
            sent["all-reduce", "model"] += (4 * 15 * 16 + 4) * tokens
    if zero:
        sent["all-gather", "data"] = weights + per_latent
    return {key: size + SMALL for key, size in sent.items()}


def picked_flops(architecture: str, model: int) -> int:
    """FLOPs of the products of a token's gradient with the rows that it picked: on one device k of
    each token; on a shard of several a ceil(k / shards)-th of them, and as spare rows half as many
    again for three tokens of four."""
    if architecture != "topk":
        return 0
    first = -(-K // model)
    spare = 0 if model == 1 else -(-first // 2) * TOKENS * 3 // 4
    return 2 * WIDTH * (TOKENS * first + spare)


def told(architecture: str, zero: bool, data: int, model: int):
    picks = {"k": K} if architecture == "topk" else {}
    sae = by_name(architecture).Config(d_sae=LATENTS * model, **picks)
    config = Config(
        sae=sae,
        data=DataConfig(batch_size=TOKENS * data),
        mesh=MeshConfig(data=data, model=model, zero=zero),
    )
    count = data * model
    topology = chips.Topology(f"cpu:{count}", None, jax.devices()[:count], count)
    with as_for_accelerators():  # on CPUs AuxK communicates where nobody is dead, too
        return estimate(resolve(config, (WIDTH,)), topology)


def main():
    for architecture, zero, axis in [
        ("relu", False, "data"),
        ("relu", True, "data"),
        ("relu", False, "model"),
        ("topk", False, "data"),
        ("topk", False, "model"),
    ]:
        one = told(architecture, zero, 1, 1)
        for count in map(int, sys.argv[1:]):
            mesh = {"data": 1, "model": 1} | {axis: count}
            found = told(architecture, zero, **mesh) if count > 1 else one
            allowed = designed(architecture, zero, **mesh)
            payload = dict.fromkeys(map("|".join, allowed), 0)
            for c in found.collectives:
                key = "|".join((c.kind, "+".join(found.axes(c))))
                payload[key] = payload.get(key, 0) + c.bytes * c.times
            line = {
                "architecture": architecture + (" with ZeRO" if zero else ""),
                "axis": axis,
                "devices": count,
                "flops": found.flops.total(),
                "designed_flops": one.flops.total()
                - picked_flops(architecture, 1)
                + picked_flops(architecture, mesh["model"]),
                "memory_bytes": found.memory_bytes,
                "payload": payload,
                "designed": {"|".join(key): size for key, size in allowed.items()},
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
