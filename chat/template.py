"""The text that a chat template makes of a conversation, and what of it is trained on.

The model trains on what it will have to write. In each turn of the assistant, that is the text after the prompt of
`apply_chat_template(add_generation_prompt=True)`, up to and including the token that ends the turn.

Nothing is assumed about a template but that it renders the conversation. Templates differ in what they accept, in what
they write around a turn, and in how they write earlier turns. So a turn is found by comparison: the conversation is
rendered again with other words in one message, and the two texts are equal up to these words and after them.
"""

import difflib
import inspect
import re
import traceback
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from chat.messages import brief
from chat.shapes import Conversation, Messages
from config.errors import OptionError, first_line
from config.text import load_json
from runtime.limits import LimitError, limited

# The date that `strftime_now` writes. A fixed one, because a run that resumes tomorrow must have the same tokens. This
# is the date that Llama's templates write where they are not told another.
DATE = "2024-07-26"

WORDS = ("content", "reasoning_content", "reasoning", "thinking")  # keys of a message with text that templates write

QUESTION: Messages = [{"role": "user", "content": "a"}]

SECONDS, GIBIBYTES = 10.0, 1  # for one rendering; that of the longest conversations takes less than a second

Span = tuple[int, int]


class TemplateMismatchError(OptionError):
    """A chat template does not render a conversation, or not so that its answers can be found.

    Another conversation may fit. If a template reaches a limit (runtime/limits.py), a plain OptionError is raised.
    """


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None, **variables: Any) -> str:
    """The text of messages by the tokenizer's chat template. Raises TemplateMismatchError if the template refuses them.

    Raises OptionError if the template takes too much time or memory.
    `variables` are add_generation_prompt and what else the template reads. A date in `strftime_now` (ISO) replaces
    today's date.
    """
    try:
        with limited(SECONDS, GIBIBYTES):
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **_with_date(variables))
    except Exception as error:  # a template is a program: it may raise anything
        raise _refusal(tokenizer, messages, error) from error


def render_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None, **variables: Any
) -> tuple[str, list[Span]]:
    """The text of messages by a template with markers, and where {% generation %} marks it: [start, end) in characters.

    Raises TemplateMismatchError if the template refuses them, and OptionError if it takes too much time or memory.
    """
    known = {**tokenizer.special_tokens_map, **_with_date(variables)}
    template = tokenizer.get_chat_template(tools=tools)
    try:
        with limited(SECONDS, GIBIBYTES):
            (text,), (spans,) = render_jinja_template(
                [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **known
            )
    except Exception as error:
        raise _refusal(tokenizer, messages, error) from error
    return text, spans


def has_markers(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> bool:
    """Whether the chat template itself marks what the assistant says, with {% generation %}."""
    return bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.get_chat_template(tools=tools)))


def check_markers(tokenizer: PreTrainedTokenizerBase, **variables: Any) -> None:
    """Raises OptionError for a template that marks an answer, but not the token that ends it."""
    answer = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    for messages in (answer, [{"role": "system", "content": "system"}, *answer]):
        try:
            text, spans = render_marked(tokenizer, messages, None, **variables)
        except TemplateMismatchError:  # it may refuse this one, and none of the records
            continue
        if not "".join(text[start:end] for start, end in spans).partition("answer")[2].strip():
            raise OptionError(
                "chat_template: its {% generation %} markers leave out what ends an answer, so the model could not "
                "learn to stop\npass a --chat_template that marks it, too"
            )
        return


def check_variables(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    """The variables of the option chat_template_kwargs, a JSON mapping. Raises OptionError if no template reads one."""
    variables: dict[str, Any] = load_json(text)
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
    known = names_in(tokenizer) - reserved
    if unknown := [name for name in variables if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it reads {', '.join(sorted(known))}; remove the others"
        raise OptionError(f"chat_template_kwargs {text}: the chat template does not read {', '.join(unknown)}\n{hint}")
    try:
        _with_date(variables)
    except (TypeError, ValueError) as error:
        raise OptionError(f"chat_template_kwargs {text}: strftime_now is a date, as 2026-01-31") from error
    return variables


def names_in(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names that the tokenizer's chat templates read, and that they do not always set themselves."""
    templates = tokenizer.chat_template
    texts = list(templates.values()) if isinstance(templates, dict) else [templates or ""]
    # The search computes constant expressions of the template, so it needs the sandbox, too.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols])
    names: set[str] = set()
    for text in texts:
        plain = re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", "", text)
        try:
            with limited(SECONDS, GIBIBYTES):
                names |= jinja2.meta.find_undeclared_variables(environment.parse(plain))
        except Exception as error:
            raise OptionError(f"chat_template: {_cause(tokenizer, error)}\npass another --chat_template") from error
    return names


def trained_spans(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str, **variables: Any
) -> list[Span]:
    """Where the assistant speaks in `text`, the rendering of a conversation: for each turn, [start, end) in characters.

    This is for templates without markers. A turn starts where the prompt for it ends: the rendering of the messages
    before it, with add_generation_prompt. It ends with what the template writes after the turn whatever follows.
    Costs about three renderings for each turn. Raises TemplateMismatchError if the template does not allow it.
    """
    renderings = _Renderings(tokenizer, conversation, text, variables)
    spans: list[Span] = []
    for index in filter(conversation.trains_on, range(len(conversation.messages))):
        words = renderings.words(index, len(conversation.messages))
        start = _start(renderings, index, words) if words else 0
        end = words[1] + len(_closing(renderings, index, words)) if words else 0
        if not (spans[-1][1] if spans else 0) <= start < end:
            raise TemplateMismatchError(
                f"chat_template: cannot find where turn {index} of a conversation begins and ends\n"
                "pass a --chat_template that marks the answers with {% generation %} and {% endgeneration %}"
            )
        spans.append((start, end))
    return spans


@dataclass
class _Renderings:
    """The renderings of a conversation and of its beginnings, each made once."""

    tokenizer: PreTrainedTokenizerBase
    conversation: Conversation
    text: str  # of the whole conversation
    variables: dict[str, Any]
    made: dict[tuple[int, bool], str | None] = field(default_factory=dict)
    closings: dict[str, str] = field(default_factory=dict)  # of answers, by the role of the next message

    def __post_init__(self) -> None:
        self.made[len(self.conversation.messages), False] = self.text
        self.tokens = _token_pattern(self.tokenizer, len(self.tokenizer))

    def render(self, messages: Messages, prompt: bool = False) -> str | None:
        """The text of messages, with the prompt for an answer or without. None if the template refuses them."""
        try:
            return render(
                self.tokenizer, messages, self.conversation.tools, **self.variables, add_generation_prompt=prompt
            )
        except TemplateMismatchError:
            return None

    def first(self, length: int, prompt: bool = False) -> str | None:
        """The text of the first `length` messages."""
        if (length, prompt) not in self.made:
            self.made[length, prompt] = self.render(self.conversation.messages[:length], prompt)
        return self.made[length, prompt]

    def words(self, index: int, length: int, prompt: bool = False) -> Span | None:
        """Where the words of message `index` are in the text of the first `length` messages: [start, end).

        They are what changes if the message has other words. None if the template writes none of them.
        """
        text, messages = self.first(length, prompt), self.conversation.messages[:length]
        if text is None:
            return None
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        for changed in _reworded(messages[index], mark):
            other = self.render([*messages[:index], changed, *messages[index + 1 :]], prompt)
            if other and mark in other:
                start = _common(text, other)
                return start, len(text) - _common(text[start:][::-1], other[start:][::-1])
        return None

    def after(self, index: int, prompt: bool = False) -> str | None:
        """What the template writes after the words of message `index` if the conversation ends there."""
        text, words = self.first(index + 1, prompt), self.words(index, index + 1, prompt)
        return text[words[1] :] if text and words else None

    def has_prompts(self) -> bool:
        """Whether add_generation_prompt changes what the template writes."""
        last = max(n for n, message in enumerate(self.conversation.messages, 1) if message["role"] == "assistant")
        return self.first(last, prompt=True) != self.first(last)


def _start(renderings: _Renderings, index: int, words: Span) -> int:
    """Where turn `index` starts in the text: after as much of the prompt for it as the text has there."""
    text, prompt = renderings.text, renderings.first(index, prompt=True) if index else None
    if prompt and text.startswith(prompt):
        return len(prompt)
    if prompt:
        # The template writes earlier turns in another way, or its prompt opens a block that this turn does not have.
        # So compare what the prompt and the text write after the words of the message before.
        before = renderings.words(index - 1, len(renderings.conversation.messages))
        asked = renderings.words(index - 1, index, prompt=True)
        if before and asked and before[1] <= words[0]:
            opening = prompt[asked[1] :]
            shared = _shared(text[before[1] :], opening, renderings.tokens)
            return before[1] + len(shared) if shared == opening else min(before[1] + len(shared), words[0])
    asked_text, plain = renderings.render(QUESTION, prompt=True) or "", renderings.render(QUESTION) or ""
    opening = asked_text[len(_shared(asked_text, plain, renderings.tokens)) :]
    found = text.rfind(opening, 0, words[0]) if opening else -1
    return found + len(opening) if found >= 0 else words[0]


def _closing(renderings: _Renderings, index: int, words: Span) -> str:
    """What ends turn `index`, after its words. It is found once for all answers before messages of one role."""
    messages = renderings.conversation.messages
    role = "" if index == len(messages) - 1 else messages[index + 1]["role"]
    if messages[index].get("tool_calls"):
        return _find_closing(renderings, index, words)
    if not renderings.text.startswith(renderings.closings.get(role, "\ue000"), words[1]):
        renderings.closings[role] = _find_closing(renderings, index, words)
    return renderings.closings[role]


def _find_closing(renderings: _Renderings, index: int, words: Span) -> str:
    """What ends turn `index`, after its words: what the template writes there whatever follows.

    White space at its end is left out, because the template writes it after the model has stopped. Raises
    TemplateMismatchError if the template writes nothing after an answer.
    """
    tokens, after = renderings.tokens, renderings.text[words[1] :]
    last = index == len(renderings.conversation.messages) - 1
    alone = after if last else renderings.after(index)
    if alone is None:  # the template refuses a conversation that ends here
        return _first(tokens, after)
    if not alone.strip():
        raise TemplateMismatchError(
            "chat_template: it writes nothing after an answer, so the model could not learn to stop\n"
            "pass a --chat_template that ends an answer, with EOS or another special token; see "
            "docs/troubleshooting.md#gibberish-after-fine-tuning"
        )
    if not renderings.has_prompts():
        # The template writes the prompt for an answer never, or always. If always, it ends this text and the prompt.
        prompt = renderings.first(index, prompt=True) if index else renderings.render(QUESTION, prompt=True)
        shared = _shared_end(alone, prompt or "", tokens)
        own = alone.removesuffix(shared)
        if shared.strip() and not own.rstrip().endswith(str(renderings.tokenizer.eos_token)):
            own += _first(tokens, shared) or shared.rstrip().partition("\n")[0]
        return _shared(own.rstrip(), after, tokens)
    answered = renderings.after(index, prompt=True) or "" if last else ""
    if shared := _shared(alone, answered if last else after, tokens).rstrip():
        return shared
    if last:
        return alone.rstrip()
    # The template ends the last turn in another way. Other turns end with the first token that always follows them.
    return _first(tokens, _shared(after, renderings.after(index, prompt=True) or "", tokens))


def _reworded(message: dict[str, Any], mark: str) -> Iterator[dict[str, Any]]:
    """Messages that differ from this one only in its words. A template may refuse the first one, and take another."""
    changed = message | {key: _marked(message[key], mark) for key in (*WORDS, "tool_calls") if message.get(key)}
    if changed != message:
        yield changed
    yield message | {"content": mark}
    if message.get("tool_calls"):
        yield {"role": message["role"], "content": mark}


def _marked(value: Any, mark: str) -> Any:
    """Text becomes the mark, and so do texts in a list of parts, and the arguments of calls."""
    if isinstance(value, str):
        return mark
    if isinstance(value, list):
        return [_marked(item, mark) for item in value]
    if isinstance(value, dict):
        if isinstance(value.get("function"), dict):
            return value | {"function": _marked(value["function"], mark)}
        if "arguments" in value:
            return value | {"arguments": {mark: mark} if isinstance(value["arguments"], dict) else mark}
        return value | ({"text": mark} if "text" in value else {})
    return value


def _common(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_right(lengths, False, key=lambda length: one[:length] != other[:length])


def _shared(one: str, other: str, tokens: re.Pattern[str]) -> str:
    """What both texts begin with, without a part of an added token."""
    length = _common(one, other)
    for text in (one, other):
        for match in tokens.finditer(text):
            if match.end() > length:
                length = min(length, match.start())
                break
    return one[:length]


def _shared_end(one: str, other: str, tokens: re.Pattern[str]) -> str:
    """What both texts end with, without a part of an added token."""
    length = _common(one[::-1], other[::-1])
    for text in (one, other):
        for match in tokens.finditer(text):
            if match.start() < len(text) - length < match.end():
                length = len(text) - match.end()
    return one[len(one) - length :]


@lru_cache(maxsize=8)
def _token_pattern(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    """Matches any added token of a tokenizer with `size` tokens, and what looks like one: it may lack a template's."""
    contents = {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
    longest_first = sorted(map(re.escape, contents), key=len, reverse=True)
    return re.compile("|".join([*longest_first, r"<\|[^<>|\s]+\|>"]))


def _first(tokens: re.Pattern[str], text: str) -> str:
    """The text up to and including its first added token; nothing if it has none."""
    match = tokens.search(text)
    return text[: match.end()] if match else ""


def _with_date(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of a rendering, with `strftime_now` as the function that templates call."""
    return variables | {"strftime_now": datetime.fromisoformat(variables.get("strftime_now", DATE)).strftime}


def _refusal(tokenizer: PreTrainedTokenizerBase, messages: Messages, error: Exception) -> OptionError:
    """The error for messages that a chat template does not render."""
    roles = brief(", ".join(str(message["role"]) for message in messages))
    if isinstance(error, LimitError):
        text = f"chat_template: a conversation of {roles}: {_cause(tokenizer, error)}"
        return OptionError(f"{text}\ncorrect the template, or pass another --chat_template")
    return TemplateMismatchError(f"chat_template: it refuses a conversation of {roles}: {_cause(tokenizer, error)}")


def _cause(tokenizer: PreTrainedTokenizerBase, error: Exception) -> str:
    """The message of an error of a template, with the last line of the template that was reached, and its file."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in ("<template>", "<unknown>")]
    file = getattr(tokenizer, "chat_template_file", None) or tokenizer.name_or_path
    return first_line(error) + (f" (line {lines[-1]} of the template of {file})" if lines else "")
