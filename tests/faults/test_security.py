"""Files from anybody: nothing in them is executed, and tokens of the user are written nowhere."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PretrainedConfig

from config import check, parse
from config.errors import OptionError
from config.options import Options
from data.dataset_info import read_entries
from data.prepare import prepare_data
from data.sources import find_sources
from model.build import build_model, load_config_and_tokenizer
from model.weights import find_weights
from tests import test_house
from tests.launch import train
from tests.world import PLAIN, with_markers

SECRET = "hf_ThisIsASecretToken"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SWANLAB_API_KEY")

CODE = "from pathlib import Path\nPath({trace!r}).touch()\n"


@pytest.fixture
def place(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model in DIR and with code.py, which leaves a file `trace` if it runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "DIR")
    for directory in (tmp_path, tmp_path / "DIR"):
        (directory / "code.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    return tmp_path


def change(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def load() -> PretrainedConfig:
    """Load DIR as a run does, up to the headers of its weights. Returns its configuration."""
    options = Options(model_name_or_path="DIR")
    config, _ = load_config_and_tokenizer(options)
    find_weights(options, build_model(options, config))
    return config


def refused() -> str:
    with pytest.raises(OptionError) as error:
        load()
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


# --- What the trainer never does -------------------------------------------------------------------------------------


@pytest.mark.fault(
    "security",
    "a pickle, or Python code, in a place where the trainer could look for data",
    "no file of the trainer calls pickle, torch.load, eval or the like, so there is no such place",
)
def test_no_code_unpickles() -> None:
    """Objects between ranks are the exception: torch pickles what broadcast_object and gather_objects send."""
    wrong = {"pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
    calls = {"eval", "exec", "torch.load", "np.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
    found = []
    for path in test_house.CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                found += [f"{path}: imports {name}" for name in names if str(name).split(".")[0] in wrong]
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in calls:
                found.append(f"{path}:{node.lineno}: {name}")
    assert found == []


# --- Tokens ----------------------------------------------------------------------------------------------------------


def set_secrets() -> None:
    os.environ.update(dict.fromkeys(VARIABLES, SECRET))


@pytest.mark.fault(
    "security",
    "a token in the environment",
    "never in what a run prints, in checkpoints, metrics, traces, the ledger, the export or the data cache",
)
@pytest.mark.parametrize(
    ("steps", "more"),
    [
        (1, ["--ledger", "--show_examples", 1]),
        pytest.param(4, ["--trace_steps", 1, "--report_to", "tensorboard", "--prompt", "a"], marks=pytest.mark.slow),
    ],
)
def test_tokens_of_the_environment(tiny: list[object], tmp_path: Path, steps: int, more: list[object]) -> None:
    options = ["--max_steps", steps, "--output_dir", tmp_path / "run", "--data_cache_dir", tmp_path / "cache", *more]
    outcome = train(1, [*tiny, *options], before=set_secrets)
    assert outcome.exit_codes == [0], outcome.output
    assert SECRET not in outcome.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"state.json", "metrics.jsonl", "about.json", "config.json"} <= {path.name for path in files}
    assert any(path.match("trace/*.json") for path in files) == ("--trace_steps" in more)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.fault(
    "security", "a token among the options, on the command line or in a run file", "refused, and not repeated"
)
@pytest.mark.parametrize("name", ["token", "use_auth_token", "hf_hub_token", "ms_hub_token"])
def test_tokens_among_options(place: Path, name: str) -> None:
    (place / "run.yaml").write_text(f"{name}: {SECRET}\n")
    for argv in ([f"--{name}", SECRET], [f"--{name}={SECRET}"], ["run.yaml"]):
        with pytest.raises(OptionError, match="tokens are not options") as error:
            parse(argv)
        assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token", "wandb_api_key", "hf_tokn"])
def test_tokens_that_do_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens for an upload, and options that are unknown: no message repeats the value."""
    try:
        options = str(parse([f"--{name}", SECRET]))
    except OptionError as error:
        options = str(error)
    assert SECRET not in options + "".join(capsys.readouterr())


# --- Models and tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "security",
    "Python code that config.json, tokenizer_config.json or the directory of a model brings along",
    "never executed without --trust_remote_code; known models are built by transformers",
)
def test_code_of_a_known_model(place: Path) -> None:
    """test_remote_code_is_asked_for in tests/test_models.py has an unknown model, which is refused."""
    auto_map = {"AutoConfig": "code.Other", "AutoModelForCausalLM": "code.Other", "AutoTokenizer": ["code.A", "code.B"]}
    change(place / "DIR" / "config.json", auto_map=auto_map)
    (place / "DIR" / "custom_generate").mkdir()
    shutil.copy("code.py", place / "DIR" / "custom_generate" / "generate.py")
    assert load().model_type == "qwen3"
    change(place / "DIR" / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Other")
    load()  # tokenizer.json has all
    assert not (place / "trace").exists()


@pytest.mark.fault(
    "security",
    "a config.json that names a kernel on the hub for its attention or experts",
    "refused, because transformers would download and execute it",
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub(place: Path, key: str) -> None:
    change(place / "DIR" / "config.json", **{key: "someone/kernel"})
    assert "implementation someone/kernel, and transformers would run code from there\n" in refused()


@pytest.mark.fault(
    "security", "a config.json that asks for a billion layers or labels", "exit 2 after 100 s of processor time"
)
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels"])
def test_a_large_configuration(place: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("model.build.SECONDS", 0.3)
    change(place / "DIR" / "config.json", layer_types=None, **{key: 10**9})
    assert "no model configuration could be loaded: it takes more than 0.3 s of processor time" in refused()


def test_a_large_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of layers that the configuration can list, but no machine can build."""
    monkeypatch.setattr("model.build.SECONDS", 0.3)
    change(place / "DIR" / "config.json", layer_types=None, num_hidden_layers=100_000)
    assert "it takes more than 0.3 s of processor time" in refused()


class Payload:
    """An object that leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trace"),)


@pytest.mark.fault("security", "a pickle in place of a tokenizer or configuration", "refused, not executed")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_pickles_of_other_names(place: Path, name: str) -> None:
    (place / "DIR" / name).write_bytes(pickle.dumps(Payload()))
    if name == "generation_config.json":
        load()  # it is not needed
    else:
        assert "DIR: " in refused()
    assert not (place / "trace").exists()


def test_links_of_the_hub_cache(place: Path) -> None:
    """The files of a model may be links that leave its directory, as in the cache of the hub."""
    (place / "blobs").mkdir()
    for path in list((place / "DIR").iterdir()):
        path.rename(place / "blobs" / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    assert load().model_type == "qwen3"


@pytest.mark.fault(
    "security",
    "torch's directory of compiled code in /tmp, if another user has made it or may write there",
    "refused, because torch unpickles and executes its files; the trainer makes its own 0700",
)
def test_compiled_code_of_another_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(place))

    def claim() -> Path:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        check(Options(torch_compile=True, output_dir="output"), 1)
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    made = claim()
    assert made.parent == place
    assert made.stat().st_mode & 0o777 == 0o700
    assert claim() == made
    made.chmod(0o777)
    with pytest.raises(OptionError, match=f"torch_compile true: other users can write to {made}"):
        claim()
    made.chmod(0o700)
    if os.geteuid() == 0:  # another user
        os.chown(made, 1234, 1234)
        with pytest.raises(OptionError, match=f"torch_compile true: other users can write to {made}"):
            claim()


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("security", "a data set with a loading script", "refused, not executed")
def test_data_set_scripts(place: Path) -> None:
    (place / "set").mkdir()
    shutil.copy("code.py", place / "set" / "set.py")
    options = Options(dataset_name="set", data_cache_dir="cache", block_size=32)
    with pytest.raises(OptionError, match="dataset_name set: "):
        find_sources(options)
    assert not (place / "trace").exists()


@pytest.mark.fault(
    "security",
    "a pipe or a device in place of data or of a file of options",
    "refused at once, because it may have no end",
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices(place: Path, kind: str) -> None:
    def put(name: str) -> str:
        os.mkfifo(name) if kind == "pipe" else Path(name).symlink_to("/dev/zero")
        return name

    def run(*argv: str) -> None:
        options = parse([*argv, "--model_name_or_path", "DIR", "--data_cache_dir", "cache"], 1)
        prepare_data(options, load_config_and_tokenizer(options)[1])

    (place / "set").mkdir()
    put("set/b.jsonl")
    for argv in (
        [put("run.yaml")],
        ["--config", put("run.json")],
        ["--deepspeed", put("ds.json")],
        ["--fsdp", "full_shard", "--fsdp_config", put("fsdp.json")],
        ["--chat_template", put("t.jinja")],
        ["--dataset", "a", "--dataset_info", put("info.json")],
        ["--train_file", put("a.jsonl")],
        ["--train_file", "set"],
    ):
        with pytest.raises(OptionError, match=r"it is no regular file|is a pipe or a device"):
            run(*argv)
    put("DIR/chat_template.jinja")
    with pytest.raises(OptionError):
        run("--train_file", "a.jsonl")


# --- Files of options ------------------------------------------------------------------------------------------------


@pytest.mark.fault("security", "a run file in YAML with Python objects", "refused, not executed")
@pytest.mark.parametrize("place_of_it", ["lr_scheduler_kwargs: {{a: {}}}", "lr_scheduler_kwargs: [[{}]]", "{}: 1"])
def test_objects_of_yaml(place: Path, place_of_it: str) -> None:
    for tag in ("!!python/object/apply:os.system ['touch trace']", "!!python/object/new:os.system ['touch trace']"):
        (place / "run.yaml").write_text(place_of_it.format(tag) + "\n")
        with pytest.raises(OptionError, match=r"run\.yaml: "):
            parse(["run.yaml"])
    assert not (place / "trace").exists()


@pytest.mark.fault(
    "security", "a run file whose aliases stand for a billion values", "refused before they are written out"
)
def test_aliases_of_yaml(place: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    (place / "run.yaml").write_text("\n".join(lines))
    with pytest.raises(OptionError, match=r"run\.yaml: .*its aliases make it a file of more than 100,000 values"):
        parse(["run.yaml"])


@pytest.mark.fault(
    "security", "an option or a record with control characters, which can write over a terminal", "they are escaped"
)
def test_control_characters(place: Path) -> None:
    for value in ("\x1b[2Jred", "a\nb\nc\nd\ne", "\u2028\u2028", "\ud800"):
        with pytest.raises(OptionError) as error:
            parse(["--max_steps", value])
        assert len(str(error.value).splitlines()) <= 3
        assert all(character.isprintable() or character == "\n" for character in str(error.value))
        with pytest.raises(OptionError) as error:
            read_entries("DIR", value + "x")
        assert len(str(error.value).splitlines()) <= 3


def test_a_template_of_the_model(place: Path) -> None:
    """A message for a template that comes with the model names the model."""
    tokenizer = AutoTokenizer.from_pretrained("DIR")
    tokenizer.chat_template = "{{ 1 / 0 }}" + with_markers(PLAIN)
    tokenizer.save_pretrained("DIR")
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (place / "chat.jsonl").write_text(json.dumps(record) + "\n")
    options = Options(model_name_or_path="DIR", train_file="chat.jsonl", data_cache_dir="cache")
    with pytest.raises(OptionError, match=r"division by zero \(line 1 of the template of DIR\)"):
        prepare_data(options, load_config_and_tokenizer(options)[1])
