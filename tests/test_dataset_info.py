"""Proves data/dataset_info.py: what LLaMA-Factory's dataset_info.json says of a data set is what is trained on."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from config.checks import check_data
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from data.dataset_info import Entry, read_entries
from data.prepare import prepare_data
from data.records import START, parsed, read
from data.sources import find_sources
from tests.test_data import tokens_of

OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}

# An entry, a record, and the record that it becomes. Questions are joined as LLaMA-Factory joins them: "prompt\nquery".
CONVERSIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        {},
        {"instruction": "q", "input": "more", "output": "a", "system": "not named"},
        {"messages": [user("q\nmore"), assistant("a")]},
    ),
    "alpaca with names": (
        {"columns": {"prompt": "question", "response": "answer", "system": "persona", "history": "before"}},
        {"question": "q2", "answer": "a2", "persona": "s", "before": [["q1", "a1"]]},
        {"messages": [SYSTEM, user("q1"), assistant("a1"), user("q2"), assistant("a2")]},
    ),
    "empty texts": (
        {"columns": {"prompt": "p", "query": "q", "response": "r", "system": "s", "history": "h", "tools": "t"}},
        {"p": "question", "q": "", "r": "a", "s": "", "h": None, "t": '[{"name": "f"}]'},
        {"tools": '[{"name": "f"}]', "messages": [user("question"), assistant("a")]},
    ),
    "text": ({"columns": {"prompt": "body"}}, {"body": "some text", "id": 3}, {"text": "some text"}),
    "pair": (
        {"ranking": True, "columns": {"prompt": "q", "query": "i", "chosen": "good", "rejected": "bad"}},
        {"q": "q", "i": "i", "good": "g", "bad": "b"},
        {"prompt": [user("q\ni")], "chosen": [assistant("g")], "rejected": [assistant("b")]},
    ),
    "sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "talk", "system": "persona", "tools": "functions"}},
        {
            "talk": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}", "weight": 0}],
            "persona": "s",
            "functions": "[]",
        },
        {
            "tools": "[]",
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "{}", "weight": 0},
            ],
        },
    ),
    "sharegpt with tags": (
        {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
        {"messages": [SYSTEM, user("q"), assistant("a"), {"role": "observation", "content": "o"}]},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "observation", "value": "o"},
            ]
        },
    ),
    "sharegpt pair": (
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "g"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": [{"from": "gpt", "value": "g"}],
            "rejected": [{"from": "gpt", "value": "b"}],
        },
    ),
    "openai": (
        {
            "formatting": "openai",
            "columns": {"messages": "messages"},
            "tags": OPENAI_TAGS | {"observation_tag": "tool"},
        },
        {
            "messages": [
                user("q"),
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "r", "name": "f"},
            ]
        },
        {
            "messages": [
                user("q"),
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "r", "name": "f"},
            ]
        },
    ),
}


def entry_of(folder: Path, values: dict[str, Any], records: list[dict[str, Any]] | None = None) -> Entry:
    """The entry `values` of a dataset_info.json in `folder`, with a file of `records`."""
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(records or []))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "data.json"} | values}))
    return read_entries(str(folder), "mine")[0]


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(name: str, tmp_path: Path) -> None:
    """Columns, roles and keys become those of chat/shapes.py. Keys of a message that have no tag stay."""
    values, record, expected = CONVERSIONS[name]
    assert entry_of(tmp_path, values).convert(record, "a place") == expected


@pytest.mark.parametrize(
    ("values", "record", "message"),
    [
        ({}, {"instruction": "q", "output": None}, "file: line 3: output must be text, and is None"),
        ({}, {"instruction": 3, "output": "a"}, "file: line 3: instruction must be text, and is 3"),
        ({"columns": {"prompt": "p", "response": "r", "history": "h"}}, {"h": [["q"]]}, "h must have pairs of texts"),
        ({"formatting": "sharegpt"}, {"messages": []}, "has no column conversations, which is the column messages"),
        (
            {"formatting": "sharegpt"},
            {"conversations": [{"from": "bot", "value": "a"}]},
            "a message whose from is bot, which is none of human, gpt, observation, function_call, system",
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "m", "system": "s"}},
            {"m": [{"from": "system", "value": "one"}], "s": "two"},
            "has a system message and a column s",
        ),
        (
            {"ranking": True, "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}},
            {"p": "q", "c": "a"},
            "has no column r, which is the column rejected",
        ),
    ],
)
def test_records_that_do_not_fit(values: dict[str, Any], record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as found:
        entry_of(tmp_path, values).convert(record, "file: line 3")
    assert str(found.value).startswith("file: line 3: ")
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"columns": {"prompt": "p", "images": "i"}}, "columns has images, which is not supported"),
        ({"columns": {"prompt": "p", "kto_tag": "k"}}, "columns has kto_tag, which is not supported"),
        ({"columns": {"promt": "p"}}, "columns has promt, which is none of prompt, query, response, history, "),
        ({"tags": {"role": "r"}}, "tags has role, which is none of role_tag, content_tag"),
        ({"folder": "f"}, "the key folder is not supported; the keys are hf_hub_url, file_name, formatting"),
        ({"formatting": "chatml"}, "formatting is chatml, and must be one of alpaca, sharegpt, openai"),
        ({"ranking": True}, "columns must have chosen"),
        ({"num_samples": 0}, "num_samples a number above 0"),
        ({"num_samples": 2**63}, "num_samples a number above 0"),
        ({"split": "test"}, "split and subset are for data sets on the hub"),
        ({"file_name": None}, "there is no file_name and no hf_hub_url"),
        ({"file_name": None, "ms_hub_url": "a/b"}, "the key ms_hub_url is not supported"),
    ],
)
def test_entries_that_do_not_fit(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as found:
        entry_of(tmp_path, values)
    assert f"dataset mine: in {tmp_path}/dataset_info.json, " in str(found.value)
    assert message in str(found.value)


def options_of(folder: Path, names: str, *more: str) -> Options:
    argv = ["--dataset_dir", str(folder), "--dataset", names, "--data_cache_dir", str(folder.parent / "cache"), *more]
    words = ["--validation_split_percentage", "0", "--packing", "documents", "--model_name_or_path", "any"]
    options = parse([*argv, *words, "--block_size", "64", "--preprocessing_num_workers", "1"])
    check_data(options)
    return options


def test_through_the_preparation(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two data sets become one, each sequence once in an epoch; their text is the template's; columns are reported."""
    folder = tmp_path / "in"
    alpaca = [{"instruction": f"q{number}", "input": "i", "output": "a", "id": number} for number in range(5)]
    shared = [{"talk": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 3
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(alpaca, indent=1))
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, shared)))
    columns = {"messages": "talk", "system": "systme"}
    talk = {"formatting": "sharegpt", "columns": columns, "tags": OPENAI_TAGS, "file_name": "b.jsonl"}
    (folder / "dataset_info.json").write_text(json.dumps({"one": {"file_name": "a.json"}, "two": talk}))
    data = prepare_data(options_of(folder, "one,two"), tokenizer)
    text = tokenizer.decode(tokens_of(data.train))
    for number in range(5):
        assert f"<|im_start|>user\nq{number}\ni<|im_end|>\n<|im_start|>assistant\na<|im_end|>" in text
    assert text.count("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>") == 3
    assert all(sequences == quota for sequences, quota in data.train.sources)
    assert data.counts["train"].documents == 8
    assert capsys.readouterr().err.endswith(
        "dataset one: dataset_info.json names no use for the columns id\n"
        "dataset two: the first record has no systme, which dataset_info.json names\n"
    )
    with pytest.raises(OptionError, match=r"dataset three: is not in .*, which has one, two"):
        prepare_data(options_of(folder, "one,three"), tokenizer)
    with pytest.raises(OptionError, match="one data set can be streamed, not one,two"):
        options_of(folder, "one,two", "--streaming", "--max_steps", "1")
    stream = prepare_data(options_of(folder, "two", "--streaming", "--max_steps", "1"), tokenizer).train
    assert "x" in tokenizer.decode(next(iter(stream)).tokens.tolist())


def test_a_number_of_samples(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The first records are read, and a resume after any of them reads the others."""
    records = [{"instruction": f"q{number}", "output": "a"} for number in range(9)]
    entry_of(tmp_path / "in", {"num_samples": 6}, records)
    (source,), _ = find_sources(options_of(tmp_path / "in", "mine"))
    found = list(read(source))
    assert [parsed(raw)["messages"][0]["content"] for raw in found] == [f"q{number}" for number in range(6)]
    for number, raw in enumerate(found):
        assert list(read(source, raw.after)) == found[number + 1 :]
    key = source.key
    entry_of(tmp_path / "in", {"num_samples": 10}, records)
    (source,), _ = find_sources(options_of(tmp_path / "in", "mine"))
    assert source.key != key
    assert len(list(islice(read(source, START), 9))) == 9
    with pytest.raises(OptionError, match="num_samples is 10, and there are 9 records"):
        list(read(source))


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """`hf_hub_url`, here a directory, with its split."""
    datasets.DatasetDict({"dev": datasets.Dataset.from_list([{"p": "q", "r": "a"}])}).save_to_disk(tmp_path / "saved")
    values = {"file_name": None, "hf_hub_url": str(tmp_path / "saved"), "ms_hub_url": "x", "split": "dev"}
    entry_of(tmp_path / "in", values | {"columns": {"prompt": "p", "response": "r"}})
    (source,), _ = find_sources(options_of(tmp_path / "in", "mine"))
    assert [parsed(raw) for raw in read(source)] == [{"messages": [user("q"), assistant("a")]}]
    entry_of(tmp_path / "in", values | {"split": "train"})
    with pytest.raises(OptionError, match="dataset mine: has no split train, only dev"):
        find_sources(options_of(tmp_path / "in", "mine"))


def test_without_dataset_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="dataset a/b: pass --dataset_info FILE"):
        check_data(Options(dataset="a/b"))
    with pytest.raises(OptionError, match=r"dataset_info x.json: pass --dataset NAME"):
        check_data(Options(dataset_info="x.json"))
    entry_of(tmp_path / "data", {}, [{"instruction": "q", "output": "a"}])
    check_data(Options(dataset="mine"))  # LLaMA-Factory's own default is the directory data
    assert len(find_sources(Options(dataset="mine", data_cache_dir=str(tmp_path / "cache")))[0]) == 1
