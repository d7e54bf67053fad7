"""The text that a chat template makes of a conversation, and what of it is trained on.

The model trains on what it will have to write. In each turn of the assistant, that is the text after the prompt of
`apply_chat_template(add_generation_prompt=True)`, up to and including the token that ends the turn.
"""

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from chat.shapes import Conversation, Messages
from config.errors import OptionError

ANSWER = "\ue000answer\ue000"  # takes the place of an answer in a rendering; no text has these characters

Span = tuple[int, int]


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
    for index in filter(conversation.trains_on, range(len(conversation.messages))):
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
