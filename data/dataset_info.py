"""LLaMA-Factory's dataset_info.json: names for data sets, and for the columns and roles that their records have.

An entry says where a data set is and what its columns mean. Its records become records of the shapes in chat/shapes.py
before anything else looks at them. The meaning of each key is that of LLaMA-Factory's data/README.md.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config.errors import OptionError, first_line
from config.text import load_json, read_text

FILE_NAME = "dataset_info.json"

COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}

"""The columns of a format if an entry names none. An entry that names some has no others."""

MORE_COLUMNS = {
    "alpaca": ("history", "system", "tools", "chosen", "rejected"),
    "sharegpt": ("system", "tools", "chosen", "rejected"),
    "openai": ("system", "tools", "chosen", "rejected"),
}

ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "assistant"),
    "system_tag": ("system", "system"),
}

"""For each tag, its default, which is also the role of chat/shapes.py in a "sharegpt" record, and in "messages"."""

NOT_SUPPORTED = ("images", "videos", "audios", "kto_tag")

PLACES = ("hf_hub_url", "file_name")

KEYS = (*PLACES, "formatting", "ranking", "subset", "split", "num_samples", "columns", "tags")


@dataclass(frozen=True)
class Entry:
    """An entry of dataset_info.json, checked."""

    name: str
    path: str | None  # of a file or directory, or
    hub_id: str | None  # of a data set on the hub
    formatting: str = "alpaca"  # a key of COLUMNS
    ranking: bool = False  # whether its records are pairs of a chosen and a rejected answer
    subset: str | None = None
    split: str = "train"
    num_samples: int | None = None
    columns: dict[str, str] = field(default_factory=dict)  # the meaning of a column -> its name
    tags: dict[str, str] = field(default_factory=dict)

    def key(self) -> str:
        """Everything that changes the records, for the key of the source."""
        return json.dumps(asdict(self) | {"name": "", "path": ""}, sort_keys=True)

    def convert(self, record: dict[str, Any], place: str) -> dict[str, Any]:
        """A record with the columns that chat/shapes.py knows. Raises OptionError with the `place` of the record."""
        pair = ("chosen", "rejected") if self.ranking else ()
        for meaning in ("messages", *pair):
            if meaning in self.columns and record.get(self.columns[meaning]) is None:
                raise OptionError(f"{place}: has no column {self.columns[meaning]}, which is the column {meaning}")
        tools = self._column(record, "tools")
        named = {"tools": tools} if tools is not None else {}
        if self.formatting == "alpaca":
            return named | self._from_alpaca(record, place)
        turns = self._turns(self._column(record, "messages"), place)
        system = self._text(record, "system", place)
        if system and turns and turns[0]["from"] == "system":
            raise OptionError(f"{place}: has a system message and a column {self.columns['system']}; remove one")
        if system:
            turns = [{"from": "system", "value": system}, *turns]
        if self.ranking:
            answers = {name: self._turns([self._column(record, name)], place) for name in pair}
            return named | {"conversations": turns} | answers
        if self.formatting == "openai":
            return named | {"messages": [_message(turn, place) for turn in turns]}
        return named | {"conversations": turns}

    def _from_alpaca(self, record: dict[str, Any], place: str) -> dict[str, Any]:
        """Messages, a pair, or a text if the entry has no column of answers."""
        question = "\n".join(filter(None, [self._text(record, "prompt", place), self._text(record, "query", place)]))
        if not self.ranking and "response" not in self.columns:
            return {"text": question}
        messages = []
        if system := self._text(record, "system", place):
            messages.append({"role": "system", "content": system})
        for turn in self._column(record, "history") or []:
            if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
                raise OptionError(f"{place}: {self.columns['history']} must have pairs of texts, not {str(turn)[:100]}")
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        messages.append({"role": "user", "content": question})
        answers = {}
        for meaning in ("chosen", "rejected") if self.ranking else ("response",):
            answer = self._column(record, meaning)
            if not isinstance(answer, str):
                raise OptionError(f"{place}: {self.columns[meaning]} must be text, and is {str(answer)[:100]}")
            answers[meaning] = [{"role": "assistant", "content": answer}]
        return {"prompt": messages} | answers if self.ranking else {"messages": messages + answers["response"]}

    def _column(self, record: dict[str, Any], meaning: str) -> Any:
        return record.get(self.columns[meaning]) if meaning in self.columns else None

    def _text(self, record: dict[str, Any], meaning: str, place: str) -> str | None:
        value = self._column(record, meaning)
        if not isinstance(value, str | None):
            raise OptionError(f"{place}: {self.columns[meaning]} must be text, and is {str(value)[:100]}")
        return value

    def _turns(self, messages: Any, place: str) -> list[dict[str, Any]]:
        """The messages with the keys and roles of a "sharegpt" record. Other keys are unchanged."""
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise OptionError(f"{place}: must have messages, not {str(messages)[:100]}")
        role_tag, content_tag = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        roles = {self.tags.get(tag, default): default for tag, (default, _) in ROLES.items()}
        turns = []
        for message in messages:
            role = message.get(role_tag)
            if role not in roles:
                raise OptionError(
                    f"{place}: a message whose {role_tag} is {str(role)[:100]}, which is none of {', '.join(roles)}\n"
                    f"name the roles in the tags of {self.name} in {FILE_NAME}"
                )
            others = {key: value for key, value in message.items() if key not in (role_tag, content_tag)}
            turns.append({"from": roles[role], "value": message.get(content_tag)} | others)
        return turns


def read_entries(dataset_info: str, names: str) -> list[Entry]:
    """The entries of `names`, separated by commas, in a dataset_info.json or its directory. Raises OptionError."""
    path = Path(dataset_info).expanduser()
    path = path / FILE_NAME if path.is_dir() else path
    if files := [name for name in names.split(",") if Path(name).expanduser().is_file()]:
        raise OptionError(f"dataset {files[0]}: is a file, and no name in {path}; pass --train_file {files[0]}")
    try:
        entries = load_json(read_text(path))
    except (OSError, ValueError) as error:
        raise OptionError(f"dataset_info {path}: cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(entries, dict):
        raise OptionError(f"dataset_info {path}: must be a JSON object of data sets by name")
    found = []
    for name in filter(None, (name.strip() for name in names.split(","))):
        if not isinstance(entries.get(name), dict):
            raise OptionError(f"dataset {name}: is not in {path}, which has {', '.join(entries)}")
        found.append(_entry(name, entries[name], path))
    if not found:
        raise OptionError(f"dataset {names}: pass names of data sets in {path}, with commas between them")
    return found


def _entry(name: str, entry: dict[str, Any], path: Path) -> Entry:
    """An entry as dataset_info.json has it, checked."""

    def refuse(problem: str) -> OptionError:
        return OptionError(f"dataset {name}: in {path}, {problem}")

    values = {key: value for key, value in entry.items() if value is not None}
    if "hf_hub_url" in values:
        values = {key: value for key, value in values.items() if key not in ("ms_hub_url", "om_hub_url", "script_url")}
    if unknown := sorted(values.keys() - set(KEYS)):
        raise refuse(f"the key {', '.join(unknown)} is not supported; the keys are {', '.join(KEYS)}")
    if not values.keys() & set(PLACES):
        raise refuse("there is no file_name and no hf_hub_url")
    for key in (*PLACES, "subset", "split"):
        if not isinstance(values.get(key, ""), str):
            raise refuse(f"{key} must be text, and is {str(values[key])[:100]}")
    formatting = values.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in COLUMNS:
        raise refuse(f"formatting is {formatting}, and must be one of {', '.join(COLUMNS)}")
    columns, tags = values.get("columns", COLUMNS[formatting]), values.get("tags", {})
    for key, mapping, known in (
        ("columns", columns, (*COLUMNS[formatting], *MORE_COLUMNS[formatting])),
        ("tags", tags, ("role_tag", "content_tag", *ROLES)),
    ):
        if not isinstance(mapping, dict) or not all(isinstance(value, str | None) for value in mapping.values()):
            raise refuse(f"{key} must be a mapping of texts")
        for unknown_name in mapping.keys() - set(known):
            why = "not supported" if unknown_name in NOT_SUPPORTED else f"none of {', '.join(known)}"
            raise refuse(f"{key} has {unknown_name}, which is {why} with formatting {formatting}")
    ranking, samples, split = values.get("ranking", False), values.get("num_samples"), values.get("split", "train")
    columns = {key: value for key, value in columns.items() if value is not None}
    needed = ("chosen", "rejected") if ranking else ()
    for column in (*needed, "prompt" if formatting == "alpaca" else "messages"):
        if column not in columns:
            raise refuse(f"columns must have {column}")
    if not isinstance(ranking, bool) or not (samples is None or (type(samples) is int and 0 < samples < 2**63)):
        raise refuse("ranking must be true or false, and num_samples a number above 0 and below 2^63")
    if "hf_hub_url" not in values and (split != "train" or "subset" in values):
        raise refuse("split and subset are for data sets on the hub; remove them")
    hub_id = values.get("hf_hub_url")
    return Entry(
        name=name,
        path=None if hub_id else str(path.parent / values["file_name"]),
        hub_id=hub_id,
        formatting=formatting,
        ranking=ranking,
        subset=values.get("subset"),
        split=split,
        num_samples=samples,
        columns=columns,
        tags={key: value for key, value in tags.items() if value is not None},
    )


def _message(turn: dict[str, Any], place: str) -> dict[str, Any]:
    """A message with `role` and `content` from a turn with `from` and `value`."""
    roles = dict(ROLES.values())
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] == "function_call" and "tool_calls" not in others:
        raise OptionError(f"{place}: a message that calls a function must have tool_calls with formatting openai")
    return {"role": roles[turn["from"]], "content": turn["value"]} | others
