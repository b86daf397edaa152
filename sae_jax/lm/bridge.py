"""Runs models of families that our decoder does not know, by transformers and torch.

A site of a `TorchModel` is the input or the output of a module of transformers' model. Where the
tree of modules says which module it is, it has the name of our decoder's site:

    resid_pre.L  resid_post.L  into and out of the L-th layer (of the longest list of modules)
    mlp_in.L     into the layer's MLP
    z.L  attn_out.L    into and out of the attention's output projection
    mlp_act.L  mlp_out.L  into and out of the MLP's last projection
                 (where a norm follows before the residual stream, *_out.L is what leaves the norm)

Any module also has sites by its path: hf:model.layers.3.mlp is its output and hf:PATH:in its input,
in both cases the first tensor.
"""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sae_jax import hub, paths
from sae_jax.errors import UserError, choose, on_one_line, some
from sae_jax.json_files import checked, read_json
from sae_jax.lm.directory import TORCH, model_directory, pinned_spec
from sae_jax.lm.edits import INPUTS, POSITIONS, TOKENS, apply, sites_read
from sae_jax.lm.families import LAYERS
from sae_jax.lm.language_model import LanguageModel
from sae_jax.lm.weights import fingerprint, with_weights

_HOOK = "hf:"  # of a site's name, for a module by its path

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn")
_LAST_OF_ATTENTION = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_LAST_OF_MLP = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "wo")
_NORM_AFTER_MLP = "post_feedforward_layernorm"  # of OLMo 2 and others; these have one after both:
_NORM_AFTER_ATTENTION = "post_attention_layernorm"


def is_torch(spec) -> bool:
    """Returns whether `spec` names a model that transformers runs and not our decoder."""
    return str(spec).startswith(TORCH)


@dataclasses.dataclass(frozen=True)
class _HookPoint:
    """Names the output of the module at `path`, or with `is_input` its input."""

    path: str
    is_input: bool = False


class TorchModel(LanguageModel):
    """A language model that transformers runs.

    It runs on the first GPU that torch has, else on the CPU. The arrays that it returns are on
    JAX's default device.
    """

    def __init__(self, spec, dtype: str = "float32"):
        """Opens the model, but does not read its weights.

        Raises UserError if torch or transformers is not installed, or if there is no such model.

        Args:
          spec: torch:DIRECTORY, or torch:org/repository for a model on the Hugging Face hub, with
            or without hf:// before it.
          dtype: the type in which it computes, a name of torch's.
        """
        self._torch, self._transformers = _import(spec)
        name = _directory_or_hub_name(str(spec).removeprefix(TORCH))
        self.directory = model_directory(name)
        self._name = pinned_spec(name, self.directory)
        self.spec = f"{TORCH}{self._name}"
        self.dtype, self.mesh = dtype, None
        _check_depth(self.directory)
        config = self._load(self._transformers.AutoConfig).get_text_config()
        self.vocab_size = config.vocab_size
        # Without a bound of their own: models whose positions have none (ALiBi).
        self.max_context = getattr(config, "max_position_embeddings", None) or 2048

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its config and weights, which a store keeps."""
        with_weights(self._name, old=True)
        old = sorted(file.name for file in self.directory.glob("pytorch_model*.bin"))
        return fingerprint(self.directory, [] if any(self.directory.glob("*.safetensors")) else old)

    @functools.cached_property
    def _module(self):
        torch = self._torch
        dtype = getattr(torch, self.dtype)
        with_weights(self._name, old=True)
        auto = self._transformers.AutoModelForCausalLM
        module, info = self._load(auto, dtype=dtype, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):  # transformers draws them at random
            raise UserError(f"{self.directory} has no tensor {some(missing, 1)}")
        for name, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise UserError(f"parameter {name} of {self.directory} holds NaN or infinity")
        return module.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @functools.cached_property
    def layers_module(self) -> str:
        """The path of the model's layers: the longest list of modules that is in no other list."""
        torch, lists = self._torch, {}
        for name, module in self._module.named_modules():
            inner = any(name.startswith(f"{outer}.") for outer in lists)
            if isinstance(module, torch.nn.ModuleList) and not inner:
                lists[name] = len(module)
        if not lists:
            raise UserError(f"{self.directory} has no list of layers; name modules as {_HOOK}PATH")
        return max(lists, key=lists.get)

    def site_width(self, site: str) -> int:
        """Returns the width of a site's activations, after running the model on a few tokens.

        Raises UserError for a site that the model does not have.
        """
        _, taps = self._run(np.zeros((2, 3), np.int32), (site,), head=False)
        return taps[site].shape[-1]

    def flops_per_token(self, sites: Sequence[str], context_length: int) -> None:
        """Returns None: the FLOPs of these families are not known."""

    def runner(self, sites: Sequence[str], dtype) -> Callable[[np.ndarray], dict]:
        """Returns a function from tokens (B, T) to {site: (B, T, width)} of `dtype` on the host."""
        sites, dtype = tuple(sites), getattr(self._torch, np.dtype(dtype).name)

        def run(tokens):
            _, taps = self._run(tokens, sites, head=False)
            return {site: self._to_numpy(taps[site].to(dtype)) for site in sites}

        return run

    def forward(self, tokens, taps=(), edits=None, logits=True):
        """Runs the model as `LanguageModel.forward` says.

        The activations of an edited site are copied to JAX and back.
        """
        out, tapped = self._run(np.asarray(tokens), tuple(taps), edits or {}, head=logits)
        tapped = {site: self._to_jax(x) for site, x in tapped.items()}
        return (self._to_jax(out.logits.float()) if logits else None), tapped

    def continuations(self, prompts, samples, rules, prompt_edits, new_edits, on_tokens=None):
        """Writes texts as `LanguageModel.continuations` says, with transformers' own cache.

        Raises UserError for a model that keeps no keys and values, such as a state space model.
        """
        width, samples = max(len(prompt) for prompt in prompts), np.array(samples, np.int32)
        lengths = np.array([len(prompt) for prompt in prompts])
        limits = np.minimum(rules.max_new_tokens, self.max_context - lengths)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        edits, cache = prompt_edits(tokens.shape), None
        new, ended = [[] for _ in prompts], np.zeros(len(prompts), bool)
        while not ended.all():
            step = max(len(row) for row in new)
            positions = np.arange(width + step)[None] - (width - lengths)[:, None]
            out, _ = self._run(tokens, (), edits, positions=positions, cache=cache)
            cache = out[self._cache_name]
            logits = self._to_jax(out.logits[:, -1].float())
            chosen, grown = np.asarray(rules.next_tokens(logits, samples, step)), ~ended
            for row in np.flatnonzero(grown):
                new[row].append(chosen[row])
                ended[row] = chosen[row] in rules.eos or len(new[row]) == limits[row]
            if on_tokens is not None:
                on_tokens(np.flatnonzero(grown), chosen[grown])
            tokens, edits = chosen[:, None], new_edits
        return [np.array(row, np.int32) for row in new]

    def _run(
        self, tokens_BxT: np.ndarray, taps=(), edits=None, head=True, positions=None, cache=None
    ):
        """Returns what transformers' model gives, and {tap: tensor (B, T, width)}.

        Args:
          tokens_BxT: ids.
          taps: names of sites.
          edits: edits by site.
          head: whether logits are wanted.
          positions: in generation, those of all tokens so far, (B, past + T), negative for padding.
          cache: transformers' cache of the past.
        """
        torch, tapped, edits = self._torch, {}, edits or {}
        reads = {other for edit in edits.values() for other in sites_read(edit)} - set(INPUTS)
        points = {site: self._hook_point(site) for site in (*taps, *edits, *reads)}
        length = tokens_BxT.shape[1]
        own = np.arange(length)[None] if positions is None else positions[:, -length:]
        given = {POSITIONS: jnp.asarray(own), TOKENS: jnp.asarray(tokens_BxT)}

        def edited(site, x):
            """Returns the replacement of the tensor x (B, T, width)."""
            read = dict(given)
            for other in set(sites_read(edits[site])) & reads:
                if other not in tapped:
                    raise UserError(
                        f"the edit of {site} reads {other}, which does not come before it in the "
                        "forward pass; read an earlier site"
                    )
                read[other] = self._to_jax(tapped[other])
            new_BxTxW = apply(edits[site], self._to_jax(x), read)
            if new_BxTxW.shape != x.shape:
                raise UserError(
                    f"the edit of {site} turned shape {tuple(x.shape)} into {new_BxTxW.shape}"
                )
            new_BxTxW = np.array(new_BxTxW.astype(jnp.float32))  # torch wants to own it
            return torch.from_numpy(new_BxTxW).to(x.device, x.dtype)

        def visit(site, x):
            """Returns what the model goes on with in place of `x`."""
            if site in tapped:
                raise UserError(f"{site} runs several times in one pass of {self.directory}")
            x_BxTxW = _by_token(x, tokens_BxT.shape, site)
            if site in edits:
                x_BxTxW = edited(site, x_BxTxW)
            tapped[site] = x_BxTxW.clone()  # some add to it in place, Falcon's layers for one
            return x_BxTxW.reshape(x.shape)

        module = self._module
        prefix = f"{module.base_model_prefix}."
        if not head and all(point.path.startswith(prefix) for point in points.values()):
            run = module.base_model  # without the unembedding, which may be most of the work
        else:
            run = module
        with torch.inference_mode(), contextlib.ExitStack() as hooks:
            for site, point in points.items():
                hooks.enter_context(_hook(module, point, functools.partial(visit, site), torch))
            to_torch = functools.partial(torch.tensor, dtype=torch.long, device=module.device)
            inputs = {"input_ids": to_torch(tokens_BxT), "use_cache": positions is not None}
            if positions is not None:
                inputs |= {"attention_mask": to_torch(positions >= 0), self._cache_name: cache}
                if "position_ids" in inspect.signature(run.forward).parameters:
                    inputs["position_ids"] = to_torch(np.maximum(own, 0))
            out = run(**inputs)
        for site in points:
            if site not in tapped:
                raise UserError(f"{site} has no part in a pass of {self.directory}; name another")
        return out, {site: tapped[site] for site in taps}

    @functools.cached_property
    def _cache_name(self) -> str:
        """The name of keys and values in what transformers' model takes and gives."""
        takes = inspect.signature(self._module.forward).parameters
        for name in ("cache", "past_key_values"):  # the second in older versions of transformers
            if name in takes:
                return name
        raise UserError(
            f"{self.directory} keeps no keys and values of past tokens, which generation needs; "
            "run transformers' own generate on it"
        )

    def _hook_point(self, site: str) -> _HookPoint:
        if site.startswith(_HOOK):
            path = site.removeprefix(_HOOK)
            modules = [name for name, _ in self._module.named_modules() if name]
            module = choose(path.removesuffix(":in"), modules, f"the module {site}")
            return _HookPoint(module, is_input=path.endswith(":in"))
        if site not in self._site_hooks:
            names = sorted({name.partition(".")[0] for name in self._site_hooks})
            raise UserError(
                f"unknown site {site!r}; {self.directory} has {', '.join(names)}, each with .LAYER "
                f"from 0 to {self._num_layers - 1}, and {_HOOK}PATH for any module, such as "
                f"{_HOOK}{self.layers_module}.0, with :in for what goes into it"
            )
        return self._site_hooks[site]

    @property
    def _num_layers(self) -> int:
        return len(self._module.get_submodule(self.layers_module))

    @functools.cached_property
    def _site_hooks(self) -> dict[str, _HookPoint]:
        """Returns the hook point of each site that can be found, by our names of sites."""
        points = {}
        for number, layer in enumerate(self._module.get_submodule(self.layers_module)):
            own = f"{self.layers_module}.{number}"
            found = {"resid_pre": _HookPoint(own, is_input=True), "resid_post": _HookPoint(own)}
            attention, mlp = _child(layer, _ATTENTION), _child(layer, _MLP)
            if attention and (last := _child(layer.get_submodule(attention), _LAST_OF_ATTENTION)):
                path = f"{own}.{attention}.{last}"
                found |= {"z": _HookPoint(path, is_input=True), "attn_out": _HookPoint(path)}
            if mlp:
                found["mlp_in"] = _HookPoint(f"{own}.{mlp}", is_input=True)
            if last := _child(layer.get_submodule(mlp or ""), _LAST_OF_MLP):
                path = f"{own}.{mlp}.{last}" if mlp else f"{own}.{last}"
                found |= {"mlp_act": _HookPoint(path, is_input=True), "mlp_out": _HookPoint(path)}
            if _child(layer, (_NORM_AFTER_MLP,)):
                found["attn_out"] = _HookPoint(f"{own}.{_NORM_AFTER_ATTENTION}")
                found["mlp_out"] = _HookPoint(f"{own}.{_NORM_AFTER_MLP}")
            points |= {f"{name}.{number}": point for name, point in found.items()}
        return points

    def _load(self, auto, **options):
        try:
            return auto.from_pretrained(self.directory, **options)
        except (
            Exception
        ) as error:  # of any class, where a field of config.json is not as it must be
            reason = on_one_line(error) or type(error).__name__
            raise UserError(f"transformers cannot read {self.directory}: {reason}") from None

    def _to_jax(self, x) -> jax.Array:
        return jnp.asarray(self._to_numpy(x))

    def _to_numpy(self, x) -> np.ndarray:
        if x.dtype == self._torch.bfloat16:  # which torch does not give to numpy
            return x.contiguous().view(self._torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return x.contiguous().cpu().numpy()


def _hook(module, point: _HookPoint, visit: Callable, torch):
    """Returns the handle of a hook that replaces the tensor at a point by `visit` of it."""

    def before(_, args, kwargs):
        for i, x in enumerate(args):
            if torch.is_tensor(x):
                return (*args[:i], visit(x), *args[i + 1 :]), kwargs
        name = next(name for name, x in kwargs.items() if torch.is_tensor(x))
        return args, kwargs | {name: visit(kwargs[name])}

    def after(_, args, out):
        return visit(out) if torch.is_tensor(out) else (visit(out[0]), *out[1:])

    target = module.get_submodule(point.path)
    if point.is_input:
        return target.register_forward_pre_hook(before, with_kwargs=True)
    return target.register_forward_hook(after)


def _by_token(x, shape: tuple[int, int], site: str):
    """Returns x as (B, T, width), also where the tokens of all sequences are in one axis."""
    if x.shape[:2] != shape and x.shape[0] != shape[0] * shape[1]:
        raise UserError(f"{site} has shape {tuple(x.shape)}, no row for each token; name another")
    return x.reshape(*shape, -1)


def _child(module, names: Sequence[str]) -> str | None:
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)


def _directory_or_hub_name(name: str) -> str:
    """Returns a directory as it is, and any other name as one of the hub, as transformers does."""
    if hub.is_hub_name(name) or paths.local(name).is_dir():
        return name
    try:
        return str(hub.parse(f"{hub.SCHEME}{name}"))
    except UserError:
        raise UserError(f"{name} is no directory, and no name of a model on the hub") from None


def _check_depth(directory: pathlib.Path) -> None:
    """Raises UserError for a config.json with more layers than any model has.

    transformers makes lists of them, and modules, before it looks at the weights.
    """
    file = directory / "config.json"
    values = read_json(file)
    for part in (values, *(v for v in values.values() if isinstance(v, dict))):
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if (value := part.get(name)) is not None:
                checked(value, LAYERS, f"{name} = {value!r:.60} in {file}")


def _import(spec):
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError(f'{spec} needs torch and transformers: pip install "sae-jax[hf]"') from None
    return torch, transformers
