"""The faults that `break_on_purpose` makes, each with the tests that should notice it."""

from __future__ import annotations

import re
from dataclasses import dataclass

LIBRARY = "hooked_lm"


class AnchorError(Exception):
    """The code that a breakage changes is not where it was."""


@dataclass(frozen=True)
class Breakage:
    """One fault.

    Attributes:
        name: what is broken, in words with hyphens.
        file: the module, from the root of the repository.
        anchor: a regular expression of the code that is changed, found once in that file.
        broken: what stands there instead; `\\1` is the anchor's first group.
        tests: the files under `tests` that should notice.
    """

    name: str
    file: str
    anchor: str
    broken: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """Return the module's source with the fault in it.

        Raises:
            AnchorError: the anchor is found nowhere, or in several places.
        """
        places = len(re.findall(self.anchor, source))
        if places != 1:
            raise AnchorError(
                f"{self.name}: {self.file} has {places or 'no'} places like {self.anchor!r}. The code has changed: "
                "give the breakage an anchor that is found once"
            )
        broken = re.sub(self.anchor, self.broken, source)
        if broken == source:
            raise AnchorError(f"{self.name}: the replacement changes nothing in {self.file}")
        return broken


COMPONENTS, ARCHITECTURES = "hooked_lm/components", ("test_architectures.py",)

BREAKAGES = (
    # Positions and masks
    Breakage(
        "rotary-turns-the-other-way",
        f"{COMPONENTS}/positions.py",
        r"torch\.cat\(\(-second, first\), -1\)",
        "torch.cat((second, -first), -1)",
        ARCHITECTURES,
    ),
    Breakage(
        "rotary-neighbours-swapped",
        f"{COMPONENTS}/positions.py",
        r"\(-turning\[\.\.\., 1::2\], turning\[\.\.\., ::2\]\)",
        "(-turning[..., ::2], turning[..., 1::2])",
        ARCHITECTURES,
    ),
    Breakage(
        "rotary-by-parts-keeps-what-it-should-slow",
        f"{COMPONENTS}/positions.py",
        r"keep \* frequencies \+ \(1 - keep\) \* frequencies / self\.factor",
        "(1 - keep) * frequencies + keep * frequencies / self.factor",
        ("test_rotary_scalings.py",),
    ),
    Breakage(
        "longrope-changes-one-position-early",
        f"{COMPONENTS}/positions.py",
        r"lengths > self\.original_ctx",
        "lengths >= self.original_ctx",
        ("test_rotary_scalings.py",),
    ),
    Breakage(
        "alibi-slopes-start-one-late",
        f"{COMPONENTS}/positions.py",
        r"2\.0 \*\* \(-8 \* \(i \+ 1\) / n\)",
        "2.0 ** (-8 * (i + 2) / n)",
        ARCHITECTURES,
    ),
    Breakage(
        "window-is-one-position-shorter",
        f"{COMPONENTS}/sequence.py",
        r"there > here - window\)",
        "there > here - window + 1)",
        ARCHITECTURES,
    ),
    Breakage(
        "causal-mask-shows-the-next-position",
        f"{COMPONENTS}/sequence.py",
        r"keys <= queries if causal",
        "keys <= queries + 1 if causal",
        ("test_architectures.py", "test_kv_cache.py"),
    ),
    Breakage(
        "padding-counts-as-positions",
        f"{COMPONENTS}/sequence.py",
        r"self\.valid\.long\(\)\.cumsum\(-1\) - 1",
        "torch.ones_like(self.valid).long().cumsum(-1) - 1",
        ("test_padding.py",),
    ),
    Breakage(
        "padding-is-looked-at",
        f"{COMPONENTS}/sequence.py",
        r"allowed & self\.valid\[:, None, None, :\]",
        "allowed & torch.ones_like(self.valid)[:, None, None, :]",
        ("test_padding.py",),
    ),
    Breakage(
        "group-of-queries-reads-the-wrong-key-head",
        f"{COMPONENTS}/attention.py",
        r"\bk\.repeat_interleave\(group, (?:dim=)?2\)",
        "k.repeat(1, 1, group, 1)",
        ("test_architectures.py", "test_hook_sites.py"),
    ),
    # Norms and MLPs
    Breakage(
        "eps-outside-the-root",
        f"{COMPONENTS}/norm.py",
        r"\(exact\.square\(\)\.mean\(over, keepdim=True\) \+ self\.eps\)\.sqrt\(\)",
        "exact.square().mean(over, keepdim=True).sqrt() + self.eps",
        ("test_hook_sites.py", "test_architectures.py"),
    ),
    Breakage(
        "norm-with-hooks-does-not-centre",
        f"{COMPONENTS}/norm.py",
        r"exact = exact - exact\.mean\(over, keepdim=True\)",
        "exact = exact * 1.0",
        ("test_hook_sites.py", "test_architectures.py"),
    ),
    Breakage(
        "experts-weights-do-not-sum-to-one",
        f"{COMPONENTS}/moe.py",
        r"weights = weights / weights\.sum\(-1, keepdim=True\)",
        "weights = weights / weights.amax(-1, keepdim=True)",
        ("test_architectures.py", "test_experts.py"),
    ),
    # Weights
    Breakage(
        "gain-not-folded",
        "hooked_lm/weights/processing.py",
        r"W\.mul_\(gain\[:, None\]\)",
        "W.mul_(torch.ones_like(gain)[:, None])",
        ("test_weights.py",),
    ),
    Breakage(
        "norms-bias-lost-in-folding",
        "hooked_lm/weights/processing.py",
        r"if bias is not None:",
        "if bias is not None and norm == 'none':",
        ("test_weights.py",),
    ),
    Breakage(
        "writing-weights-centred-along-the-wrong-axis",
        "hooked_lm/weights/processing.py",
        r"value\.sub_\(value\.mean\(-1, keepdim=True\)\)",
        "value.sub_(value.mean(0, keepdim=True))",
        ("test_weights.py",),
    ),
    Breakage(
        "value-biases-go-to-the-wrong-heads",
        "hooked_lm/weights/processing.py",
        r"b_V\.repeat_interleave\(W_O\.shape\[0\] // b_V\.shape\[0\], dim=0\)",
        "b_V.repeat(W_O.shape[0] // b_V.shape[0], 1)",
        ("test_weights.py",),
    ),
    Breakage(
        "even-factors-are-not",
        "hooked_lm/factored_matrix.py",
        r"root = S\.sqrt\(\)",
        "root = S",
        ("test_factored_matrix.py",),
    ),
    Breakage(
        "composition-counts-one-norm-twice",
        "hooked_lm/factored_matrix.py",
        r"sizes = left\.norm\(\) \* right\.norm\(\)",
        "sizes = left.norm() * left.norm()",
        ("test_factored_matrix.py", "test_composition.py"),
    ),
    # Checkpoints of HuggingFace
    Breakage(
        "gpt2-heads-and-dimensions-exchanged",
        "weight_conversion/families/gpt2.py",
        r'"\(head d_head\) d_model -> head d_head d_model"',
        '"(d_head head) d_model -> head d_head d_model"',
        ("test_gpt2_conversion.py",),
    ),
    Breakage(
        "gate-and-up-projection-exchanged",
        "weight_conversion/tables.py",
        r"gate, up, down = \(f\"\{module\}\.\{name\}\" for name in names\)",
        'up, gate, down = (f"{module}.{name}" for name in names)',
        ("test_families.py", "-k", "certificate and (llama or gemma)"),
    ),
    Breakage(
        "gemma-gains-without-the-one",
        "weight_conversion/tables.py",
        r"f\"\{target\}\.w\", add=add, again=again\)",
        'f"{target}.w", again=again)',
        ("test_families.py", "-k", "certificate and gemma"),
    ),
    # Text
    Breakage(
        "bos-at-the-end",
        "hooked_lm/tokenization/functions.py",
        r"\(start \+ encode\(tokenizer, one\)\)",
        "(encode(tokenizer, one) + start)",
        ("test_tokens.py",),
    ),
    Breakage(
        "bos-taken-for-padding",
        "hooked_lm/tokenization/functions.py",
        r"padded = torch\.cat\(\(padded\[:, 1:\], torch\.zeros_like\(padded\[:, :1\]\)\), 1\) & padded",
        "padded = padded & padded",
        ("test_tokens.py", "test_padding.py"),
    ),
    # Loss, metrics, decoding
    Breakage(
        "loss-predicts-the-token-itself",
        "hooked_lm/losses.py",
        r"tokens\[:, 1:\]\.flatten\(\)",
        "tokens[:, :-1].flatten()",
        ("test_losses.py",),
    ),
    Breakage(
        "loss-counts-predictions-of-padding",
        "hooked_lm/losses.py",
        r"\(attention_mask\[:, :-1\] \* attention_mask\[:, 1:\]\)",
        "(attention_mask[:, :-1])",
        ("test_losses.py",),
    ),
    Breakage(
        "logit-difference-adds",
        "hooked_lm/metrics.py",
        r"read\[\.\.\., 0\] - read\[\.\.\., 1\]",
        "read[..., 0] + read[..., 1]",
        ("test_metrics.py",),
    ),
    Breakage(
        "kl-divergence-the-wrong-way-round",
        "hooked_lm/metrics.py",
        r"wanted\.exp\(\) \* \(wanted - read\.log_softmax\(-1\)\)",
        "read.softmax(-1) * (read.log_softmax(-1) - wanted)",
        ("test_kl_divergence.py",),
    ),
    Breakage(
        "rank-counts-the-answer-itself",
        "hooked_lm/metrics.py",
        r"read > _pick\(read, column\)",
        "read >= _pick(read, column)",
        ("test_metrics.py",),
    ),
    Breakage(
        "frequency-penalty-is-a-bonus",
        "hooked_lm/generation/decoding.py",
        r"logits - self\.freq_penalty \* counts",
        "logits + self.freq_penalty * counts",
        ("test_generation_sampling.py",),
    ),
    Breakage(
        "nucleus-leaves-out-the-token-that-fills-it",
        "hooked_lm/generation/decoding.py",
        r"\.cumsum\(-1\)\.roll\(1, -1\)",
        ".cumsum(-1)",
        ("test_generation_sampling.py",),
    ),
    Breakage(
        "finished-prompts-go-on",
        "hooked_lm/generation/decoding.py",
        r"torch\.where\(finished, ends\[0\], chosen\)",
        "torch.where(finished & False, ends[0], chosen)",
        ("test_generation.py",),
    ),
    # Caches
    Breakage(
        "frozen-cache-remembers-its-mask",
        "hooked_lm/kv_cache.py",
        r"if not self\.frozen:\n",
        "if True:\n",
        ("test_kv_cache.py",),
    ),
    Breakage(
        "rewound-cache-keeps-a-position",
        "hooked_lm/kv_cache.py",
        r"self\._length = min\(length, self\._length\)",
        "self._length = min(length + 1, self._length)",
        ("test_kv_cache.py", "test_bad_input.py"),
    ),
    Breakage(
        "cache-writes-into-a-graph",
        "hooked_lm/kv_cache.py",
        r"sealed = self\._in_a_graph or \(",
        "sealed = (",
        ("test_kv_cache.py",),
    ),
    Breakage(
        "components-of-the-stream-are-not-centred",
        "hooked_lm/activation_cache/streams.py",
        r"residual_stack = residual_stack - residual_stack\.mean\(-1, keepdim=True\)",
        "residual_stack = residual_stack * 1.0",
        ("test_cache_attributions.py",),
    ),
    # Hooks, interventions, sweeps
    Breakage(
        "removed-hook-stays",
        "hooked_lm/hooks/handle.py",
        r"handles\.remove\(self\)",
        "pass",
        ("test_hook_contexts.py",),
    ),
    Breakage(
        "reset-removes-permanent-hooks",
        "hooked_lm/hooks/point.py",
        r"\w+\.is_permanent and not including_permanent",
        "False",
        ("test_hook_contexts.py",),
    ),
    Breakage(
        "intervention-forgets-what-was-read-before",
        "hooked_lm/interventions/intervention.py",
        r"else one - n_past for one in entries",
        "else one for one in entries",
        ("test_interventions.py",),
    ),
    Breakage(
        "sweep-reads-the-wrong-position",
        "hooked_lm/sweep/engine.py",
        r"% self\.tokens\.shape\[1\] - group\.start\]",
        "% self.tokens.shape[1] - group.start - 1]",
        ("test_sweep.py",),
    ),
    Breakage(
        "sweep-starts-from-another-position",
        "hooked_lm/sweep/walk.py",
        r"self\._entering\(cell\)\[:, group\.start :\]",
        "self._entering(cell).roll(1, 1)[:, group.start :]",
        ("test_sweep.py",),
    ),
    # What a hook is given
    Breakage(
        "hook-that-reads-is-written-to-by-the-next",
        "hooked_lm/hooks/point.py",
        r"            private = False\n            continue",
        "            continue",
        ("test_hook_points.py",),
    ),
    Breakage(
        "no-private-copy-for-hooks-that-edit",
        "hooked_lm/hooks/point.py",
        r"x, private = x\.clone\(\), True",
        "private = True",
        ("test_hooks.py", "test_hook_sites.py"),
    ),
    Breakage(
        "returned-tensor-is-written-to-by-the-next",
        "hooked_lm/hooks/point.py",
        r"private and returned is x, True",
        "private, True",
        ("test_hook_points.py", "test_single_sites.py"),
    ),
    Breakage(
        "recorder-keeps-a-tensor-that-an-editor-holds",
        "hooked_lm/hooks/point.py",
        r"x\.clone\(\) if shared and not x\.requires_grad else x\)",
        "x)",
        ("test_observing.py",),
    ),
    Breakage(
        "two-points-watch-the-gradient-of-one-tensor",
        "hooked_lm/hooks/point.py",
        r"x = x\.view_as\(x\)",
        "x = x",
        ("test_hook_points.py",),
    ),
    Breakage(
        "hooks-of-a-block-act-in-every-thread",
        "hooked_lm/hooks/handle.py",
        r"\(self\.thread is None or self\.thread is here\.identity\) and ",
        "",
        ("test_threads.py",),
    ),
    Breakage(
        "pass-is-not-restored",
        "hooked_lm/hooks/thread.py",
        r"here\.running = before",
        "pass",
        ("test_threads.py",),
    ),
    Breakage(
        "interventions-do-not-know-the-cached-positions",
        "hooked_lm/interventions/running.py",
        r"hook\.axes, \w+(?:\(\))?\.n_past",
        "hook.axes, 0",
        ("test_interventions.py", "test_threads.py"),
    ),
    # Copies of the stream per head
    Breakage(
        "stream-gets-the-gradient-of-the-copies-twice",
        f"{COMPONENTS}/head_inputs.py",
        r"-heads\.sum\(2\)",
        "torch.zeros_like(heads.sum(2))",
        ("test_observing.py",),
    ),
    Breakage(
        "edited-heads-read-the-shared-norm",
        f"{COMPONENTS}/head_inputs.py",
        r"self\.ln1\(copy\)",
        "self._of_the_stream()",
        ("test_observing.py",),
    ),
    Breakage(
        "reading-hooks-of-the-norm-see-the-copies",
        f"{COMPONENTS}/head_inputs.py",
        r"editing_hooks_only\(self\.points\)",
        "editing_hooks_only(())",
        ("test_observing.py",),
    ),
    # Components of one's own
    Breakage(
        "classes-are-not-compared-with-what-they-were",
        f"{COMPONENTS}/stock.py",
        r"if found is not expected and",
        "if kind is not stock and found is not expected and",
        ("test_own_components.py",),
    ),
    Breakage(
        "torch-hooks-are-not-looked-at",
        f"{COMPONENTS}/stock.py",
        r"if has_module_hooks\(module\):",
        "if False:",
        ("test_every_own_component.py",),
    ),
    Breakage(
        "misplaced-hook-points-are-not-noticed",
        f"{COMPONENTS}/stock.py",
        r"return None if point\.name in \(\"\", place\) else",
        "return None if True else",
        ("test_every_own_component.py",),
    ),
    Breakage(
        "components-of-ones-own-are-walked",
        "hooked_lm/sweep/exactness.py",
        r"if changed is not None:",
        "if False:",
        ("test_every_own_component.py", "test_own_components.py"),
    ),
    Breakage(
        "lazy-cache-forgets-the-soft-caps",
        "hooked_lm/activation_cache/replay.py",
        r"\(cfg\.attn_scores_soft_cap, cfg\.output_logits_soft_cap, cfg\.attention_dir\)",
        "(cfg.attention_dir,)",
        ("test_own_components.py",),
    ),
    Breakage(
        "lazy-cache-forgets-the-checksums",
        "hooked_lm/activation_cache/replay.py",
        r"found = contents\(read or \{\}\)",
        "found = contents({})",
        ("test_lazy_cache_changes.py",),
    ),
    Breakage(
        "uncached-generation-reads-as-one-pass",
        "hooked_lm/generation/decoding.py",
        r"again = tokens\.shape\[1\]",
        "again = None",
        ("test_generation_interventions.py",),
    ),
    # Configs and clean prompts
    Breakage(
        "field-that-is-built-in-can-be-assigned",
        "hooked_lm/config/lock.py",
        r"if name not in ASSIGNABLE:\n(?:.+\n)+?        \)\n    value = ASSIGNABLE\[name\]",
        "value = ASSIGNABLE.get(name, _any_value)",
        ("test_model_config.py",),
    ),
    Breakage(
        "one-clean-prompt-patches-one-corrupted-prompt",
        "hooked_lm/patching/sites.py",
        r"value\.expand\(tokens\.shape\[0\], \*value\.shape\[1:\]\)",
        "value",
        ("test_patching_clean.py",),
    ),
    Breakage(
        "one-clean-prompt-is-padded-as-the-first-corrupted-one",
        "hooked_lm/patching/sites.py",
        r"if own\.shape\[0\] == 1 and bool\(\(mask == mask\[:1\]\)\.all\(\)\):",
        "if own.shape[0] == 1:",
        ("test_patching_clean.py",),
    ),
)
