"""The parity certificate: our model beside the one of `transformers`, site by site, on the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import isnan
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooked_lm import bundled
from hooked_lm._support.plain_data import PlainData
from hooked_lm.names import get_act_name
from hooked_lm.transformer import HookedTransformer
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Sites
from weight_conversion.foreign import find_foreign
from weight_conversion.hub import Hub
from weight_conversion.multimodal import decoder_class, is_multimodal
from weight_conversion.own_format import OWN_FORMAT
from weight_conversion.registry import family_of
from weight_conversion.source import find_folder, read_json

__all__ = ["EXACT", "GRADIENT_TOLERANCE", "TOLERANCE", "Certificate", "Comparison", "Precision", "verify"]

Precision = Literal["float32", "float64"]

# The positional arguments of a module of the reference, and those by name.
_Args = tuple[Tensor, ...]
_Kwargs = dict[str, Tensor]


class _Output(Protocol):
    """The compared part of the output of a language model of `transformers`."""

    logits: Tensor
    attentions: tuple[Tensor, ...] | None


class _Reference(Protocol):
    """The used part of a language model of `transformers`."""

    config: object

    def __call__(self, tokens: Tensor, **options: object) -> _Output: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module: ...


# Largest error allowed, relative to the largest value at the site; gradients go through the model twice.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Below this relative error the reference computes in float64 throughout, without rounding to float32.
EXACT = 1e-9


@dataclass(frozen=True)
class Comparison:
    """How far one site's values are from the reference's.

    Attributes:
        check: the kind of comparison: `"activations"`, `"cached decoding"`, `"left padding"` or `"gradients"`.
        site: our name of the activation.
        precision: `"float32"` or `"float64"`.
        absolute: the largest difference.
        relative: `absolute` over the largest value of the reference.
        tolerance: the largest `relative` that passes.
    """

    check: str
    site: str
    precision: Precision
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """The result of `verify`.

    Attributes:
        name, architecture: of the checkpoint.
        torch, transformers: versions of the reference.
        tokens: shape of the prompts, [batch pos].
        comparisons: every site that was compared.
        not_compared: the name of each site that was not compared -> the reason.
    """

    name: str
    architecture: str
    torch: str
    transformers: str
    tokens: tuple[int, int]
    comparisons: tuple[Comparison, ...]
    not_compared: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)

    @property
    def exact_in_float64(self) -> bool:
        """Whether both compute in float64 throughout and agree to 1e-9."""
        precise = [comparison for comparison in self.comparisons if comparison.precision == "float64"]
        return bool(precise) and all(comparison.relative <= EXACT for comparison in precise)

    def worst(self, check: str | None = None, precision: Precision | None = None) -> Comparison | None:
        """Return the comparison with the largest relative error, of one check and precision or of all.

        Args:
            check, precision: which comparisons count; None for all.
        """
        among = [
            comparison
            for comparison in self.comparisons
            if check in (None, comparison.check) and precision in (None, comparison.precision)
        ]
        # NaN counts as the largest error.
        return max(among, key=lambda comparison: (isnan(comparison.relative), comparison.relative), default=None)

    def to_dict(self) -> PlainData:
        """Return everything as plain data."""
        return {**asdict(self), "passed": self.passed, "exact_in_float64": self.exact_in_float64}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.architecture}), {self.tokens[0]} prompts of {self.tokens[1]} tokens"]
        lines.append(f"{'check':17} {'site':34} {'precision':9} {'absolute':>9} {'relative':>9}")
        for comparison in self.comparisons:
            mark = "" if comparison.passed else f"   FAILED: above {comparison.tolerance:.0e}"
            lines.append(
                f"{comparison.check:17} {comparison.site:34} {comparison.precision:9} "
                f"{comparison.absolute:9.2e} {comparison.relative:9.2e}{mark}"
            )
        lines += [f"not compared: {what} ({why})" for what, why in self.not_compared.items()]
        lines.append("certificate: passed" if self.passed else "certificate: FAILED")
        return "\n".join(lines)


def verify(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    positions: int | None = None,
    batch: int = 2,
    seed: int = 0,
    float64: bool = True,
    reference: nn.Module | None = None,
    ignore_config_fields: Collection[str] = (),
) -> Certificate:
    """Load a checkpoint here and in `transformers`, run both on random tokens, and compare every site.

    Compared are, in float32 and (`float64`) in float64: the residual stream before and after every block, the outputs
    of attention and MLP, the patterns where the reference returns them, the input of the unembedding, and the logits;
    decoding with a key-value cache; a prompt padded on the left against the same prompt alone; and the gradients of a
    random sum of logits with respect to the embeddings that enter the first block.

    Args:
        name_or_path: whatever `from_pretrained` loads and transformers too: a HuggingFace hub id, an alias, a folder in
            HuggingFace's format or with an adapter, or a GGUF file.
        revision: branch, tag or commit on the hub.
        positions: length of the prompts; by default 64, or the model's context where that is shorter.
        batch: how many prompts.
        seed: of the tokens.
        float64: compare in float64 too.
        reference: the model to compare with, for a checkpoint that transformers cannot load without code that comes
            with it: a language model in float32 with the modules of a Llama of transformers, and the same weights.
        ignore_config_fields: as for `from_pretrained`. The reference reads these fields all the same, so the
            certificate passes only if they do not matter.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or has the format that only this library reads.
        ValueError: `positions` is not a length that the model reads.
    """
    import transformers

    place = find_folder(bundled.find(str(name_or_path)) or name_or_path, revision)
    if (place / "config.json").is_file() and read_json(place / "config.json").get("format") == OWN_FORMAT:
        raise CheckpointError(f"{name_or_path} was saved by this library: there is no reference to compare it with")
    comparisons: list[Comparison] = []
    not_compared: dict[str, str] = {}
    shape = (0, 0)
    for precision in ("float32", "float64") if float64 else ("float32",):
        dtype = getattr(torch, precision)
        ours = HookedTransformer.from_pretrained_no_processing(
            place, dtype=dtype, ignore_config_fields=ignore_config_fields
        )
        tokens = _random_tokens(ours, batch, positions, seed)
        shape = (tokens.shape[0], tokens.shape[1])
        loaded, sites = (
            _load_reference(place, dtype) if reference is None else _given_reference(reference, place, dtype)
        )
        theirs = cast(_Reference, loaded.eval())
        architecture = type(loaded).__name__
        obstacle = _obstacle(theirs, tokens) if precision == "float64" else None
        if obstacle is not None:
            not_compared["float64"] = f"the reference does not run in it: {obstacle}"
            break
        pair = _Pair(ours, theirs, sites, precision)
        comparisons += pair.comparisons(tokens)
        not_compared |= pair.not_compared
        # Free the models of this precision before those of the next are loaded.
        del ours, theirs, loaded, pair
    return Certificate(
        name=str(name_or_path),
        architecture=architecture,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokens=shape,
        comparisons=tuple(comparisons),
        not_compared=not_compared,
    )


def _given_reference(reference: nn.Module, place: Path, dtype: torch.dtype) -> tuple[nn.Module, Sites]:
    """Return a copy of a model that stands for the checkpoint's, and where its sites are."""
    architecture = (read_json(place / "config.json").get("architectures") or ["nothing"])[0]
    return deepcopy(reference).to(dtype), family_of(architecture).sites


def _load_reference(place: Path, dtype: torch.dtype) -> tuple[nn.Module, Sites]:
    """Return the checkpoint as a model of transformers, and where its sites are.

    Raises:
        CheckpointError: transformers does not load it.
    """
    foreign = find_foreign(place, Hub())
    if foreign is not None:
        loaded: nn.Module = foreign.load(dtype, attn_implementation="eager")
        return loaded, family_of(type(loaded).__name__).sites
    import transformers

    content = read_json(place / "config.json")
    architecture = (content.get("architectures") or ["nothing"])[0]
    whole = is_multimodal(content)
    kind = getattr(transformers, architecture) if whole else transformers.AutoModelForCausalLM
    try:
        loaded = kind.from_pretrained(
            place,
            dtype=dtype,
            attn_implementation="eager" if whole else family_of(architecture).sites.attention,
            experts_implementation="eager",
            trust_remote_code=False,
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"transformers does not load {place}: {error}") from error
    if not whole:
        return loaded, family_of(architecture).sites
    sites = family_of(decoder_class(loaded.config.get_text_config().to_dict())).sites
    decoder = next(name for name, _ in loaded.model.named_children() if name in ("language_model", "text_model"))
    return loaded, replace(sites, layers=f"model.{decoder}.layers")


def _obstacle(reference: _Reference, tokens: Int[Tensor, "batch pos"]) -> str | None:
    """Why the reference does not run in its precision, or None if it does. Errors of our own model are not caught."""
    try:
        with torch.no_grad():
            reference(tokens, use_cache=False)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _random_tokens(model: HookedTransformer, batch: int, positions: int | None, seed: int) -> Int[Tensor, "batch pos"]:
    length = min(64, model.cfg.n_ctx) if positions is None else positions
    if not 1 <= length <= model.cfg.n_ctx:
        raise ValueError(f"positions={positions} is not in 1-{model.cfg.n_ctx}, the context of this model")
    generator = torch.Generator().manual_seed(seed)
    # The first few tokens of a vocabulary are often special tokens, which some models treat as padding.
    return torch.randint(min(5, model.cfg.d_vocab - 1), model.cfg.d_vocab, (batch, length), generator=generator)


class _Pair:
    """Our model and the reference, in one precision."""

    def __init__(self, ours: HookedTransformer, theirs: _Reference, sites: Sites, precision: Precision) -> None:
        self.ours, self.theirs, self.sites, self.precision = ours, theirs, sites, precision
        self.layers = cast(nn.ModuleList, theirs.get_submodule(sites.layers))
        self.not_compared: dict[str, str] = {}

    def comparisons(self, tokens: Int[Tensor, "batch pos"]) -> Iterator[Comparison]:
        with torch.no_grad():
            logits = yield from self.activations(tokens)
            yield from self.cached_decoding(tokens, logits)
            yield from self.left_padding(tokens)
        yield from self.gradients(tokens)

    def compare(self, check: str, site: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> Comparison:
        theirs = theirs.reshape(ours.shape)
        absolute = (ours - theirs).abs().max().item()
        scale = theirs.abs().max().item()
        return Comparison(check, site, self.precision, absolute, absolute / scale if scale else absolute, tolerance)

    def reference(self, tokens: Int[Tensor, "batch pos"], **options: object) -> _Output:
        """Return the reference's output for a prompt, independent of prompts that it has read before."""
        self.forget_lengths(tokens)
        return self.theirs(tokens, use_cache=False, **options)

    def forget_lengths(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Reset the rotary frequencies of the reference, which with dynamic NTK scaling depend on its longest prompt.

        Running a prompt within the original context resets them.
        """
        if self.ours.cfg.use_dynamic_rope:
            with torch.no_grad():
                self.theirs(tokens[:, :1], use_cache=False)

    def activations(self, tokens: Int[Tensor, "batch pos"]) -> Generator[Comparison, None, Tensor]:
        """Compare every site of a plain run; return the reference's logits."""
        with self.watching() as seen:
            patterned = self.sites.attention == "eager" and self.sites.patterns
            reference = self.reference(tokens, output_attentions=patterned)
        patterns = reference.attentions or ()
        seen |= {get_act_name("pattern", layer): pattern for layer, pattern in enumerate(patterns)}
        seen["unembed.hook_out"] = reference.logits
        for site, path in (("attn_out", self.sites.attn), ("mlp_out", self.sites.mlp)):
            if path is None:
                self.not_compared[f"blocks.*.hook_{site}"] = "no module of the reference outputs it"
        if not patterns:
            self.not_compared["patterns"] = "the reference does not give them"
        _, cache = self.ours.run_with_cache(tokens, names_filter=list(seen))
        for site, theirs in seen.items():
            if theirs.numel() != cache[site].numel():
                self.not_compared[site] = f"the reference's has shape {tuple(theirs.shape)}"
                continue
            yield self.compare("activations", site, cache[site], theirs)
        return reference.logits

    @contextmanager
    def watching(self) -> Iterator[dict[str, Tensor]]:
        """Record the reference's activations under our names, in the order of computation."""
        seen: dict[str, Tensor] = {}

        def keep_input(name: str, factor: float = 1.0) -> Callable[..., None]:
            def keep(module: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
                # A copy: some blocks add to their input in place.
                seen[name] = (args[0] if args else kwargs["hidden_states"]) * factor

            return keep

        def keep_output(name: str, factor: float = 1.0) -> Callable[..., None]:
            def keep(module: nn.Module, args: _Args, output: Tensor | tuple[Tensor, ...] | list[Tensor]) -> None:
                seen[name] = factor * (output[0] if isinstance(output, (tuple, list)) else output)

            return keep

        handles = []
        halves = self.sites.blocks_per_layer
        for layer, block in enumerate(self.layers):
            before = keep_input(get_act_name("resid_pre", layer * halves))
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            for half in range(halves):
                for name, path in (("attn_out", self.sites.attn), ("mlp_out", self.sites.mlp)):
                    if path is not None:
                        module = block.get_submodule(path.replace("{half}", str(half)))
                        keep = keep_output(get_act_name(name, layer * halves + half), self.write_scale(block))
                        handles.append(module.register_forward_hook(keep))
        if len(self.layers):
            last = keep_output(get_act_name("resid_post", len(self.layers) * halves - 1))
            handles.append(self.layers[-1].register_forward_hook(last))
        head = self.theirs.get_output_embeddings()
        divisor = 1.0 if self.sites.read_divisor is None else getattr(self.theirs.config, self.sites.read_divisor)
        handles.append(head.register_forward_pre_hook(keep_input("unembed.hook_in", divisor), with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def write_scale(self, block: nn.Module) -> float:
        """Return the factor by which a block multiplies what attention and MLP output before adding it."""
        name = self.sites.write_scale
        if name is None:
            return 1.0
        factor: float = getattr(self.theirs.config if hasattr(self.theirs.config, name) else block, name)
        return factor

    def cached_decoding(self, tokens: Int[Tensor, "batch pos"], logits: Tensor) -> Iterator[Comparison]:
        """Compare our logits, for half a prompt at once and the other half token by token, with the reference's run."""
        length, start = tokens.shape[1], max(tokens.shape[1] // 2, 1)
        # Where rotary frequencies depend on the length of the prompt, a cache is valid up to where they change.
        changes = [pos for pos in range(start, length) if self.ours.cfg.rotation_changes(pos, pos + 1)]
        end = changes[0] if changes else length
        if end < length:
            logits = self.reference(tokens[:, :end]).logits
        cache = self.ours.new_kv_cache(tokens.shape[0])
        steps = [self.ours(tokens[:, :start], past_kv_cache=cache)]
        steps += [self.ours(tokens[:, pos : pos + 1], past_kv_cache=cache) for pos in range(start, end)]
        yield self.compare("cached decoding", "unembed.hook_out", torch.cat(steps, 1), logits)

    def left_padding(self, tokens: Int[Tensor, "batch pos"]) -> Iterator[Comparison]:
        """Compare our logits of a prompt padded on the left with the reference's logits of the prompt alone."""
        padding = tokens.shape[1] // 3
        if padding == 0 or tokens.shape[0] < 2:
            self.not_compared["left padding"] = "it takes two prompts of at least three tokens"
            return
        mask = torch.ones_like(tokens)
        mask[-1, :padding] = 0
        ours = self.ours(tokens, attention_mask=mask)[-1:, padding:]
        alone = self.reference(tokens[-1:, padding:]).logits
        yield self.compare("left padding", "unembed.hook_out", ours, alone)

    def gradients(self, tokens: Int[Tensor, "batch pos"]) -> Iterator[Comparison]:
        """Compare gradients of the same random sum of logits at the input of the first block."""
        site = get_act_name("resid_pre", 0)
        self.forget_lengths(tokens)
        entered: list[Tensor] = []

        def keep(module: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
            stream = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
            entered.append(stream)
            return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

        handle = self.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.enable_grad():
                logits = self.theirs(tokens, use_cache=False).logits
        finally:
            handle.remove()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        with torch.no_grad():
            stream = self.ours(tokens, stop_at_layer=0)
        stream = stream.detach().requires_grad_()
        with torch.enable_grad():
            (theirs,) = torch.autograd.grad((logits * weights).sum(), entered)
            (ours,) = torch.autograd.grad((self.ours(stream, start_at_layer=0) * weights).sum(), stream)
        yield self.compare("gradients", site, ours, theirs, GRADIENT_TOLERANCE)
