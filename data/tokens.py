"""From records to tokens: detect the shape, render, tokenize, and mark which tokens are trained on.

Tokens are uint32. The highest bit is set in a masked token, such as one of a user's words.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from chat.shapes import (
    SHAPES,
    Conversation,
    PlainText,
    read_record,
    shapes_of,
    unpaired_preference,
    without_padding,
)
from chat.template import check_markers, has_markers, render, trained_spans
from chat.traces import check_traces
from config.errors import OptionError
from data.records import RawRecord
from data.sources import Source

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
    train_on_last_turn: bool = False  # of a conversation, instead of all answers

    def key(self) -> list[object]:
        """Its part of the key of prepared data: everything that the tokens depend on."""
        template, eos = self.tokenizer.chat_template, self.tokenizer.eos_token_id
        vocabulary = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        facts = [self.shape, self.text_column, self.block_size, self.max_targetless_fraction, self.train_on_last_turn]
        return [*facts, template, eos, vocabulary]


class Outcome(IntEnum):
    """The result of tokenizing a record."""

    FRAGMENT = 0  # tokens of a document that continues in the next record
    DOCUMENT = 1  # tokens, up to the end of a document
    TRUNCATED = 2  # the first block_size tokens of a conversation that has more
    EMPTY = 3  # no tokens, because there was no text
    NO_TARGETS = 4  # no tokens, because the model would train on none of them


class Encoding(NamedTuple):
    """What a record becomes. A pair becomes two of them."""

    tokens: list[int]
    outcome: Outcome
    unused: tuple[str, ...] = ()  # columns, and keys of messages, that hold something but change nothing


Encoded = list[Encoding]


def document_lengths(lengths: ArrayLike, outcomes: ArrayLike) -> NDArray[np.int64]:
    """The tokens of each document, from those of each record: the fragments of a large text are one document."""
    ends = np.asarray(outcomes) != Outcome.FRAGMENT
    return np.bincount(np.cumsum(ends) - ends, weights=np.asarray(lengths)).astype(np.int64)


def detect_shape(source: Source, first: RawRecord | None, data_format: str, objective: str, text_column: str) -> str:
    """The shape of a source's records by the columns of the first one. Raises OptionError."""
    if first is None:
        raise OptionError(f"{source.name}: has no records; pass a file or a data set with records")
    record = parsed(first)
    fitting = shapes_of(record, text_column)
    if data_format == "auto" and objective == "dpo" and "preference" in fitting:
        fitting = ["preference"]
    shape = (fitting or ["text"])[0] if data_format == "auto" else data_format
    if data_format == "auto" and (column := unpaired_preference(record)) and shape not in ("text", "preference"):
        raise OptionError(
            f"data_format auto: {source.name} holds answers that are good or bad, by its column {column}, as KTO needs "
            f"them; there is no such --objective\npass --data_format {shape} to train on all answers"
        )
    if (shape == "preference") != (objective == "dpo"):
        raise OptionError(
            f"objective {objective}: {source.name} holds records of the shape {shape}\n"
            "dpo trains on pairs (chosen and rejected), sft on other shapes; change --objective or --data_format"
        )
    if data_format == "auto" and len(fitting) > 1:
        raise OptionError(
            f"data_format auto: {source.name} has the columns {', '.join(record)}, which fit {' and '.join(fitting)}\n"
            "pass --data_format with one of these"
        )
    groups = SHAPES.get(shape, ((text_column,),))
    if not any(set(group) <= record.keys() for group in groups):
        raise OptionError(
            f"{'text_column' if shape == 'text' else 'data_format'} {' and '.join(groups[0])}: {source.name} has no "
            f"such column, only {', '.join(record)}\npass --text_column, or --data_format for conversations"
        )
    return shape


def encoder(rendering: Rendering) -> Callable[[list[RawRecord]], Encoded]:
    """A function that tokenizes records. Raises OptionError for options that cannot be followed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # safe, because forked loader workers use no tokenizer
    if rendering.shape == "text":
        if rendering.train_on_last_turn:
            raise OptionError("train_on_last_turn true: a text has no turns; pass it for conversations only")
        return lambda records: [
            one._replace(unused=_beside_text(raw, rendering))
            for raw, one in zip(records, _encode_texts(records, rendering), strict=True)
        ]
    if rendering.tokenizer.chat_template and has_markers(rendering.tokenizer, None):
        check_markers(rendering.tokenizer)
    return lambda records: _encode_conversations(records, rendering)


def parsed(raw: RawRecord) -> Record:
    """The columns of a record. Raises OptionError with its place if it cannot be parsed."""
    if isinstance(raw.content, dict):
        return without_padding(raw.content)
    try:
        record = json.loads(raw.content)
    except ValueError as error:
        raise OptionError(f"{raw.place}: cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise OptionError(f"{raw.place}: must be a JSON object, not {raw.content[:100].decode(errors='replace')}")
    return record


def readable(place: str, record: Record, shape: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A record as the text that is tokenized. For a pair, the text with the chosen answer."""
    conversation = read_record(shape, record, place)[0][0]
    if isinstance(conversation, dict):
        return conversation["prompt"] + conversation["completion"]
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
        Encoding(bos * raw.begins + ids + eos * raw.ends, Outcome.DOCUMENT if raw.ends else Outcome.FRAGMENT)
        if ids
        else Encoding([], Outcome.EMPTY)
        for raw, ids in zip(records, encoded, strict=True)
    ]


def _beside_text(raw: RawRecord, rendering: Rendering) -> tuple[str, ...]:
    """The columns beside the text that hold something. Parsing a record again takes little time."""
    return tuple(name for name, value in parsed(raw).items() if name != rendering.text_column and value)


def _encode_conversations(records: list[RawRecord], rendering: Rendering) -> Encoded:
    size = rendering.block_size
    encoded: Encoded = []
    for raw in records:
        conversations, unused = read_record(rendering.shape, parsed(raw), raw.place)
        sides = []
        for conversation in conversations:
            ids, trained_on, keys = _encode_conversation(raw.place, conversation, rendering)
            sides.append((ids, trained_on))
            unused += [f"{key} of messages" for key in keys]
        outcomes = [_outcome(ids, trained_on, size) for ids, trained_on in sides]
        if max(outcomes) in (Outcome.EMPTY, Outcome.NO_TARGETS):  # of a pair, both are left out
            outcomes, sides = [max(outcomes)] * len(outcomes), [([], [])] * len(outcomes)
        for (ids, trained_on), outcome in zip(sides, outcomes, strict=True):
            kept = zip(ids[:size], trained_on[:size], strict=True)
            tokens = [token if trained else token | MASKED for token, trained in kept]
            encoded.append(Encoding(tokens, outcome, tuple(dict.fromkeys(unused))))
            unused = []  # once for a pair
    return encoded


def _outcome(ids: list[int], trained_on: list[bool], size: int) -> Outcome:
    if not ids:
        return Outcome.EMPTY
    if not any(trained_on[1:size]):  # the first token has no token before it that could predict it
        return Outcome.NO_TARGETS
    return Outcome.TRUNCATED if len(ids) > size else Outcome.DOCUMENT


def _encode_conversation(
    place: str, record: Conversation | PlainText, rendering: Rendering
) -> tuple[list[int], list[bool], list[str]]:
    """Token ids, whether each is trained on, and the keys of messages that are not used."""
    tokenizer = rendering.tokenizer
    if isinstance(record, dict):
        # Plain text, without a template. The prompt is tokenized alone, as it will be when the model is asked.
        parts = tokenizer([record["prompt"], record["completion"]], add_special_tokens=False)["input_ids"]
        completion = [*parts[1], tokenizer.eos_token_id]
        return parts[0] + completion, [False] * len(parts[0]) + [True] * len(completion), []
    conversation = record.with_last_turn_only() if rendering.train_on_last_turn else record
    try:
        unused = check_traces(tokenizer, conversation)
        return *encode_messages(conversation, tokenizer), unused
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
    if has_markers(tokenizer, tools) and not conversation.masked:
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
