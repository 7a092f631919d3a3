"""Every alias that version 3.9 of the classic library published for a model of a supported family, by hub id.

The hub ids are those of today: some models have moved since they were named, and santacoder has a copy that needs no
code of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["PUBLISHED_ALIASES"]

# By owner, models whose alias is their name on the hub, in lower case.
_BY_NAME = {
    "01-ai": "Yi-34B Yi-34B-Chat Yi-6B Yi-6B-Chat",
    "ai-forever": "mGPT",
    "allenai": (
        "Olmo-3-1025-7B Olmo-3-1125-32B Olmo-3-32B-Think Olmo-3-7B-Instruct Olmo-3-7B-Think Olmo-3.1-32B-Instruct "
        "Olmo-3.1-32B-Think"
    ),
    "ArthurConmy": "redwood_attn_2l",
    "bigscience": "bloom-1b1 bloom-1b7 bloom-3b bloom-560m bloom-7b1",
    "EleutherAI": "gpt-j-6b gpt-neo-1.3B gpt-neo-125m gpt-neo-2.7B gpt-neox-20b pythia-14m pythia-31m",
    "facebook": "opt-1.3b opt-125m opt-13b opt-2.7b opt-30b opt-6.7b opt-66b",
    "google": (
        "gemma-2-27b gemma-2-27b-it gemma-2-2b gemma-2-2b-it gemma-2-9b gemma-2-9b-it gemma-2b gemma-2b-it "
        "gemma-3-12b-it gemma-3-12b-pt gemma-3-1b-it gemma-3-1b-pt gemma-3-270m gemma-3-270m-it gemma-3-27b-it "
        "gemma-3-27b-pt gemma-3-4b-it gemma-3-4b-pt gemma-7b gemma-7b-it medgemma-27b-it medgemma-27b-text-it "
        "medgemma-4b-it medgemma-4b-pt"
    ),
    "microsoft": "phi-1 phi-1_5 phi-2 phi-4",
    "mistralai": "Mistral-Nemo-Base-2407",
    "openai": "gpt-oss-20b",
    "Qwen": (
        "Qwen1.5-0.5B Qwen1.5-0.5B-Chat Qwen1.5-1.8B Qwen1.5-1.8B-Chat Qwen1.5-14B Qwen1.5-14B-Chat Qwen1.5-4B "
        "Qwen1.5-4B-Chat Qwen1.5-7B Qwen1.5-7B-Chat Qwen2-0.5B Qwen2-0.5B-Instruct Qwen2-1.5B Qwen2-1.5B-Instruct "
        "Qwen2-7B Qwen2-7B-Instruct Qwen2.5-0.5B Qwen2.5-0.5B-Instruct Qwen2.5-1.5B Qwen2.5-1.5B-Instruct Qwen2.5-14B "
        "Qwen2.5-14B-Instruct Qwen2.5-32B Qwen2.5-32B-Instruct Qwen2.5-3B Qwen2.5-3B-Instruct Qwen2.5-72B "
        "Qwen2.5-72B-Instruct Qwen2.5-7B Qwen2.5-7B-Instruct Qwen3-0.6B Qwen3-0.6B-Base Qwen3-1.7B Qwen3-14B Qwen3-4B "
        "Qwen3-8B"
    ),
    "stabilityai": "stablelm-base-alpha-3b stablelm-base-alpha-7b stablelm-tuned-alpha-3b stablelm-tuned-alpha-7b",
    "stanford-crfm": (
        "alias-gpt2-small-x21 arwen-gpt2-medium-x21 battlestar-gpt2-small-x49 beren-gpt2-medium-x49 "
        "caprica-gpt2-small-x81 celebrimbor-gpt2-medium-x81 darkmatter-gpt2-small-x343 durin-gpt2-medium-x343 "
        "eowyn-gpt2-medium-x777 expanse-gpt2-small-x777"
    ),
}
# The sizes of Pythia, each with the one that its models were named by at first.
_PYTHIA = {
    "70m": "19m",
    "160m": "125m",
    "410m": "350m",
    "1b": "800m",
    "1.4b": "1.3b",
    "2.8b": "2.7b",
    "6.9b": "6.7b",
    "12b": "13b",
}
# What comes after the size.
_PYTHIA_KINDS = ("", "-deduped", "-deduped-v0", "-v0")
_PYTHIA_SEEDS = {"160m": ("-seed1", "-seed2", "-seed3")}
# Neel Nanda's small models: their layers and widths, by the texts that they were trained on and the activation.
_ON_C4_AND_CODE = {
    "Attn_Only": "1L512W 2L512W 3L512W 4L512W",
    "GELU": "1L512W 2L512W 3L512W 4L512W",
    "SoLU": "1L512W 2L512W 3L512W 4L512W 6L768W 8L1024W 10L1280W 12L1536W",
}
_ON_THE_PILE = "1L_v9 2L_v10 4L_v11 6L_v13 8L_v21 10L_v22 12L_v23"
_ON_WIKIPEDIA = "1L512W 4L512W"
# TinyStories, as the hub spells them. Aliases write "Layers" as an l.
_TINY_STORIES = (
    "1Layer-21M 1M 28M 2Layers-33M 33M 3M 8M Instruct-1M Instruct-28M Instruct-2Layers-33M Instruct-33M Instruct-3M "
    "Instruct-8M Instuct-1Layer-21M"
)
# Models with aliases that follow no rule, and these aliases.
_OTHERS = {
    "allenai/OLMo-1B-hf": "olmo-1b",
    "allenai/OLMo-2-0425-1B": "olmo-2-1b",
    "allenai/OLMo-2-1124-7B": "olmo-2-7b",
    "allenai/OLMo-7B-hf": "olmo-7b",
    "allenai/OLMoE-1B-7B-0924": "olmoe",
    "Baidicoot/Othello-GPT-Transformer-Lens": "othello-gpt",
    "bigcode/gpt_bigcode-santacoder": "santacoder",
    "codellama/CodeLlama-7b-hf": "codellamallama-2-7b",
    "codellama/CodeLlama-7b-Instruct-hf": "codellama-7b-instruct",
    "codellama/CodeLlama-7b-Python-hf": "codellama-7b-python",
    "distilbert/distilgpt2": "distil-gpt2 distill-gpt2 distillgpt2 gpt2-xs",
    "EleutherAI/gpt-j-6b": "gpt-j gptj",
    "EleutherAI/gpt-neo-1.3B": "gpt-neo-medium neo-medium",
    "EleutherAI/gpt-neo-125m": "gpt-neo-small neo neo-small",
    "EleutherAI/gpt-neo-2.7B": "gpt-neo-large neo-large",
    "EleutherAI/gpt-neox-20b": "gpt-neox neox",
    "EleutherAI/pythia-70m": "pythia",
    "EleutherAI/pythia-70m-v0": "pythia-v0",
    "facebook/opt-1.3b": "opt-medium",
    "facebook/opt-125m": "opt opt-small",
    "facebook/opt-13b": "opt-xxl",
    "facebook/opt-2.7b": "opt-large",
    "facebook/opt-30b": "opt-xxxl",
    "facebook/opt-6.7b": "opt-xl",
    "facebook/opt-66b": "opt-xxxxl",
    "meta-llama/Llama-2-13b-chat-hf": "llama-2-13b-chat",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-2-70b-chat-hf": "llama-2-70b-chat meta-llama-2-70b-chat-hf",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2-7b-chat",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b-instruct",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b-instruct mixtral-instruct",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral mixtral-8x7b",
    "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr": (
        "attn-only-2l-demo attn-only-2l-induction-demo attn-only-2l-shortformer-6b-big-lr attn-only-demo"
    ),
    "openai-community/gpt2": "gpt2-small",
    "openai/gpt-oss-20b": "gpt-oss",
    "Qwen/QwQ-32B-Preview": "qwen-32b-preview",
    "stabilityai/stablelm-base-alpha-3b": "stablelm-base-3b",
    "stabilityai/stablelm-base-alpha-7b": "stablelm-base-7b",
    "stabilityai/stablelm-tuned-alpha-3b": "stablelm-tuned-3b",
    "stabilityai/stablelm-tuned-alpha-7b": "stablelm-tuned-7b",
    "stanford-crfm/alias-gpt2-small-x21": "gpt2-mistral-small-a gpt2-stanford-small-a stanford-gpt2-small-a",
    "stanford-crfm/arwen-gpt2-medium-x21": "gpt2-medium-small-a gpt2-stanford-medium-a stanford-gpt2-medium-a",
    "stanford-crfm/battlestar-gpt2-small-x49": "gpt2-mistral-small-b stanford-gpt2-small-b",
    "stanford-crfm/beren-gpt2-medium-x49": "gpt2-medium-small-b gpt2-stanford-medium-b stanford-gpt2-medium-b",
    "stanford-crfm/caprica-gpt2-small-x81": "gpt2-mistral-small-c gpt2-stanford-small-c stanford-gpt2-small-c",
    "stanford-crfm/celebrimbor-gpt2-medium-x81": "gpt2-medium-small-c stanford-gpt2-medium-c",
    "stanford-crfm/darkmatter-gpt2-small-x343": "gpt2-mistral-small-d stanford-gpt2-small-d",
    "stanford-crfm/durin-gpt2-medium-x343": "gpt2-medium-small-d gpt2-stanford-medium-d stanford-gpt2-medium-d",
    "stanford-crfm/eowyn-gpt2-medium-x777": "gpt2-medium-small-e gpt2-stanford-medium-e stanford-gpt2-medium-e",
    "stanford-crfm/expanse-gpt2-small-x777": "gpt2-mistral-small-e stanford-gpt2-small-e",
    "swiss-ai/Apertus-8B-2509": "apertus apertus-8b",
    "swiss-ai/Apertus-8B-Instruct-2509": "apertus-8b-instruct apertus-instruct",
}


def _by_rule() -> Iterator[tuple[str, str]]:
    """The aliases that follow from the names of models, each with the hub id."""
    for owner, names in _BY_NAME.items():
        for name in names.split():
            yield name.lower(), f"{owner}/{name}"
    for size, first in _PYTHIA.items():
        for kind in (*_PYTHIA_KINDS, *_PYTHIA_SEEDS.get(size, ())):
            hub_id = f"EleutherAI/pythia-{size}{kind}"
            for alias in (f"pythia-{size}{kind}", f"pythia-{first}{kind}", f"eleutherai/pythia-{first}{kind}"):
                yield alias, hub_id
    for name in _TINY_STORIES.split():
        alias = re.sub("layers?", "l", name.lower()).replace("instuct", "instruct")
        yield f"tiny-stories-{alias}", f"roneneldan/TinyStories-{name}"
    for activation, several in _ON_C4_AND_CODE.items():
        for size in several.split():
            yield from _small(activation, size, "C4_Code", ("", "-new", "-c4-code"))
    for size in _ON_WIKIPEDIA.split():
        yield from _small("SoLU", size, "Wiki_Finetune", ("-wiki", "-wiki-finetune", "-finetune"))
    for size in _ON_THE_PILE.split():
        yield from _small("SoLU", size, "old", ("-pile", "-old"))


def _small(activation: str, size: str, texts: str, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    layers = re.match(r"\d+L", size)
    assert layers is not None
    alias = f"{activation}-{layers[0]}".lower().replace("_", "-")
    for ending in endings:
        yield alias + ending, f"NeelNanda/{activation}_{size}_{texts}"


# Aliases in lower case.
PUBLISHED_ALIASES: dict[str, str] = {
    **dict(_by_rule()),
    **{alias: hub_id for hub_id, aliases in _OTHERS.items() for alias in aliases.split()},
}
