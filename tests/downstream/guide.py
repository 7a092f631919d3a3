"""What the guide of `docs/migrating.md` says of classic calls, as code that runs in both libraries.

Each function below is code of the classic library, and stands for the row of the guide whose first cell it names.
`python -m tests.downstream.guide FILE`, run with the classic library's Python, writes what the functions give there.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformer_lens import (
    FactoredMatrix,
    HookedTransformer,
    HookedTransformerConfig,
    SVDInterpreter,
    evals,
    head_detector,
    patching,
    utils,
)
from transformer_lens.hook_points import HookPoint
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.downstream.models import GEMMA_LIKE, GPT2_LIKE, VOCAB, build, logit_difference, tokens

Value = Any

_WORDS = ["the", "a", "John", "Mary", "gave", "drink", "to", ".", ",", "and", "in", "of"]


@dataclass(frozen=True)
class Row:
    """A row of the guide.

    Attributes:
        cell: its first cell.
        run: the classic code; returns what the libraries are compared by.
        same: whether both give the same.
    """

    cell: str
    run: Callable[[], Value]
    same: bool


ROWS: dict[str, Row] = {}


def row(cell: str, same: bool = True) -> Callable[[Callable[[], Value]], Callable[[], Value]]:
    """Register a function as the code of a row, given by its first cell."""

    def register(run: Callable[[], Value]) -> Callable[[], Value]:
        assert cell not in ROWS
        ROWS[cell] = Row(cell, run, same)
        return run

    return register


# Where there is nothing to run in both libraries: the first cells, with the reason.
NOT_RUN: dict[str, str] = {
    '`HookedTransformer.from_pretrained("gpt2")`': "it downloads; test_compat holds both libraries' defaults",
    "`from_pretrained_no_processing`": "it downloads; test_families holds the logits",
    "`hf_model=`, `tokenizer=`, `checkpoint_index=`, `checkpoint_value=`, `first_n_layers=`": "they need a checkpoint",
    "a tokenizer that cannot be read stops the load": "it needs a checkpoint",
    "a name from the library's list": "it downloads",
    "`n_devices=`, 4-bit weights": "it needs several GPUs",
    "everything in memory, or only what a filter names": "the arguments are this library's own",
    "saving a cache with `torch.save`": "the methods are this library's own",
    "path patching by hand, with hooks": "test_downstream compares the numbers",
    "attribution patching by hand": "test_downstream compares the numbers",
    "`evals.evaluate`, `evaluate_on_dataset`, the data loaders": "they download",
    "`train.train(model, config, dataset)`": "the arguments differ; the error of the classic names says what to use",
}

# Rows on differences that `tests/classic` compares with the classic library.
HELD_BY_THE_CLASSIC_SUITE: set[str] = {
    "`hook_q` and `hook_k` stand before the norm of queries and keys, these and `hook_v` before `clip_qkv`",
    "`unembed.hook_out` stands before the soft cap",
    "a norm runs once for each of queries, keys and values, and its cached gradient is that of the last",
    "an attention mask does nothing in bidirectional attention; a hole in it counts in ALiBi's distances and in "
    "windows",
    "the loss of texts padded on the right counts the padding",
    "hook points that nothing calls (`hook_mlp_out` of an attention-only block, `hook_pos_embed` with ALiBi)",
    "`hook_expert_weights` and `hook_expert_indices` have one axis for all tokens",
    "hook points in each expert (`mlp.experts.0.hook_pre`)",
    "the gain of a norm that is not folded is left out by `apply_ln_to_stack`, `logit_attrs` and `apply_ln=` of parts",
    "`stack_head_results(0, incl_remainder=True)` has the last layer's output as remainder",
    "`decompose_resid` of a shortformer has its positions among the parts",
    "results of heads in models that normalise after attention",
    "a gate, a router and experts have no biases",
    "`FactoredMatrix.Vh` is V",
    "folding changes the logits of gated LayerNorm models, shortformers and `final_rms`",
    "`cfg.n_params` counts grouped keys and values once for each query head",
    '`to_tokens("", prepend_bos=False)` is a prompt of no tokens',
    '`error_measure="abs"` rounds its scores to three places',
}


# What the rows share


@functools.cache
def small() -> HookedTransformer:
    """Return a model as processing leaves it: its norms have no parameters."""
    return build({**GPT2_LIKE, "normalization_type": "LNPre"})


@functools.cache
def grouped() -> HookedTransformer:
    return build(GEMMA_LIKE)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def words(**special: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer of words, read from a folder as both libraries read it again."""
    vocabulary = ["<bos>", "<eos>", "<pad>", "<unk>", *_WORDS, *(f" {word}" for word in _WORDS)][:VOCAB]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", **special}
    folder = Path(_folder().name) / str(len(special))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def reader() -> HookedTransformer:
    """Return a model that reads texts."""
    model = build(GPT2_LIKE)
    model.set_tokenizer(words())
    return model


def zeroed(activation: Tensor, hook: HookPoint) -> Tensor:
    activation[:] = 0.0
    return activation


def pairs() -> tuple[Tensor, Tensor]:
    """Return clean and corrupted prompts, [2 6] each."""
    return tokens(2, 6, seed=21), tokens(2, 6, seed=22)


def metric(logits: Tensor) -> Tensor:
    return logit_difference(logits)


# Loading


@row(
    "`fold_ln=`, `center_writing_weights=`, `center_unembed=`, `fold_value_biases=`, `refactor_factored_attn_matrices=`"
)
def _() -> Value:
    model = build(GPT2_LIKE)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    folded = HookedTransformer(HookedTransformerConfig(**{**GPT2_LIKE, "normalization_type": "LNPre"}))
    folded.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=True, center_unembed=True)
    return [folded.W_U, folded.W_in, folded.b_O, folded(tokens(2, 6))]


@row("`model.load_state_dict(torch.load(...))`")
def _() -> Value:
    path = Path(_folder().name) / "weights.pt"
    torch.save(small().state_dict(), path)
    model = HookedTransformer(small().cfg.__class__(**{**GPT2_LIKE, "normalization_type": "LNPre"}))
    model.load_state_dict(torch.load(path))
    return model(tokens(2, 6))


@row("`HookedTransformerConfig(...)`")
def _() -> Value:
    cfg = HookedTransformerConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=5, d_vocab=7, d_head=4, act_fn="relu")
    return [cfg.d_mlp, cfg.attn_scale, cfg.d_vocab_out, cfg.initializer_range]


@row("assigning a field of `model.cfg` changes the model, or nothing, without a word", same=False)
def _() -> Value:
    build(GPT2_LIKE).cfg.n_heads = 2
    return "nothing said"


@row("`cfg.seed` seeds torch's global generator", same=False)
def _() -> Value:
    torch.manual_seed(3)
    HookedTransformerConfig(**{**GPT2_LIKE, "seed": 5})
    return torch.rand(3, dtype=torch.float64)


# Running


@row("`model(tokens, return_type=...)`")
def _() -> Value:
    prompts = tokens(2, 6)
    logits, loss = small()(prompts, return_type="both")
    return [logits, loss, small()(prompts, return_type="loss", loss_per_token=True)]


@row("`model.run_with_hooks(..., fwd_hooks=[(name, fn)])`")
def _() -> Value:
    hooks = [(utils.get_act_name("z", 1), zeroed), (lambda name: name.endswith("0.hook_mlp_out"), zeroed)]
    return small().run_with_hooks(tokens(2, 6), fwd_hooks=hooks)


@row("`bwd_hooks=` of `run_with_hooks`")
def _() -> Value:
    seen: list[str] = []
    loss = small().run_with_hooks(
        tokens(1, 4),
        return_type="loss",
        bwd_hooks=[("blocks.0.hook_resid_post", lambda g, hook: seen.append(hook.name))],
    )
    loss.backward()
    return len(seen)


@row("`with model.hooks(...)`, `add_hook`, `add_perma_hook`, `reset_hooks`")
def _() -> Value:
    model, prompts = build(GPT2_LIKE), tokens(2, 6)
    with model.hooks(fwd_hooks=[("hook_embed", zeroed)]):
        within = model(prompts)
    model.add_hook("blocks.0.hook_attn_out", zeroed)
    model.add_perma_hook("blocks.1.hook_attn_out", zeroed)
    both = model(prompts)
    model.reset_hooks()
    return [within, both, model(prompts)]


@row("hooks on one point share one tensor")
def _() -> Value:
    kept: list[Tensor] = []

    def scaled(activation: Tensor, hook: HookPoint) -> Tensor:
        return 2 * kept[0] + 0 * activation

    hooks = [("hook_embed", lambda x, hook: kept.append(x)), ("hook_embed", scaled)]
    logits = small().run_with_hooks(tokens(2, 6), fwd_hooks=hooks)
    return [logits, torch.autograd.grad(logit_difference(logits), kept[0])[0]]


@row("torch's `register_forward_hook` on a hook point")
def _() -> Value:
    handle = small().blocks[0].hook_mlp_out.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    logits = small()(tokens(2, 6))
    handle.remove()
    return logits


@row("`hook.layer()`, `hook.name`, `hook.ctx`")
def _() -> Value:
    def noted(activation: Tensor, hook: HookPoint) -> None:
        hook.ctx["seen"] = (hook.layer(), hook.name)

    small().run_with_hooks(tokens(1, 3), fwd_hooks=[("blocks.1.attn.hook_z", noted)])
    seen = small().hook_dict["blocks.1.attn.hook_z"].ctx.pop("seen")
    return [seen[0], seen[1]]


@row("a hook may edit a tensor that a cache holds", same=False)
def _() -> Value:
    model = build(GPT2_LIKE)
    cache: dict[str, Tensor] = {}
    model.cache_some(cache, lambda name: name == "hook_embed")
    model.add_hook("hook_embed", zeroed)
    model(tokens(1, 3))
    return cache["hook_embed"]


@row("`run_with_cache(names_filter=fn)`")
def _() -> Value:
    _, cache = small().run_with_cache(tokens(2, 6), names_filter=lambda name: name.endswith("hook_z"))
    return [sorted(cache.keys()), cache["z", 1]]


@row("cached tensors are detached")
def _() -> Value:
    _, cache = small().run_with_cache(tokens(1, 3))
    return [cache["resid_post", 1].requires_grad]


@row("`incl_bwd=True`")
def _() -> Value:
    _, cache = build(GPT2_LIKE).run_with_cache(tokens(2, 6), return_type="loss", incl_bwd=True)
    return [cache["blocks.0.hook_resid_post_grad"], cache["blocks.1.attn.hook_pattern_grad"]]


@row("`start_at_layer=`, `stop_at_layer=`")
def _() -> Value:
    middle = small()(tokens(2, 6), stop_at_layer=1)
    return [middle, small()(middle, start_at_layer=1)]


@row("`past_kv_cache=HookedTransformerKeyValueCache.init_cache(cfg, device, batch)`")
def _() -> Value:
    from transformer_lens import TransformerLensKeyValueCache

    past, prompts = TransformerLensKeyValueCache.init_cache(reader().cfg, "cpu", 2), tokens(2, 6) // 2 + 4
    reader()(prompts[:, :4], past_kv_cache=past)
    return [reader()(prompts[:, 4:], past_kv_cache=past), past[1].past_keys]


# Flags


@row("`cfg.use_attn_result`, `model.set_use_attn_result(True)`")
def _() -> Value:
    model = build(GPT2_LIKE)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens(2, 6))
    return cache["result", 1]


@row("`use_split_qkv_input`, `use_attn_in`, `use_hook_mlp_in` and their setters, `use_hook_tokens`")
def _() -> Value:
    model = build(GPT2_LIKE)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    _, cache = model.run_with_cache(tokens(2, 6))
    return [cache["q_input", 1], cache["blocks.1.hook_mlp_in"]]


@row("`ungroup_grouped_query_attention`")
def _() -> Value:
    model = build({**GEMMA_LIKE, "ungroup_grouped_query_attention": True})
    _, cache = model.run_with_cache(tokens(1, 5))
    return [list(cache["v", 0].shape), cache["v", 0]]


@row("`run_with_cache` without a filter caches what the flags allow")
def _() -> Value:
    _, cache = small().run_with_cache(tokens(1, 3))
    return [sorted(cache.keys())]


# The cache


@row('`cache["pattern", 3]`, `cache["blocks.3.attn.hook_pattern"]`')
def _() -> Value:
    _, cache = small().run_with_cache(tokens(2, 6))
    return [cache["pattern", 1], cache["blocks.0.attn.hook_pattern"], cache["scale", 1, "ln1"], cache["embed"]]


@row(
    "`accumulated_resid`, `decompose_resid`, `stack_head_results`, `stack_neuron_results`, "
    "`get_full_resid_decomposition`, `stack_activation`"
)
def _() -> Value:
    _, cache = small().run_with_cache(tokens(2, 6))
    return [
        cache.accumulated_resid(layer=2, incl_mid=True),
        cache.decompose_resid(layer=2, pos_slice=-1),
        cache.stack_head_results(layer=2, pos_slice=-1, return_labels=True),
        cache.stack_neuron_results(layer=1, pos_slice=-1),
        cache.get_full_resid_decomposition(pos_slice=-1).sum(0),
        cache.stack_activation("z"),
    ]


@row("`apply_ln=True` of `accumulated_resid`")
def _() -> Value:
    _, cache = small().run_with_cache(tokens(2, 6))
    return cache.accumulated_resid(layer=2, apply_ln=True, pos_slice=-1)


@row("`logit_attrs(stack, tokens, incorrect_tokens)`")
def _() -> Value:
    _, cache = small().run_with_cache(tokens(2, 6))
    stack = cache.decompose_resid(layer=2)
    return cache.logit_attrs(stack, 3, incorrect_tokens=7)


@row("`project_output_onto=` of neuron results")
def _() -> Value:
    _, cache = small().run_with_cache(tokens(2, 6))
    return cache.stack_neuron_results(layer=2, pos_slice=-1, project_output_onto=small().W_U[:, :3].detach())


@row("`to`, `remove_batch_dim`, `apply_slice_to_batch_dim`, `toggle_autodiff`")
def _() -> Value:
    _, cache = small().run_with_cache(tokens(2, 6))
    part = cache.apply_slice_to_batch_dim(1)
    _, single = small().run_with_cache(tokens(1, 6))
    single.remove_batch_dim()
    return [part["z", 0], single["z", 0], cache.to("cpu")["z", 1]]


# Weights


@row("`model.W_Q`, `W_O`, `W_E`, `W_U`, `W_pos`, `b_Q`, ...")
def _() -> Value:
    return [small().W_Q, small().W_O, small().W_E, small().W_pos, small().b_Q, grouped().W_K, grouped().W_V]


@row("`model.QK`, `model.OV`")
def _() -> Value:
    return [small().QK.AB[1, 2], small().OV.AB[0, 1], grouped().QK.AB[1, 3], grouped().OV.AB[1, 3]]


@row('`all_composition_scores("K")`, `all_head_labels`, `accumulated_bias`')
def _() -> Value:
    return [small().all_composition_scores("K"), small().accumulated_bias(2)]


@row("`FactoredMatrix`: `AB`, `svd`, `U`, `S`, `Vh`, `eigenvalues`, `norm`, `make_even`, `collapse_l`, indexing")
def _() -> Value:
    matrix = FactoredMatrix(small().W_Q[0, 1], small().W_K[0, 1].T)
    even = matrix.make_even()
    return [matrix.AB, matrix.S, matrix.norm(), even.AB, matrix.eigenvalues.abs().sort().values, (matrix @ matrix).AB]


@row('`SVDInterpreter(model).get_singular_vectors("OV", layer_index=, num_vectors=, head_index=)`')
def _() -> Value:
    model = build({**GPT2_LIKE, "normalization_type": "LNPre", "dtype": torch.float32})
    return SVDInterpreter(model).get_singular_vectors("OV", layer_index=1, num_vectors=2, head_index=3).abs()


@row("`model.fold_layer_norm(...)`, `center_writing_weights`, ...")
def _() -> Value:
    model = build(GPT2_LIKE)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    folded = model.center_writing_weights(model.fold_layer_norm(state))
    return [folded["blocks.1.attn.W_Q"], folded["blocks.0.mlp.b_in"], folded["unembed.W_U"], folded["embed.W_E"]]


@row("a gated MLP adds `b_in` after the product", same=False)
def _() -> Value:
    model = build(GEMMA_LIKE)
    with torch.no_grad():
        model.blocks[0].mlp.b_in.fill_(0.5)
    return model(tokens(1, 4))


# Text and generation


@row(
    "`to_tokens`, `to_string`, `to_str_tokens`, `to_single_token`, `get_token_position`, "
    "`tokens_to_residual_directions`"
)
def _() -> Value:
    model, text = reader(), "John gave Mary a drink"
    return [
        model.to_tokens(text),
        model.to_tokens([text, "Mary gave"]),
        model.to_str_tokens(text),
        model.to_single_token(" Mary"),
        model.get_token_position(" gave", text),
        model.tokens_to_residual_directions(torch.tensor([[4, 5]])),
    ]


@row("`generate(prompt, max_new_tokens=, temperature=, top_k=, top_p=, freq_penalty=)`")
def _() -> Value:
    tokens_only = {"stop_at_eos": False, "return_type": "tokens"}
    return reader().generate("John gave", max_new_tokens=5, do_sample=False, verbose=False, **tokens_only)


@row("`generate_stream`")
def _() -> Value:
    prompt = reader().to_tokens("John gave")
    stream = reader().generate_stream(prompt, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    return list(stream)


@row("padding")
def _() -> Value:
    model, texts = reader(), ["John gave Mary a drink", "Mary gave"]
    left, right = (model(texts, padding_side=side) for side in ("left", "right"))
    return [left[0], left[1, -1], right[0], right[1, 2]]


@row("`default_prepend_bos`")
def _() -> Value:
    return [reader().to_tokens("John"), reader().to_tokens("John", prepend_bos=False)]


@row("a tokenizer without BOS gets its end-of-text token as BOS", same=False)
def _() -> Value:
    model = build(GPT2_LIKE)
    model.set_tokenizer(words(bos_token=None))
    return model.tokenizer.bos_token


@row("text of a chat template that begins with BOS gets a second", same=False)
def _() -> Value:
    return reader().to_tokens("<bos>John")


@row("`model.tokenizer(text)` always has BOS")
def _() -> Value:
    return reader().tokenizer("John gave")["input_ids"]


@row("`utils.test_prompt(prompt, answer, model)`", same=False)
def _() -> Value:
    return utils.test_prompt("John gave", " Mary", reader(), print_details=False)


# Patching


@row("`patching.get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)` and the others")
def _() -> Value:
    clean, corrupted = pairs()
    _, cache = small().run_with_cache(clean)
    return [
        patching.get_act_patch_resid_pre(small(), corrupted, cache, metric),
        patching.get_act_patch_attn_head_out_by_pos(small(), corrupted, cache, metric),
        patching.get_act_patch_attn_head_pattern_all_pos(small(), corrupted, cache, metric),
    ]


@row("`get_act_patch_attn_head_pattern_by_pos` is `[layer head dest_pos]`", same=False)
def _() -> Value:
    clean, corrupted = pairs()
    _, cache = small().run_with_cache(clean)
    return patching.get_act_patch_attn_head_pattern_by_pos(small(), corrupted, cache, metric)


@row("`generic_activation_patch(..., patch_setter, activation_name, index_axis_names, index_df)`")
def _() -> Value:
    def setter(activation: Tensor, index: list[int], clean: Tensor) -> Tensor:
        activation[:, index[1]] = clean[:, index[1]]
        return activation

    clean, corrupted = pairs()
    _, cache = small().run_with_cache(clean)
    return patching.generic_activation_patch(
        small(), corrupted, cache, metric, setter, "resid_mid", index_axis_names=("layer", "pos")
    )


@row("`get_act_patch_block_every`, `..._attn_head_all_pos_every`, `..._by_pos_every`")
def _() -> Value:
    clean, corrupted = pairs()
    _, cache = small().run_with_cache(clean)
    return [
        patching.get_act_patch_block_every(small(), corrupted, cache, metric),
        patching.get_act_patch_attn_head_all_pos_every(small(), corrupted, cache, metric),
    ]


@row("a metric is a function of logits")
def _() -> Value:
    clean, corrupted = pairs()
    _, cache = small().run_with_cache(clean)
    return patching.get_act_patch_mlp_out(small(), corrupted, cache, lambda logits: logits[0, -1, 3] - logits[1, 2, 4])


# Heads, evaluation, training


@row('`head_detector.detect_head(model, seq, "induction_head")`')
def _() -> Value:
    return head_detector.detect_head(reader(), "John gave Mary John gave Mary", "induction_head")


@row("`evals.sanity_check`, `induction_loss`, `ioi_eval`, `IOIDataset`")
def _() -> Value:
    template = "[A] and [B] gave a [OBJECT] . [B] gave a [OBJECT] to [A]"
    given = {"tokenizer": words(), "templates": [template], "nouns": {"OBJECT": ["drink"]}}
    dataset = evals.IOIDataset(**given, names=["John", "Mary"], num_samples=2, symmetric=True, prepend_bos=True)
    prompts = [dataset[index]["prompt"].tolist() for index in range(2)]
    return [len(dataset), sorted(prompts)]


@row(
    "`utils.lm_cross_entropy_loss`, `lm_accuracy`, `sample_logits`, `to_numpy`, `get_corner`, `Slice`, "
    "`get_act_name`, ..."
)
def _() -> Value:
    prompts = tokens(2, 6)
    logits = small()(prompts).detach()
    return [
        utils.lm_cross_entropy_loss(logits, prompts),
        utils.lm_accuracy(logits, prompts),
        utils.sample_logits(logits[:, -1], temperature=0.0),
        utils.Slice((1, 3)).apply(logits, dim=1),
        utils.get_corner(logits, 2),
        utils.get_act_name("k", 6, "a"),
        utils.get_act_name("scale4ln1"),
    ]


@row("`HookedRootModule`, `HookPoint`")
def _() -> Value:
    from transformer_lens.hook_points import HookedRootModule

    class Twice(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.hook_twice = HookPoint()
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_twice(2 * x)

    x = torch.arange(3.0, dtype=torch.float64)
    output, cache = Twice().run_with_cache(x)
    return [output, cache["hook_twice"], Twice().run_with_hooks(x, fwd_hooks=[("hook_twice", zeroed)])]


def as_plain(value: Value) -> Value:
    """Return what a value is compared by: itself; of a large tensor its shape and three projections."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().double()
        if value.numel() <= 12:
            return as_plain(value.tolist())
        directions = torch.randn(3, value.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        finite = value.flatten().nan_to_num(neginf=-1e3)
        return [list(value.shape), as_plain((directions @ finite / value.numel() ** 0.5).tolist())]
    if isinstance(value, (list, tuple)):
        return [as_plain(one) for one in value]
    return round(value, 10) if isinstance(value, float) else value


if __name__ == "__main__":
    found = {cell: as_plain(one.run()) for cell, one in ROWS.items()}
    Path(sys.argv[1]).write_text(json.dumps(found, separators=(",", ":"), ensure_ascii=False) + "\n")
