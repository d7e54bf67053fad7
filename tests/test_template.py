"""Proves chat/template.py and its use in data/: chat templates of every kind, and special tokens."""

import json
import re
import shutil
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chat.shapes import Conversation
from chat.template import DATE, check_variables, names_in
from chat.traces import check_traces
from config.checks import check_data
from config.command_line import parse
from config.errors import OptionError
from data.prepare import describe_data
from data.tokens import encode_messages
from model.build import load_config_and_tokenizer
from tests.test_chat import CALL, TOOLS, assistant, prepare_records, rows_of, user
from tests.world import PLAIN, with_markers, without_markers

# Small templates, each with one habit of a family of models.
CHATML = without_markers(PLAIN)
PHI = r"""
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
MISTRAL = r"""
{%- set ns = namespace(turns=0) %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{%- for m in messages if m.role in ['user', 'assistant'] and not m.tool_calls %}
  {%- if (m.role == 'user') != (ns.turns % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
  {%- set ns.turns = ns.turns + 1 %}
{%- endfor %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- '<s>' }}
{%- for m in messages %}
  {%- if m.role == 'user' %}
    {%- if tools and m == users[-1] %}{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}
    {{- '[INST] ' + (system if m == users[-1] else '') + m.content + '[/INST]' }}
  {%- elif m.tool_calls %}
    {{- '[CALLS][' }}
    {%- for call in m.tool_calls %}
      {%- if call.id | length != 9 %}{{ raise_exception('an id has 9 characters') }}{% endif %}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
    {%- endfor %}
    {{- ']' + eos_token }}
  {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
  {%- elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}
  {%- else %}{{ raise_exception('unknown role') }}{% endif %}
{%- endfor %}"""
GEMMA = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
  {{- '<|turn|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|end_of_turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>model\n' }}{% endif %}"""
LLAMA = r"""
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|header|>system<|/header|>\n\nToday: ' + date_string + '<|eot|>' }}
{%- for m in messages %}
  {{- '<|header|>' + m.role + '<|/header|>\n\n' }}
  {%- if m.tool_calls %}{{ (m.tool_calls[0].function | tojson) + '<|eom|>' }}
  {%- else %}{{ m.content | trim + '<|eot|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"""
LLAMA_2 = r"""
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
  {%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
GRANITE = r"""
{%- for m in messages %}{{ '<|role|>' + m.role + '<|/role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|role|>assistant<|/role|>' }}{% endif %}"""
ALWAYS = r"""
{%- for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n' + (m.content or '') }}
  {%- for call in m.tool_calls or [] %}{{ '<|call|>' + (call.function | tojson) + '<|/call|>' }}{% endfor %}
  {{- '<|eot|>' }}
{%- endfor %}{{ '<|header|>assistant<|/header|>\n' }}"""
ALWAYS_SHORT = r"""
{%- for m in messages %}{{ (' ' + m.content + eos_token) if m.role == 'assistant' else '<|u|>' + m.content + '<|/u|>' }}
{%- endfor %}{{ '<|a|>' }}"""
NEVER = r"""{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"""
DEFAULT_SYSTEM = (
    r"""{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}""" + CHATML
)
NEEDS_SYSTEM = r"""{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}""" + PLAIN
THINKING = r"""
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\n' }}
  {%- if m.role == 'assistant' %}
    {%- set words = m.content or '' %}{% set thoughts = m.reasoning_content or '' %}
    {%- if '</think>' in words %}
      {%- set thoughts = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}
      {%- set words = words.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}
    {{- words }}
    {%- for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
  {%- else %}{{ m.content }}{% endif %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
OPENS_THINKING = THINKING.replace(r"{{- '<|im_start|>assistant\n' }}", r"{{- '<|im_start|>assistant\n<think>\n' }}")
R1 = r"""
{%- set ns = namespace(tool=false) %}{{ bos_token }}
{%- for m in messages %}
  {%- if m.role == 'user' %}{% set ns.tool = false %}{{ '<|User|>' + m.content }}
  {%- elif m.role == 'tool' %}{% set ns.tool = true %}{{ '<|output|>' + m.content + '<|/output|>' }}
  {%- elif m.content is none %}
    {%- for call in m.tool_calls %}{{ '<|Assistant|><|call|>' + call.function.name + '\n' }}
      {{- call.function.arguments + '<|/call|>' }}
    {%- endfor %}{{ '<|eos|>' }}
  {%- else %}
    {{- ('<|outputs_end|>' if ns.tool else '<|Assistant|>') + m.content.split('</think>')[-1] + '<|eos|>' }}
    {%- set ns.tool = false %}
  {%- endif %}
{%- endfor %}
{%- if ns.tool %}{{ '<|outputs_end|>' }}{% elif add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
V3 = R1.replace(r"'<|Assistant|><think>\n'", "'<|Assistant|></think>'").replace(
    "'<|Assistant|>') +", "'<|Assistant|></think>') +"
)
HARMONY = r"""
{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for m in messages %}
  {%- if m.role == 'assistant' and m.tool_calls %}
    {%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
    {{- '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}
    {{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
  {%- elif m.role == 'assistant' %}
    {%- if m.thinking and loop.last %}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
    {%- endif %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
  {%- elif m.role == 'tool' %}{{ '<|start|>tool<|message|>' + m.content + '<|end|>' }}
  {%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
COMMAND = r"""
{%- for m in messages %}{{ '<|START|><|' + m.role + '|>' }}
  {{- '<|RESPONSE|>' + m.content + '<|/RESPONSE|>' if m.role == 'assistant' else m.content }}{{ '<|STOP|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START|><|assistant|>' }}{% endif %}"""
VICUNA = r"""
{%- for m in messages %}{{ ('USER: ' if m.role == 'user' else ' ASSISTANT: ') + m.content }}
  {%- if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""
LEADING_BREAK = r"""
{%- for m in messages %}{{ '\n\n' if not loop.first }}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '\n\n<|assistant|>' }}{% endif %}"""

ONE = [user("hi"), assistant("hello")]
TWO = [user("hi"), assistant("hello"), user("hi"), assistant("hello")]
SYSTEM = [{"role": "system", "content": "be brief"}, *TWO]
IN_A_ROW = [user("hi"), assistant("hello"), assistant("you")]
GREETING = [assistant("welcome"), *TWO]
QUESTION = [*TWO, user("and?")]
SPACES = [user("hi"), assistant("  \n hello\n"), user("a"), assistant(" b")]
EMPTY = [user("hi"), assistant(""), *ONE]
CALLS = [{**CALL, "id": "123456789"}]
RESULT = {"role": "tool", "content": "2"}
TOOL = [user("add"), assistant(None, tool_calls=CALLS), RESULT, assistant("it is 2"), *ONE]
TEXT_CALL = [{"function": {"name": "add", "arguments": '{"a": 1}'}}]
TEXT_TOOL = [user("add"), assistant(None, tool_calls=TEXT_CALL), RESULT, assistant("it is 2"), *ONE]
THOUGHTS = [user("1+1"), assistant("<think>\nr1\n</think>\n\n2"), user("2+2"), assistant("<think>\nr2\n</think>\n\n4")]
REASONING = [user("1+1"), assistant("2", reasoning_content="r1"), user("2+2"), assistant("4", reasoning_content="r2")]
STEPS = [
    user("add"),
    assistant(None, tool_calls=CALLS, reasoning_content="r1"),
    RESULT,
    assistant("2", reasoning_content="r2"),
]
HARMONY_STEPS = [
    user("add"),
    assistant(None, tool_calls=CALLS, thinking="t1"),
    RESULT,
    assistant("2", thinking="t2"),
    user("hi"),
    assistant("hello", thinking="t3"),
]

EXPECTED: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "Phi: EOS where there is no prompt": (PHI, TWO, ["hello<|end|>", "hello<|end|>"]),
    "Phi, one turn": (PHI, ONE, ["hello<|end|>"]),
    "Phi, two in a row": (PHI, IN_A_ROW, ["hello<|end|>", "you<|end|>"]),
    "Phi, spaces": (PHI, SPACES, ["  \n hello\n<|end|>", " b<|end|>"]),
    "Mistral: no prompt, alternation": (MISTRAL, TWO, [" hello<eos>", " hello<eos>"]),
    "Mistral, system in the last question": (MISTRAL, SYSTEM, [" hello<eos>", " hello<eos>"]),
    "Mistral, tools": (
        MISTRAL,
        TOOL,
        ['[CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]<eos>', " it is 2<eos>", " hello<eos>"],
    ),
    "Gemma: model, no system": (GEMMA, TWO, ["hello<|end_of_turn|>", "hello<|end_of_turn|>"]),
    "Gemma, ends with a question": (GEMMA, QUESTION, ["hello<|end_of_turn|>", "hello<|end_of_turn|>"]),
    "Llama": (LLAMA, SYSTEM, ["hello<|eot|>", "hello<|eot|>"]),
    "Llama, begins with an answer": (LLAMA, GREETING, ["welcome<|eot|>", "hello<|eot|>", "hello<|eot|>"]),
    "Llama, another end of a call": (
        LLAMA,
        TOOL,
        ['{"name": "add", "arguments": {"a": 1}}<|eom|>', "it is 2<|eot|>", "hello<|eot|>"],
    ),
    "Llama 2: BOS before each question": (LLAMA_2, TWO, [" hello <eos>", " hello <eos>"]),
    "Granite": (GRANITE, SYSTEM, ["hello<|end_of_text|>", "hello<|end_of_text|>"]),
    "always a prompt": (ALWAYS, TWO, ["hello<|eot|>", "hello<|eot|>"]),
    "always a prompt, two in a row": (ALWAYS, IN_A_ROW, ["hello<|eot|>", "you<|eot|>"]),
    "always a prompt, begins with an answer": (ALWAYS, GREETING, ["welcome<|eot|>", "hello<|eot|>", "hello<|eot|>"]),
    "always a prompt, tools": (
        ALWAYS,
        TOOL,
        ['<|call|>{"name": "add", "arguments": {"a": 1}}<|/call|><|eot|>', "it is 2<|eot|>", "hello<|eot|>"],
    ),
    "always a prompt, other ends": (ALWAYS_SHORT, TWO, [" hello<eos>", " hello<eos>"]),
    # Without a prompt, the model has to write the header, too.
    "never a prompt": (NEVER, TWO, ["<|im_start|>assistant\nhello<|im_end|>"] * 2),
    "default system": (DEFAULT_SYSTEM, TWO, ["hello<|im_end|>", "hello<|im_end|>"]),
    "needs a system message": (without_markers(NEEDS_SYSTEM), SYSTEM, ["hello<|im_end|>", "hello<|im_end|>"]),
    "empty answer": (CHATML, EMPTY, ["<|im_end|>", "hello<|im_end|>"]),
    "thinking, no thoughts": (THINKING, TWO, ["hello<|im_end|>", "<think>\n\n</think>\n\nhello<|im_end|>"]),
    "thinking, empty answer": (THINKING, EMPTY, ["<|im_end|>", "<think>\n\n</think>\n\nhello<|im_end|>"]),
    "thinking, in the words": (THINKING, THOUGHTS, ["2<|im_end|>", "<think>\nr2\n</think>\n\n4<|im_end|>"]),
    "thinking": (THINKING, REASONING, ["2<|im_end|>", "<think>\nr2\n</think>\n\n4<|im_end|>"]),
    "thinking, steps": (
        THINKING,
        STEPS,
        [
            '<think>\nr1\n</think>\n\n<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>',
            "<think>\nr2\n</think>\n\n2<|im_end|>",
        ],
    ),
    "thinking, earlier steps": (
        THINKING,
        [*STEPS, *ONE],
        [
            '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>',
            "2<|im_end|>",
            "<think>\n\n</think>\n\nhello<|im_end|>",
        ],
    ),
    "opens thinking": (OPENS_THINKING, REASONING, ["2<|im_end|>", "r2\n</think>\n\n4<|im_end|>"]),
    "opens thinking, in the words": (OPENS_THINKING, THOUGHTS, ["2<|im_end|>", "r2\n</think>\n\n4<|im_end|>"]),
    "R1": (R1, THOUGHTS, ["\n\n2<|eos|>", "\n\n4<|eos|>"]),
    "R1, null content": (
        R1,
        TEXT_TOOL,
        ['<|call|>add\n{"a": 1}<|/call|><|eos|>', "it is 2<|eos|>", "hello<|eos|>"],
    ),
    "DeepSeek V3": (V3, TWO, ["hello<|eos|>", "hello<|eos|>"]),
    "harmony": (
        HARMONY,
        HARMONY_STEPS,
        [
            '<|channel|>analysis<|message|>t1<|end|><|start|>assistant to=add<|message|>{"a": 1}<|call|>',
            "<|channel|>final<|message|>2<|end|>",
            "<|channel|>analysis<|message|>t3<|end|><|start|>assistant<|channel|>final<|message|>hello<|return|>",
        ],
    ),
    "Command: two tokens end a turn": (COMMAND, TWO, ["<|RESPONSE|>hello<|/RESPONSE|><|STOP|>"] * 2),
    "EOS at the very end": (VICUNA, TWO, [" hello", " hello<eos>"]),
    "white space before a turn": (LEADING_BREAK, TWO, ["hello<|end|>", "hello<|end|>"]),
}


def with_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer with this template, BOS and every token in <|...|>, [...] or <...> that the template writes."""
    names = sorted(set(re.findall(r"<\|[\w/]+\|>|\[/?[A-Z]+\]|</?think>|</?call>", template)))
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "additional_special_tokens": [*names, "<|user|>", "<|assistant|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer


def runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained_on: list[bool]) -> list[str]:
    """The text of each run of tokens that are trained on."""
    found: list[list[int]] = []
    for token, trained, before in zip(ids, trained_on, [False, *trained_on], strict=False):
        if trained and not before:
            found.append([])
        if trained:
            found[-1].append(token)
    return [tokenizer.decode(run) for run in found]


@pytest.mark.parametrize("name", EXPECTED)
def test_families(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Tokens are those of the tokenizer itself. Trained on is what the model has to write, up to what ends its turn."""
    template, messages, expected = EXPECTED[name]
    tools = TOOLS if messages in (TOOL, TEXT_TOOL) else None
    with_tokens(tokenizer, template)
    ids, trained_on = encode_messages(Conversation(messages, tools), tokenizer, {"strftime_now": "2026-01-02"})
    date = datetime(2026, 1, 2).strftime
    assert tokenizer.apply_chat_template(messages, tools, strftime_now=date)["input_ids"] == ids
    assert runs(tokenizer, ids, trained_on) == expected


def test_the_prompt_is_that_of_inference(tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokens before the last answer are the prompt that apply_chat_template gives, if the template allows it."""
    for template, messages in ((CHATML, SYSTEM), (PHI, TWO), (GEMMA, TWO), (OPENS_THINKING, REASONING), (V3, TWO)):
        with_tokens(tokenizer, template)
        ids, trained_on = encode_messages(Conversation(messages), tokenizer)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        start = len(trained_on) - trained_on[::-1].index(True) - 1
        while trained_on[start - 1]:
            start -= 1
        assert ids[:start] == prompt


def test_only_some_messages_with_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Markers decide within the turns that are trained on, and no other turn is."""
    quiet = with_markers(PLAIN).replace("{% generation %}", "quietly {% generation %}")
    for template, answer in ((with_markers(PLAIN), "hello<|im_end|>"), (quiet, "hello<|im_end|>")):
        with_tokens(tokenizer, template)
        ids, trained_on = encode_messages(Conversation(TWO, masked=frozenset({1})), tokenizer)
        assert runs(tokenizer, ids, trained_on) == [answer]
        assert trained_on.index(True) > len(ids) // 2
        ids, trained_on = encode_messages(Conversation(TWO), tokenizer)
        assert runs(tokenizer, ids, trained_on) == [answer, answer]


@pytest.mark.parametrize("template", [with_markers(PLAIN), CHATML], ids=["markers", "no markers"])
def test_white_space_outside_the_offsets(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """A tokenizer that leaves white space out of its offsets loses no token of an answer, and adds none.

    transformers' own mask loses whole answers, or marks all tokens up to the end (transformers issue 47325).
    """
    with_tokens(tokenizer, template)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    messages = [user("hi"), assistant(" bye"), user("  x "), assistant("    four"), user("y"), assistant("end  ")]
    ids, trained_on = encode_messages(Conversation(messages), tokenizer)
    assert runs(tokenizer, ids, trained_on) == [" bye<|im_end|>", "    four<|im_end|>", "end  <|im_end|>"]


def test_an_answer_at_the_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """An answer that is token 0 does not mark what follows (transformers issue 47325)."""
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    with_tokens(tokenizer, template + "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}")
    ids, trained_on = encode_messages(Conversation([assistant("A"), user("some words")]), tokenizer)
    assert runs(tokenizer, ids, trained_on) == ["A"]


def test_refusals_name_the_record(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Whatever a template raises, with markers or without, is one error with the record's place, and no probe fails."""
    good, bad = {"messages": TWO}, {"messages": [{"role": "developer", "content": "x"}, *TWO]}
    raising, dividing = refusing("m.role == 'developer'"), "{{ 1 // (messages[0].role != 'developer') }}"
    for template in (with_markers(PLAIN), CHATML):
        for refusal, words in ((raising, "no"), (dividing, "integer division or modulo by zero")):
            with_tokens(tokenizer, refusal + template)
            with pytest.raises(OptionError) as error:
                prepare_records([good, bad], tokenizer, tmp_path)
            assert "chat.jsonl: line 2: chat_template: it refuses a conversation of developer, user" in str(error.value)
            assert words in str(error.value)
            assert len(str(error.value).splitlines()) <= 3


def refusing(condition: str) -> str:
    """The beginning of a template that refuses a message m in this condition."""
    return f"{{% for m in messages if {condition} %}}{{{{ raise_exception('no') }}}}{{% endfor %}}"


@pytest.mark.parametrize("markers", [with_markers, without_markers])
def test_probes_refuse_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, markers: Any) -> None:
    """A template that refuses every probe renders the records."""
    with_tokens(tokenizer, refusing("m.content in ['question', 'a']") + markers(NEEDS_SYSTEM))
    data = prepare_records([{"messages": SYSTEM}], tokenizer, tmp_path)
    assert data.counts["train"].documents == 1
    assert data.stop_tokens == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_turn_that_cannot_be_found(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that renders these words and no others leaves nothing to compare."""
    with_tokens(tokenizer, refusing("m.content not in ['hi', 'hello']") + CHATML)
    with pytest.raises(OptionError, match="cannot find where turn 1 of a conversation begins and ends"):
        encode_messages(Conversation(ONE), tokenizer)


@pytest.mark.parametrize("markers", [with_markers, without_markers])
@pytest.mark.parametrize("role", ["system", "tool", "assistant"])
def test_a_message_without_a_trace(tokenizer: PreTrainedTokenizerBase, role: str, markers: Any) -> None:
    """A message that the template drops is an error, with its number and role. Dropped reasoning is not."""
    skipping = PLAIN.replace("for message in messages", f"for message in messages if message.role != '{role}'")
    with_tokens(tokenizer, markers(skipping))
    messages = [user("hi"), {"role": role, "content": "lost"}, user("more"), assistant("fine")]
    with pytest.raises(OptionError, match=f"the chat template drops message 1, of role {role}"):
        check_traces(tokenizer, Conversation(messages))
    with_tokens(tokenizer, THINKING)
    check_traces(tokenizer, Conversation(REASONING))


# --- Variables and dates --------------------------------------------------------------------------------------------


def test_variables_reach_every_rendering(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """enable_thinking makes the empty block a part of the prompt. Other variables have other prepared data."""
    with_tokens(tokenizer, THINKING)
    options = {"chat_template_kwargs": '{"enable_thinking": false}'}
    texts = []
    for given in ({}, options, {"chat_template_kwargs": '{"enable_thinking": true}'}):
        ((ids, trained_on),) = rows_of(prepare_records([{"messages": ONE}], tokenizer, tmp_path, **given))
        texts.append(runs(tokenizer, ids, trained_on))
    whole = ["<think>\n\n</think>\n\nhello<|im_end|>"]
    assert texts == [whole, ["hello<|im_end|>"], whole]
    ids, trained_on = encode_messages(Conversation(TWO), tokenizer, {"enable_thinking": False})  # QwenLM/Qwen3#1826
    assert runs(tokenizer, ids, trained_on) == ["hello<|im_end|>"] * 2
    assert len(list((tmp_path / "cache").glob("data-*/about.json"))) == 3


@pytest.mark.parametrize(
    ("template", "given", "complaint"),
    [
        (THINKING, '{"enable_thinkin": 1}', "does not read enable_thinkin\ndid you mean enable_thinking?"),
        (CHATML, '{"documents": []}', "does not read documents\nit reads bos_token; remove the others"),
        (THINKING, '{"add_generation_prompt": true}', "does not read add_generation_prompt"),
        (LLAMA, '{"strftime_now": "today"}', "strftime_now is a date, as 2026-01-31"),
        (LLAMA, '{"strftime_now": 3}', "strftime_now is a date, as 2026-01-31"),
        ("{% if %}", "{}", "chat_template: Expected an expression"),
    ],
)
def test_variables_that_will_not_do(
    tokenizer: PreTrainedTokenizerBase, template: str, given: str, complaint: str
) -> None:
    with_tokens(tokenizer, template.replace("{{- '<|im_start|>'", "{{- bos_token + '<|im_start|>'", 1))
    with pytest.raises(OptionError) as error:
        check_variables(tokenizer, given)
    assert complaint in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_variables_are_a_json_mapping() -> None:
    for text in ("enable_thinking", "[1]", "false"):
        with pytest.raises(OptionError, match=r"chat_template_kwargs .*: pass a JSON mapping"):
            check_data(parse(["--chat_template_kwargs", text]))
    check_data(parse(["--chat_template_kwargs", "{}"]))


def test_variables_without_a_conversation(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with_tokens(tokenizer, THINKING)
    with pytest.raises(OptionError, match="the records are no conversations"):
        prepare_records([{"text": "a"}], tokenizer, tmp_path, chat_template_kwargs='{"enable_thinking": false}')


def test_names_in_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Markers, loop controls and several templates are understood. A variable with a default is one."""
    tokenizer.chat_template = {
        "default": with_markers(PLAIN),
        "tool_use": "{% if x is not defined %}{% set x = y %}{% endif %}{% for m in messages %}{% break %}{% endfor %}",
    }
    assert names_in(tokenizer) == {"messages", "add_generation_prompt", "x", "y"}


def test_the_date_is_fixed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that writes today's date gets a fixed one, and the run says so. It can be chosen."""
    record = {"messages": ONE}
    with_tokens(tokenizer, LLAMA)
    ((ids, _),) = rows_of(prepare_records([record], tokenizer, tmp_path))
    assert "Today: 26 Jul 2024<|eot|>" in tokenizer.decode(ids)
    assert f"chat_template: writes a date; it is {DATE} in every conversation" in capsys.readouterr().err
    options = {"chat_template_kwargs": '{"strftime_now": "2026-11-28"}'}
    ((ids, _),) = rows_of(prepare_records([record], tokenizer, tmp_path, **options))
    assert "Today: 28 Nov 2026<|eot|>" in tokenizer.decode(ids)
    assert "it is 2026-11-28 in every" in capsys.readouterr().err
    options = {"chat_template_kwargs": '{"date_string": "Monday"}'}
    ((ids, _),) = rows_of(prepare_records([record], tokenizer, tmp_path, **options))
    assert "Today: Monday<|eot|>" in tokenizer.decode(ids)
    with_tokens(tokenizer, CHATML)
    capsys.readouterr()
    prepare_records([record], tokenizer, tmp_path)
    assert "date" not in capsys.readouterr().err


# --- Stop tokens, BOS and EOS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        (PHI, ["<|end|>"]),
        (MISTRAL, ["<eos>"]),
        (GEMMA, ["<|end_of_turn|>"]),
        (LLAMA, ["<|eom|>", "<|eot|>"]),
        (ALWAYS, ["<|eot|>"]),
        (R1, ["<|eos|>"]),
        (HARMONY, ["<|call|>", "<|return|>"]),
        (COMMAND, ["<|STOP|>"]),
        (with_markers(PLAIN), ["<|im_end|>"]),
        (with_markers(PLAIN).replace("'<|im_end|>' }}{% endg", "'<|im_end|>\\n' }}{% endg"), ["<|im_end|>"]),
    ],
)
def test_stop_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str, stops: list[str]) -> None:
    """Prepared or streamed, the finished model stops at what ends a turn, whatever follows it in the template."""
    with_tokens(tokenizer, template)
    tokenizer.add_tokens(["\n"])  # as Gemma's has
    expected = sorted(tokenizer.convert_tokens_to_ids(stop) for stop in stops)
    for more in ({}, {"streaming": True, "max_steps": 1}):
        assert prepare_records([{"messages": ONE}], tokenizer, tmp_path, **more).stop_tokens == expected
    for more in ({}, {"streaming": True, "max_steps": 1}):
        strings = prepare_records([{"prompt": "a", "completion": "b"}], tokenizer, tmp_path, **more)
        assert strings.stop_tokens == [tokenizer.eos_token_id]


def test_no_token_ends_a_turn(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "###")
    data = prepare_records([{"messages": ONE}], tokenizer, tmp_path)
    assert data.stop_tokens == []
    assert "no special token ends a turn, so the finished model stops at <eos> only" in capsys.readouterr().err


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, writing BOS before a text, as those of Llama and Gemma."""
    with_tokens(tokenizer, CHATML)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", bos)])
    return tokenizer


@pytest.mark.parametrize("streaming", [False, True])
def test_bos_and_eos_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, streaming: bool) -> None:
    """A prompt has the tokens of tokenizer(prompt). BOS and EOS that a text has are not added, and are counted."""
    adds_bos(tokenizer)
    records = [
        {"prompt": "one two", "completion": " three"},
        {"prompt": "<s>one two", "completion": " three"},
        {"prompt": "one two", "completion": " three<eos>"},
        {"prompt": "<s>one two", "completion": " three<eos>"},
    ]
    data = prepare_records(records, tokenizer, tmp_path, packing="none", streaming=streaming, max_steps=1)
    rows = list(islice(iter(data.train), 4)) if streaming else [data.train[index] for index in range(4)]
    prompt, completion = tokenizer("one two")["input_ids"], tokenizer(" three<eos>")["input_ids"][1:]
    assert prompt[0] == tokenizer.bos_token_id != prompt[1]
    for row in rows:
        assert row.tokens.tolist() == prompt + completion
        assert row.trained_on.tolist() == [False] * len(prompt) + [True] * len(completion)
    if not streaming:
        counts = data.counts["train"]
        assert (counts.had_bos, counts.had_eos) == (2, 2)
        lines = describe_data(data, 64)
        assert lines["added once"] == "BOS and EOS: 2 texts already began with BOS, and 2 already ended with EOS"


def test_bos_and_eos_once_in_texts_and_pairs(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    adds_bos(tokenizer)
    whole = tokenizer("one two<eos>")["input_ids"]
    records = [{"text": text} for text in ("one two", "<s>one two", "one two<eos>", "<s>one two<eos>", "")]
    data = prepare_records(records, tokenizer, tmp_path, packing="documents")
    assert [token for tokens, _ in rows_of(data) for token in tokens] == whole * 4
    assert (data.counts["train"].had_bos, data.counts["train"].had_eos) == (2, 2)
    pair = {"prompt": "<s>one", "chosen": " two<eos>", "rejected": " two"}
    pairs = prepare_records([pair], tokenizer, tmp_path, objective="dpo")
    assert pairs.train[0].tokens.tolist() == [*tokenizer("one two<eos>")["input_ids"]] * 2
    assert (pairs.counts["train"].had_bos, pairs.counts["train"].had_eos) == (2, 1)


def test_a_conversation_has_the_bos_of_its_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As apply_chat_template: BOS if the template writes it, once, and none that the tokenizer would add."""
    adds_bos(tokenizer)
    for template, number in ((GEMMA, 1), (CHATML, 0)):
        tokenizer.chat_template = template
        ((ids, _),) = rows_of(prepare_records([{"messages": ONE}], tokenizer, tmp_path))
        assert ids.count(tokenizer.bos_token_id) == number
        assert ids == tokenizer.apply_chat_template(ONE)["input_ids"]


# --- A token without an embedding -----------------------------------------------------------------------------------


@pytest.mark.fault(
    "configuration",
    "a token id beyond the vocabulary of the model",
    "refused with the record that has it, or with the tokenizer if every text may need it",
)
def test_a_token_beyond_the_vocabulary(model_dir: Path, tmp_path: Path) -> None:
    """An added token that the model has no embedding for is no obstacle, until a text contains it."""
    shutil.copytree(model_dir, tmp_path / "model")
    size = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<eos>")
    tokenizer.save_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids("<image>") == size
    _, loaded = load_config_and_tokenizer(parse(["--model_name_or_path", str(tmp_path / "model")]))
    fine = [{"text": "one"}, {"messages": ONE}, {"prompt": "a", "completion": "b"}]
    bad = [{"text": "an <image>"}, {"messages": [user("<image>"), *ONE]}, {"prompt": "a", "completion": "<image>"}]
    for good, record in zip(fine, bad, strict=True):
        assert prepare_records([good], loaded, tmp_path, packing="documents").counts["train"].documents == 1
        with pytest.raises(OptionError) as error:
            prepare_records([good, record], loaded, tmp_path)
        assert f"chat.jsonl: line 2: has the token <image>, whose id {size} is beyond the model's" in str(error.value)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": size - 1}))
    with pytest.raises(OptionError, match="its highest token id is"):  # also a token that every text may need
        load_config_and_tokenizer(parse(["--model_name_or_path", str(tmp_path / "model")]))
