"""The architectures of transformers that are left out, by kind, with what they would take."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["LEFT_OUT", "LeftOut", "why_left_out"]


@dataclass(frozen=True)
class LeftOut:
    """One kind of model that does not load.

    Attributes:
        title: the models, for the documentation.
        names: a regular expression; the class names of such models begin with it.
        reason: why they are left out.
    """

    title: str
    names: str
    reason: str


# Decoder families that transformers has and that this library leaves out, and the other kinds of model.
LEFT_OUT = (
    LeftOut(
        "DeepSeek-V3.2 and V4, GLM-5",
        "DeepseekV32|DeepseekV4|GlmMoeDsa",
        "an indexer chooses which keys a query may attend to",
    ),
    LeftOut("Kimi Linear", "KimiLinear", "it is recurrent in part"),
    LeftOut("Dory, Inkling 2 Loop", "Dory|Inkling2Loop", "they run some of their layers several times"),
    LeftOut("Gemma 3n, Gemma 4", "Gemma3n|Gemma4", "layers share keys and values, and embeddings enter at every layer"),
    LeftOut(
        "Mamba, RWKV, Jamba, Falcon-H1, Zamba, Bamba, RecurrentGemma, Qwen3-Next, Lara Mini, Granite 4 with Mamba "
        "layers",
        "Mamba|Rwkv|Jamba|FalconH1|FalconMamba|Zamba|Bamba|RecurrentGemma|Qwen3Next|Qwen3_5|NemotronH|Lfm2|LaraMini"
        "|XLSTM|xLSTM",
        "they are recurrent, in part or whole",
    ),
    LeftOut(
        "T5, BART and other encoder-decoders; BERT and other encoders",
        "T5|MT5|UMT5|LongT5|Bart|MBart|Pegasus|Marian|M2M100|Whisper|Blenderbot|Prophet|LED|EncoderDecoder"
        "|Bert|Roberta|XLMRoberta|Deberta|Electra|Albert|DistilBert|ModernBertFor(?!Causal)|MPNet|CLIP|ViT",
        "this library is about decoders",
    ),
    LeftOut(
        "checkpoints quantised by GPTQ, AWQ and others that transformers cannot undo",
        "(?!)",
        "load what they were made from",
    ),
)


def why_left_out(architecture: str) -> str | None:
    """Return of which kind an architecture is and why that is left out; None for one of no known kind.

    Args:
        architecture: the class name that a config gives.
    """
    kinds = (kind for kind in LEFT_OUT if re.match(kind.names, architecture))
    return next((f"{kind.title}: {kind.reason}" for kind in kinds), None)
