"""Messages of any spelling, as the chat templates of transformers expect them.

A message has a `role` (user, assistant, system, developer or tool) and a `content`, which is a text or None. A message
of the assistant may have `tool_calls`. All other keys stay for the template, except the marks that say whether a
message is trained on.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from config.errors import OptionError

Messages = list[dict[str, Any]]

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "observations", "tool_response", "tool_results", "ipython"), "tool"),
    **dict.fromkeys(("function", "function_response"), "tool"),  # the result of a function, as in OpenAI's old API
    **{"system": "system", "developer": "developer"},
}

"""Every known role of a message with a text, and its role in a chat template."""

CALL_ROLES = ("function_call", "tool_call")  # of a message whose text is what a function is called with, as JSON

MARKS = ("loss", "loss_scale", "train", "training", "weight")

"""The keys that say whether a message is trained on, of ms-swift (the first two), axolotl (the next two) and OpenAI."""

DETAILED_MARKS = ("train_detail", "training_detail")  # axolotl: positions within a message


class Arguments(dict[str, Any]):
    """The arguments of a tool call: an object to templates that encode it, and its JSON to those that print it."""

    def __init__(self, arguments: dict[str, Any], as_json: str) -> None:
        super().__init__(arguments)
        self._json = as_json  # with an underscore, because a template finds an argument as arguments.NAME

    def __str__(self) -> str:
        return self._json

    def __add__(self, text: str) -> str:
        return self._json + text

    def __radd__(self, text: str) -> str:
        return text + self._json


@dataclass
class Turns:
    """Messages, and for those with a mark, by their index, whether they are trained on."""

    messages: Messages = field(default_factory=list)
    marks: dict[int, bool] = field(default_factory=dict)

    def append(self, message: dict[str, Any], mark: bool | None) -> None:
        if mark is not None:
            self.marks[len(self.messages)] = mark
        self.messages.append(message)


def read_messages(value: Any, column: str, place: str, role_of_text: str | None = None) -> Turns:
    """The messages of a column: a list of messages, a single one, or a text, which is a message of `role_of_text`.

    Raises OptionError with the `place` of the record if a message has no role or text, or holds what is not text.
    """
    if role_of_text and isinstance(value, str):
        value = {"role": role_of_text, "content": value}
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        kinds = "text or a list of messages" if role_of_text else "a list of messages"
        raise OptionError(f"{place}: {column} must be {kinds}, and is {brief(value)}")
    turns = Turns()
    of = "" if column in ("messages", "conversations", "conversation") else f" of {column}"
    for index, message in enumerate(value):
        for one in _split_round(message):
            _add(turns, one, f"{place}: message {index}{of}")
    return turns


def brief(value: Any) -> str:
    """The beginning of a value, on one line, for messages."""
    return " ".join(str(value).split())[:100]


def _split_round(message: dict[str, Any]) -> Messages:
    """The question and the answer of a round of ms-swift, such as {"human": text, "assistant": text}."""
    users, answers = (
        [key for key in message if ROLES.get(key) == role and isinstance(message[key], str)]
        for role in ("user", "assistant")
    )
    if {"role", "from"} & message.keys() or len(users) != 1 or len(answers) != 1:
        return [message]
    others = {key: value for key, value in message.items() if key not in (*users, *answers)}
    return [
        {"role": "user", "content": message[users[0]]},
        {"role": answers[0], "content": message[answers[0]], **others},
    ]


def _add(turns: Turns, given: dict[str, Any], where: str) -> None:
    """Append a message to `turns`, or add its tool calls to the turn of the assistant that ends there."""
    message = dict(given)
    has_content = bool({"content", "value"} & message.keys())
    role, content = _one_of(message, ("role", "from"), where), _one_of(message, ("content", "value"), where)
    if not isinstance(role, str):
        raise OptionError(f"{where} must have a role and a content, and is {brief(given)}")
    mark = _mark(message, where)
    if role.replace("-", "_") in CALL_ROLES:
        content, message["tool_calls"] = _calls_of_text(content, where)
        if turns.messages and turns.messages[-1]["role"] == "assistant" and content is None:
            if mark is not None and mark != turns.marks.get(len(turns.messages) - 1, True):
                raise OptionError(f"{where} belongs to the turn of the message before it, but is marked otherwise")
            last = turns.messages[-1]
            last["tool_calls"] = [*(last.get("tool_calls") or []), *message["tool_calls"]]
            return
        role = "assistant"
    elif isinstance(message.get("function_call"), dict):  # OpenAI's old API
        message["tool_calls"] = _calls_of_text(message.pop("function_call"), where)[1]
    elif message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    role = ROLES.get(role.replace("-", "_"), role)
    if mark and role != "assistant":
        raise OptionError(f"{where}, of role {role}, is marked to be trained on; only the assistant's messages can be")
    for key in ("reasoning_content", "thinking"):
        if isinstance(message.get(key), list):
            message[key] = _text(message[key], where)
    content = _text(content, where) if isinstance(content, list) else content
    if not isinstance(content, str | None):
        raise OptionError(f"{where} must have a role and a content, and is {brief(given)}")
    if content is None and not message.get("tool_calls"):
        raise OptionError(f"{where}, of role {role}, has no content")
    # A null content stays, and so does a missing one, because templates treat them differently.
    turns.append({"role": role, **({"content": content} if has_content else {}), **message}, mark)


def _one_of(message: dict[str, Any], keys: tuple[str, str], where: str) -> Any:
    """Take the value of either key out of a message."""
    first, second = (message.pop(key, None) for key in keys)
    if first is not None and second is not None and first != second:
        raise OptionError(f"{where} has {keys[0]} and {keys[1]}, which differ; remove one of them")
    return second if first is None else first


def _mark(message: dict[str, Any], where: str) -> bool | None:
    """Take the marks out of a message: whether it is trained on, or None without a mark."""
    for key in DETAILED_MARKS:
        if message.pop(key, None):
            raise OptionError(f"{where}: {key} marks positions within a message; only whole messages can be marked")
    given = {key: value for key in MARKS if (value := message.pop(key, None)) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise OptionError(f"{where}: {key} is {brief(value)}; only true, false, 0 and 1 can be followed")
    if len({bool(value) for value in given.values()}) > 1:
        raise OptionError(f"{where} has marks that contradict each other: {given}")
    return bool(next(iter(given.values()))) if given else None


def _text(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of parts."""
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = (
            next((part[key] for key in ("text", "content", "value") if key in part), None) if kind == "text" else None
        )
        if not isinstance(text, str):
            raise OptionError(f"{where} has a part of type {kind}; only parts with a text can be trained on")
        if any(part.get(key) is not None for key in MARKS):
            raise OptionError(f"{where} marks one of its parts; only whole messages can be marked")
        texts.append(text)
    return "".join(texts)


def _calls_of_text(value: Any, where: str) -> tuple[str | None, list[dict[str, Any]]]:
    """The text before the tool calls, or None, and the calls: an object with name and arguments, or a list of these.

    LLaMA-Factory and ms-swift write them as JSON. A thought may come before it, or any text before JSON in <tool_call>.
    """
    before = None
    if isinstance(value, str):
        tagged = re.fullmatch(r"(.*?)((<tool_call>(?:(?!</tool_call>).)*</tool_call>\s*)+)", value, re.DOTALL)
        match = tagged or re.fullmatch(r"(\s*<think>.*</think>\s*)?(.*)", value, re.DOTALL)
        assert match
        before = match[1] or None
        texts = re.findall(r"<tool_call>(.*?)</tool_call>", match[2], re.DOTALL) if tagged else [match[2]]
        try:
            values = [json.loads(text) for text in texts]
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{where} must call a tool with JSON, and is {brief(match[2])}: {error}") from error
        value = values if tagged else values[0]
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise OptionError(f"{where} must call a tool with its name and its arguments, and is {brief(call)}")
    functions = [{key: call[key] for key in call if key != "id"} for call in calls]
    return before, _tool_calls(
        [
            {"type": "function", **({"id": call["id"]} if "id" in call else {}), "function": function}
            for call, function in zip(calls, functions, strict=True)
        ],
        where,
    )


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with arguments that are encoded once. OpenAI has them as JSON in a text."""
    try:
        calls = json.loads(calls) if isinstance(calls, str) else calls
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{where}: tool_calls is not JSON: {error}") from error
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise OptionError(f"{where}: tool_calls must be a list of objects, and is {brief(calls)}")
    return [
        {**call, "function": _function(call["function"], where)}
        if isinstance(call.get("function"), dict)
        else _function(call, where)
        for call in calls
    ]


def _function(function: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        return {**function, "arguments": Arguments(arguments, json.dumps(arguments, ensure_ascii=False))}
    if not isinstance(arguments, str):
        return function
    try:
        decoded = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{where}: the arguments of a tool call are not JSON: {brief(arguments)}") from error
    if not isinstance(decoded, dict):
        raise OptionError(f"{where}: the arguments of a tool call must be a JSON object, and are {brief(arguments)}")
    return {**function, "arguments": Arguments(decoded, arguments or "{}")}
