"""Chat templates that fail, never end, fill the memory, or reach for Python: a message, and nothing is executed."""

import json
import resource
import signal
import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from chat.template import names_in, render
from config.errors import OptionError
from config.options import Options
from data.prepare import prepare_data
from tests.world import PLAIN, without_markers

# Each comes before a template that works, and acts on the second record alone.
FAILING = {
    "{{ 1 / (messages | length - 2) }}": "division by zero",
    "{% for i in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "maximum recursion depth exceeded",
    "{% include '/etc/passwd' %}": "no loader for this environment specified",
    "{{ absent.name }}": "'absent' is undefined",
    "{{ messages.append(messages[0]) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__.os.system('touch trace') }}": "access to attribute '__init__' of 'type' object",
    "{{ ('{0.__class__}' | format) ~ '{0.__class__.__mro__}'.format(1) }}": "access to attribute '__class__' of 'int'",
}
ENDLESS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "processor time",
    "{% set n = namespace(n=10) %}{% for i in range(99) %}{% set n.n = n.n ** 10 %}{% endfor %}": "processor time",
}
LARGE = {
    "{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}": "1 GiB of memory",
    "{{ messages[0].content * 10 ** 10 }}": "1 GiB of memory",
    "{{ '%9999999999d' % messages | length }}": "1 GiB of memory",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: chat.jsonl has 40 records, and a template can know the second."""
    monkeypatch.chdir(tmp_path)
    records = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "an answer"}]}
        for word in ("one", "two", *("more",) * 38)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def refused(tokenizer: PreTrainedTokenizerBase, beginning: str, workers: int = 1) -> str:
    """The message for chat.jsonl and a template that begins so, in line 2, on the second record."""
    condition = "{% if messages and messages[0].content == 'two' %}"
    tokenizer.chat_template = f"{condition}\n{beginning}{{% endif %}}" + without_markers(PLAIN)
    tokenizer.chat_template_file = "t.jinja"
    options = Options(train_file="chat.jsonl", block_size=64, data_cache_dir="cache", preprocessing_num_workers=workers)
    with pytest.raises(OptionError) as error:
        prepare_data(options, tokenizer)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


@pytest.mark.fault(
    "security",
    "a chat template that divides by zero, calls itself, includes a file, or reaches for Python attributes",
    "exit 2 with the record, and file and line of the template; jinja's sandbox executes nothing",
)
@pytest.mark.parametrize("beginning", FAILING)
def test_a_failing_template(tokenizer: PreTrainedTokenizerBase, place: Path, beginning: str) -> None:
    message = refused(tokenizer, beginning)
    assert "chat.jsonl: line 2: chat_template: it refuses a conversation of user, assistant: " in message
    assert FAILING[beginning] in message
    assert "(line 2 of the template of t.jinja)" in message
    assert not (place / "trace").exists()


@pytest.mark.fault(
    "security",
    "a chat template that never ends",
    "exit 2 after 10 s of processor time, with the record, and file and line of the template",
)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("beginning", ENDLESS)
def test_an_endless_template(
    tokenizer: PreTrainedTokenizerBase, place: Path, monkeypatch: pytest.MonkeyPatch, beginning: str, workers: int
) -> None:
    """It ends in the process that prepares and in workers, which get small chunks here."""
    monkeypatch.setattr("chat.template.SECONDS", 0.2)
    monkeypatch.setattr("data.cache.CHUNK", 1)
    message = refused(tokenizer, beginning, workers)
    assert (
        "chat.jsonl: line 2: chat_template: a conversation of user, assistant: it takes more than 0.2 s of" in message
    )
    assert "(line 2 of the template of t.jinja)" in message


@pytest.mark.fault(
    "security",
    "a chat template that writes a text of many gigabytes",
    "exit 2 at 1 GiB of memory, with the record, and file and line of the template",
)
@pytest.mark.parametrize("beginning", LARGE)
def test_a_large_text(tokenizer: PreTrainedTokenizerBase, place: Path, beginning: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    message = refused(tokenizer, beginning)
    assert "chat.jsonl: line 2: chat_template: a conversation of user, assistant: it needs more than 1 GiB" in message
    assert "(line 2 of the template of t.jinja)" in message
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_constants_of_a_template(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """jinja computes constant expressions when it compiles a template or searches it for names. It gives up in time."""
    monkeypatch.setattr("chat.template.SECONDS", 0.2)
    tokenizer.chat_template = "{{ 10 ** (10 ** 9) }}"
    assert names_in(tokenizer) == set()
    with pytest.raises(OptionError, match=r"of user: it takes more than 0\.2 s of processor time"):
        render(tokenizer, [{"role": "user", "content": "a"}], None)


def test_limits_end_with_the_rendering(tokenizer: PreTrainedTokenizerBase) -> None:
    """No timer stays behind. A thread can render, too: without the limit of time, which needs a signal."""
    handler = signal.getsignal(signal.SIGVTALRM)
    texts = []

    def work() -> None:
        texts.append(render(tokenizer, [{"role": "user", "content": "a"}], None))

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert texts == ["<|im_start|>user\na<|im_end|>\n"] * 2
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == handler
