"""Times SAEDashboard once, for collect_beside_saedashboard.py, whose folder is the argument."""

import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights


def main(folder: pathlib.Path) -> None:
    """Writes result.json: seconds, those of the cores, the largest activation of each latent."""
    asked = json.loads((folder / "peer.json").read_text())
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    model = hooked(asked["model"], tokens.shape[1])
    sae = SAE.load_from_disk(folder / "sae")
    settings = SaeVisConfig(
        hook_point=asked["hook"],
        features=asked["latents"],
        minibatch_size_features=len(asked["latents"]),
        minibatch_size_tokens=8,
        ignore_tokens=set(asked["ignore"]),
    )
    begin, cpu = time.perf_counter(), time.process_time()
    found = SaeVisRunner(settings).run(encoder=sae, model=model, tokens=tokens)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    largest = [
        max(max(s.feat_acts) for s in data.sequence_data.seq_group_data[0].seq_data)
        for data in (found.feature_data_dict[latent] for latent in asked["latents"])
    ]
    result = {"seconds": seconds, "cpu_seconds": cpu, "largest": largest}
    (folder / "result.json").write_text(json.dumps(result))


def hooked(directory: str, context_length: int) -> HookedSAETransformer:
    """Returns a Llama model of a directory in TransformerLens, with its weights as they are."""
    llama = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = llama.config
    model = HookedSAETransformer(
        HookedTransformerConfig(
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            n_ctx=context_length,
            d_head=config.hidden_size // config.num_attention_heads,
            n_heads=config.num_attention_heads,
            n_key_value_heads=config.num_key_value_heads,
            d_mlp=config.intermediate_size,
            d_vocab=config.vocab_size,
            act_fn=config.hidden_act,
            normalization_type="RMS",
            eps=config.rms_norm_eps,
            gated_mlp=True,
            final_rms=True,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=config.hidden_size // config.num_attention_heads,
            original_architecture="LlamaForCausalLM",
            device="cpu",
        )
    )
    model.load_state_dict(convert_llama_weights(llama, model.cfg), strict=False)
    return model


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(pathlib.Path(sys.argv[1]))
