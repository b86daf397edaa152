"""Shows estimates as text and as JSON values."""

from sae_jax.plan.estimate import Estimate, row_width
from sae_jax.plan.operations import Operation

ROW_BYTES = 2
"""Bytes of a value of a store, which is bfloat16 unless it says otherwise."""


def text(estimate: Estimate, price: float | None = None, top: int = 0) -> str:
    """Returns everything about one mesh as lines of text.

    `price` is that of a device for an hour; with None nothing is said of costs. `top` is how many
    of the dearest operations are listed.
    """
    return "\n".join(
        [
            *_header_lines(estimate),
            *_memory_lines(estimate),
            *_work_lines(estimate),
            *_operation_lines(estimate, top),
            *_run_lines(estimate, price),
        ]
    )


def row(estimate: Estimate) -> str:
    """Returns one mesh as a line under `HEADER`."""
    mesh, config = estimate.mesh, estimate.config
    fits = "no" if not estimate.fits else "yes" if estimate.compiled else "maybe"
    step = estimate.step_seconds
    times = f"{step * 1e3:11.1f}{1 / estimate.token_seconds:14,.0f}" if step else f"{'':25}"
    return (
        f"{mesh['data']:6}{mesh['model']:7}  {'yes' if config.mesh.zero else 'no':6}"
        f"{config.data.batch_size:9}  {config.sae.compute_dtype:9}"
        f"{estimate.total / 1e9:10.2f}  {fits:6}{times}  "
        + ("compiled" if estimate.compiled else "traced")
    )


HEADER = (
    f"{'data':>6}{'model':>7}  {'ZeRO':6}{'batch':>9}  {'dtype':9}{'GB':>10}  {'fits':6}"
    f"{'ms a step':>11}{'tokens/s':>14}"
)
TRACED = (
    "traced: read off the program before it is compiled, which needs more (up to 3 times the GB "
    "was seen). --compiles=N compiles so many of the best, or more of them."
)
"""What is to be said below rows of which some are traced."""
COMPILED = "What is suggested was compiled."


def short(estimate: Estimate) -> str:
    """Returns the time and the memory of one mesh as a few words."""
    step, topology = estimate.step_seconds, estimate.topology
    words = (
        [f"{step * 1e3:.1f} ms a step, {1 / estimate.token_seconds:,.0f} tokens/s"] if step else []
    )
    room = f" of {topology.capacity / 1e9:.1f}" if topology.chip else ""
    words.append(f"{estimate.total / 1e9:.1f}{room} GB")
    return ", ".join(words) + ("" if estimate.compiled else ", by the traced program")


def as_dict(estimate: Estimate, price: float | None = None, top: int = 0) -> dict:
    """Returns the content of `--json`: bytes, FLOPs and seconds of one device and one step, and of
    the whole run.

    `price` is that of a device for an hour; with None there is no cost. `top` is how many of the
    dearest operations are in it.
    """
    times = estimate.seconds
    out = {
        "compiled": estimate.compiled,
        "batch_size": estimate.config.data.batch_size,
        "compute_dtype": estimate.config.sae.compute_dtype,
        "topology": estimate.topology.name,
        "devices": len(estimate.topology.devices),
        "mesh": estimate.mesh | {"zero": estimate.config.mesh.zero},
        "fits": estimate.fits,
        "bytes": estimate.bytes | {"total": estimate.total},
    }
    if estimate.flops is None:
        return out
    return out | {
        "flops": dict(estimate.flops),
        "memory_bytes": estimate.memory_bytes,
        "collectives": [
            {"kind": c.kind, "axes": estimate.axes(c), "bytes": c.bytes, "times": c.times,
             "sent": c.sent}
            for c in estimate.collectives
        ],
        "seconds": times and times | {"step": estimate.step_seconds},
        "compiler_seconds": estimate.compiler_seconds,
        "operations": [_operation(o, estimate) for o in dearest(estimate, top)],
        "run": times and run_hours(estimate, price),
    }  # fmt: skip


def _header_lines(estimate: Estimate) -> list[str]:
    """Returns the lines that name the run, the devices and the mesh."""
    sae, topology = estimate.config.sae, estimate.topology
    chips = f"{len(topology.devices)} x {topology.chip.name if topology.chip else 'CPU'}"
    mesh = f"data {estimate.mesh['data']} x model {estimate.mesh['model']}"
    return [
        f"{sae.architecture} {sae.kind}, {sae.d_sae:,} latents, d_in {sae.d_in:,}, batches of "
        f"{estimate.config.data.batch_size:,} tokens, {sae.compute_dtype} products",
        f"{topology.name}: {chips}, mesh {mesh}{', ZeRO' if estimate.config.mesh.zero else ''}",
        "",
    ]


def _memory_lines(estimate: Estimate) -> list[str]:
    """Returns the table of a device's memory."""
    names = {
        "parameters": "parameters",
        "optimizer": "Adam's moments",
        "counters": "dead-latent counters and scalars",
        "batch": "batch",
        "temporaries": "gradients, activations, temporaries",
        "program": "program",
    }
    lines = [f"{'Memory of a device':38}{'GB':>12}"]
    lines += [f"  {names[name]:36}{size / 1e9:12.3f}" for name, size in estimate.bytes.items()]
    lines += [f"  {'in all, at most':36}{estimate.total / 1e9:12.3f}"]
    if estimate.topology.chip is not None:
        verdict = "fits" if estimate.fits else "DOES NOT FIT"
        there = f"of {estimate.topology.capacity / 1e9:.1f} GB"
        if not estimate.topology.is_tpu:
            there += (
                f", JAX's part of {estimate.topology.chip.memory / 1e9:.0f} "
                "(XLA_PYTHON_CLIENT_MEM_FRACTION)"
            )
        lines += [f"  {verdict}: {there}"]
    return [*lines, ""]


def _work_lines(estimate: Estimate) -> list[str]:
    """Returns the lines on a device's work and its collectives; none where the compiler found no
    room.
    """
    if estimate.flops is None:
        return []
    products = ", ".join(f"{n / 1e12:.3f} T{dtype}" for dtype, n in estimate.flops.items() if n)
    lines = [
        "Work of a device in a step, where no latent is dead",
        f"  FLOPs of matrix products: {products.replace('Tb', 'T b').replace('Tf', 'T f')}",
        f"  through memory: {estimate.memory_bytes / 1e9:.2f} GB",
    ]
    if estimate.collectives:
        lines.append(f"  {'collective':20}{'over':14}{'times':>6}{'MB each':>12}{'MB sent':>12}")
    alike: dict[tuple, list] = {}
    for c in estimate.collectives:
        alike.setdefault((c.kind, "+".join(estimate.axes(c)), c.bytes), []).append(c)
    for (kind, over, size), group in sorted(
        alike.items(), key=lambda item: -sum(c.sent for c in item[1])
    ):
        times, sent = sum(c.times for c in group), sum(c.sent for c in group)
        lines.append(f"  {kind:20}{over:14}{times:6}{size / 1e6:12.3f}{sent / 1e6:12.3f}")
    return [*lines, ""]


def dearest(estimate: Estimate, top: int) -> list[Operation]:
    """Returns the `top` operations that take most of a step; where peaks are unknown, those that
    move most.
    """
    topology = estimate.topology

    def cost(o: Operation) -> float:
        return o.seconds(topology) if topology.chip else o.bytes * o.times

    return sorted(estimate.operations, key=cost, reverse=True)[:top]


def _operation(operation: Operation, estimate: Estimate) -> dict:
    """Returns an operation as JSON values: what all its executions in a step take."""
    times, topology, own = operation.times, estimate.topology, operation.own_seconds
    return {
        "name": operation.name,
        "words": operation.words,
        "times": times,
        "seconds": topology.chip and operation.seconds(topology),
        "compiler_seconds": own if own is None else own * times,
        "flops": {dtype: n * times for dtype, n in operation.flops.items()},
        "bytes": operation.bytes * times,
    }


def _operation_lines(estimate: Estimate, top: int) -> list[str]:
    """Returns the table of the dearest operations."""
    if not top or estimate.flops is None:
        return []
    lines = [
        f"{'ms':>8}{'of step':>9}{'XLA: ms':>9}{'times':>7}{'TFLOP':>9}{'GB':>9}"
        "  the dearest operations"
    ]
    for told in (_operation(o, estimate) for o in dearest(estimate, top)):
        own, seconds = told["compiler_seconds"], told["seconds"]
        lines.append(
            (f"{'':17}" if seconds is None else f"{seconds * 1e3:8.2f}"
             f"{seconds / estimate.step_seconds:9.1%}")
            + (f"{'':9}" if own is None else f"{own * 1e3:9.2f}")
            + f"{told['times']:7}{sum(told['flops'].values()) / 1e12:9.3f}"
            f"{told['bytes'] / 1e9:9.3f}  {told['words']} (%{told['name']})"
        )  # fmt: skip
    return [*lines, ""]


def _run_lines(estimate: Estimate, price: float | None) -> list[str]:
    """Returns the lines on the times of a step and of the whole run; none where peaks are
    unknown.
    """
    times = estimate.seconds
    if times is None:
        return []
    parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in times.items())
    total = run_hours(estimate, price)
    own = estimate.compiler_seconds
    rows = ROW_BYTES * row_width(estimate.config) / estimate.token_seconds
    chip = estimate.topology.chip
    links = f"{chip.link_rate / 1e9:.0f} GB/s to its neighbours"
    if not estimate.topology.is_tpu:
        links = (
            f"{chip.link_rate / 1e9:.0f} GB/s in a node, {chip.network_rate / 1e9:.0f} to others"
        )
    return [
        f"Step at the published peaks, operation by operation: {estimate.step_seconds * 1e3:.1f} ms"
        + (f"; {own * 1e3:.1f} by the compiler's estimates, where it has any" if own else ""),
        f"By themselves: {parts} ms",
        f"{1 / estimate.token_seconds:,.0f} tokens/s; "
        f"{total['tokens']:.4g} tokens: {total['hours']:,.1f} h, "
        f"{total['chip_hours']:,.0f} chip-hours ({total['chip_hours'] / 24:,.1f} chip-days)"
        + cost_words(total.get("cost"), price),
        f"For that the stream must deliver {rows / 1e9:,.2f} GB/s of bfloat16 rows; sae-jax bench "
        "--reading tells what a disk or bucket gives.",
        f"The peaks are a bound: a real step takes longer. Taken for a {chip.name}: "
        f"{chip.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, {chip.float32 / 1e12:.0f} in float32, "
        f"memory {chip.memory_rate / 1e12:.2f} TB/s, links {links}.",
    ]


def run_hours(estimate: Estimate, price: float | None) -> dict[str, float]:
    """Returns the tokens, hours, chip-hours and, with a price, the cost of the whole run."""
    batch, tokens = estimate.config.data.batch_size, estimate.config.train.tokens
    hours = tokens // batch * estimate.step_seconds / 3600
    chip_hours = hours * len(estimate.topology.devices)
    total = {"tokens": tokens, "hours": hours, "chip_hours": chip_hours}
    return total if price is None else total | {"cost": chip_hours * price}


def cost_words(cost: float | None, price: float | None) -> str:
    """Returns what a cost is, as the end of a line; nothing without a price."""
    return "" if cost is None else f", cost {cost:,.2f} at {price:g} a device-hour"
