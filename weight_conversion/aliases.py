"""Short names for the hub ids of checkpoints."""

from __future__ import annotations

from weight_conversion.published_aliases import PUBLISHED_ALIASES

__all__ = ["ALIASES", "hub_id"]

# In lower case: names are looked up without regard to case.
ALIASES: dict[str, str] = {
    **PUBLISHED_ALIASES,
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "codegen-350m-mono": "Salesforce/codegen-350M-mono",
    "codegen-2b-mono": "Salesforce/codegen-2B-mono",
    "starcoder": "bigcode/starcoder",
    "starcoderbase-1b": "bigcode/starcoderbase-1b",
    "tiny-starcoder": "bigcode/tiny_starcoder_py",
    "openai-gpt": "openai-community/openai-gpt",
    "opt-350m": "facebook/opt-350m",
    "galactica-125m": "facebook/galactica-125m",
    "falcon-7b": "tiiuae/falcon-7b",
    "falcon-7b-instruct": "tiiuae/falcon-7b-instruct",
    "falcon-40b": "tiiuae/falcon-40b",
    "falcon-rw-1b": "tiiuae/falcon-rw-1b",
    "mpt-7b": "mosaicml/mpt-7b",
    "mpt-30b": "mosaicml/mpt-30b",
    "xglm-564m": "facebook/xglm-564M",
    "persimmon-8b": "adept/persimmon-8b-base",
    "phi-1.5": "microsoft/phi-1_5",
    "stablelm-3b-4e1t": "stabilityai/stablelm-3b-4e1t",
    "stablelm-2-1.6b": "stabilityai/stablelm-2-1_6b",
    "stablelm-2-12b": "stabilityai/stablelm-2-12b",
    "starcoder2-3b": "bigcode/starcoder2-3b",
    "starcoder2-7b": "bigcode/starcoder2-7b",
    "starcoder2-15b": "bigcode/starcoder2-15b",
    "qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "granite-3.0-1b-a400m": "ibm-granite/granite-3.0-1b-a400m-base",
    "phi-3.5-moe": "microsoft/Phi-3.5-MoE-instruct",
    "command-r": "CohereLabs/c4ai-command-r-v01",
    "aya-23-8b": "CohereLabs/aya-23-8B",
    "aya-expanse-8b": "CohereLabs/aya-expanse-8b",
    "command-r7b": "CohereLabs/c4ai-command-r7b-12-2024",
    "granite-3.0-2b": "ibm-granite/granite-3.0-2b-base",
    "granite-3.0-8b": "ibm-granite/granite-3.0-8b-base",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-base",
    "glm-4-9b": "zai-org/glm-4-9b-hf",
    "glm-edge-1.5b": "zai-org/glm-edge-1.5b-chat",
    "glm-4-9b-0414": "zai-org/GLM-4-9B-0414",
    "helium-1-preview": "kyutai/helium-1-preview-2b",
    "minitron-4b": "nvidia/Minitron-4B-Base",
    "nemotron-mini-4b": "nvidia/Nemotron-Mini-4B-Instruct",
    "afm-4.5b": "arcee-ai/AFM-4.5B",
    "seed-oss-36b": "ByteDance-Seed/Seed-OSS-36B-Base",
    "exaone-4.0-1.2b": "LGAI-EXAONE/EXAONE-4.0-1.2B",
    "ernie-4.5-0.3b": "baidu/ERNIE-4.5-0.3B-PT",
    "hunyuan-0.5b": "tencent/Hunyuan-0.5B-Pretrain",
    "hunyuan-7b": "tencent/Hunyuan-7B-Pretrain",
    "nanochat-d20": "nanochat-students/nanochat-d20",
    "vaultgemma-1b": "google/vaultgemma-1b",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "mistral-nemo-12b": "mistralai/Mistral-Nemo-Base-2407",
}

_HUB_IDS = {known.lower(): known for known in ALIASES.values()}


def hub_id(name: str) -> str:
    """Return the hub id that a name stands for, in upper or lower case; any other name is returned as it is."""
    return ALIASES.get(name.lower(), _HUB_IDS.get(name.lower(), name))
