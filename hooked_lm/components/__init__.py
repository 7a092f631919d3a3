"""The parts of a hooked transformer, importable one by one under their classic names."""

from hooked_lm.components.attention import Attention
from hooked_lm.components.block import TransformerBlock
from hooked_lm.components.embed import Embed, Unembed
from hooked_lm.components.latent_attention import LatentAttention
from hooked_lm.components.mlp import MLP, GatedMLP
from hooked_lm.components.moe import MoE
from hooked_lm.components.norm import LayerNorm, LayerNormPre, Norm, RMSNorm, RMSNormPre
from hooked_lm.components.positions import PosEmbed
from hooked_lm.components.sequence import SequenceLayout

# The classic library's names for the one attention class.
AbstractAttention = Attention
GroupedQueryAttention = Attention

__all__ = [
    "MLP",
    "AbstractAttention",
    "Attention",
    "Embed",
    "GatedMLP",
    "GroupedQueryAttention",
    "LatentAttention",
    "LayerNorm",
    "LayerNormPre",
    "MoE",
    "Norm",
    "PosEmbed",
    "RMSNorm",
    "RMSNormPre",
    "SequenceLayout",
    "TransformerBlock",
    "Unembed",
]
