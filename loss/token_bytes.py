"""The bytes of text that tokens stand for, to measure the loss per byte instead of per token."""

import json
import re
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"  # of SentencePiece
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte of SentencePiece


@cache
def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """The UTF-8 bytes of text that each token stands for: int64 [vocabulary]. A special token stands for none.

    The bytes of a text's tokens add up to the bytes of the text, also where a token holds a fraction of a character.
    Two kinds of tokenizers are known: byte-level BPE (GPT-2, Llama 3, Qwen), where each character of a token is a byte,
    and SentencePiece (Llama 2, Gemma), where U+2581 is a space and <0x0A> is a byte. There, the space that a tokenizer
    puts before a text counts, too. For any other tokenizer, None.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"], ensure_ascii=False)
    byte_level, sentence_piece = '"ByteLevel"' in decoder, SPACE in decoder
    if not byte_level and not sentence_piece:
        return None
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    counts = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, number in vocabulary.items():
        if number in added:
            counts[number] = 0 if added[number].special else len(token.encode())
        elif byte_level:
            counts[number] = len(token)
        else:
            counts[number] = 1 if BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())
    return counts
