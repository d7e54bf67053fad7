"""Proves chat/shapes.py, chat/messages.py and chat/traces.py: every shape of records, and that nothing is lost."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from chat.messages import Arguments, read_messages
from chat.shapes import Conversation, read_record
from chat.traces import check_traces
from config.errors import OptionError
from config.options import Options
from data.prepare import describe_data, prepare_data
from data.records import RawRecord, read
from data.sources import Source
from data.tokens import detect_shape, encode_messages, parsed
from tests.launch import ROOT
from tests.test_chat import REASONING, TOOLS, assistant, prepare_records, rows_of, user
from tests.world import PLAIN, with_markers, without_markers

SYSTEM = {"role": "system", "content": "be brief"}
ASKED = [user("hi"), assistant("hello"), user("add")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
GOOD, BAD = assistant("good"), assistant("bad, too")


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


# A record for each row of the table in docs/data.md, in its order, and the expected messages: a conversation, or the
# chosen and the rejected one. The last number is that of the messages that are masked: the prompt.
ANSWERED: Any = ([[*ASKED, GOOD]], 0)
TEXTS: Any = ([{"prompt": "a b", "completion": " good"}], 0)
PAIR: Any = ([[*ASKED, GOOD], [*ASKED, BAD]], 3)
SHORT_PAIR: Any = ([[user("add"), GOOD], [user("add"), BAD]], 1)
ROWS: dict[str, tuple[dict[str, Any], tuple[list[Any], int]]] = {
    "`text`, or the column that `--text_column` names": ({"text": "a b good"}, ([], 0)),
    "`messages` with `role`, `content`": ({"messages": [*ASKED, GOOD]}, ANSWERED),
    "`messages` with `from`, `value`": ({"messages": [human("hi"), gpt("hello"), human("add"), gpt("good")]}, ANSWERED),
    "`conversations` with `from`, `value`": (
        {
            "system": "be brief",
            "tools": json.dumps([TOOLS[0]["function"]]),
            "conversations": [
                human("add"),
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                gpt("it is 2"),
            ],
        },
        (
            [
                [
                    SYSTEM,
                    user("add"),
                    assistant(None, tool_calls=[CALL]),
                    {"role": "tool", "content": "2"},
                    assistant("it is 2"),
                ]
            ],
            0,
        ),
    ),
    "`conversations` with `role`, `content`": ({"conversations": [*ASKED, GOOD]}, ANSWERED),
    "`conversation` with `human`, `assistant`": (
        {"conversation": [{"human": "hi", "assistant": "hello"}, {"human": "add", "assistant": "good"}]},
        ANSWERED,
    ),
    "messages in `prompt` and `completion`": (
        {"system_prompt": "be brief", "prompt": ASKED, "completion": [GOOD]},
        ([[SYSTEM, *ASKED, GOOD]], 4),
    ),
    "texts in `prompt` and `completion`": ({"prompt": "a b", "completion": " good"}, TEXTS),
    "a text in `prompt`, messages in `completion`": (
        {"prompt": "add", "completion": [GOOD]},
        ([[user("add"), GOOD]], 1),
    ),
    "`instruction`, `input`, `output`, `history`": (
        {"instruction": "a", "input": "b", "output": "good", "system": "be brief", "history": [["hi", "hello"]]},
        ([[SYSTEM, user("hi"), assistant("hello"), user("a\nb"), GOOD]], 0),
    ),
    "`instruction`, `context`, `response`": (
        {"instruction": "a", "context": "b", "response": "good"},
        ([[user("a\nb"), GOOD]], 0),
    ),
    "`query`, `response`, `history`": ({"query": "add", "response": "good", "history": [["hi", "hello"]]}, ANSWERED),
    "`prompt`, `query`, `response`": (
        {"prompt": "a", "query": "b", "response": "good"},
        ([[user("a\nb"), GOOD]], 0),
    ),
    "`prompt`, `response`": ({"prompt": "add", "response": "good"}, ([[user("add"), GOOD]], 0)),
    "`question`, `answer`": ({"question": "add", "answer": "good"}, ([[user("add"), GOOD]], 0)),
    "messages in `chosen` and `rejected`": ({"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, PAIR),
    "messages in `prompt`, `chosen` and `rejected`": (
        {"system": "be brief", "prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
        ([[SYSTEM, *ASKED, GOOD], [SYSTEM, *ASKED, BAD]], 4),
    ),
    "texts in `prompt`, `chosen` and `rejected`": (
        {"prompt": "a b", "chosen": " good", "rejected": " bad"},
        ([*TEXTS[0], {"prompt": "a b", "completion": " bad"}], 0),
    ),
    "a text in `prompt`, messages in `chosen` and `rejected`": (
        {"prompt": "add", "chosen": [GOOD], "rejected": [BAD]},
        SHORT_PAIR,
    ),
    "`conversations`, a message in `chosen` and `rejected`": (
        {
            "conversations": [human("hi"), gpt("hello"), human("add")],
            "chosen": gpt("good"),
            "rejected": gpt("bad, too"),
        },
        PAIR,
    ),
    "`messages`, a message in `chosen` and `rejected`": ({"messages": ASKED, "chosen": GOOD, "rejected": BAD}, PAIR),
    "`instruction`, `input`, `chosen`, `rejected`": (
        {"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad, too"},
        ([[user("a\nb"), GOOD], [user("a\nb"), BAD]], 1),
    ),
    "`question`, `chosen`, `rejected`": (
        {"system": "be brief", "question": "add", "chosen": "good", "rejected": "bad, too"},
        ([[SYSTEM, user("add"), GOOD], [SYSTEM, user("add"), BAD]], 2),
    ),
    "`instruction`, `chosen_response`, `rejected_response`": (
        {"instruction": "add", "chosen_response": "good", "rejected_response": "bad, too"},
        SHORT_PAIR,
    ),
    "`messages`, a text in `rejected_response`": ({"messages": [*ASKED, GOOD], "rejected_response": "bad, too"}, PAIR),
    "`messages`, `rejected_messages`": ({"messages": [*ASKED, GOOD], "rejected_messages": [*ASKED, BAD]}, PAIR),
    "`query`, `response`, `rejected_response`": (
        {"query": "add", "response": "good", "rejected_response": "bad, too", "history": [["hi", "hello"]]},
        PAIR,
    ),
    "`input` with `messages`, `preferred_output`, `non_preferred_output`": (
        {"input": {"messages": ASKED}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        PAIR,
    ),
}


def table() -> list[tuple[str, str]]:
    """The shape and the columns of each row of the table of records in docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text()
    rows = page.partition("| shape | columns |")[2].partition("\n\n")[0].splitlines()[2:]
    return [(cells[1].strip(" `"), cells[2].strip()) for cells in (row.split("|") for row in rows)]


def test_the_table_has_all_shapes() -> None:
    """The page shows each example below, and each example has the columns of its row."""
    assert [columns for _, columns in table()] == list(ROWS)
    for columns, (record, _) in ROWS.items():
        assert set(re.findall(r"`(\w+)`", columns)) <= set(re.findall(r'"(\w+)":', json.dumps(record)))


@pytest.mark.parametrize(("shape", "columns"), table())
def test_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, shape: str, columns: str) -> None:
    """Each shape is detected, becomes the expected messages, uses all columns, and is trained on where it should be."""
    tokenizer.chat_template = without_markers(REASONING)
    record, (expected, prompt) = ROWS[columns]
    objective = "dpo" if shape == "preference" else "sft"
    assert detect_shape(Source("a", ""), RawRecord("", record, (0, 0, 0)), "auto", objective, "text") == shape
    data = prepare_records([record], tokenizer, tmp_path, objective=objective, block_size=8 if shape == "text" else 512)
    assert (data.counts["train"].shape, data.unused) == (shape, {})
    if shape == "text":
        return
    conversations, unused = read_record(shape, record, "here")
    assert unused == []
    texts = [one for one in conversations if isinstance(one, dict)]
    assert [one if isinstance(one, dict) else one.messages for one in conversations] == expected
    tokens: list[int] = []
    trained: list[bool] = []
    for messages in expected[len(texts) :]:
        answers = {index for index in range(prompt) if messages[index]["role"] == "assistant"}
        one = Conversation(messages, TOOLS if "tools" in record else None, frozenset(answers))
        ids, trained_on = encode_messages(one, tokenizer)
        tokens, trained = tokens + ids, trained + trained_on
    if not texts:
        assert rows_of(data) == [(tokens, trained)]
        assert 0 < sum(trained) < len(trained)


@pytest.mark.parametrize(
    ("record", "expected", "unused"),
    [
        ({"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, PAIR, []),
        ({"prompt": "add", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, PAIR, []),
        ({"prompt": "else", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, PAIR, ["prompt"]),
        ({"messages": [user("a")], "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, PAIR, ["messages"]),
        ({"prompt": ASKED, "chosen": "good", "rejected": BAD}, PAIR, []),
        ({"messages": json.dumps(ASKED), "chosen": "good", "rejected": "bad, too", "score": 0}, PAIR, ["score"]),
    ],
)
def test_pairs(record: dict[str, Any], expected: tuple[list[Any], int], unused: list[str]) -> None:
    """Answers may repeat the prompt, be messages or texts. A prompt that is no part of them is reported."""
    conversations, not_used = read_record("preference", record, "here")
    assert not_used == unused
    for conversation, messages in zip(conversations, expected[0], strict=True):
        assert isinstance(conversation, Conversation)
        assert conversation.messages == messages
        assert [conversation.trains_on(index) for index in range(4)] == [False, False, False, True]


# --- Messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # ms-swift: parallel calls and a call after a thought are one turn of the assistant.
        (
            [
                user("a"),
                assistant("<think>\nadd\n</think>\n"),
                {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
                {"role": "tool_call", "content": '{"name": "add", "arguments": "{\\"a\\": 1}"}'},
                {"role": "tool_response", "content": "2"},
            ],
            [
                user("a"),
                assistant("<think>\nadd\n</think>\n", tool_calls=[CALL, CALL]),
                {"role": "tool", "content": "2"},
            ],
        ),
        # LLaMA-Factory: a list of calls, and a thought before it.
        (
            [
                {"role": "human", "content": "a"},
                {"role": "function_call", "content": '<think>b</think>\n[{"name": "add", "arguments": {"a": 1}}]'},
            ],
            [user("a"), assistant("<think>b</think>\n", tool_calls=[CALL])],
        ),
        (
            [
                {
                    "from": "function_call",
                    "value": 'b<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
                    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
                }
            ],
            [assistant("b", tool_calls=[CALL, CALL])],
        ),
        # OpenAI, its old API, and an answer without a key content.
        (
            [
                {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": None},
                {"role": "function", "name": "add", "content": "2"},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "assistant", "content": "b", "tool_calls": []},
            ],
            [
                assistant(None, tool_calls=[CALL]),
                {"role": "tool", "name": "add", "content": "2"},
                {"role": "assistant", "tool_calls": [CALL]},
                assistant("b", tool_calls=[]),
            ],
        ),
        # A content of parts.
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": [], "reasoning_content": [{"type": "text", "text": "c"}]},
            ],
            [user("a b"), assistant("", reasoning_content="c")],
        ),
    ],
    ids=["ms-swift", "LLaMA-Factory", "tags", "OpenAI", "parts"],
)
def test_messages(messages: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert read_messages(messages, "messages", "here").messages == expected


def test_roles_of_sharegpt() -> None:
    roles = ["human", "user", "gpt", "assistant", "chatgpt", "bing", "bard", "model", "system", "tool", "function"]
    turns = read_messages([{"from": role, "value": "a"} for role in roles], "conversations", "here")
    expected = ["user"] * 2 + ["assistant"] * 6 + ["system", "tool", "tool"]
    assert [message["role"] for message in turns.messages] == expected


def test_arguments_are_encoded_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """Templates that encode arguments, print them or read one of them all get what they need."""
    text = '{"text": "é", "b": null}'
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    turns = read_messages([assistant(None, tool_calls=[call])], "messages", "here")
    arguments = turns.messages[0]["tool_calls"][0]["function"]["arguments"]
    assert isinstance(arguments, Arguments)
    assert arguments == {"text": "é", "b": None}
    for template, expected in {
        "{{ a | tojson }}": text,
        "{{ a }}": text,
        "{{ '<' + a + '>' }}": f"<{text}>",
        "{{ a.text }}{{ a.b is none }}": "éTrue",
        "{% for key, value in a | items %}{{ key }}{% endfor %}": "textb",
    }.items():
        source = "{% set a = messages[0].tool_calls[0].function.arguments %}" + template
        assert tokenizer.apply_chat_template(turns.messages, chat_template=source, tokenize=False) == expected


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (
            {"messages": [{"role": "narrator", "content": "a"}]},
            "unknown role narrator\nknown are user, human, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 0 has a part of type image_url",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "train": 0}]}]}, "marks one of its"),
        ({"messages": [{"role": "user", "from": "gpt", "content": "a"}]}, "message 0 has role and from, which differ"),
        (
            {"messages": [{"from": "function_call", "value": "add(\n1)"}]},
            "message 0 must call a tool with JSON, and is add",
        ),
        (
            {"messages": [{"from": "function_call", "value": '{"a": 1}'}]},
            "message 0 must call a tool with its name and",
        ),
        ({"messages": [assistant(None, tool_calls="[")]}, "message 0: tool_calls is not JSON"),
        ({"messages": [assistant(None, tool_calls=[{"name": "f", "arguments": "{"}])]}, "are not JSON: {"),
        ({"messages": [assistant(None, tool_calls=[{"name": "f", "arguments": "[]"}])]}, "must be a JSON object"),
        ({"messages": [assistant("a", weight=0.5)]}, "message 0: weight is 0.5; only true, false, 0 and 1"),
        ({"messages": [assistant("a", loss=True, train=False)]}, "message 0 has marks that contradict each other"),
        ({"messages": [assistant("a", train_detail=[{"train": False}])]}, "message 0: train_detail marks positions"),
        ({"messages": [{**user("a"), "train": True}]}, "message 0, of role user, is marked to be trained on"),
        ({"messages": [user("a"), GOOD], "images": ["a.png"]}, "column images: only text can be trained on"),
        (
            {"messages": [user("a"), GOOD], "history": [["a", "b"]]},
            "column history: this shape has no place for earlier",
        ),
        ({"messages": [user("a"), GOOD], "chat_template_kwargs": {"a": 1}}, "column chat_template_kwargs: a template"),
        ({"messages": [SYSTEM, user("a"), GOOD], "system": "b"}, "has a column system and another system message"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "column system: a prompt and an answer in plain text"),
        (
            {"prompt": [assistant("a", loss=1)], "completion": [GOOD]},
            "message 0 is marked to be trained on, but belongs",
        ),
        ({"instruction": "a", "output": 3}, "output must be text, and is 3"),
        ({"instruction": "a", "output": "b", "response": "c"}, "output and response could each be meant"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history must be pairs of a question and an answer"),
    ],
)
def test_what_cannot_be_used(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record: Any, complaint: str) -> None:
    """An error names file and line, and what is wrong there."""
    fine = {key: value for key, value in record.items() if key in ("instruction", "output", "prompt", "completion")}
    fine = {"messages": [user("a"), GOOD]} if "messages" in record else dict.fromkeys(fine, "a")
    with pytest.raises(OptionError) as error:
        prepare_records([fine, record], tokenizer, tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/chat.jsonl: line 2: ")
    assert complaint in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("record", "options", "complaint"),
    [
        ({"messages": [GOOD], "conversations": [gpt("a")]}, {}, "which fit messages and sharegpt\npass --data_format"),
        ({"text": "a", "question": "b", "answer": "c"}, {}, "which fit alpaca and text\npass --data_format"),
        ({"text": "a", "messages": [GOOD]}, {"text_column": "messages"}, "which fit messages and text"),
        ({"prompt": "a", "completion": "b", "label": True}, {}, "by its column label, as KTO needs them"),
        ({"conversations": [gpt("a")], "kto_tag": False}, {}, "by its column kto_tag, as KTO needs them"),
        ({"content": "a"}, {"data_format": "sharegpt"}, "data_format conversations: "),
    ],
)
def test_what_cannot_be_detected(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record: Any, options: dict[str, Any], complaint: str
) -> None:
    """A record of several shapes, or of a shape for another objective, is refused."""
    with pytest.raises(OptionError) as error:
        prepare_records([record], tokenizer, tmp_path, **options)
    assert complaint in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


# --- What is trained on ---------------------------------------------------------------------------------------------


def trained_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained_on: list[bool]) -> str:
    return tokenizer.decode([token for token, trained in zip(ids, trained_on, strict=True) if trained])


@pytest.mark.parametrize("markers", [with_markers, without_markers])
@pytest.mark.parametrize(
    "mark", [{"loss": False}, {"weight": 0}, {"train": False}, {"training": False}, {"loss_scale": 0.0}]
)
def test_marks(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, markers: Any, mark: dict[str, Any]) -> None:
    """A marked answer is masked and stays in the conversation, with each key and with each kind of template."""
    tokenizer.chat_template = markers(PLAIN)
    unmarked = [user("a"), assistant("b"), user("c"), assistant("d")]
    (key, no), marked = *mark.items(), [dict(message) for message in unmarked]
    marked[0][key], marked[1][key], marked[3][key] = None, no, not no
    ((ids, trained_on),) = rows_of(prepare_records([{"messages": marked}], tokenizer, tmp_path))
    assert trained_text(tokenizer, ids, trained_on) == "d<|im_end|>"
    assert ids == tokenizer.apply_chat_template(unmarked, return_dict=True)["input_ids"]


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
def test_train_on_last_turn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, streaming: bool) -> None:
    """Only the last answer is trained on. A text has no turns."""
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]}) + "\n")
    options = Options(train_file=str(path), data_cache_dir=str(tmp_path / "cache"), streaming=streaming, block_size=64)
    options.validation_split_percentage, options.train_on_last_turn = 0, True
    sequence = next(iter(prepare_data(options, tokenizer).train))
    assert trained_text(tokenizer, sequence.tokens.tolist(), sequence.trained_on.tolist()) == "d<|im_end|>"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(OptionError, match="train_on_last_turn true: a text has no turns"):
        prepare_data(options, tokenizer)


# --- Nulls, and what is not used ------------------------------------------------------------------------------------


NULLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "a", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"b": None}}}]},
    ],
    "tools": [{"function": {"name": "f", "default": None, "required": []}}],
    "system": None,
}


def test_nulls(tmp_path: Path) -> None:
    """What a line of JSON says stays: nulls and empty lists. Nulls that a data set pads with go, but not a content."""
    padded: dict[str, Any] = {
        "messages": [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
        "tools": [{"function": {"name": "f", "required": []}}],
    }
    paths = [tmp_path / "chat.jsonl", tmp_path / "chat.parquet"]
    paths[0].write_text(json.dumps(NULLS))
    datasets.Dataset.from_list([NULLS]).to_parquet(paths[1])
    for path, expected in zip(paths, (NULLS, padded), strict=True):
        (conversation,), unused = read_record("messages", parsed(next(read(Source("", "", (path,))))), "here")
        assert isinstance(conversation, Conversation)
        assert (conversation.messages, conversation.tools) == (expected["messages"], expected["tools"])
        assert unused == []


def test_an_empty_list_of_tools_stays() -> None:
    for tools, expected in ([[], []], ["[]", []], ["", None], [None, None]):
        (conversation,), _ = read_record("messages", {"messages": [user("a")], "tools": tools}, "here")
        assert isinstance(conversation, Conversation)
        assert conversation.tools == expected


def test_what_is_not_used_is_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Columns and keys that hold something and change nothing are printed, with the number of records."""
    record = {"messages": [{**user("a"), "mood": "good"}, assistant("b")], "id": 7, "label": "", "text": None}
    other = {"messages": [user("a"), assistant("b")], "source": "web"}
    data = prepare_records([record, record, other], tokenizer, tmp_path)
    assert data.unused == {"id": 2, "mood of messages": 2, "source": 1}
    line = "columns, and the records that have them: id (2), mood of messages (2), source (1)"
    assert describe_data(data, 64)["not used"] == line
    text = prepare_records([{"text": "one two three four", "id": 7}], tokenizer, tmp_path, block_size=4)
    assert text.unused == {"id": 1}
    options = Options(
        train_file=str(tmp_path / "chat.jsonl"), data_cache_dir=str(tmp_path), streaming=True, block_size=4
    )
    assert describe_data(prepare_data(options, tokenizer), 4)["not used"] == "columns id (1) of the first record"


# --- Traces ---------------------------------------------------------------------------------------------------------


ONLY_TWO = PLAIN.replace(
    "{{- '<|im_start|>'",
    "{%- if message.role not in ('user', 'assistant') %}{% continue %}{% endif %}{{- '<|im_start|>'",
)


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        (
            ONLY_TWO,
            [user("20"), {"role": "tool", "content": "20"}, GOOD],
            "drops message 1, of role tool: its text is '20'",
        ),
        (
            ONLY_TWO,
            [{"role": "system", "content": "be good and brief"}, user("a"), GOOD],
            "drops message 0, of role system",
        ),
        (
            PLAIN,
            [user("a"), assistant("b", tool_calls=[CALL])],
            "drops message 1, of role assistant: it has tool calls",
        ),
    ],
)
def test_a_message_that_leaves_no_trace(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]], complaint: str
) -> None:
    tokenizer.chat_template = without_markers(template)
    with pytest.raises(OptionError) as error:
        check_traces(tokenizer, Conversation(messages))
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        # Earlier reasoning is dropped, and an answer is trimmed.
        (REASONING, [user("a"), assistant(" b\n", reasoning_content="c d e f g"), user("h"), assistant("i")]),
        # A result of a tool is encoded again; reasoning in the content is dropped.
        (
            PLAIN.replace("{{ message.content + '", "{{ (message.content | tojson) + '"),
            [user('a "quoted" text'), assistant("b")],
        ),
        (
            PLAIN.replace("{{ message.content + '", "{{ message.content.split('</think>')[-1] + '"),
            [user("a"), assistant("<think>a long thought</think>b"), user("c"), assistant("d")],
        ),
        # The system message moves to another place; a template knows a role of its own.
        (
            PLAIN.replace("{{- '<|im_start|>'", "{{- 'narrator ' if false }}{{- '<|im_start|>'")
            .replace("{%- for message in messages %}", "{%- for message in messages[1:] %}")
            .replace("{%- if add", "{{ messages[0].content }}{%- if add"),
            [SYSTEM, {"role": "narrator", "content": "a"}, assistant("b")],
        ),
    ],
    ids=["reasoning", "encoded", "thoughts", "moved"],
)
def test_templates_that_change_a_message(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]
) -> None:
    """What real templates do to a text is no reason to refuse it."""
    tokenizer.chat_template = without_markers(template)
    assert check_traces(tokenizer, Conversation(messages)) == []
