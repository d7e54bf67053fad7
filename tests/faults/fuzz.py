"""Files that lie: strategies of hypothesis for what a file may hold, and the functions of the trainer that read it.

Each target writes a changed file and reads it as a run does. Either the file is accepted, or an OptionError says in at
most three lines what is wrong. `watch` sees what the process does meanwhile: it must write to no other place, start no
program, open no connection and unpickle nothing.
"""

import contextlib
import copy
import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from transformers import PreTrainedTokenizerBase

import checkpoint
from checkpoint.files import MANIFEST, STATE, size_and_hash
from checkpoint.load import choose_checkpoint, load_checkpoint
from config import check, parse
from config.options import Options
from config.plan import Plan
from data.dataset_info import read_entries
from data.prepare import prepare_data
from data.sources import find_sources
from model.build import build_model, load_config_and_tokenizer
from model.weights import find_weights, load_weights
from optim import build_optimizer
from tests.world import PLAIN, with_markers, without_markers

HUNG = 60  # seconds for one input, of which the slowest takes less than one

# --- What a file may hold --------------------------------------------------------------------------------------------

WORDS = [
    *("", " ", ".", "..", "/", "~", "/dev/zero", "/dev/stdin", "/etc/passwd", "../outside/file", "outside", "pipe"),
    *(
        "a\nb\nc\nd",
        "\0",
        "\x1b[31m",
        "\ud800",
        "\u2028",
        "nan",
        "1e400",
        "-1",
        "0x10",
        "true",
        "null",
        "auto",
        "epoch",
    ),
    *("{{", "{% raw %}", "{{ 1/0 }}", "{0.__class__}", "%s" * 9, "__class__", "!!python/object", "$HOME", "a" * 3000),
    *("text", "messages", "role", "content", "user", "assistant", "bfloat16", "qwen3", "float8", "model.safetensors"),
]
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e308, float("nan")]
NUMBERS += [float("inf"), float("-inf")]

any_text = st.sampled_from(WORDS) | st.text(st.characters(), max_size=8)
scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | any_text
any_json = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value within a JSON value."""
    yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*above, key))


@st.composite
def changed(draw: DrawFn, value: Any, words: list[str] | None = None) -> Any:
    """A JSON value with one to three changes: another value, one that is gone, a new key, a value doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        new = draw(any_json | st.sampled_from(words) if words else any_json)
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return new
            continue
        parent = functools.reduce(lambda inner, key: inner[key], path[:-1], value)
        if isinstance(parent[path[-1]], int | float) and draw(st.booleans()):
            new = draw(st.sampled_from(NUMBERS))  # of the right type, and of another size
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "wrap"]))
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "wrap":
            parent[path[-1]] = [parent[path[-1]]]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(any_text)] = new
        else:
            parent[path[-1]] = new
    return value


@st.composite
def damaged(draw: DrawFn, content: bytes) -> bytes:
    """Bytes that are cut off, or have other bytes in some places."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "head"]))
        if kind == "cut":
            del raw[place:]
        elif kind == "insert":
            raw[place:place] = draw(st.binary(max_size=4) | st.sampled_from([b"\0", b"\xff\xfe", b"[" * 2000, b"{}"]))
        elif raw:
            place = place % min(len(raw), 64) if kind == "head" else place
            raw[place] = draw(st.integers(0, 255))
    return bytes(raw)


def as_file(value: Any) -> bytes:
    """A JSON value as a file has it, with NaN and Infinity; bytes stay as they are."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def json_file(value: Any, words: list[str] | None = None) -> SearchStrategy[bytes]:
    """A JSON file that holds `value` with some changes, or any other value, or damaged bytes."""
    text = as_file(value)
    return changed(value, words).map(as_file) | changed(value, words).map(as_file) | damaged(text)


# --- What the process does meanwhile ---------------------------------------------------------------------------------

_allowed: Path | None = None  # the directory that may be written while watched, but not OUTSIDE in it
_seen: list[str] = []

OUTSIDE = "outside"  # a directory that nothing may touch

FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "socket.getaddrinfo"),
    "pickle.find_class",
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _allowed is None:
        return
    # torch.distributed.checkpoint pickles the plans that its ranks send each other: no file holds them.
    of_torch = event == "pickle.find_class" and str(arguments[0]).split(".")[0] == "torch"
    if event in FORBIDDEN and not of_torch:
        _seen.append(f"{event} {arguments}")
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        paths = arguments[:1]
    elif event in CHANGES:
        paths = arguments[:2]
    else:
        return
    for path in paths:
        written = Path(os.path.realpath(os.fsdecode(path))) if isinstance(path, str | bytes) else None
        if written and (_allowed not in (written, *written.parents) or OUTSIDE in written.parts):
            _seen.append(f"{event} {path!r}")


@functools.cache
def _hook() -> None:
    sys.addaudithook(_audit)  # for the life of the process


@contextlib.contextmanager
def watch(allowed: Path) -> Iterator[None]:
    """Fail if the block writes outside of `allowed`, starts a program, connects, unpickles, or does not end."""
    global _allowed
    _hook()

    def stop(*_: Any) -> None:
        raise AssertionError(f"no end after {HUNG} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HUNG)
    _allowed = allowed
    _seen.clear()
    try:
        yield
    finally:
        _allowed = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if _seen:
        raise AssertionError(f"not allowed: {_seen}")


def snapshot(directory: Path) -> dict[str, bytes | str]:
    """The content of each file below a directory, and where links point."""
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
    }


# --- What reads it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A directory with everything that a run reads; `place` is also the current directory."""

    place: Path
    tokenizer: PreTrainedTokenizerBase

    def options(self, **more: Any) -> Options:
        named = {"data_cache_dir": str(self.place / "cache"), "output_dir": str(self.place / "output")}
        return Options(**named | {"block_size": 32, "preprocessing_num_workers": 1} | more)


@dataclass(frozen=True)
class Target:
    """A file that a run reads: what it may hold, how it is read, and the weight of its number of inputs."""

    content: Callable[[World], SearchStrategy[Any]]
    read: Callable[[World, Any], None]
    weight: int = 1


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_file(content))


RUN = {"learning_rate": 1e-4, "train_file": "text.jsonl", "max_steps": 5, "bf16": False, "lr_scheduler_type": "cosine"}
RUN |= {"fsdp_config": {"version": 2}, "lr_scheduler_kwargs": {"num_cycles": 1}, "train_mixture": None, "seed": 1}
RUN |= {"validation_file": {"a": "b"}, "save_steps": 0.5, "warmup_ratio": 0.1, "report_to": ["none"], "packing": True}
NAMES = [*Options.__dataclass_fields__, "fsdp", "deepspeed", "per_device_batch_size", "no_bf16", "help", "config"]

YAML = "learning_rate: 1e-4\nmax_steps: 5\nbf16: no\nbase: &b {a: 1}\nlr_scheduler_kwargs: {<<: *b, num_cycles: 2}\n"
TAGS = ["!!python/object/apply:os.system ['touch trace']", "!!binary aGk=", "!!timestamp 2001-99-99", "&a [*a]"]
TAGS += [
    "!!python/name:os.system",
    "!!set {a, b}",
    "!!int 0x",
    "!!float .nan",
    "? [a]\n: b",
    "!!null",
    "*missing",
    "- ",
]
TAGS += ["2001-13-45", "0x", "1:99:99", "<<: [1]", "[" * 300, "!!omap [a: 1]", "!!bool maybe", "=", "!!timestamp x"]


@st.composite
def _yaml(draw: DrawFn, world: World) -> bytes:
    lines = YAML.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        key, value = draw(st.sampled_from(NAMES) | any_text), draw(st.sampled_from(TAGS) | any_json.map(json.dumps))
        lines.insert(draw(st.integers(0, len(lines))), f"{key}: {value}")
    text = "\n".join(lines).encode(errors="surrogatepass")
    return draw(st.just(text) | damaged(text))


def _read_run(world: World, content: bytes, suffix: str) -> None:
    _write(world.place / f"run{suffix}", content)
    check(parse([f"run{suffix}", "--output_dir", str(world.place / "output")], 2), 2)


DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 10}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8},
    "activation_checkpointing": {"number_checkpoints": 2},
}


def _read_deepspeed(world: World, content: bytes) -> None:
    _write(world.place / "ds.json", content)
    with contextlib.redirect_stdout(None):  # the table
        check(parse(["--deepspeed", "ds.json", "--output_dir", str(world.place / "output")], 2), 2)


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what now"},
    {"role": "assistant", "content": "that", "weight": 1},
    {"from": "human", "value": "and then"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": [{"type": "text", "text": "this"}]},
]
RECORDS: list[Any] = [
    {"text": "some words of a text", "other": 1},
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": CHAT[1:3]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"prompt": "one and", "completion": " two"},
    {"instruction": "one", "input": "and", "output": "two", "history": [["a", "b"]]},
    {"prompt": "one", "chosen": " two", "rejected": " three"},
    {"chosen": CHAT[1:3], "rejected": [CHAT[1], {"role": "assistant", "content": "no"}]},
    {"messages": CHAT[1:3], "rejected_response": "no"},
]
COLUMNS = ["user", "assistant", "tool", "function_call", "gpt", "observation", "tool_calls", "loss", "train_detail"]


@st.composite
def _records(draw: DrawFn, world: World) -> tuple[bytes, str]:
    """Lines of one shape, one of which is changed, and the suffix of the file."""
    record = draw(st.sampled_from(RECORDS))
    lines = [as_file(record)] * 3
    lines[draw(st.integers(0, 2))] = draw(json_file(record, COLUMNS) | any_json.map(as_file))
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".jsonl.zst"]))
    content = b"[" + b",".join(lines) + b"]" if kind == ".json" else b"\n".join(lines)
    return draw(st.just(content) | st.just(content) | st.just(content) | damaged(content)), kind


def _read_records(world: World, content: tuple[bytes, str]) -> None:
    raw, suffix = content
    path = world.place / "data" / f"records{suffix}"
    _write(path, raw)
    objective = "dpo" if b"reject" in raw else "sft"
    options = world.options(train_file=str(path), objective=objective, max_targetless_fraction=1.0, block_size=8)
    data = prepare_data(options, world.tokenizer)
    assert len(data.train[0].tokens) <= 16


DATASET_INFO = {
    "a": {"file_name": "text.jsonl", "columns": {"prompt": "text"}},
    "b": {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        "num_samples": 2,
    },
    "c": {"file_name": "pairs.jsonl", "ranking": True, "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}},
}


def _read_dataset_info(world: World, content: bytes) -> None:
    _write(world.place / "dataset_info.json", content)
    for name in "abc":
        for entry in read_entries("dataset_info.json", name):
            if not entry.hub_id:  # the hub is not asked
                prepare_data(world.options(dataset=name, dataset_info="dataset_info.json"), world.tokenizer)


def _model_file(name: str, strategy: Callable[[bytes], SearchStrategy[bytes]], directory: str = "model") -> Target:
    """A file of a model directory, which is restored after each input."""

    def read(world: World, content: bytes) -> None:
        path = world.place / directory / name
        before = path.read_bytes()
        _write(path, content)
        try:
            _read_model(world, directory)
        finally:
            path.write_bytes(before)

    return Target(lambda world: strategy((world.place / directory / name).read_bytes()), read)


def _read_model(world: World, directory: str) -> None:
    options = world.options(model_name_or_path=str(world.place / directory))
    options.block_size = None
    config, tokenizer = load_config_and_tokenizer(options)
    tokenizer(["some words", "<eos>"])
    model = build_model(options, config)
    weights = find_weights(options, model)
    load_weights(model.to_empty(device="cpu"), weights)


def _of_json(words: list[str]) -> Callable[[bytes], SearchStrategy[bytes]]:
    return lambda before: json_file(json.loads(before), words)


TEMPLATES = [
    *("{{ 1/0 }}", "{% for a in range(9) %}", "{% endfor %}", "{{ a.b.c }}", "{% include 'a' %}", "{{ ''.__class__ }}"),
    *("{% generation %}", "{% endgeneration %}", "{% macro a() %}", "{% endmacro %}", "{{ a() }}", "{{ messages[9] }}"),
    *("{% if messages[0].role == 'user' %}", "{% endif %}", "{{ raise_exception('no') }}", "{{ strftime_now(1) }}"),
    *("{{ tools | tojson(indent=-1) }}", "{{ messages | map('upper') | list }}", "{% break %}", "{{ '{' * 9 }}", "{#"),
    *("{{ cycler.__init__.__globals__ }}", "{% set messages = 3 %}", "{{ messages | sort }}", "{{ lipsum(999) }}"),
]


@st.composite
def _template(draw: DrawFn, world: World) -> bytes:
    template = draw(st.sampled_from([with_markers(PLAIN), without_markers(PLAIN)]))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(template)))
        template = template[:place] + draw(st.sampled_from(TEMPLATES) | any_text) + template[place:]
    return template.encode(errors="surrogatepass")


def _read_template(world: World, content: bytes) -> None:
    _write(world.place / "template.jinja", content)
    options = world.options(model_name_or_path=str(world.place / "model"), chat_template="template.jinja")
    options.train_file, options.max_targetless_fraction = "chat.jsonl", 1.0
    _, tokenizer = load_config_and_tokenizer(options)
    prepare_data(options, tokenizer)


def _prepared_file(name: str) -> Target:
    """A file of prepared data: about.json, or one of numbers."""

    def content(world: World) -> SearchStrategy[bytes]:
        before = _prepare(world).joinpath(name).read_bytes()
        return json_file(json.loads(before)) if name.endswith(".json") else damaged(before)

    def read(world: World, content: bytes) -> None:
        path = _prepare(world) / name
        before = path.read_bytes()
        _write(path, content)
        try:
            data = _prepared(world)
            for index in range(min(len(data.train), 5)):
                data.train[index]
        finally:
            shutil.rmtree(world.place / "cache", ignore_errors=True) if not path.exists() else path.write_bytes(before)

    return Target(content, read)


def _prepared(world: World) -> Any:
    return prepare_data(world.options(train_file="text.jsonl"), world.tokenizer)


def _prepare(world: World) -> Path:
    return Path(_prepared(world).train.folder).parent


def _read_hashes(world: World, content: bytes) -> None:
    _write(world.place / "cache" / "hashes.json", content)
    find_sources(world.options(train_file="text.jsonl"))


def _checkpoint(world: World) -> Path:
    return world.place / "output" / "checkpoint-1"


@functools.cache
def _trained(place: Path) -> tuple[Any, Any, Any]:
    """A model, its optimizer and the identity of the run whose checkpoint is in `place`; the first call saves it."""
    options = Options(model_name_or_path=str(place / "model"), output_dir=str(place / "output"), async_save=False)
    config, _ = load_config_and_tokenizer(options)
    model = build_model(options, config)
    weights = find_weights(options, model)
    load_weights(model.to_empty(device="cpu"), weights)
    optimizer = build_optimizer(model, options)
    plan = Plan(32, 1, 8, 9, 9)
    identity = checkpoint.identify_run(options, plan, "data", model, {})
    (place / "output").mkdir(exist_ok=True)
    checkpoint.Saver(options).save(model, optimizer, checkpoint.Progress(1, 256), identity)
    return model, optimizer, identity


def _checkpoint_file(name: str) -> Target:
    """A JSON file of a checkpoint. The manifest is written anew for others, as one who means harm would."""

    def content(world: World) -> SearchStrategy[bytes]:
        _trained(world.place)
        value = json.loads((_checkpoint(world) / name).read_bytes())
        words = ["../../outside/file", str(world.place / "outside" / "file"), "model", "../pipe", STATE, MANIFEST]
        return json_file(value, words)

    def read(world: World, content: bytes) -> None:
        model, optimizer, identity = _trained(world.place)
        manifest = (_checkpoint(world) / MANIFEST).read_bytes()
        before = (_checkpoint(world) / name).read_bytes()
        _write(_checkpoint(world) / name, content)
        if name != MANIFEST:
            entries = json.loads(manifest) | {name: size_and_hash(_checkpoint(world) / name)}
            _write(_checkpoint(world) / MANIFEST, entries)
        try:
            for resumed in ("auto", str(_checkpoint(world))):
                options = world.options(resume_from_checkpoint=resumed)
                lock = checkpoint.claim_output_dir(options, 0)
                assert lock
                lock.close()
                if found := choose_checkpoint(options):
                    load_checkpoint(found, model, optimizer, identity)
        finally:
            (_checkpoint(world) / name).write_bytes(before)
            (_checkpoint(world) / MANIFEST).write_bytes(manifest)

    return Target(content, read)


METRICS = b'{"step": 1, "tokens_seen": 4}\n'


def _read_metrics(world: World, content: bytes) -> None:
    options = world.options(output_dir=str(world.place / "other"), overwrite_output_dir=True)
    _write(world.place / "other" / "metrics.jsonl", content)
    lock = checkpoint.claim_output_dir(options, 0)
    assert lock
    lock.close()


TARGETS = {
    "run.yaml": Target(_yaml, lambda world, content: _read_run(world, content, ".yaml"), 4),
    "run.json": Target(lambda _: json_file(RUN, NAMES), lambda world, content: _read_run(world, content, ".json"), 4),
    "DeepSpeed file": Target(lambda _: json_file(DEEPSPEED), _read_deepspeed, 4),
    "records": Target(_records, _read_records, 4),
    "dataset_info.json": Target(lambda _: json_file(DATASET_INFO), _read_dataset_info, 2),
    "chat template": Target(_template, _read_template, 2),
    "config.json": _model_file("config.json", _of_json(["qwen3", "llama", "auto_map", "code.Other"])),
    "tokenizer_config.json": _model_file("tokenizer_config.json", _of_json(["auto_map", "code.Other"])),
    "tokenizer.json": _model_file("tokenizer.json", damaged),
    "model.safetensors": _model_file("model.safetensors", damaged),
    "model.safetensors.index.json": _model_file(
        "model.safetensors.index.json",
        _of_json(["../outside/file", "../model/model.safetensors", "/dev/zero"]),
        "sharded",
    ),
    "about.json of prepared data": _prepared_file("about.json"),
    "sequences.bin of prepared data": _prepared_file("train/sequences.bin"),
    "segments.bin of prepared data": _prepared_file("train/segments.bin"),
    "hashes.json of the data cache": Target(lambda _: json_file({"a": [[1, 2], "b"]}), _read_hashes),
    "state.json": _checkpoint_file(STATE),
    "manifest.json": _checkpoint_file(MANIFEST),
    "metrics.jsonl": Target(lambda _: damaged(METRICS), _read_metrics),
}
