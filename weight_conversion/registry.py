"""The family of each architecture, and `register_family` for families from other packages."""

from __future__ import annotations

import difflib
import importlib.metadata
import threading
import warnings
from types import ModuleType

from weight_conversion.aliases import ALIASES
from weight_conversion.errors import CheckpointError
from weight_conversion.families import (
    afmoe,
    apertus,
    arcee,
    aria_text,
    baichuan,
    biogpt,
    bloom,
    codegen,
    cohere,
    cohere2,
    cohere2_moe,
    cwm,
    dbrx,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone,
    exaone4,
    exaone_moe,
    falcon,
    flex_olmo,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_neox_japanese,
    gpt_oss,
    gptj,
    granite,
    granite_moe,
    granite_moe_hybrid,
    granite_moe_shared,
    granite_swa,
    helium,
    hunyuan_dense,
    hunyuan_moe,
    hy_v3,
    hyperclovax,
    internlm,
    internlm2,
    jais2,
    llama,
    longcat_flash,
    minicpm3,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mixtral,
    modernbert_decoder,
    mpt,
    nanochat,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    openai_gpt,
    opt,
    persimmon,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    sarvam_moe,
    seed_oss,
    smollm3,
    solar_open,
    stablelm,
    starcoder2,
    vaultgemma,
    xglm,
    youtu,
)
from weight_conversion.family import Family
from weight_conversion.left_out import why_left_out

__all__ = ["ALIASES", "ENTRY_POINTS", "FAMILIES", "family_of", "register_family"]

# The families that come with the package.
FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    gpt_neo.FAMILY,
    gptj.FAMILY,
    codegen.FAMILY,
    gpt_bigcode.FAMILY,
    openai_gpt.FAMILY,
    opt.FAMILY,
    llama.FAMILY,
    bloom.FAMILY,
    falcon.FAMILY,
    mpt.FAMILY,
    xglm.FAMILY,
    persimmon.FAMILY,
    phi.FAMILY,
    stablelm.FAMILY,
    starcoder2.FAMILY,
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    olmoe.FAMILY,
    flex_olmo.FAMILY,
    granite_moe.FAMILY,
    granite_moe_shared.FAMILY,
    phimoe.FAMILY,
    gpt_oss.FAMILY,
    glm4_moe.FAMILY,
    sarvam_moe.FAMILY,
    dots1.FAMILY,
    solar_open.FAMILY,
    minimax_m2.FAMILY,
    ernie4_5_moe.FAMILY,
    exaone_moe.FAMILY,
    hy_v3.FAMILY,
    afmoe.FAMILY,
    modernbert_decoder.FAMILY,
    longcat_flash.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    glm4_moe_lite.FAMILY,
    minicpm3.FAMILY,
    youtu.FAMILY,
    cohere.FAMILY,
    cohere2.FAMILY,
    granite.FAMILY,
    glm.FAMILY,
    glm4.FAMILY,
    helium.FAMILY,
    nemotron.FAMILY,
    arcee.FAMILY,
    seed_oss.FAMILY,
    apertus.FAMILY,
    exaone4.FAMILY,
    ernie4_5.FAMILY,
    hunyuan_dense.FAMILY,
    nanochat.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    phi3.FAMILY,
    olmo.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    smollm3.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    vaultgemma.FAMILY,
    mistral.FAMILY,
    ministral.FAMILY,
    ministral3.FAMILY,
    cwm.FAMILY,
    jais2.FAMILY,
    hyperclovax.FAMILY,
    granite_swa.FAMILY,
    biogpt.FAMILY,
    gpt_neox_japanese.FAMILY,
    aria_text.FAMILY,
    dbrx.FAMILY,
    granite_moe_hybrid.FAMILY,
    hunyuan_moe.FAMILY,
    cohere2_moe.FAMILY,
    internlm.FAMILY,
    internlm2.FAMILY,
    baichuan.FAMILY,
    exaone.FAMILY,
)

_BY_ARCHITECTURE = {architecture: family for family in FAMILIES for architecture in family.architectures}

# The group in which installed packages name their families.
ENTRY_POINTS = "hooked_lm.families"
_loaded_groups: set[str] = set()
_loading_entry_points = threading.RLock()


def register_family(family: Family | ModuleType, *, replace: bool = False) -> None:
    """Make the checkpoints of a family of HuggingFace models loadable.

    An installed package does without this call if it names its families as entry points of the group
    `hooked_lm.families`; the first unknown architecture loads them. In its `pyproject.toml`:

        [project.entry-points."hooked_lm.families"]
        my_llama = "my_package.my_llama:FAMILY"

    Args:
        family: a `Family`, or a module whose `FAMILY` is one.
        replace: take architectures that another family has, one that comes with the package included. Without it, a
            family that is not the one registered under an architecture already is refused.

    Raises:
        TypeError: it is no family.
        CheckpointError: one of its architectures has another family; then nothing is registered.
    """
    found = getattr(family, "FAMILY", None) if isinstance(family, ModuleType) else family
    if not isinstance(found, Family):
        raise TypeError(
            f"a family is a weight_conversion.family.Family, or a module with one as FAMILY; got {family!r}"
        )
    if not found.architectures or isinstance(found.architectures, str):
        raise TypeError(f"the family {found.name} names its architectures in a tuple; got {found.architectures!r}")
    for architecture in found.architectures:
        other = _BY_ARCHITECTURE.get(architecture, found)
        if other is not found and not replace:
            raise CheckpointError(
                f"the architecture {architecture!r} has the family {other.name!r} already; register_family(..., "
                f"replace=True) puts {found.name!r} in its place"
            )
    _BY_ARCHITECTURE.update(dict.fromkeys(found.architectures, found))


def family_of(architecture: str) -> Family:
    """Return the family of a HuggingFace class name.

    An architecture that is not known makes the families that installed packages name as entry points known, once.

    Raises:
        CheckpointError: no family has it; the message names the nearest and how to add one.
    """
    if architecture not in _BY_ARCHITECTURE:
        _load_entry_points()
    if architecture in _BY_ARCHITECTURE:
        return _BY_ARCHITECTURE[architecture]
    raise CheckpointError(_unsupported(architecture))


def _unsupported(architecture: str) -> str:
    """The error for an architecture without a family: why there is none, or which are nearest."""
    why = why_left_out(architecture)
    if why is not None:
        return f"the architecture {architecture!r} is not supported ({why}). docs/families.md lists those that are"
    near = difflib.get_close_matches(architecture, _BY_ARCHITECTURE, n=3, cutoff=0.6)
    nearest = f"the nearest are {', '.join(near)}" if near else "docs/families.md lists them"
    return (
        f"the architecture {architecture!r} is not among the supported ones; {nearest}. "
        "To add it, write a family (docs/adding_a_family.md) and call weight_conversion.register_family with it"
    )


def _load_entry_points() -> None:
    """Register the families of installed packages, once; an entry point that gives none becomes a warning."""
    # Held while the families load, so that another thread waits for them rather than misses them.
    with _loading_entry_points:
        if ENTRY_POINTS in _loaded_groups:
            return
        _loaded_groups.add(ENTRY_POINTS)
        faults = []
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            try:
                register_family(entry_point.load())
            except Exception as error:  # a package of others may fail in any way, and the families here still work
                faults.append(f"{entry_point.name!r} ({entry_point.value}): {type(error).__name__}: {error}")
    for fault in faults:
        warnings.warn(f"in the group {ENTRY_POINTS!r}, this entry point gives no family: {fault}", stacklevel=3)
