"""Says how the files of each family store a parameter: names, orientation and packing."""

import dataclasses
import math

import numpy as np

from sae_jax.lm.architecture import Leaf


@dataclasses.dataclass(frozen=True)
class Stored:
    """Describes how a parameter is stored: as a tensor of a file, or as a third of one.

    Attributes:
      name: the tensor's name.
      inputs_first: whether a matrix is (inputs, outputs) and not (outputs, inputs).
      third: 0, 1 or 2 for queries, keys or values that are in one tensor; None for others.
      by_head: whether such a tensor has the three of each head together (GPT-NeoX).
    """

    name: str
    inputs_first: bool = False
    third: int | None = None
    by_head: bool = False

    def shape(self, leaf: Leaf) -> list[int]:
        """Returns the shape of the tensor that stores the parameter `leaf`."""
        outputs = math.prod(leaf.shape[leaf.inputs :]) * (1 if self.third is None else 3)
        if not leaf.inputs:
            return [outputs]
        inputs = math.prod(leaf.shape[: leaf.inputs])
        return [inputs, outputs] if self.inputs_first else [outputs, inputs]

    def read(self, tensor, leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the part `index` of the parameter (*inputs, *outputs).

        If the part is one range of the first axis of the inputs or outputs, only its rows or
        columns are read.

        Args:
          tensor: the stored tensor, or a slice object of safetensors.
          leaf: the parameter.
          index: a slice for each axis of the parameter.
        """
        axis = next((a for a, s in enumerate(index) if s != slice(None)), None)
        leading = (0, leaf.inputs)  # the first axis of the inputs, and of the outputs
        ranges = [
            index[a].indices(leaf.shape[a])[:2] if a == axis else (0, leaf.shape[a])
            for a in leading
            if a < len(leaf.shape)
        ]
        outputs = self._outputs(tensor, leaf, ranges)
        shape = list(leaf.shape)
        for a, (start, stop) in zip(leading, ranges, strict=False):
            shape[a] = stop - start
        part = outputs.reshape(shape)
        read_already = axis in leading
        return part if axis is None or read_already else part[index]

    def _outputs(self, tensor, leaf: Leaf, ranges) -> np.ndarray:
        """Returns the matrix (inputs, outputs) of the given ranges of their first axes."""
        head = leaf.inputs  # the first axis of the outputs
        per = math.prod(leaf.shape[head + 1 :])
        (start, stop), count = ranges[-1] if leaf.inputs else ranges[0], leaf.shape[head]
        if self.by_head:
            rows = slice(3 * per * start, 3 * per * stop)
        else:
            before = (self.third or 0) * per * count
            rows = slice(before + per * start, before + per * stop)
        if not leaf.inputs:
            values = tensor[rows]
        else:
            width = math.prod(leaf.shape[1 : leaf.inputs])
            columns = slice(width * ranges[0][0], width * ranges[0][1])
            values = tensor[columns, rows] if self.inputs_first else tensor[rows, columns].T
        if self.by_head:
            values = values.reshape(*values.shape[:-1], stop - start, 3, per)[..., self.third, :]
        return values


_LLAMA_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "w_q": "self_attn.q_proj.weight",
    "w_k": "self_attn.k_proj.weight",
    "w_v": "self_attn.v_proj.weight",
    "w_o": "self_attn.o_proj.weight",
    "b_q": "self_attn.q_proj.bias",
    "b_k": "self_attn.k_proj.bias",
    "b_v": "self_attn.v_proj.bias",
    "b_o": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}
_GEMMA_LAYER = _LLAMA_LAYER | {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1.weight",
    "b_attn_norm": "ln_1.bias",
    "w_o": "attn.c_proj.weight",
    "b_o": "attn.c_proj.bias",
    "mlp_norm": "ln_2.weight",
    "b_mlp_norm": "ln_2.bias",
    "w_up": "mlp.c_fc.weight",
    "b_up": "mlp.c_fc.bias",
    "w_down": "mlp.c_proj.weight",
    "b_down": "mlp.c_proj.bias",
}
_NEOX_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "b_attn_norm": "input_layernorm.bias",
    "w_o": "attention.dense.weight",
    "b_o": "attention.dense.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "b_mlp_norm": "post_attention_layernorm.bias",
    "w_up": "mlp.dense_h_to_4h.weight",
    "b_up": "mlp.dense_h_to_4h.bias",
    "w_down": "mlp.dense_4h_to_h.weight",
    "b_down": "mlp.dense_4h_to_h.bias",
}


@dataclasses.dataclass(frozen=True)
class Names:
    """Holds the names of a family's tensors.

    Attributes:
      base: the prefix of all names but the unembedding's, in files that were saved with a head.
      layers: the name of the list of layers.
      layer: the names of a layer's tensors, by our names of parameters.
      top: the names of other tensors, by our names of parameters.
      unembed: the name of the unembedding.
      packed: the name of the tensor that holds queries, keys and values, if there is one.
      inputs_first: whether matrices of a layer are (inputs, outputs).
      by_head: whether the packed tensor has the three of each head together.
      derived: the ends of names of tensors that can be computed from others, which are not read.
    """

    base: str
    layers: str
    layer: dict[str, str]
    top: dict[str, str]
    unembed: str = "lm_head.weight"
    packed: str | None = None
    inputs_first: bool = False
    by_head: bool = False
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def stored(self, path: tuple) -> Stored:
        """Returns how the parameter at a path of the tree is stored.

        path: such as ("embed",) or ("layers", 3, "w_q").
        """
        name = path[-1]
        if len(path) == 1:
            if name == "unembed":
                return Stored(self.unembed)
            return Stored(self.base + self.top[name], inputs_first=name in ("embed", "positions"))
        prefix = f"{self.base}{self.layers}.{path[1]}."
        if self.packed and name[2:] in ("q", "k", "v"):
            kind = "weight" if name.startswith("w_") else "bias"
            third = "qkv".index(name[2:])
            full = f"{prefix}{self.packed}.{kind}"
            return Stored(full, self.inputs_first, third, self.by_head)
        return Stored(prefix + self.layer[name], self.inputs_first and name.startswith("w_"))


_LLAMA_TOP = {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}
_LLAMA = Names("model.", "layers", _LLAMA_LAYER, _LLAMA_TOP)
_GEMMA = Names("model.", "layers", _GEMMA_LAYER, _LLAMA_TOP)
_GPT2 = Names(
    "transformer.",
    "h",
    _GPT2_LAYER,
    {
        "embed": "wte.weight",
        "positions": "wpe.weight",
        "final_norm": "ln_f.weight",
        "b_final_norm": "ln_f.bias",
    },
    packed="attn.c_attn",
    inputs_first=True,
    derived=(".attn.bias", ".attn.masked_bias"),
)
_NEOX = Names(
    "gpt_neox.",
    "layers",
    _NEOX_LAYER,
    {
        "embed": "embed_in.weight",
        "final_norm": "final_layer_norm.weight",
        "b_final_norm": "final_layer_norm.bias",
    },
    unembed="embed_out.weight",
    packed="attention.query_key_value",
    by_head=True,
    derived=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)


def names_of(family: str) -> Names:
    """Returns the names of the tensors of a family, which is a model_type of config.json."""
    own = {"gpt2": _GPT2, "gpt_neox": _NEOX}
    return own.get(family, _GEMMA if family.startswith(("gemma2", "gemma3")) else _LLAMA)


def in_files(names: Names, tensors) -> Names:
    """Returns `names` changed to those that a model's files have.

    The base is missing where the model was saved without its head, and is another one where the
    model also reads images. GPT-NeoX's unembedding has one of two names. `tensors` are the names,
    or a dict by name, of the files' tensors.
    """
    if names.unembed not in tensors and "lm_head.weight" in tensors:
        names = dataclasses.replace(names, unembed="lm_head.weight")
    anchor = names.top["embed"]
    for base in ("language_model.model.", "model.language_model.", names.base, ""):
        if base + anchor in tensors:
            return dataclasses.replace(names, base=base)
    return names


_IMAGES = ("vision_tower.", "multi_modal_projector.")
IMAGE_PARTS = (*_IMAGES, *("model." + name for name in _IMAGES))
"""The beginnings of the names of tensors that serve images only."""
