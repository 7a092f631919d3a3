"""The reference: a transformer in plain torch, written from a config's fields and a state dict alone.

One prompt at a time, without batch axis, padding or key-value cache; one head at a time; every activation is formed,
shown to the edits, and kept. Nothing here is imported from the package that is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Called with the name and the value of each activation; returns what the computation goes on with.
Edit = Callable[[str, Tensor], Tensor]
COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


class Reference:
    """A model, by the values of its config and its weights.

    Args:
        config: the config's fields, by name.
        weights: the state dict.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.c, self.w = config, dict(weights)
        # Tied to the embedding, it is not a weight of its own.
        self.w.setdefault("unembed.W_U", self.w["embed.W_E"].T)
        self.n_heads = config["n_heads"]
        self.n_kv_heads = config["n_key_value_heads"] or self.n_heads
        # What the experts of a block write, for the next to add.
        self.carried = torch.zeros(())

    def run(self, tokens: Tensor, edit: Edit, *, head_copies: bool = False) -> dict[str, Tensor]:
        """Return every activation of one prompt, by name, without batch axis.

        Args:
            tokens: [pos].
            edit: makes the edits.
            head_copies: each head reads its own copy of the stream through a norm of its own, as edits of single
                heads' inputs need; otherwise all read one norm.
        """
        seen: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> Tensor:
            seen[name] = edit(name, x)
            return seen[name]

        stream = self.embedded(see("hook_tokens", tokens), see)
        extra = None
        if "pos_embed.W_pos" in self.w:
            positions = see("hook_pos_embed", self.w["pos_embed.W_pos"][: len(tokens)].clone())
            if self.c["positional_embedding_type"] == "shortformer":
                extra = positions
            else:
                stream = stream + positions
        for layer in range(self.c["n_layers"]):
            stream = Block(self, layer, see, edit, head_copies).run(stream, extra)
        if self.c["final_norm"]:
            kind = self.kind()
            stream = self.norm("ln_final", stream, "RMS" if kind and self.c["final_rms"] else kind, see)
        if self.c["unembed_act_fn"] is not None:
            stream = self.transformed(stream, see)
        logits = see("unembed.hook_in", stream) @ self.w["unembed.W_U"] + self.w["unembed.b_U"]
        see("unembed.hook_out", capped(logits * self.c["logit_scale"], self.c["output_logits_soft_cap"]))
        return seen

    def transformed(self, x: Tensor, see: Edit) -> Tensor:
        """Return what the unembedding reads, where a layer with an activation function comes first."""
        at = "unembed.transform"
        x = see(f"{at}.hook_pre", x @ self.w[f"{at}.W_dense"] + self.w[f"{at}.b_dense"])
        x = see(f"{at}.hook_post", ACTIVATIONS[self.c["unembed_act_fn"]](x))
        return self.norm(f"{at}.ln", x, self.kind(), see)

    def embedded(self, tokens: Tensor, see: Edit) -> Tensor:
        x = self.w["embed.W_E"][tokens] * self.c["embedding_scale"]
        if self.c["post_embedding_ln"]:
            x = self.norm("embed.ln", x, self.kind(), see)
        return see("hook_embed", x)

    def kind(self) -> str | None:
        """`"LN"`, `"RMS"` or None. Whether there is a gain and a bias follows from the weights."""
        kind: str | None = self.c["normalization_type"]
        return kind and kind.removesuffix("Pre")

    def norm(
        self, name: str, x: Tensor, kind: str | None, see: Edit, n_axes: int = 1, eps: float | None = None
    ) -> Tensor:
        """Normalise the last axes together."""
        if kind is None:
            return x
        over = tuple(range(-n_axes, 0))
        if kind == "LN":
            x = x - x.mean(over, keepdim=True)
        scale = see(f"{name}.hook_scale", (x.pow(2).mean(over, keepdim=True) + (eps or self.c["eps"])).sqrt())
        x = see(f"{name}.hook_normalized", x / scale)
        return x * self.w.get(f"{name}.w", 1.0) + self.w.get(f"{name}.b", 0.0)


class Block:
    """One block of one run."""

    def __init__(self, model: Reference, layer: int, see: Edit, edit: Edit, head_copies: bool) -> None:
        self.model, self.c, self.w, self.layer = model, model.c, model.w, layer
        self.name, self.all_see, self.edit, self.head_copies = f"blocks.{layer}", see, edit, head_copies
        self.placement = self.c["norm_placement"]

    def see(self, site: str, x: Tensor) -> Tensor:
        return self.all_see(f"{self.name}.{site}", x)

    def weight(self, name: str) -> Tensor:
        return self.w[f"{self.name}.{name}"]

    def norm(self, site: str, x: Tensor, see: Edit | None = None) -> Tensor:
        return self.model.norm(f"{self.name}.{site}", x, self.model.kind(), see or self.all_see)

    def run(self, stream: Tensor, extra: Tensor | None) -> Tensor:
        stream = self.see("hook_resid_pre", stream)
        attn_out = self.attention(*self.head_inputs(stream, extra))
        if self.placement in ("before_and_after", "after"):
            attn_out = self.norm("ln1_post", attn_out)
        attn_out = self.see("hook_attn_out", attn_out)
        after = stream + attn_out
        if self.placement == "residual":
            after = self.norm("ln1", after)
        if self.c["attn_only"]:
            return self.see("hook_resid_post", after)
        if self.c["parallel_attn_mlp"]:
            return self.see("hook_resid_post", after + self.mlp_out(stream))
        middle = self.see("hook_resid_mid", after)
        after = middle + self.mlp_out(middle)
        if self.placement == "residual":
            after = self.norm("ln2", after)
        return self.see("hook_resid_post", after)

    def head_inputs(self, stream: Tensor, extra: Tensor | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return each head's input of queries, keys and values, after the norm."""
        n, m = self.model.n_heads, self.model.n_kv_heads
        before = self.placement in ("before", "before_and_after") and (self.layer > 0 or self.c["first_norm"])
        self.shared = shared = self.norm("ln1", stream) if before else stream
        if not self.head_copies:
            q, k, v = [shared] * n, [shared] * m, [shared] * m
        else:
            copies = self.see("hook_attn_in", torch.stack([stream] * n, 1))
            # A key-value head reads the mean of its query heads' copies.
            grouped = copies.unflatten(1, (m, n // m)).mean(2)
            inputs = (
                self.see("hook_q_input", copies),
                self.see("hook_k_input", grouped),
                self.see("hook_v_input", grouped),
            )
            # The norm's edits act on every copy; what is seen of the norm is that of the stream.
            q, k, v = ([self.norm("ln1", x, self.edit) if before else x for x in one.unbind(1)] for one in inputs)
        if extra is not None:
            q, k = [x + extra for x in q], [x + extra for x in k]
        return q, k, v

    def attention(self, q_in: list[Tensor], k_in: list[Tensor], v_in: list[Tensor]) -> Tensor:
        if self.c["d_latent_kv"] is None:
            q, k, v = self.projected(q_in, "Q"), self.projected(k_in, "K"), self.projected(v_in, "V")
        else:
            q, k, v = self.from_latents(q_in, k_in, v_in)
        q, k, v = self.see("attn.hook_q", q), self.see("attn.hook_k", k), self.see("attn.hook_v", v)
        layers = self.c["rotary_layers"]
        rotates = self.c["positional_embedding_type"] == "rotary" and (layers is None or layers[self.layer])
        if rotates:
            q, k = self.rotated(q), self.rotated(k)
        if self.c["qk_norm_after_rotary"]:
            q, k = self.head_norm(q, "q_norm"), self.head_norm(k, "k_norm")
        contexts = torch.arange(len(q)) // self.c["query_scale_ctx_len"]
        q = q * (1 + self.c["query_scale_beta"] * contexts.float().log1p()).to(q)[:, None, None]
        if rotates:
            q, k = self.see("attn.hook_rot_q", q), self.see("attn.hook_rot_k", k)
        group = self.model.n_heads // self.model.n_kv_heads
        scores = torch.stack([self.scores(q[:, h], k[:, h // group], h) for h in range(self.model.n_heads)])
        scores = self.see("attn.hook_attn_scores", scores)
        if self.c["attention_sinks"]:
            sinks = self.weight("attn.sinks")[:, None, None].expand(-1, scores.shape[1], 1)
            pattern = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            pattern = scores.softmax(-1)
        pattern = self.see("attn.hook_pattern", pattern)
        z = torch.stack([pattern[h] @ v[:, h // group] for h in range(len(pattern))], 1)
        if self.c["attention_gate"]:
            W_G, b_G = self.weight("attn.W_G"), self.weight("attn.b_G")
            opened = torch.stack([(q_in[h] @ W_G[h] + b_G[h]).sigmoid() for h in range(len(W_G))], 1)
            z = z * self.see("attn.hook_gate", opened)
        z = self.see("attn.hook_z", z)
        W_O = self.weight("attn.W_O")
        result = self.see("attn.hook_result", torch.stack([z[:, h] @ W_O[h] for h in range(len(W_O))], 1))
        return result.sum(1) + self.weight("attn.b_O")

    def projected(self, inputs: list[Tensor], which: str) -> Tensor:
        """Return queries, keys or values [pos head d_head] before rotation."""
        W, b = self.weight(f"attn.W_{which}"), self.weight(f"attn.b_{which}")
        x = torch.stack([inputs[h] @ W[h] + b[h] for h in range(len(W))], 1)
        if which != "V" and not self.c["qk_norm_after_rotary"]:
            x = self.head_norm(x, f"{which.lower()}_norm")
        return x if self.c["clip_qkv"] is None else x.clamp(-self.c["clip_qkv"], self.c["clip_qkv"])

    def from_latents(self, q_in: list[Tensor], k_in: list[Tensor], v_in: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [pos head d_head], read from latents."""
        if self.c["d_latent_q"] is None:
            q = self.projected(q_in, "Q")
        else:
            (latents,) = self.latents("q", "DQ", q_in)
            q = torch.stack([x @ W for x, W in zip(latents, self.weight("attn.W_UQ"), strict=True)], 1)
        of_keys, of_values = self.latents("kv", "DKV", k_in, v_in)
        rotating = [x @ self.weight("attn.W_KR") + self.weight("attn.b_KR") for x in k_in]
        content = [x @ W for x, W in zip(of_keys, self.weight("attn.W_UK"), strict=True)]
        k = torch.stack([torch.cat(parts, -1) for parts in zip(rotating, content, strict=True)], 1)
        return q, k, torch.stack([x @ W for x, W in zip(of_values, self.weight("attn.W_UV"), strict=True)], 1)

    def latents(self, name: str, down: str, *inputs: list[Tensor]) -> list[list[Tensor]]:
        """Return each head's latents; what is seen of them is that of the stream, and edits act on every copy."""

        def latent(x: Tensor, see: Edit) -> Tensor:
            compressed = x @ self.weight(f"attn.W_{down}") + self.weight(f"attn.b_{down}")
            norm = f"{self.name}.attn.latent_{name}_norm"
            normed = self.model.norm(norm, compressed, "RMS", see, eps=self.c["latent_eps"])
            return see(f"{self.name}.attn.hook_latent_{name}", normed)

        shared = latent(self.shared, self.all_see)
        if not self.head_copies:
            return [[shared] * len(one) for one in inputs]
        return [[latent(x, self.edit) for x in one] for one in inputs]

    def head_norm(self, x: Tensor, name: str) -> Tensor:
        if not self.c["use_qk_norm"]:
            return x
        kind = self.c["qk_norm_type"].removesuffix("Pre")
        n_axes = 2 if self.c["qk_norm_across_heads"] else 1
        return self.model.norm(f"{self.name}.attn.{name}", x, kind, self.all_see, n_axes)

    def window(self) -> int | None:
        types = self.c["attn_types"]
        window: int | None = self.c["window_size"]
        return window if window is not None and (types is None or types[self.layer] == "local") else None

    def rotated(self, x: Tensor) -> Tensor:
        """Turn each pair of dimensions, [pos head d_head]. Angles are in float32, as checkpoints are trained with."""
        dim, turned = self.c["rotary_dim"], x.clone()
        frequencies = self.frequencies(dim, len(x))
        amplitude = self.c["longrope_attention_factor"] if self.c["use_longrope"] else 1.0
        for pair in range(dim // 2):
            one, other = (2 * pair, 2 * pair + 1) if self.c["rotary_adjacent_pairs"] else (pair, pair + dim // 2)
            angles = torch.arange(len(x)).float() * frequencies[pair]
            cos, sin = ((amplitude * one).to(x)[:, None] for one in (angles.cos(), angles.sin()))
            turned[..., one] = x[..., one] * cos - x[..., other] * sin
            turned[..., other] = x[..., other] * cos + x[..., one] * sin
        return turned

    def frequencies(self, dim: int, length: int) -> Tensor:
        c, exponents = self.c, torch.arange(0, dim, 2).float() / dim
        if c["rotary_base_local"] is not None and self.window() is not None:
            return 1.0 / c["rotary_base_local"] ** exponents
        if c["use_dynamic_rope"]:
            factor, original = c["dynamic_rope_factor"], c["dynamic_rope_original_ctx_len"]
            stretch = factor * torch.tensor(max(length, original)) / original - (factor - 1)
            return 1.0 / (c["rotary_base"] * stretch ** (dim / (dim - 2))) ** exponents
        if c["use_longrope"]:
            which = "long" if length > c["longrope_original_ctx_len"] else "short"
            return 1.0 / (torch.tensor(c[f"longrope_{which}_factors"]) * c["rotary_base"] ** exponents)
        return 1.0 / c["rotary_base"] ** exponents / c["rotary_scaling_factor"]

    def scores(self, q: Tensor, k: Tensor, head: int) -> Tensor:
        """Return one head's scores [query key]."""
        scale = 1.0 / self.c["attn_scale"] if self.c["use_attn_scale"] else 1.0
        if self.c["scale_attn_by_inverse_layer_idx"]:
            scale /= self.layer + 1
        scores = capped(q @ k.T * scale, self.c["attn_scores_soft_cap"])
        n, window = len(q), self.window()
        causal = self.c["attention_dir"] == "causal"
        distance = torch.arange(n)[:, None] - torch.arange(n)[None]
        if self.c["positional_embedding_type"] == "alibi":
            scores = scores - (slope(head, self.model.n_heads) * distance.abs()).to(scores) * self.c["alibi_scale"]
        hidden = torch.zeros(n, n, dtype=torch.bool)
        for query in range(n):
            for key in range(n):
                later = causal and key > query
                hidden[query, key] = later or (window is not None and abs(query - key) >= window)
        return scores.masked_fill(hidden, float("-inf"))

    def mlp_out(self, stream: Tensor) -> Tensor:
        x = self.see("hook_mlp_in", stream.clone())
        if self.placement in ("before", "before_and_after"):
            x = self.norm("ln2", x)
        layers, shortcut = self.c["moe_layers"], self.c["shortcut_experts"]
        if shortcut and self.layer % 2 == 0:
            self.model.carried = self.see("hook_shortcut_out", self.experts(x, "shortcut"))
        has_experts = self.c["num_experts"] is not None and not shortcut and (layers is None or layers[self.layer])
        out = self.experts(x, "mlp") if has_experts else self.dense("mlp", x)
        if shortcut and self.layer % 2:
            out = out + self.model.carried
        if self.placement in ("before_and_after", "after"):
            out = self.norm("ln2_post", out)
        return self.see("hook_mlp_out", out)

    def dense(self, at: str, x: Tensor) -> Tensor:
        linear = x @ self.weight(f"{at}.W_in") + self.weight(f"{at}.b_in")
        if f"{self.name}.{at}.W_gate" in self.w:
            gate = self.see(f"{at}.hook_pre", x @ self.weight(f"{at}.W_gate") + self.weight(f"{at}.b_gate"))
            post = self.activated(gate, at) * self.see(f"{at}.hook_pre_linear", linear)
        else:
            post = self.activated(self.see(f"{at}.hook_pre", linear), at)
            if self.c["act_fn"] == "solu_ln":
                post = self.model.norm(f"{self.name}.{at}.ln", self.see(f"{at}.hook_mid", post), "LN", self.all_see)
        post = self.see(f"{at}.hook_post", post)
        return post @ self.weight(f"{at}.W_out") + self.weight(f"{at}.b_out")

    def experts(self, x: Tensor, at: str) -> Tensor:
        scores = x @ self.weight(f"{at}.W_router") + self.weight(f"{at}.b_router")
        weights = scores.sigmoid() if self.c["router_scores"] == "sigmoid" else scores.softmax(-1)
        weights = self.see(f"{at}.hook_expert_weights", weights)
        chosen = torch.stack([self.choice(row, at) for row in weights])
        chosen = self.see(f"{at}.hook_expert_indices", chosen)
        out = self.dense(f"{at}.shared", x) if self.c["d_shared_expert"] is not None else torch.zeros_like(x)
        if self.c["shared_expert_gate"]:
            out = out * (x @ self.weight(f"{at}.W_shared_gate") + self.weight(f"{at}.b_shared_gate")).sigmoid()
        rows = []
        for pos in range(len(x)):
            total = weights[pos, chosen[pos]].sum() if self.c["norm_topk_prob"] else 1.0
            if self.c["norm_topk_prob"] and self.c["norm_topk_min"] > 0:
                total = max(total, weights.new_tensor(self.c["norm_topk_min"]))
            row = out[pos]
            for expert in chosen[pos].tolist():
                row = row + self.c["routed_scale"] * weights[pos, expert] / total * self.expert(expert, x[pos], at)
            rows.append(row)
        return torch.stack(rows)

    def choice(self, weights: Tensor, at: str) -> Tensor:
        """The experts of one token: those with the largest corrected weights, of the best groups."""
        if self.c["router_correction"]:
            weights = weights + self.weight(f"{at}.b_correction")
        groups = self.c["expert_groups"] or 1
        members = torch.arange(len(weights)).chunk(groups)
        by = {"max": 1, "top2": 2}[self.c["expert_group_score"]]
        worth = [float(weights[own].detach().sort(descending=True).values[:by].sum()) for own in members]
        best = sorted(range(groups), key=lambda group: -worth[group])[: self.c["expert_groups_per_token"] or 1]
        allowed = torch.cat([members[group] for group in best])
        return allowed[weights[allowed].argsort(descending=True)][: self.c["experts_per_token"]]

    def expert(self, expert: int, x: Tensor, at: str) -> Tensor:
        if expert >= self.c["num_experts"] - self.c["identity_experts"]:
            return x
        hidden = x @ self.weight(f"{at}.W_in")[expert] + self.weight(f"{at}.b_in")[expert]
        if self.c["gated_mlp"]:
            gate = x @ self.weight(f"{at}.W_gate")[expert] + self.weight(f"{at}.b_gate")[expert]
            limit = self.c["gated_limit"]
            if limit is not None:
                gate, hidden = gate.clamp(max=limit), hidden.clamp(-limit, limit) + 1
            hidden = self.activated(gate, "mlp") * hidden
        else:
            hidden = self.activated(hidden, "mlp")
        return hidden @ self.weight(f"{at}.W_out")[expert] + self.weight(f"{at}.b_out")[expert]

    def activated(self, x: Tensor, at: str) -> Tensor:
        name = self.c["act_fn"]
        if name == "xielu":
            positive = self.weight(f"{at}.act_fn.alpha_p").exp().log1p()
            negative = self.weight(f"{at}.act_fn.alpha_n").exp().log1p() + 0.5
            # Checkpoints are trained with this bound, which shows where x is exactly zero.
            below = negative * (torch.expm1(x.clamp(max=-1e-6)) - x)
            return torch.where(x > 0, positive * x * x, below) + 0.5 * x
        return ACTIVATIONS[name](x)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Not a clamp, whose derivative at zero is one.
    "relu": lambda x: x.where(x > 0, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "identity": lambda x: x,
    "solu": lambda x: x * x.softmax(-1),
    "solu_ln": lambda x: x * x.softmax(-1),
}


def capped(x: Tensor, cap: float) -> Tensor:
    return cap * (x / cap).tanh() if cap > 0 else x


def slope(head: int, n_heads: int) -> Tensor:
    """ALiBi's slope of a head (Press et al. 2022), in float32."""
    whole = 2 ** math.floor(math.log2(n_heads))
    if head < whole:
        return torch.tensor(2.0 ** (-8 * (head + 1) / whole))
    return torch.tensor(2.0 ** (-4 * (2 * (head - whole) + 1) / whole))
