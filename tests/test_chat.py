"""Proves chat/ and data/tokens.py: all shapes of conversations, and which tokens are trained on."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chat.shapes import Conversation
from config.errors import OptionError
from config.options import Options
from data.prepare import GRAY, GREEN, Data, prepare_data, show_examples
from data.tokens import encode_messages
from tests.launch import train_ok
from tests.world import PLAIN, with_markers, without_markers

# A template like those of reasoning models. The last answer shows its reasoning, earlier answers do not. An answer is
# trimmed. Tools are described first and called after the answer, and their results are a user's turn.
REASONING = r"""
{%- set last = namespace(question=0) %}
{%- for message in messages if message.role == 'user' %}
  {%- set last.question = messages.index(message) %}
{%- endfor %}
{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
  {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
  {%- if message.role == 'assistant' %}BEGIN
    {%- if loop.index0 > last.question %}
      {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}
    {%- endif %}
    {{- (message.content or '') | trim }}
    {%- for call in message.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
    {{- '<|im_end|>' }}END
  {%- else %}{{ message.content + '<|im_end|>' }}{% endif %}
  {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}]
CONVERSATIONS = {
    "one turn": [user("hi"), assistant("hello you")],
    "several turns": [
        user("hi"),
        assistant("hello"),
        user("more"),
        assistant(" sure, more\n\n"),
        user("?"),
        assistant("!"),
    ],
    "system": [{"role": "system", "content": "be brief"}, user("hi"), assistant("hello")],
    "the same twice": [user("hello"), assistant("hello"), user("hello"), assistant("hello")],
    "an answer like a turn": [user("a"), assistant("<|im_start|> assistant is a word"), user("b"), assistant("c")],
    "two answers in a row": [user("hi"), assistant("hello"), assistant("you")],
    "reasoning": [
        user("1+1"),
        assistant("2", reasoning_content="one more"),
        user("+1"),
        assistant("3", reasoning_content="3"),
    ],
    "tools": [
        user("add"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "2"},
        assistant("it is 2"),
        user("again"),
        assistant("it is 2", tool_calls=[CALL]),
    ],
    "ends with a question": [user("hi"), assistant("hello"), user("and?")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", [PLAIN, REASONING], ids=["plain", "reasoning"])
def test_mask_without_markers_is_that_of_markers(tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
    """A template without markers gives the ids and the mask that transformers gives for the template with them."""
    messages = CONVERSATIONS[name]
    tools = TOOLS if name == "tools" and template == REASONING else None
    if template == PLAIN:
        messages = [message for message in messages if message["content"] is not None]
    tokenizer.chat_template = with_markers(template)
    marked = tokenizer.apply_chat_template(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
    conversation = Conversation(messages, tools)
    ids, trained_on = encode_messages(conversation, tokenizer)
    assert (ids, trained_on) == (marked["input_ids"], [mask == 1 for mask in marked["assistant_masks"]])
    assert 0 < sum(trained_on) < len(ids)
    tokenizer.chat_template = without_markers(template)
    assert encode_messages(conversation, tokenizer) == (ids, trained_on)
    assert tokenizer.apply_chat_template(messages, tools, return_dict=True)["input_ids"] == ids


def test_what_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each answer is trained on with the token that ends its turn, and nothing else that the template writes."""
    ids, trained_on = encode_messages(Conversation(CONVERSATIONS["several turns"]), tokenizer)
    text = tokenizer.decode([token for token, trained in zip(ids, trained_on, strict=True) if trained])
    assert text == "hello<|im_end|> sure, more\n\n<|im_end|>!<|im_end|>"


def prepare_records(
    records: Sequence[object], tokenizer: PreTrainedTokenizerBase, directory: Path, **options: Any
) -> Data:
    path = directory / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"block_size": 64, "validation_split_percentage": 0, **options}
    return prepare_data(Options(train_file=str(path), data_cache_dir=str(directory / "cache"), **settings), tokenizer)


def rows_of(data: Data) -> list[tuple[list[int], list[bool]]]:
    sequences = (data.train[index] for index in range(len(data.train)))
    return [(sequence.tokens.tolist(), sequence.trained_on.tolist()) for sequence in sequences]


MESSAGES = {"messages": [user("what\n\nnow"), assistant("that")]}


@pytest.mark.parametrize(
    ("shape", "record"),
    [
        ("messages", MESSAGES),
        ("sharegpt", {"conversations": [{"from": "human", "value": "what\n\nnow"}, {"from": "gpt", "value": "that"}]}),
        ("prompt", {"prompt": [user("what\n\nnow")], "completion": [assistant("that")]}),
        ("alpaca", {"instruction": "what\n", "input": "now", "output": "that"}),
        ("alpaca", {"instruction": "what\n\nnow", "input": "", "output": "that", "text": "something else"}),
    ],
)
def test_shapes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, shape: str, record: dict[str, Any]) -> None:
    """A conversation gives one and the same sequence in every shape. The shape is detected, and can be forced."""
    data = prepare_records([record], tokenizer, tmp_path)
    assert data.counts["train"].shape == shape
    assert data.packing == "documents"
    (tmp_path / "messages").mkdir()
    assert rows_of(data) == rows_of(prepare_records([MESSAGES], tokenizer, tmp_path / "messages"))
    assert rows_of(data) == rows_of(prepare_records([record], tokenizer, tmp_path, data_format=shape))


def test_prompt_and_completion_as_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Strings are used without a template. The completion and the EOS after it are trained on."""
    data = prepare_records([{"prompt": "one two", "completion": " three"}], tokenizer, tmp_path)
    prompt, completion = tokenizer("one two")["input_ids"], [*tokenizer(" three")["input_ids"], tokenizer.eos_token_id]
    assert rows_of(data) == [(prompt + completion, [False] * len(prompt) + [True] * len(completion))]


def test_only_the_completion_is_learned(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """An answer in the prompt is masked, with and without markers."""
    record = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    for template in (without_markers(PLAIN), with_markers(PLAIN)):
        tokenizer.chat_template = template
        ((ids, trained_on),) = rows_of(prepare_records([record], tokenizer, tmp_path))
        assert (
            tokenizer.decode([token for token, trained in zip(ids, trained_on, strict=True) if trained])
            == "d<|im_end|>"
        )


def test_text_is_learned_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = prepare_records([{"text": "one two three"}] * 9, tokenizer, tmp_path, block_size=8)
    assert (data.counts["train"].shape, data.packing, data.stop_tokens) == ("text", "concat", [tokenizer.eos_token_id])
    assert all(all(trained_on) for _, trained_on in rows_of(data))


def test_what_is_left_out_is_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Counts are exact: truncated conversations, empty ones, and those without an answer within block_size."""
    fine, long = {"messages": [user("a"), assistant("b")]}, "word " * 99
    records = [
        *[fine] * 20,
        {"messages": [user("a"), assistant(long)]},
        {"messages": [user(long), assistant("b")]},
        {"messages": [user("a")]},
        {"messages": []},
    ]
    data = prepare_records(records, tokenizer, tmp_path)
    counts = data.counts["train"]
    assert (counts.documents, counts.cut_documents) == (21, 1)
    assert (counts.targetless_documents, counts.empty_documents) == (2, 1)
    assert counts.tokens == sum(len(tokens) for tokens, _ in rows_of(data))
    assert counts.trained_tokens == sum(sum(trained_on) for _, trained_on in rows_of(data))
    assert data.stop_tokens == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with pytest.raises(OptionError) as error:
        prepare_records(records, tokenizer, tmp_path, max_targetless_fraction=0.08)
    assert "2 of 24 records have no token to train on" in str(error.value)
    assert "chat.jsonl: line 22: '<|im_start|>user" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": "hi"}, "line 2: messages must be a list of messages, and is hi"),
        ({"messages": [user("a"), {"role": "assistant", "content": 3}]}, "line 2: message 1 must have a role"),
        ({"messages": [{"content": "a"}]}, "line 2: message 0 must have a role"),
        ({"messages": [assistant(None)]}, "line 2: message 0, of role assistant, has no content"),
        ({"messages": [user("a")], "tools": "{"}, "line 2: tools is not JSON"),
        ({"other": 1}, "line 2: messages must be a list of messages, and is None"),
        ({"text": "a"}, "line 2: its columns are of the shape text, but the first record is of the shape messages"),
        ([1], "line 2: must be a JSON object, not [1]"),
    ],
)
def test_a_bad_record_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record: Any, complaint: str) -> None:
    """A null or wrongly typed record is an error that names file and record."""
    with pytest.raises(OptionError) as error:
        prepare_records([MESSAGES, record], tokenizer, tmp_path)
    assert f"{tmp_path}/chat.jsonl: {complaint}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_conversation_among_texts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"line 2: its columns are of the shape messages, .* shape text\nkeep one"):
        prepare_records([{"text": "a"}, MESSAGES], tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "the tokenizer has no chat template\npass --chat_template FILE"),
        ("{{ raise_exception('no such role') }}", "it refuses a conversation of user, assistant: no such role"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "it writes nothing after an answer"),
        (
            "{% for m in messages %}{{ m.content if m.content != 'that' else '' }}|{{ messages | length }}{% endfor %}"
            "{% if messages[-1].content == 'that' %}other{% endif %}",
            "it writes nothing after an answer",
        ),
    ],
)
def test_templates_that_will_not_do(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str | None, complaint: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(OptionError) as error:
        prepare_records([MESSAGES], tokenizer, tmp_path)
    assert complaint in str(error.value)
    assert "line 1: " in str(error.value)


def test_markers_must_hold_the_end(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A template whose markers leave out the token that ends a turn is refused: the model would never stop."""
    marked = (
        with_markers(PLAIN)
        .replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen")
        .replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    )
    tokenizer.chat_template = marked
    with pytest.raises(OptionError, match="markers leave out what ends an answer"):
        prepare_records([MESSAGES], tokenizer, tmp_path)


def test_show(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Tokens trained on are green, and masked tokens are gray."""
    text = show_examples(prepare_records([MESSAGES], tokenizer, tmp_path).train, 5, tokenizer, True)
    assert f"{GREEN}that<|im_end|>" in text
    assert f"{GRAY}<|im_start|>user\nwhat\n\nnow<|im_end|>\n<|im_start|>assistant\n" in text


def test_the_last_prompt_is_a_message(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The chat template renders --prompt as a message of the user, and opens the answer."""
    prompt = prepare_records([MESSAGES], tokenizer, tmp_path, prompt="say 3").last_prompt
    assert prompt
    assert tokenizer.decode(prompt.tokens) == "<|im_start|>user\nsay 3<|im_end|>\n<|im_start|>assistant\n"


def test_trained_on_conversations(tiny: list[object], tmp_path: Path) -> None:
    """In a run, the template comes from a file, is exported, and the model stops where answers stopped."""
    (tmp_path / "template.jinja").write_text(without_markers(PLAIN).replace("<|im_end|>", "<eos>"))
    lines = [json.dumps({"messages": [user(f"say {n}"), assistant(str(n))]}) for n in range(200)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    options = [
        "--train_file",
        tmp_path / "chat.jsonl",
        "--chat_template",
        tmp_path / "template.jinja",
        "--max_steps",
        2,
    ]
    more = [
        "--packing",
        "documents",
        "--block_size",
        96,
        "--show_examples",
        1,
        "--output_dir",
        tmp_path / "run",
        "--prompt",
        "say 3",
    ]
    output = train_ok(2, *tiny, *options, *more)
    assert "180 documents (messages)" in output
    assert "packing documents" in output
    assert re.search(r"«\d+<eos>»", output), "marks, because the output is no terminal"
    assert "\033" not in output
    assert "--- completion of 'say 3' ---\n" in output
    exported = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert exported.chat_template == (tmp_path / "template.jinja").read_text()
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["eos_token_id"] == [
        exported.eos_token_id
    ]
