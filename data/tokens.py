"""From records to tokens: detect the shape, render, tokenize, and mark which tokens are trained on.

Tokens are uint32. The highest bit is set in a masked token, such as one of a user's words.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from chat.shapes import SHAPES, Conversation, Messages, PlainText, read_record, shapes_of, unpaired_preference
from chat.template import (
    DATE,
    TemplateMismatchError,
    check_markers,
    has_markers,
    render,
    render_marked,
    trained_spans,
)
from chat.traces import check_traces
from config.errors import OptionError, first_line
from data.records import RawRecord, Source, parsed

MASKED = 1 << 31

# Conversations that show which token ends a turn: an answer, and a call of a tool. A template may refuse some of them.
QUESTION = {"role": "user", "content": "question"}
CALL = {"id": "123456789", "type": "function", "function": {"name": "tool", "arguments": {"key": "value"}}}
PROBES: list[Messages] = [
    [QUESTION, {"role": "assistant", "content": "answer"}],
    [{"role": "system", "content": "system"}, QUESTION, {"role": "assistant", "content": "answer"}],
    [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
]

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
    variables: dict[str, Any] = field(default_factory=dict)  # of the chat template, from chat_template_kwargs

    def key(self) -> list[object]:
        """Its part of the key of prepared data: everything that the tokens depend on."""
        tokenizer = self.tokenizer
        # Its vocabulary, added tokens, normalizer, and what it adds to a text. Templates also read its special tokens.
        backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        facts = [self.shape, self.text_column, self.block_size, self.max_targetless_fraction, self.train_on_last_turn]
        facts += [self.variables, DATE]
        return [*facts, tokenizer.chat_template, special, backend, tokenizer.split_special_tokens]

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens that the tokenizer writes before a text: BOS for those of Llama and Gemma, none for Qwen's."""
        bare, full = (self.tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        starts = range(len(full) - len(bare) + 1)
        return full[: next((start for start in starts if full[start : start + len(bare)] == bare), 0)]

    @cached_property
    def vocabulary_size(self) -> int | None:
        """The vocabulary of the model, if the tokenizer has added tokens beyond it (model/build.py)."""
        size: int | None = getattr(self.tokenizer, "model_vocabulary_size", None)
        return size


class Outcome(IntEnum):
    """The result of tokenizing a record."""

    FRAGMENT = 0  # tokens of a document that continues in the next record
    DOCUMENT = 1  # tokens, up to the end of a document
    TRUNCATED = 2  # the first block_size tokens of a conversation that has more
    EMPTY = 3  # no tokens, because there was no text
    NO_TARGETS = 4  # no tokens, because the model would train on none of them


class Had(IntFlag):
    """Special tokens that a text already has, so they are not added a second time."""

    BOS = 1
    EOS = 2


class Encoding(NamedTuple):
    """What a record becomes. A pair becomes two of them."""

    tokens: list[int]
    outcome: Outcome
    had: int = 0  # of Had
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
        return partial(_naming_the_record, partial(_encode_texts, rendering=rendering))
    if rendering.tokenizer.chat_template and has_markers(rendering.tokenizer, None):
        check_markers(rendering.tokenizer, **rendering.variables)
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


def readable(place: str, record: Record, rendering: Rendering) -> str:
    """A record as the text that is tokenized. For a pair, the text with the chosen answer."""
    conversation = read_record(rendering.shape, record, place)[0][0]
    if isinstance(conversation, dict):
        return conversation["prompt"] + conversation["completion"]
    return render(rendering.tokenizer, conversation.messages, conversation.tools, **rendering.variables)


def stop_tokens(rendering: Rendering, first: RawRecord | None) -> list[int]:
    """The tokens that end what the model writes: of a text EOS, of a conversation the token that ends a turn.

    The template shows it, so it is known before any record is tokenized. The `first` record tells whether the records
    are conversations, and is the last conversation that is tried.
    """
    tokenizer = rendering.tokenizer
    if rendering.shape == "text" or first is None:
        return [tokenizer.eos_token_id]
    record = read_record(rendering.shape, parsed(first), first.place)[0][0]
    if isinstance(record, dict):
        return [tokenizer.eos_token_id]
    found = []
    for conversation in [*map(Conversation, PROBES), record]:
        with suppress(TemplateMismatchError):
            ids, trained_on = encode_messages(conversation, tokenizer, rendering.variables)
            trained = [token for token, on in zip(ids, trained_on, strict=True) if on]
            found += [token for token in trained if tokenizer.decode(token).strip()][
                -1:
            ]  # markers may hold a "\n", too
    return sorted({token for token in found if can_stop(tokenizer, token)})


@dataclass(frozen=True)
class Prompt:
    """A prompt of --sample_prompts, and the tokens that the model sees of it."""

    text: str
    tokens: list[int]


def encode_prompt(text: str, rendering: Rendering, first: RawRecord | None) -> Prompt:
    """A prompt as the model is trained to see it, by the `first` record: a message of the user, or the start of a text.

    Raises OptionError if the chat template refuses it.
    """
    tokenizer, record = rendering.tokenizer, None
    if rendering.shape != "text" and first is not None:
        record = read_record(rendering.shape, parsed(first), first.place)[0][0]
    if isinstance(record, Conversation):
        messages = [{"role": "user", "content": text}]
        rendered = render(tokenizer, messages, None, add_generation_prompt=True, **rendering.variables)
        return Prompt(text, tokenizer(rendered, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(text, (rendering.prefix if ids[: len(rendering.prefix)] != rendering.prefix else []) + ids)


def can_stop(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token may end what the model writes: an added token, but not one of white space, as Gemma has them."""
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(str(added).strip())


def _encode_texts(records: list[RawRecord], rendering: Rendering) -> Encoded:
    """EOS ends each document. BOS begins it if the tokenizer itself adds one, as those of Llama and Gemma do."""
    texts, unused = [], []
    for raw in records:
        columns = parsed(raw)
        text = columns.get(rendering.text_column)
        if not isinstance(text, str):
            _require_shape(raw.place, columns, rendering)
            raise OptionError(f"{raw.place} has no text in column {rendering.text_column}: {str(text)[:100]}")
        texts.append(text)
        unused.append(tuple(name for name, value in columns.items() if name != rendering.text_column and value))
    encoded = rendering.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    result = []
    for raw, ids, names in zip(records, encoded["input_ids"], unused, strict=True):
        if not ids:
            result.append(Encoding([], Outcome.EMPTY))
            continue
        _check_ids(raw.place, ids, rendering)
        before, after, had = _special(ids, ids, rendering)
        tokens = before * raw.begins + ids + after * raw.ends
        had &= Had.BOS * raw.begins | Had.EOS * raw.ends
        result.append(Encoding(tokens, Outcome.DOCUMENT if raw.ends else Outcome.FRAGMENT, had, names))
    return result


def _special(start: list[int], end: list[int], rendering: Rendering) -> tuple[list[int], list[int], int]:
    """The tokens to add before `start` and after `end`, if they are not there, and of Had what is there."""
    prefix, eos = rendering.prefix, rendering.tokenizer.eos_token_id
    has_bos, has_eos = bool(prefix) and start[: len(prefix)] == prefix, end[-1:] == [eos]
    return [] if has_bos else prefix, [] if has_eos else [eos], Had.BOS * has_bos | Had.EOS * has_eos


def _check_ids(place: str, ids: list[int], rendering: Rendering) -> None:
    """Raises OptionError for a token that the model has no embedding for."""
    size = rendering.vocabulary_size
    if size is not None and ids and (highest := max(ids)) >= size:
        token = rendering.tokenizer.convert_ids_to_tokens(highest)
        raise OptionError(
            f"{place}: has the token {token}, whose id {highest} is beyond the model's vocabulary of {size}\n"
            "remove it from the text, or pass a --tokenizer_name that fits the model"
        )


def _require_shape(place: str, columns: Record, rendering: Rendering) -> None:
    """Refuse a record that could not be read because it has another shape than the first one. Raises OptionError."""
    fitting = shapes_of(columns, rendering.text_column)
    if fitting and rendering.shape not in fitting:
        raise OptionError(
            f"{place}: its columns are of the shape {fitting[0]}, but the first record is of the shape "
            f"{rendering.shape}\nkeep one shape in a file, and pass files of several shapes as --train_mixture "
            "chat.jsonl=0.5,text.jsonl=0.5 --packing documents"
        )


def _encode_conversations(records: list[RawRecord], rendering: Rendering) -> Encoded:
    size = rendering.block_size
    encoded: Encoded = []
    for raw in records:
        columns = parsed(raw)
        try:
            conversations, unused = read_record(rendering.shape, columns, raw.place)
        except OptionError:
            _require_shape(raw.place, columns, rendering)
            raise
        sides = []
        for conversation in conversations:
            ids, trained_on, had, keys = _encode_conversation(raw.place, conversation, rendering)
            _check_ids(raw.place, ids, rendering)
            sides.append((ids, trained_on, had))
            unused += [f"{key} of messages" for key in keys]
        outcomes = [_outcome(ids, trained_on, size) for ids, trained_on, _ in sides]
        if max(outcomes) in (Outcome.EMPTY, Outcome.NO_TARGETS):  # of a pair, both are left out
            outcomes, sides = [max(outcomes)] * len(outcomes), [([], [], 0)] * len(outcomes)
        for (ids, trained_on, had), outcome in zip(sides, outcomes, strict=True):
            kept = zip(ids[:size], trained_on[:size], strict=True)
            tokens = [token if trained else token | MASKED for token, trained in kept]
            encoded.append(Encoding(tokens, outcome, had, tuple(dict.fromkeys(unused))))
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
) -> tuple[list[int], list[bool], int, list[str]]:
    """Token ids, whether each is trained on, of Had what a text already has, and keys of messages that are not used."""
    tokenizer, variables = rendering.tokenizer, rendering.variables
    if isinstance(record, dict):
        # Plain text, without a template. The prompt is tokenized alone, as it will be when the model is asked.
        prompt, completion = tokenizer([record["prompt"], record["completion"]], add_special_tokens=False)["input_ids"]
        before, after, had = _special(prompt, completion, rendering)
        prompt, completion = before + prompt, completion + after
        return prompt + completion, [False] * len(prompt) + [True] * len(completion), had, []
    conversation = record.with_last_turn_only() if rendering.train_on_last_turn else record
    try:
        unused = check_traces(tokenizer, conversation, **variables)
        return *encode_messages(conversation, tokenizer, variables), 0, unused
    except OptionError as error:
        raise OptionError(f"{place}: {error}") from error


def encode_messages(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any] | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of the rendered conversation, and whether each is trained on. `variables` are the template's.

    The markers of the chat template decide, or `trained_spans` if it has none. A token is trained on if any of its
    characters belongs to an answer.
    """
    messages, tools, variables = conversation.messages, conversation.tools, variables or {}
    if not messages:
        return [], []
    if not tokenizer.chat_template:
        raise TemplateMismatchError("a conversation, but the tokenizer has no chat template\npass --chat_template FILE")
    if has_markers(tokenizer, tools) and not conversation.masked:
        text, spans = render_marked(tokenizer, messages, tools, **variables)
    else:
        text = render(tokenizer, messages, tools, **variables)
        spans = trained_spans(tokenizer, conversation, text, **variables)
        if has_markers(tokenizer, tools):
            _, marked = render_marked(tokenizer, messages, tools, **variables)
            pairs = [(max(one[0], other[0]), min(one[1], other[1])) for one in spans for other in marked]
            spans = [(start, end) for start, end in pairs if start < end]
    rendered = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return rendered["input_ids"], _within(rendered["offset_mapping"], spans).tolist()


def _within(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Of each token, with its offsets in characters, whether it has any character in a span.

    Some tokenizers leave white space out of the offsets. A token of nothing else has none of its own: it begins where
    the token before ends.
    """
    first, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    previous = np.maximum.accumulate(np.concatenate([[0], end[:-1]]))[: len(end)]
    first = np.where(first == end, np.minimum(previous, first), first)
    end = np.maximum(end, first + 1)
    within = np.zeros(len(first), dtype=bool)
    for span_start, span_end in spans:
        within |= (first < span_end) & (end > span_start)
    return within
