"""The shapes of records that hold conversations: which columns each has, and the messages that they become.

docs/data.md has a table of every shape. A column that holds earlier turns, images or anything else that would change
the conversation is refused if nothing here reads it. Any other column that nothing reads is reported.
"""

import json
from dataclasses import dataclass
from typing import Any

from chat.messages import Messages, Turns, brief, read_messages
from config.errors import OptionError

QUESTIONS = ("instruction", "prompt", "query", "question", "input")
ANSWERS = ("output", "response", "answer")
CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "non_preferred_output")
CONVERSATIONS = ("messages", "conversations", "conversation")

SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (
        *zip(CHOSEN, REJECTED, strict=True),
        ("messages", "rejected_response"),
        ("messages", "rejected_messages"),
        ("response", "rejected_response"),
    ),
    "messages": (("messages",),),
    "sharegpt": (("conversations",), ("conversation",)),
    "prompt": (("prompt", "completion"),),
    "alpaca": tuple((question, answer) for question in QUESTIONS for answer in ANSWERS),
}

"""The columns that a shape needs: all of one of these groups."""

MEDIA = (
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
    "rejected_images",
    "rejected_videos",
    "rejected_audios",
)

REFUSED = {
    **dict.fromkeys(MEDIA, "only text can be trained on; remove the column, and what refers to it"),
    "history": "this shape has no place for earlier turns; put them into the messages",
    **dict.fromkeys(
        ("system", "system_prompt", "tools", "functions"),
        "a prompt and an answer in plain text have no place for it\n"
        "rename the column prompt to instruction, and completion to output, to render them as messages",
    ),
    "rejected_tools": "both answers must have the tools of the column tools",
    "chat_template_kwargs": "a template can only have arguments for all records; remove the column",
}

"""Columns that would change the conversation, so that a record is refused if its shape does not read them."""

PlainText = dict[str, str]

"""A prompt and its completion, which are used without a chat template."""


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, the tools that the model may call, and which answers are masked."""

    messages: Messages
    tools: list[Any] | None = None
    masked: frozenset[int] = frozenset()  # the indices of messages of the assistant

    def trains_on(self, index: int) -> bool:
        """Whether the model is to write the message `index`: the assistant says it, and it is not masked."""
        return self.messages[index]["role"] == "assistant" and index not in self.masked

    def with_last_turn_only(self) -> "Conversation":
        """This conversation, with all answers masked except the last one."""
        answers = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        return Conversation(self.messages, self.tools, self.masked | frozenset(answers[:-1]))


def shapes_of(record: dict[str, Any], text_column: str) -> list[str]:
    """The shapes that the columns of a record fit. A column text beside others is what these look like, rendered.

    But it is a shape of its own if the option text_column names it, or if the other columns are no usual pair.
    """
    columns = {column for column, value in record.items() if value is not None}
    shapes = [shape for shape, groups in SHAPES.items() if any(set(group) <= columns for group in groups)]
    usual = shapes and (shapes != ["alpaca"] or {"instruction", "output"} <= columns)
    if text_column in columns and not (usual and text_column == "text"):
        shapes.append("text")
    return shapes


def unpaired_preference(record: dict[str, Any]) -> str | None:
    """The column that says whether an answer is good, if the record is one for KTO."""
    if record.get("kto_tag") is not None:
        return "kto_tag"
    return "label" if isinstance(record.get("label"), bool) else None


def read_record(shape: str, record: dict[str, Any], place: str) -> tuple[list[Conversation | PlainText], list[str]]:
    """The conversation of a record, or the chosen and the rejected one of a pair, and the columns that are not used.

    `shape` is one of SHAPES. Both of a pair have a common prompt, which is masked. Raises OptionError with the `place`
    of the record if it is malformed, or has a column of REFUSED that its shape does not read.
    """
    columns = _Columns(record, place)
    conversations: list[Conversation | PlainText]
    match shape:
        case "preference":
            conversations = _pair(columns)
        case "prompt":
            answer = columns.take("completion")
            conversations = _answered(columns, _prompt(columns), {"completion": answer})
        case "alpaca":
            answer = Turns([{"role": "assistant", "content": columns.text(*ANSWERS)}])
            conversations = [_conversation(columns, _question(columns), answer, trained_from=0)]
        case _:
            turns = columns.messages(*(column for (column,) in SHAPES[shape]))
            conversations = [_conversation(columns, Turns(), turns, trained_from=0)]
    return conversations, columns.unused()


class _Columns:
    """The columns of a record, and which of them were read. A column that holds null is one that is not there."""

    def __init__(self, record: dict[str, Any], place: str) -> None:
        self.values = {column: value for column, value in record.items() if value is not None}
        self.place = place
        self.read: set[str] = set()

    def name(self, *names: str) -> str:
        """The only one of the columns that the record has, or the first name."""
        found = [name for name in names if name in self.values]
        if len(found) > 1:
            found = [name for name in found if self.values[name] not in ("", [])] or found[:1]
        if len(found) > 1:
            raise OptionError(f"{self.place}: {' and '.join(found)} could each be meant; remove or rename one of them")
        return found[0] if found else names[0]

    def take(self, *names: str) -> Any:
        """The value of the only one of the columns that the record has, or None."""
        name = self.name(*names)
        self.read.add(name)
        return self.values.get(name)

    def text(self, *names: str, missing: str | None = None) -> str:
        """The text in the only one of the columns that the record has, or `missing`."""
        name = self.name(*names)
        self.read.add(name)
        value = self.values.get(name, missing)
        if not isinstance(value, str):
            raise OptionError(f"{self.place}: {name} must be text, and is {brief(value)}")
        return value

    def decoded(self, *names: str) -> Any:
        """The value of a column that may hold JSON in a text. Some data sets use it because a column has one type."""
        name = self.name(*names)
        value = self.take(name)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{self.place}: {name} is not JSON: {error}") from error

    def messages(self, *names: str) -> Turns:
        """The messages in the only one of the columns that the record has."""
        name = self.name(*names)
        value = self.values.get(name)
        as_json = isinstance(value, str) and value.lstrip().startswith("[")
        return read_messages(self.decoded(name) if as_json else self.take(name), name, self.place)

    def tools(self) -> list[Any] | None:
        """The tools that the model may call. A tool without a type gets the one that templates expect."""
        tools = self.decoded("tools", "functions")
        if tools is None:
            return None
        if not isinstance(tools, list):
            raise OptionError(f"{self.place}: tools must be a list, and is {brief(tools)}")
        return [
            {"type": "function", "function": tool}
            if isinstance(tool, dict) and "name" in tool and not {"type", "function"} & tool.keys()
            else tool
            for tool in tools
        ]

    def unused(self) -> list[str]:
        """The columns that hold something and were not read. Raises OptionError for one of REFUSED."""
        unused = [name for name, value in self.values.items() if name not in self.read and value not in ("", [], {})]
        for name in unused:
            if name in REFUSED:
                raise OptionError(f"{self.place}: column {name}: {REFUSED[name]}")
        return unused


def _question(columns: _Columns) -> Turns:
    """Earlier rounds, and the question of a record that is not a list of messages. Its parts are joined by a newline.

    LLaMA-Factory and ms-swift join them in this way, too.
    """
    turns = _history(columns)
    first = "instruction" if "instruction" in columns.values else "prompt"
    if isinstance(columns.values.get(first), list | dict):
        return _joined(turns, read_messages(columns.take(first), first, columns.place))
    if not any(name in columns.values for name in QUESTIONS):
        columns.text("instruction")
    parts = [columns.text(first, missing=""), columns.text("query", "question", missing="")]
    parts.append(columns.text("input", "context", missing=""))
    return _joined(turns, Turns([{"role": "user", "content": "\n".join(filter(None, parts))}]))


def _history(columns: _Columns) -> Turns:
    """The earlier rounds in a column `history`: pairs of a question and an answer."""
    rounds = columns.decoded("history") or []
    turns = Turns()
    for number, pair in enumerate(rounds if isinstance(rounds, list) else [rounds]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str | None) for text in pair):
            raise OptionError(
                f"{columns.place}: history must be pairs of a question and an answer, and {number} is {brief(pair)}"
            )
        turns.messages += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), pair, strict=True)
            if text is not None
        ]
    return turns


def _prompt(columns: _Columns) -> Turns | str:
    """The column prompt: messages or a text."""
    value = columns.take("prompt")
    return value if isinstance(value, str) else read_messages(value, "prompt", columns.place)


def _pair(columns: _Columns) -> list[Conversation | PlainText]:
    """The chosen and the rejected conversation of a pair."""
    if isinstance(columns.values.get("input"), dict):  # OpenAI: {"input": {"messages": ..., "tools": ...}, ...}
        columns.values |= columns.values.pop("input")
    if "rejected_messages" in columns.values:  # ms-swift: two conversations
        return _with_common_beginning(columns, columns.messages("messages"), columns.messages("rejected_messages"))
    if any(name in columns.values for name in CHOSEN):
        return _chosen_and_rejected(columns, columns.name(*CHOSEN), columns.name(*REJECTED))
    rejected = columns.take("rejected_response")  # ms-swift: another end of a conversation
    if "messages" not in columns.values:
        answers = {"response": columns.take("response"), "rejected_response": rejected}
        return _answered(columns, _question(columns), answers)
    turns = columns.messages("messages")
    users = [index for index, message in enumerate(turns.messages) if message["role"] == "user"]
    prompt, chosen = _split(turns, max(users, default=-1) + 1)
    return _answered(columns, prompt, {"messages": chosen, "rejected_response": rejected})


def _chosen_and_rejected(columns: _Columns, chosen: str, rejected: str) -> list[Conversation | PlainText]:
    """The conversations of two columns, which hold answers or conversations with the prompt at their beginning."""
    answers = {name: columns.take(name) for name in (chosen, rejected)}
    if not any(isinstance(answer, str) for answer in answers.values()):
        sides = [read_messages(answer, name, columns.place, "assistant") for name, answer in answers.items()]
        if any(side.messages and side.messages[0]["role"] in ("user", "system", "developer") for side in sides):
            if not isinstance(columns.values.get("prompt"), list):
                return _with_common_beginning(columns, *sides)
            return _answered(columns, _prompt(columns), dict(zip(answers, sides, strict=True)))
    if column := next((name for name in CONVERSATIONS if name in columns.values), None):
        return _answered(columns, columns.messages(column), answers)
    if any(name in columns.values for name in QUESTIONS if name != "prompt"):
        return _answered(columns, _question(columns), answers)
    if "prompt" not in columns.values:
        raise OptionError(f"{columns.place}: {chosen} and {rejected} are answers, but the record has no prompt")
    return _answered(columns, _prompt(columns), answers)


def _with_common_beginning(columns: _Columns, chosen: Turns, rejected: Turns) -> list[Conversation | PlainText]:
    """Two conversations, whose prompt is what both begin with. A text in the column prompt is a copy of a message."""
    same = [one == other for one, other in zip(chosen.messages, rejected.messages, strict=False)]
    length = [*same, False].index(False)
    prompt, chosen = _split(chosen, length)
    if any(message.get("content") == columns.values.get("prompt") for message in prompt.messages):
        columns.take("prompt")
    return _answered(columns, prompt, {"chosen": chosen, "rejected": _split(rejected, length)[1]})


def _answered(columns: _Columns, prompt: Turns | str, answers: dict[str, Any]) -> list[Conversation | PlainText]:
    """A conversation for each answer to a prompt. A text is the answer of the assistant; if all is text, it stays text.

    An answer may repeat the messages of the prompt.
    """
    if isinstance(prompt, str):
        if all(isinstance(answer, str) for answer in answers.values()):
            return [{"prompt": prompt, "completion": answer} for answer in answers.values()]
        prompt = Turns([{"role": "user", "content": prompt}])
    sides = [
        answer if isinstance(answer, Turns) else read_messages(answer, name, columns.place, "assistant")
        for name, answer in answers.items()
    ]
    length = len(prompt.messages)
    if length and all(side.messages[:length] == prompt.messages for side in sides):
        sides = [_split(side, length)[1] for side in sides]
    return [_conversation(columns, prompt, side, trained_from=len(prompt.messages)) for side in sides]


def _conversation(columns: _Columns, prompt: Turns, answer: Turns, trained_from: int) -> Conversation:
    """Messages in their order, with the columns system and tools. The first `trained_from` messages are masked."""
    turns = _joined(prompt, answer)
    system = columns.text("system", "system_prompt", missing="")
    if system and turns.messages and turns.messages[0]["role"] in ("system", "developer"):
        if turns.messages[0].get("content") != system:
            raise OptionError(f"{columns.place}: has a column system and another system message; remove one of them")
    elif system:
        turns = _joined(Turns([{"role": "system", "content": system}]), turns)
        trained_from = trained_from and trained_from + 1
    for index, mark in turns.marks.items():
        if mark and index < trained_from:
            raise OptionError(f"{columns.place}: message {index} is marked to be trained on, but belongs to the prompt")
    masked = {*range(trained_from), *(index for index, mark in turns.marks.items() if not mark)}
    answers = {index for index, message in enumerate(turns.messages) if message["role"] == "assistant"}
    return Conversation(turns.messages, columns.tools(), frozenset(masked & answers))


def _joined(first: Turns, second: Turns) -> Turns:
    shift = len(first.messages)
    marks = {shift + index: mark for index, mark in second.marks.items()}
    return Turns([*first.messages, *second.messages], {**first.marks, **marks})


def _split(turns: Turns, length: int) -> tuple[Turns, Turns]:
    """The first `length` messages, and the others."""
    first = {index: mark for index, mark in turns.marks.items() if index < length}
    others = {index - length: mark for index, mark in turns.marks.items() if index >= length}
    return Turns(turns.messages[:length], first), Turns(turns.messages[length:], others)


def without_padding(value: Any) -> Any:
    """The value without keys that hold null, because Arrow gives every record the keys of all records.

    The content of a message stays, because null is what it holds beside tool calls.
    """
    if isinstance(value, dict):
        return {
            key: without_padding(item)
            for key, item in value.items()
            if item is not None or (key == "content" and value.get("role") is not None)
        }
    return [without_padding(item) for item in value] if isinstance(value, list) else value
