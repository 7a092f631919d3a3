"""The parts of a hooked transformer, importable one by one under their classic names."""

from typing import NoReturn

from hooked_lm._support.replaced import missing
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

_DECODERS_ONLY = "there are decoders only here; load encoders and encoder-decoders with transformers"
# Components of the classic library that are not here -> what to use.
_ABSENT = {
    **dict.fromkeys(("BertBlock", "BertEmbed", "BertMLMHead", "BertNSPHead", "BertPooler"), _DECODERS_ONLY),
    **dict.fromkeys(("T5Attention", "T5Block", "TokenTypeEmbed", "TokenTypedEmbed"), _DECODERS_ONLY),
    "GatedMLP4Bit": "weights of four bits are not computed with here: GatedMLP, with weights that are dequantised",
}


def __getattr__(name: str) -> NoReturn:
    error = missing(__name__, name, _ABSENT)
    # ImportError, since `from hooked_lm.components import name` would replace the text of an AttributeError.
    raise ImportError(str(error)) if name in _ABSENT else error
