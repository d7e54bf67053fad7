"""From a record to its tokens: what a text or a conversation becomes, and which of its tokens are learned.

Tokens are uint32. The highest bit of one that is given and not learned, such as a user's words, is set.
"""

import json
import os
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from config import OptionError, Options
from data.chat import SHAPES, Conversation, check_markers, has_markers, learned_spans, render, to_conversation, unpair
from data.corpus import Source

GIVEN = 1 << 31

Batch = dict[str, list[Any]]
Record = dict[str, Any]


class Fate(IntEnum):
    """What became of a record."""

    PIECE = 0  # tokens of a document that goes on in the next record
    DOCUMENT = 1  # tokens, up to the end of a document
    CUT = 2  # the same, but a conversation was longer than a row, and the rest of it is left out
    EMPTY = 3  # no tokens, because there was no text
    TARGETLESS = 4  # no tokens, because none of them would be learned


def recognise(source: Source, records: datasets.Dataset, options: Options) -> str:
    """The shape of a source's records, by the columns of the first one: text, or one of SHAPES. Raises OptionError."""
    if len(records) == 0:
        raise OptionError(f"{source.name}: it has no records; give a file or a data set that has")
    _, first = records_of(source, records[:1], [0])[0]
    fitting = (shape for shape, columns in SHAPES.items() if set(columns) <= first.keys())
    shape = str(next(fitting, "text") if options.data_format == "auto" else options.data_format)
    if (shape == "preference") != (options.objective == "dpo"):
        raise OptionError(
            f"objective {options.objective}: {source.name} holds records of the shape {shape}\n"
            "dpo learns from pairs, columns chosen and rejected, and sft from any other shape; --data_format names one"
        )
    missing = [column for column in SHAPES.get(shape, (options.text_column,)) if column not in first]
    if missing:
        raise OptionError(
            f"{'text_column' if shape == 'text' else 'data_format'} {' and '.join(missing)}: {source.name} has no such "
            f"column, only {', '.join(first)}\ngive --text_column, or --data_format for conversations"
        )
    return shape


def encoder(
    source: Source, shape: str, options: Options, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Batch, list[int]], Batch]:
    """A function for `datasets.map` that makes of a batch of records their `tokens`, and says their `fate`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # safe: the workers that a loader forks use no tokenizer
    if shape == "text":
        return lambda batch, indices: _encode_texts(batch, indices, source, options, tokenizer)
    if tokenizer.chat_template and has_markers(tokenizer, None):
        check_markers(tokenizer)
    return lambda batch, indices: _encode_conversations(batch, indices, source, shape, options, tokenizer)


def records_of(source: Source, batch: Batch, indices: list[int]) -> list[tuple[str, Record]]:
    """The records of a batch, each with the place where a person finds it. Raises OptionError for a broken one."""
    if "json" not in batch:
        columns = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return [(f"{source.name}: row {index}", record) for index, record in zip(indices, columns, strict=True)]
    records = []
    for place, line in zip(batch["place"], batch["json"], strict=True):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise OptionError(f"{place}: cannot be read as JSON: {error}") from error
        if not isinstance(record, dict):
            raise OptionError(f"{place}: must be an object in braces, and is {line[:100]}")
        records.append((place, record))
    return records


def readable(place: str, record: Record, shape: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A record as the text that is tokenised; of a pair, the chosen one."""
    shape, (record, *_) = unpair(shape, record, place)
    if isinstance(record.get("prompt"), str):
        return f"{record['prompt']}{record.get('completion')}"
    conversation = to_conversation(shape, record, place)
    return render(tokenizer, conversation.messages, conversation.tools)


def _encode_texts(
    batch: Batch, indices: list[int], source: Source, options: Options, tokenizer: PreTrainedTokenizerBase
) -> Batch:
    """EOS closes each document; BOS opens it where the tokenizer itself puts one, as Llama's and Gemma's do."""
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    eos = [tokenizer.eos_token_id]
    texts = []
    for place, record in records_of(source, batch, indices):
        text = record.get(options.text_column)
        if not isinstance(text, str):
            raise OptionError(f"{place} has no text in column {options.text_column}: {str(text)[:100]}")
        texts.append(text)
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    every = [True] * len(texts)
    pieces = list(zip(rows, batch.get("begins", every), batch.get("ends", every), strict=True))
    return {
        "tokens": [bos * begins + row + eos * ends if row else [] for row, begins, ends in pieces],
        "fate": [Fate.EMPTY if not row else Fate.DOCUMENT if ends else Fate.PIECE for row, _, ends in pieces],
    }


def _encode_conversations(
    batch: Batch, indices: list[int], source: Source, shape: str, options: Options, tokenizer: PreTrainedTokenizerBase
) -> Batch:
    assert options.block_size
    size = options.block_size
    tokens: list[list[int]] = []
    fates: list[Fate] = []
    for place, record in records_of(source, batch, indices):
        one_shape, records = unpair(shape, record, place)
        encoded = [_encode_conversation(place, one, one_shape, tokenizer) for one in records]
        found = [_fate(row, learned, size) for row, learned in encoded]
        if max(found) in (Fate.EMPTY, Fate.TARGETLESS):  # of a pair, both are left out
            found, encoded = [max(found)] * len(found), [([], [])] * len(found)
        fates += found
        tokens += [
            [token if learn else token | GIVEN for token, learn in zip(row[:size], learned[:size], strict=True)]
            for row, learned in encoded
        ]
    return {"tokens": tokens, "fate": fates}


def _fate(row: list[int], learned: list[bool], size: int) -> Fate:
    if not row:
        return Fate.EMPTY
    if not any(learned[1:size]):  # nothing comes before the first token that could predict it
        return Fate.TARGETLESS
    return Fate.CUT if len(row) > size else Fate.DOCUMENT


def _encode_conversation(
    place: str, record: Record, shape: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Token ids, and whether each is learned."""
    if shape == "prompt" and isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        # Plain text, without a template. In two parts, because the prompt will be tokenised alone when it is asked.
        parts = tokenizer([record["prompt"], record["completion"]], add_special_tokens=False)["input_ids"]
        completion = [*parts[1], tokenizer.eos_token_id]
        return parts[0] + completion, [False] * len(parts[0]) + [True] * len(completion)
    conversation = to_conversation(shape, record, place)
    try:
        return encode_messages(conversation, tokenizer)
    except OptionError as error:
        raise OptionError(f"{place}: {error}") from error


def encode_messages(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of the rendered conversation, and whether each is learned: by the template's markers, if it has any.

    A token that belongs to an answer with any of its characters is learned.
    """
    messages, tools = conversation.messages, conversation.tools
    if not messages:
        return [], []
    if not tokenizer.chat_template:
        raise OptionError("a conversation, but the tokenizer has no chat template\ngive --chat_template FILE")
    if has_markers(tokenizer, tools) and not conversation.learned_from:
        marked = tokenizer.apply_chat_template(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        return marked["input_ids"], [bool(learn) for learn in marked["assistant_masks"]]
    text = render(tokenizer, messages, tools)
    spans = learned_spans(tokenizer, conversation, text)
    rendered = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first, end = np.array(rendered["offset_mapping"], dtype=np.int64).reshape(-1, 2).T  # of each token, in characters
    learned = np.zeros(len(first), dtype=bool)
    for span_start, span_end in spans:
        learned |= (first < span_end) & (end > span_start)
    return rendered["input_ids"], learned.tolist()
