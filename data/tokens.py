"""From records to tokens: detect the shape, render, tokenize, and mark which tokens are trained on.

Tokens are uint32. The highest bit is set in a masked token, such as one of a user's words.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from chat.shapes import SHAPES, Conversation, to_conversation, unpair
from chat.template import check_markers, has_markers, render, trained_spans
from config.errors import OptionError, first_line
from data.records import RawRecord, Source, parsed

MASKED = 1 << 31

Record = dict[str, Any]


@dataclass(frozen=True)
class Rendering:
    """How the records of a source become tokens."""

    shape: str  # text, or one of chat.shapes.SHAPES
    text_column: str  # the column of a text
    block_size: int  # tokens after which a conversation is cut
    max_targetless_fraction: float  # of the records, above which a source is refused
    tokenizer: PreTrainedTokenizerBase

    def key(self) -> list[object]:
        """Its part of the key of prepared data: everything that the tokens depend on."""
        template, eos = self.tokenizer.chat_template, self.tokenizer.eos_token_id
        vocabulary = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        facts = [self.shape, self.text_column, self.block_size, self.max_targetless_fraction]
        return [*facts, template, eos, vocabulary]


class Outcome(IntEnum):
    """The result of tokenizing a record."""

    FRAGMENT = 0  # tokens of a document that continues in the next record
    DOCUMENT = 1  # tokens, up to the end of a document
    TRUNCATED = 2  # the first block_size tokens of a conversation that has more
    EMPTY = 3  # no tokens, because there was no text
    NO_TARGETS = 4  # no tokens, because the model would train on none of them


Encoded = list[tuple[list[int], Outcome]]

"""The tokens and the outcome of each record."""


def document_lengths(lengths: ArrayLike, outcomes: ArrayLike) -> NDArray[np.int64]:
    """The tokens of each document, from those of each record: the fragments of a large text are one document."""
    ends = np.asarray(outcomes) != Outcome.FRAGMENT
    return np.bincount(np.cumsum(ends) - ends, weights=np.asarray(lengths)).astype(np.int64)


def detect_shape(source: Source, first: RawRecord | None, data_format: str, objective: str, text_column: str) -> str:
    """The shape of a source's records by the columns of the first one. Raises OptionError."""
    if first is None:
        raise OptionError(f"{source.name}: has no records; pass a file or a data set with records")
    columns_of_first = parsed(first)
    fitting = (shape for shape, columns in SHAPES.items() if set(columns) <= columns_of_first.keys())
    shape = str(next(fitting, "text") if data_format == "auto" else data_format)
    if (shape == "preference") != (objective == "dpo"):
        raise OptionError(
            f"objective {objective}: {source.name} holds records of the shape {shape}\n"
            "dpo trains on pairs (chosen and rejected), sft on other shapes; change --objective or --data_format"
        )
    missing = [column for column in SHAPES.get(shape, (text_column,)) if column not in columns_of_first]
    if missing:
        raise OptionError(
            f"{'text_column' if shape == 'text' else 'data_format'} {' and '.join(missing)}: {source.name} has no such "
            f"column, only {', '.join(columns_of_first)}\npass --text_column, or --data_format for conversations"
        )
    return shape


def encoder(rendering: Rendering) -> Callable[[list[RawRecord]], Encoded]:
    """A function that tokenizes records. It gives their tokens and outcomes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # safe, because forked loader workers use no tokenizer
    if rendering.shape == "text":
        return partial(_naming_the_record, partial(_encode_texts, rendering=rendering))
    if rendering.tokenizer.chat_template and has_markers(rendering.tokenizer, None):
        check_markers(rendering.tokenizer)
    return partial(_naming_the_record, partial(_encode_conversations, rendering=rendering))


def _naming_the_record(encode: Callable[[list[RawRecord]], Encoded], records: list[RawRecord]) -> Encoded:
    """The tokens and outcomes of `encode`. Raises OptionError with the place of the record that makes it fail.

    Tokenizers and chat templates raise all kinds of exceptions, and a tokenizer sees many texts at once.
    """
    try:
        return encode(records)
    except (OptionError, MemoryError):
        raise
    except Exception as error:
        for raw in records if len(records) > 1 else ():
            _naming_the_record(encode, [raw])
        places = records[0].place if len(records) == 1 else f"{records[0].place} to {records[-1].place}"
        cause = _surrogate(records[0]) or f"{type(error).__name__}: {first_line(error)}"
        raise OptionError(f"{places}: cannot be tokenized: {cause}\ncorrect or remove this record") from error


def _surrogate(raw: RawRecord) -> str:
    """Says that a record has half of a surrogate pair, which no UTF-8 text can have, or nothing."""
    with suppress(OptionError, RecursionError):
        found = re.search("[\ud800-\udfff]", json.dumps(parsed(raw), ensure_ascii=False, default=repr))
        return f"half of a surrogate pair, \\u{ord(found[0]):04x}" if found else ""
    return ""


def readable(place: str, record: Record, shape: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A record as the text that is tokenized. For a pair, the text with the chosen answer."""
    shape, (record, *_) = unpair(shape, record, place)
    if isinstance(record.get("prompt"), str):
        return f"{record['prompt']}{record.get('completion')}"
    conversation = to_conversation(shape, record, place)
    return render(tokenizer, conversation.messages, conversation.tools)


def _encode_texts(records: list[RawRecord], rendering: Rendering) -> Encoded:
    """EOS ends each document. BOS begins it if the tokenizer itself adds one, as those of Llama and Gemma do."""
    tokenizer = rendering.tokenizer
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    eos = [tokenizer.eos_token_id]
    texts = []
    for raw in records:
        text = parsed(raw).get(rendering.text_column)
        if not isinstance(text, str):
            raise OptionError(f"{raw.place} has no text in column {rendering.text_column}: {str(text)[:100]}")
        texts.append(text)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [
        (bos * raw.begins + ids + eos * raw.ends, Outcome.DOCUMENT if raw.ends else Outcome.FRAGMENT)
        if ids
        else ([], Outcome.EMPTY)
        for raw, ids in zip(records, encoded, strict=True)
    ]


def _encode_conversations(records: list[RawRecord], rendering: Rendering) -> Encoded:
    size = rendering.block_size
    encoded: Encoded = []
    for raw in records:
        one_shape, conversations = unpair(rendering.shape, parsed(raw), raw.place)
        sides = [_encode_conversation(raw.place, one, one_shape, rendering.tokenizer) for one in conversations]
        outcomes = [_outcome(ids, trained_on, size) for ids, trained_on in sides]
        if max(outcomes) in (Outcome.EMPTY, Outcome.NO_TARGETS):  # of a pair, both are left out
            outcomes, sides = [max(outcomes)] * len(outcomes), [([], [])] * len(outcomes)
        for (ids, trained_on), outcome in zip(sides, outcomes, strict=True):
            kept = zip(ids[:size], trained_on[:size], strict=True)
            encoded.append(([token if trained else token | MASKED for token, trained in kept], outcome))
    return encoded


def _outcome(ids: list[int], trained_on: list[bool], size: int) -> Outcome:
    if not ids:
        return Outcome.EMPTY
    if not any(trained_on[1:size]):  # the first token has no token before it that could predict it
        return Outcome.NO_TARGETS
    return Outcome.TRUNCATED if len(ids) > size else Outcome.DOCUMENT


def _encode_conversation(
    place: str, record: Record, shape: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Token ids, and whether each is trained on."""
    if shape == "prompt" and isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        # Plain text, without a template. The prompt is tokenized alone, as it will be when the model is asked.
        parts = tokenizer([record["prompt"], record["completion"]], add_special_tokens=False)["input_ids"]
        completion = [*parts[1], tokenizer.eos_token_id]
        return parts[0] + completion, [False] * len(parts[0]) + [True] * len(completion)
    conversation = to_conversation(shape, record, place)
    try:
        return encode_messages(conversation, tokenizer)
    except OptionError as error:
        raise OptionError(f"{place}: {error}") from error


def encode_messages(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of the rendered conversation, and whether each is trained on.

    The markers of the chat template decide, or `trained_spans` if it has none. A token is trained on if any of its
    characters belongs to an answer.
    """
    messages, tools = conversation.messages, conversation.tools
    if not messages:
        return [], []
    if not tokenizer.chat_template:
        raise OptionError("a conversation, but the tokenizer has no chat template\npass --chat_template FILE")
    if has_markers(tokenizer, tools) and not conversation.trained_from:
        marked = tokenizer.apply_chat_template(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        return marked["input_ids"], [bool(mask) for mask in marked["assistant_masks"]]
    text = render(tokenizer, messages, tools)
    spans = trained_spans(tokenizer, conversation, text)
    rendered = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first, end = np.array(rendered["offset_mapping"], dtype=np.int64).reshape(-1, 2).T  # of each token, in characters
    trained_on = np.zeros(len(first), dtype=bool)
    for span_start, span_end in spans:
        trained_on |= (first < span_end) & (end > span_start)
    return rendered["input_ids"], trained_on.tolist()
