import json
import pathlib
import sys

from absl import flags

SUMMARY = """Measure a training step, or the reading of batches, on this machine.

  sae-jax bench                                         the top-k step at the default shape
  sae-jax bench --architecture=relu --d_in=512 --d_sae=8192
  sae-jax bench --peers                                 beside the installed peers, in turn
  sae-jax bench --reading                               the stream against a sequential read

Every figure of one call comes from one run, so that its ratios hold on a machine whose speed
drifts. --peers needs: pip install "sae-jax[peers]".
"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("architecture", "topk", "topk or relu.", flag_values=values)
    flags.DEFINE_integer("batch", 2048, "Tokens a step.", flag_values=values)
    flags.DEFINE_integer("d_in", 768, "Width of the activations.", flag_values=values)
    flags.DEFINE_integer("d_sae", 24_576, "Dictionary size.", flag_values=values)
    flags.DEFINE_integer("k", 32, "Latents a token, for topk.", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "Of matmul operands: float32, bfloat16.", flag_values=values)
    flags.DEFINE_integer("mesh_model", 1, "Devices that share the dictionary.", flag_values=values)
    flags.DEFINE_integer("rounds", 7, "Timed steps of each contestant.", flag_values=values)
    flags.DEFINE_bool("peers", False, "Time the installed peers too.", flag_values=values)
    flags.DEFINE_bool("reading", False, "Measure the stream instead.", flag_values=values)
    flags.DEFINE_string("out", None, "Write the figures there as JSON.", flag_values=values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    if args.reading:
        from sae_jax.bench.reading import measure_reading

        figures = measure_reading()
    else:
        from sae_jax.bench.step import bench_config, measure_step

        config = bench_config(
            args.architecture, args.batch, args.d_in, args.d_sae, args.k, args.dtype, args.mesh_model
        )
        figures = measure_step(config, args.rounds, args.peers)
        _print_step(figures)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _print_step(figures: dict) -> None:
    shape = " ".join(f"{name} {value}" for name, value in figures["shape"].items() if value)
    print(f"{figures['architecture']} {figures['compute_dtype']}, {shape}, {figures['device']}")
    print(f"{'':28}{'ms/step':>10}{'tokens/s':>12}{'ours is':>10}")
    for name, rate in figures["tokens_per_second"].items():
        ratio = figures["times_faster_than"].get(name)
        faster = f"{ratio:9.2f}x" if ratio else ""
        print(f"{name:28}{1e3 * figures['seconds'][name]:10.1f}{rate:12.0f}{faster:>10}")
    rate = figures["matmul_flops_per_second"] / 1e9
    print(
        f"matmul of the encoder in the same run: {rate:.0f} GFLOP/s; "
        f"the step is at {figures['fraction_of_floor']:.0%} of that floor"
    )
    sys.stdout.flush()
