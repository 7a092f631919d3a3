"""A tokenizer in which given words are one token each, so that the answers of the tasks are one token each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from hooked_lm.tokenization import Tokenizer

__all__ = ["END_OF_TEXT", "PIECE", "word_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
# A word or a number of up to two digits, each with the space in front of it; or one other character.
PIECE = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s"


def word_tokenizer(texts: Iterable[str], merges: int = 256) -> Tokenizer:
    """Return a byte-level BPE tokenizer in which every word of the texts is one token.

    A word comes with the space in front of it, as in GPT-2's: `"Mary"` and `" Mary"` are two tokens. Numbers fall into
    pieces of two digits: `" 1732"` is `" 17"` and `"32"`. Any other text is spelled with merges learned from the words,
    or byte by byte. `<|endoftext|>`, token 0, is BOS and EOS.

    Args:
        texts: the texts to take the words from.
        merges: byte pairs to learn for other words.
    """
    # Imported here: they take a while to import, and only this function needs them.
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = list(texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Backend(models.BPE())
    learner.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=1 + len(alphabet) + merges,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocab = dict(sorted(learned["vocab"].items(), key=lambda entry: entry[1]))
    for word in sorted(words - vocab.keys()):
        vocab[word] = len(vocab)
    # ignore_merges: a piece that is in the vocabulary is one token, whatever the merges would make of it.
    tokenizer = Backend(
        models.BPE(vocab=vocab, merges=[(first, second) for first, second in learned["merges"]], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    # By way of an annotated name: the class itself has no annotations.
    make: Callable[..., Tokenizer] = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
