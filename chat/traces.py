"""Whether the rendered conversation shows all that its messages hold.

A template may trim a text, drop earlier reasoning, or write a tool call in its own way. It must not drop a message.
"""

import json
import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from chat.messages import CALL_ROLES, ROLES
from chat.shapes import Conversation
from chat.template import TemplateMismatchError, render
from config.errors import OptionError

OTHER = "\ue000other\ue000"  # takes the place of a text or a name; no text has these characters

SHORT = 8  # characters; a shorter text may be in a rendering by chance

STANDARD_KEYS = ("role", "content", "tool_calls")


def check_traces(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, **variables: Any) -> list[str]:
    """The keys of messages that the chat template does not use. `variables` are those of the template.

    Raises OptionError for a message whose text or tool calls leave no trace in the rendering, or whose role is unknown.
    Costs a rendering, and another one for each message with a text that is short or not found, or with tool calls.
    """
    messages, tools = conversation.messages, conversation.tools
    if not messages or not tokenizer.chat_template:
        return []
    template = tokenizer.get_chat_template(tools=tools)
    for index, message in enumerate(messages):
        if message["role"] not in ROLES.values() and not _mentions(template, message["role"]):
            raise OptionError(
                f"message {index} has the unknown role {message['role']}\n"
                f"known are {', '.join(dict.fromkeys([*ROLES, *CALL_ROLES]))}, and what the chat template names"
            )

    def check(index: int, changed: dict[str, Any], what: str) -> None:
        others = [*messages]
        others[index] = {**messages[index], **changed}
        try:
            other = render(tokenizer, others, tools, **variables)
        except TemplateMismatchError:  # the template reads what has changed
            return
        if other == text:
            raise OptionError(
                f"the chat template drops message {index}, of role {messages[index]['role']}: {what}\n"
                "pass a --chat_template that writes it, or remove it from the data"
            )

    text = unseen = render(tokenizer, messages, tools, **variables)
    for index in sorted(range(len(messages)), key=lambda index: -len(messages[index].get("content") or "")):
        message = messages[index]
        content = (message.get("content") or "").strip()
        found = next((form for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]) if form in unseen), "")
        if found:
            unseen = unseen.replace(found, OTHER, 1)  # so that it is not the trace of another message, too
        if content and (not found or len(content) < SHORT):
            check(index, {"content": OTHER}, f"its text is {content[:50]!r}")
        if calls := message.get("tool_calls"):
            check(index, {"tool_calls": _renamed(calls)}, "it has tool calls")
    keys = {key for message in messages for key, value in message.items() if value not in (None, "", [], {})}
    return sorted(key for key in keys - {*STANDARD_KEYS} if not _mentions(template, key))


def _renamed(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with another name."""
    return [
        {**call, "function": {**call["function"], "name": OTHER}}
        if isinstance(call.get("function"), dict)
        else {**call, "name": OTHER}
        for call in calls
    ]


@lru_cache
def _mentions(template: str, word: str) -> bool:
    """Whether a word stands anywhere in a template."""
    return bool(re.search(rf"\b{re.escape(word)}\b", template))
