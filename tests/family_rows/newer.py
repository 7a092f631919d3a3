"""Rows of models that transformers knows from 5.24 on, and the tests' version may lack."""

from __future__ import annotations

from tests.family_rows.base import LLAMA, LLAMA3_SCALING
from tests.family_rows.latents import ROWS as LATENTS
from tests.family_rows.routers import ROWS as ROUTERS
from tests.family_rows.row import Row

DEEPSEEK = next(row for row in LATENTS if row.architecture == "DeepseekV3ForCausalLM")
GLM = next(row for row in ROUTERS if row.architecture == "Glm4MoeForCausalLM")
APERTUS = {**LLAMA, "rope_parameters": LLAMA3_SCALING}
SARVAM = {**GLM.fields, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}

# Where the class of the model is another family's, the config's model type says which checkpoints these are.
NEWER_ROWS = (
    Row("exaone", "LlamaForCausalLM", "ExaoneConfig", {**LLAMA, "head_dim": 6}),
    Row("sarvam-mla", "DeepseekV3ForCausalLM", "SarvamMLAConfig", DEEPSEEK.fields),
    Row("sarvam-moe", "Glm4MoeForCausalLM", "SarvamMoEConfig", SARVAM),
    Row("sarvam-moe-biases", "Glm4MoeForCausalLM", "SarvamMoEConfig", {**SARVAM, "attention_bias": True}),
    Row("apertus-1.5", "Apertus1p5TextForCausalLM", "Apertus1p5TextConfig", APERTUS, pos=24),
    Row(
        "apertus-1.5-short",
        "Apertus1p5TextForCausalLM",
        "Apertus1p5TextConfig",
        {**APERTUS, "output_vocab_size": 44},
        pos=24,
    ),
)
# Families that no other row covers.
NEWER_FAMILIES = ("Sarvam MoE",)
