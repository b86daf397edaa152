#!/usr/bin/env bash
# What only a machine with an accelerator can say, in about ten minutes on one H200:
#
#   pip install "sae-jax[cuda,peers]"
#   bash experiments/benchmarks/on_an_accelerator.sh OUT [MODEL TEXT]
#
# Steps of four architectures, beside the peers' (leave out [peers] and they are), with dead latents
# and in packs; whether a run that was stopped ends with the bits of one that was not; the harvest of
# MODEL (a Hugging Face directory such as SmolLM2-135M) on TEXT. Each part writes OUT/PART.log and,
# where it has figures, OUT/PART.json; a part that fails is named at the end and stops no other.
# SMALL=1 makes all shapes small, to try the script itself on any machine.
set -uo pipefail
if [ $# -ne 1 ] && [ $# -ne 3 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
here=$(dirname "$(realpath "$0")")
out=$(realpath -m "$1")
model=${2:-}
text=${3:-$(python -c "from sae_jax import lm; print(*lm.standard_library(), sep=',')")}
mkdir -p "$out"
if [ -n "${SMALL:-}" ]; then
  large="--batch=128 --d_in=64 --d_sae=512 --k=8"
  middle=$large
  packs="--batch=128 --d_in=64 --d_sae=512"
  tokens=65536
  context=128
else
  large="--batch=16384 --d_in=4096 --d_sae=131072 --k=64"
  middle="--batch=16384 --d_in=768 --d_sae=24576 --k=32"
  packs="--batch=2048 --d_in=512 --d_sae=4096"
  tokens=2097152
  context=1024
fi
has_peers=$(python -c 'import importlib.util as u
print(*filter(u.find_spec, ("sae_lens", "dictionary_learning", "sparsify")))')
failed=()

part() { # name, command...: runs it, shows and keeps what it says
  echo "== $1"
  if ! timeout 300 "${@:2}" 2>&1 | tee "$out/$1.log" | grep -v "^[IW][0-9]\{4\} "; then
    failed+=("$1")
  fi
}

for architecture in topk batchtopk relu jumprelu; do
  part "step-$architecture" sae-jax bench --architecture="$architecture" $large --dtype=bfloat16 \
    --out="$out/step-$architecture.json"
  [ -z "$has_peers" ] || part "peers-$architecture" python "$here/step_beside_peers.py" --architecture="$architecture" \
    $middle --dtype=bfloat16 --out="$out/peers-$architecture.json"
done
part dead python "$here/dead_beside_none.py" $middle --compute_dtype=bfloat16 \
  --out="$out/dead.json"
for architecture in topk relu; do
  part "packs-$architecture" sae-jax bench --packs=8 $packs --architecture="$architecture" \
    --dtype=bfloat16 --out="$out/packs-$architecture.json"
done

resumption() { # two runs of the demo's store, of which one is stopped on its way
  local train="sae-jax train --config=openai_topk:tiny --config.data.store=$out/store \
    --config.data.batch_size=256 --config.train.tokens=$((tokens / 5)) \
    --config.train.checkpoint_every=20"
  rm -rf "$out/store" "$out/whole" "$out/stopped" "$out/whole-export" "$out/stopped-export"
  sae-jax harvest --model=demo --text="$text" --sites=mlp_act.0 --context_length=128 \
    --tokens="$((tokens / 4))" --out="$out/store" &&
    $train --workdir="$out/whole" || return 1
  $train --workdir="$out/stopped" &
  until [ -d "$out/stopped/checkpoints/20" ] || ! kill -0 $! 2>/dev/null; do sleep .1; done
  kill -TERM $! 2>/dev/null
  wait $!
  local code=$?
  echo "stopped with exit code $code"
  [ $code -eq 75 ] || return 1 # it was done before
  sae-jax train --workdir="$out/stopped" || return 1
  for run in whole stopped; do
    sae-jax export --checkpoint="$out/$run" --format=saelens --out="$out/$run-export" || return 1
  done
  cmp "$out/whole-export/sae_weights.safetensors" "$out/stopped-export/sae_weights.safetensors" &&
    echo "the same bits, stopped or not"
}
export -f resumption
export out text tokens
part resumption bash -c resumption

if [ -n "$model" ]; then
  part harvest sae-jax bench --harvest --model="$model" --text="$text" --context_length="$context" \
    --tokens="$tokens" --rounds=3 --out="$out/harvest.json"
  part harvest-peers python "$here/harvest_beside_transformers.py" --model="$model" \
    --text="$text" --context_length="$context" --tokens="$((tokens / 8))" --rounds=3 \
    --out="$out/harvest-peers.json"
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]} (see $out/*.log)" >&2
  exit 1
fi
