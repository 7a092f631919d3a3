"""Which family an architecture belongs to, and short names for hub ids."""

from __future__ import annotations

import difflib

from weight_conversion.errors import CheckpointError
from weight_conversion.families import (
    bloom,
    codegen,
    falcon,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite_moe,
    granite_moe_shared,
    llama,
    mixtral,
    mpt,
    olmoe,
    openai_gpt,
    opt,
    persimmon,
    phi,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    stablelm,
    starcoder2,
    xglm,
)
from weight_conversion.family import Family

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
    granite_moe.FAMILY,
    granite_moe_shared.FAMILY,
    phimoe.FAMILY,
    gpt_oss.FAMILY,
)

_BY_ARCHITECTURE = {architecture: family for family in FAMILIES for architecture in family.architectures}

ALIASES: dict[str, str] = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "distillgpt2": "distilbert/distilgpt2",
    "pythia-14m": "EleutherAI/pythia-14m",
    "pythia-31m": "EleutherAI/pythia-31m",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "pythia-12b": "EleutherAI/pythia-12b",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    "pythia-160m-deduped": "EleutherAI/pythia-160m-deduped",
    "pythia-410m-deduped": "EleutherAI/pythia-410m-deduped",
    "gpt-neox-20b": "EleutherAI/gpt-neox-20b",
    "gpt-neo-125m": "EleutherAI/gpt-neo-125m",
    "gpt-neo-1.3b": "EleutherAI/gpt-neo-1.3B",
    "gpt-neo-2.7b": "EleutherAI/gpt-neo-2.7B",
    "tiny-stories-1m": "roneneldan/TinyStories-1M",
    "tiny-stories-8m": "roneneldan/TinyStories-8M",
    "tiny-stories-33m": "roneneldan/TinyStories-33M",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
    "codegen-350m-mono": "Salesforce/codegen-350M-mono",
    "codegen-2b-mono": "Salesforce/codegen-2B-mono",
    "santacoder": "bigcode/gpt_bigcode-santacoder",
    "starcoder": "bigcode/starcoder",
    "starcoderbase-1b": "bigcode/starcoderbase-1b",
    "tiny-starcoder": "bigcode/tiny_starcoder_py",
    "openai-gpt": "openai-community/openai-gpt",
    "opt-125m": "facebook/opt-125m",
    "opt-350m": "facebook/opt-350m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "opt-13b": "facebook/opt-13b",
    "opt-30b": "facebook/opt-30b",
    "opt-66b": "facebook/opt-66b",
    "galactica-125m": "facebook/galactica-125m",
    "bloom-560m": "bigscience/bloom-560m",
    "bloom-1b1": "bigscience/bloom-1b1",
    "bloom-1b7": "bigscience/bloom-1b7",
    "bloom-3b": "bigscience/bloom-3b",
    "bloom-7b1": "bigscience/bloom-7b1",
    "falcon-7b": "tiiuae/falcon-7b",
    "falcon-7b-instruct": "tiiuae/falcon-7b-instruct",
    "falcon-40b": "tiiuae/falcon-40b",
    "falcon-rw-1b": "tiiuae/falcon-rw-1b",
    "mpt-7b": "mosaicml/mpt-7b",
    "mpt-30b": "mosaicml/mpt-30b",
    "xglm-564m": "facebook/xglm-564M",
    "persimmon-8b": "adept/persimmon-8b-base",
    "phi-1": "microsoft/phi-1",
    "phi-1.5": "microsoft/phi-1_5",
    "phi-2": "microsoft/phi-2",
    "stablelm-3b-4e1t": "stabilityai/stablelm-3b-4e1t",
    "stablelm-2-1.6b": "stabilityai/stablelm-2-1_6b",
    "stablelm-2-12b": "stabilityai/stablelm-2-12b",
    "starcoder2-3b": "bigcode/starcoder2-3b",
    "starcoder2-7b": "bigcode/starcoder2-7b",
    "starcoder2-15b": "bigcode/starcoder2-15b",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "granite-3.0-1b-a400m": "ibm-granite/granite-3.0-1b-a400m-base",
    "phi-3.5-moe": "microsoft/Phi-3.5-MoE-instruct",
    "gpt-oss-20b": "openai/gpt-oss-20b",
}


def family_of(architecture: str) -> Family:
    """Return the family of a HuggingFace class name.

    Raises:
        CheckpointError: it is in none; the message names the nearest and where to add one.
    """
    if architecture in _BY_ARCHITECTURE:
        return _BY_ARCHITECTURE[architecture]
    near = difflib.get_close_matches(architecture, _BY_ARCHITECTURE, n=3, cutoff=0.4)
    nearest = f"the nearest are {', '.join(near)}" if near else f"those are {', '.join(_BY_ARCHITECTURE)}"
    raise CheckpointError(
        f"the architecture {architecture!r} is not among the supported ones; {nearest}. "
        "To add it, write a file in weight_conversion/families and a line in weight_conversion/registry.py"
    )
