"""The shapes of records that hold a conversation, and the messages that each becomes."""

import json
from dataclasses import dataclass
from typing import Any

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

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, the tools that the model may call, and which answers are masked."""

    messages: Messages
    tools: list[Any] | None = None
    masked: frozenset[int] = frozenset()  # the indices of messages of the assistant

    def trains_on(self, index: int) -> bool:
        """Whether the model is to write the message `index`: the assistant says it, and it is not masked."""
        return self.messages[index]["role"] == "assistant" and index not in self.masked


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
            masked = {index for index, message in enumerate(prompt) if message.get("role") == "assistant"}
            return Conversation(_checked(messages, place), _tools(record, place), frozenset(masked))
        case "alpaca":
            question = "\n\n".join(filter(None, [_string(record, "instruction", place), record.get("input")]))
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _string(record, "output", place)},
            ]
    if "system" in record:
        messages = [{"role": "system", "content": _string(record, "system", place)}, *messages]
    return Conversation(_checked(messages, place), _tools(record, place))


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
