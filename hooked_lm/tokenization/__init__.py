"""From text to tokens and back: functions over a tokenizer, and the model's methods in `methods`."""

from hooked_lm.tokenization.functions import (
    LogitTokens,
    PaddingSide,
    Prompts,
    TokenBatch,
    Tokenizer,
    check_padding_side,
    decode,
    encode,
    infer_attention_mask,
    prepare_tokenizer,
    single_token,
    str_tokens,
    token_position,
    token_rows,
    tokenize,
    tokenize_and_concatenate,
)

__all__ = [
    "LogitTokens",
    "PaddingSide",
    "Prompts",
    "TokenBatch",
    "Tokenizer",
    "check_padding_side",
    "decode",
    "encode",
    "infer_attention_mask",
    "prepare_tokenizer",
    "single_token",
    "str_tokens",
    "token_position",
    "token_rows",
    "tokenize",
    "tokenize_and_concatenate",
]
