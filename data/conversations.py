"""Conversations: their shapes, the text that a chat template makes of them, and what of it is trained on.

The model trains on what it will have to write. In each turn of the assistant, that is the text after the prompt of
`apply_chat_template(add_generation_prompt=True)`, up to and including the token that ends the turn.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from config.errors import OptionError

SHAPES = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}

"""The columns that a shape needs. The first shape that fits is taken."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}

ANSWER = "\ue000answer\ue000"  # takes the place of an answer in a rendering; no text has these characters

Messages = list[dict[str, Any]]

Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, the tools that the model may call, and the first message to train on."""

    messages: Messages
    tools: list[Any] | None = None
    trained_from: int = 0


def unpair(shape: str, record: dict[str, Any], place: str) -> tuple[str, list[dict[str, Any]]]:
    """The conversations of a record, and their shape: the record itself, or the chosen and the rejected one of a pair.

    Both of a pair have the shape "prompt", so their common prompt is masked. If they are lists of messages and the
    prompt is no such list, the prompt is their common beginning. Raises OptionError with the `place` of the record.
    """
    if shape != "preference":
        return shape, [record]
    record = _without_nulls(record)
    prompt, chosen, rejected = record.get("prompt"), record.get("chosen"), record.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        same = [one == other for one, other in zip(chosen, rejected, strict=False)]
        length = [*same, False].index(False)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if {type(part) for part in (prompt, chosen, rejected)} not in ({str}, {list}):
        raise OptionError(
            f"{place}: chosen and rejected must be two lists of messages, or two texts with a text as prompt, "
            f"not {str(record)[:100]}"
        )
    return "prompt", [record | {"prompt": prompt, "completion": answer} for answer in (chosen, rejected)]


def to_conversation(shape: str, record: dict[str, Any], place: str) -> Conversation:
    """The conversation of a record of any shape of SHAPES. Raises OptionError with its `place` if it is malformed."""
    record = _without_nulls(record)
    match shape:
        case "messages":
            messages = _list_of_dicts(record, "messages", place)
        case "sharegpt":
            turns = _list_of_dicts(record, "conversations", place)
            messages = [
                {"role": SHAREGPT_ROLES.get(turn.get("from", ""), turn.get("from")), "content": turn.get("value")}
                for turn in turns
            ]
        case "prompt":
            prompt = _list_of_dicts(record, "prompt", place)
            messages = [*prompt, *_list_of_dicts(record, "completion", place)]
            return Conversation(_checked(messages, place), _tools(record, place), len(prompt))
        case "alpaca":
            question = "\n\n".join(filter(None, [_string(record, "instruction", place), record.get("input")]))
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _string(record, "output", place)},
            ]
    if "system" in record:
        messages = [{"role": "system", "content": _string(record, "system", place)}, *messages]
    return Conversation(_checked(messages, place), _tools(record, place))


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None, **how: Any) -> str:
    """The text of messages by the tokenizer's chat template. Raises OptionError if the template refuses them."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **how)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise OptionError(
            f"chat_template: it refuses a conversation of {roles}: {str(error).splitlines()[0][:200]}"
        ) from error


def has_markers(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> bool:
    """Whether the chat template itself marks what the assistant says, with {% generation %}."""
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=tools)))


def check_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises OptionError for a template that marks an answer, but not the token that ends it."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens = [token for token, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    if not tokenizer.decode(tokens).partition("answer")[2].strip():
        raise OptionError(
            "chat_template: its {% generation %} markers leave out what ends an answer, so the model could not "
            "learn to stop\npass a --chat_template that marks it, too"
        )


def trained_spans(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str) -> list[Span]:
    """Where the assistant speaks in `text`, the rendering of a conversation: for each turn, [start, end) in characters.

    This is for templates without markers. A turn starts where the rendering of the messages before it ends, with the
    prompt for an answer. Its end is found by rendering the conversation again with another answer. The text before and
    after the answer must be identical in both renderings. The first messages are never rendered alone, because some
    templates write earlier turns differently from the last one. Costs a rendering for each turn. Raises OptionError if
    the template does not allow it.
    """
    question: Messages = [{"role": "user", "content": "a"}]
    opening = render(tokenizer, question, None, add_generation_prompt=True)
    opening = opening.removeprefix(render(tokenizer, question, None))
    closing = render(tokenizer, [*question, {"role": "assistant", "content": ANSWER}], None).partition(ANSWER)[2]
    closing = closing.rstrip()  # without the white space that the template writes after the model has stopped
    if not closing:
        raise OptionError(
            "chat_template: it writes nothing after an answer, so the model could not learn to stop\n"
            "pass another --chat_template"
        )
    spans = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or index < conversation.trained_from:
            continue
        replaced = [*conversation.messages]
        replaced[index] = {"role": "assistant", "content": ANSWER}
        before, found, after = render(tokenizer, replaced, conversation.tools).partition(ANSWER)
        start = before.rfind(opening) + len(opening) if opening else len(before)
        end = len(text) - len(after)
        agrees = text[:start] == before[:start] and text[end:] == after and after.startswith(closing)
        if not found or not agrees or start < len(opening) or start > end:
            raise OptionError(
                f"chat_template: cannot find where turn {index} of a conversation begins and ends\n"
                "pass a --chat_template that marks the answers with {% generation %} and {% endgeneration %}"
            )
        spans.append((start, end + len(closing)))
    return spans


def _checked(messages: Messages, place: str) -> Messages:
    """The messages, if each has a role, and a content or a tool call."""
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str | list | None):
            raise OptionError(f"{place}: message {index} must have a role and a content, and is {str(message)[:100]}")
        if content is None and "tool_calls" not in message:
            raise OptionError(f"{place}: message {index}, of role {role}, has no content")
    return messages


def _tools(record: dict[str, Any], place: str) -> list[Any] | None:
    """The column `tools`: a list, or a list as JSON. Some data sets use JSON because a column has one type."""
    tools = record.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError as error:
        raise OptionError(f"{place}: tools is not JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise OptionError(f"{place}: tools must be a list, and is {str(tools)[:100]}")
    return tools


def _list_of_dicts(record: dict[str, Any], column: str, place: str) -> Messages:
    value = record.get(column)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise OptionError(f"{place}: {column} must be a list of messages, and is {str(value)[:100]}")
    return value


def _string(record: dict[str, Any], column: str, place: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise OptionError(f"{place}: {column} must be text, and is {str(value)[:100]}")
    return value


def _without_nulls(value: Any) -> Any:
    """The value without keys that hold None, because Arrow gives every record the keys of all records."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
