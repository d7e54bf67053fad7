"""Proves model/chat.py: the command itself, in a terminal and with piped lines, beside transformers' `generate`."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.errors import OptionError
from model import chat
from tests import world
from tests.launch import ROOT, train_ok

COMMAND = [sys.executable, "-m", "model.chat"]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TERM": "dumb"}


@pytest.fixture
def endless(model_dir: Path, tmp_path: Path) -> Path:
    """A model with a chat template, with room for answers that do not end."""
    path = tmp_path / "model"
    shutil.copytree(model_dir, path)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**config, "max_position_embeddings": 10**7, "eos_token_id": None}))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = world.without_markers(world.PLAIN)
    tokenizer.save_pretrained(path)
    return path


def expected(path: Path, prompt: str, new_tokens: int) -> str:
    """The likeliest continuation, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    prompt_BT = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output_BT = model.generate(**prompt_BT, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output_BT[0, prompt_BT["input_ids"].shape[1] :], skip_special_tokens=True)


def test_conversation_in_a_terminal(endless: Path) -> None:
    """An answer that does not end is stopped by Ctrl-C. Ctrl-C at the prompt explains. /reset forgets, Ctrl-D ends."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, str(endless), "--temperature", "0", "--max_new_tokens", "1000000", "--system", "Be brief."]
    not_ignored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as in a terminal, whatever started the tests
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=not_ignored
    )
    os.close(theirs)
    shown = b""

    def read_until(text: bytes, again: int = 0) -> None:
        """Read until the terminal shows `text`. The signal `again` is sent whenever nothing comes for a second."""
        nonlocal shown
        start = len(shown)
        while text not in shown[start:]:
            if again and not select.select([ours], [], [], 1)[0]:
                process.send_signal(again)
            else:
                shown += os.read(ours, 1 << 16)  # raises OSError when the process has ended

    try:
        read_until(b"Ctrl-D ends.\r\n> ")
        os.write(ours, b"Hello\n")
        read_until(b"Hello\r\n")
        shown += os.read(ours, 1)  # the first character of the answer
        process.send_signal(signal.SIGINT)
        read_until(b"\n> ")
        process.send_signal(signal.SIGINT)
        read_until(b"Ctrl-D ends\r\n> ", signal.SIGINT)  # Python misses one that comes as it begins to wait
        os.write(ours, b"/reset\n")
        read_until(b"the conversation is forgotten\r\n> ")  # before it, Ctrl-D would be lost with the terminal's mode
        os.write(ours, b"\x04")
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        os.close(ours)
    assert b"Traceback" not in shown
    answer = shown.split(b"Hello\r\n")[1].split(b"\r\n> ")[0].decode(errors="replace")
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    likeliest = "".join(character for character in expected(endless, prompt, 4) if character.isprintable())
    assert "".join(character for character in answer if character.isprintable()).startswith(likeliest)


def run(path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Talk in this process. The input ends after the lines."""
    given = iter(lines)

    def read(_: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chat.main([str(path), "--max_new_tokens", "8", "--temperature", "0", *options])


def test_conversation_is_remembered(
    endless: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second prompt holds the first answer, until /reset."""
    prompts = []
    generate = chat.generate

    def record(model: object, tokenizer: object, prompt: dict[str, torch.Tensor], arguments: object) -> str:
        prompts.append(tokenizer.decode(prompt["input_ids"][0]))  # type: ignore[attr-defined]
        return generate(model, tokenizer, prompt, arguments) and "first answer"  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "generate", record)
    run(endless, ["one", "", "two", "/reset", "three"], monkeypatch)
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [
        ask.format("one"),
        ask.format("one") + "first answer<|im_end|>\n" + ask.format("two"),
        ask.format("three"),
    ]
    assert "the conversation is forgotten" in capsys.readouterr().out


def test_base_model_completes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model_dir, ["Permission is"], monkeypatch)
    first, *answer = capsys.readouterr().out.split("\n")
    assert "a base model without a chat template: it completes your text" in first
    completion = expected(model_dir, "Permission is", 8)
    assert "\n".join(answer).strip() == "".join(c for c in completion if c.isprintable() or c in "\n\t").strip()
    with pytest.raises(OptionError, match="system Hi: the model has no chat template"):
        run(model_dir, [], monkeypatch, "--system", "Hi")


def test_adapters(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A directory with adapters is loaded with its base model, and answers otherwise than the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_alpha=4096, init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path / "adapters")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "adapters")
    shown = []
    for path in (model_dir, tmp_path / "adapters"):
        run(path, ["Permission is"], monkeypatch)
        shown.append(capsys.readouterr().out.split("\n", 1)[1])
    assert shown[0] != shown[1]


def test_too_long_a_conversation(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused, and the next line is answered."""
    run(model_dir, ["word " * 400, "Permission is"], monkeypatch)
    shown = capsys.readouterr()
    assert shown.err == "error: the conversation is longer than the 256 positions of the model: type /reset\n"
    assert len(shown.out.strip()) > 100


def test_no_model(tmp_path: Path, model_dir: Path) -> None:
    """No model, adapters of another kind, files that are no model, and wrong options."""
    ended = subprocess.run([*COMMAND, tmp_path / "none"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"chat: error: {tmp_path}/none: there is no model\n"
        "train one with `make train`, or pass its directory: python -m model.chat DIR\n"
    )
    (tmp_path / "adapters").mkdir()
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "adapters")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{")
    with pytest.raises(OptionError, match="transformers cannot load it"):
        chat.main([str(tmp_path / "damaged")])
    for config, message in (
        ({"use_dora": True}, "use_dora True: no adapters of this trainer"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa: no adapters of this trainer"),
        ({"base_model_name_or_path": f"{tmp_path}/gone"}, "/gone: no such directory\nwrite the path"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path None: no such directory"),
    ):
        (tmp_path / "adapters/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        with pytest.raises(OptionError, match=message):
            chat.main([str(tmp_path / "adapters")])
    with pytest.raises(OptionError, match="pass --temperature"):
        chat.main([str(tmp_path), "--temperature", "-1"])


def test_checkpoint(tiny: list[object], tmp_path: Path) -> None:
    """The message says how to export a checkpoint, and that works."""
    train_ok(1, *tiny, "--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(OptionError, match="a checkpoint of a run") as error:
        chat.main([str(checkpoint)])
    words = str(error.value).partition(" with ")[2].split()
    assert words[:4] == ["--resume_from_checkpoint", str(checkpoint), "--max_steps", "2"]
    train_ok(1, *tiny, *words[:4], "--output_dir", tmp_path / "exported")
    chat.require_model(tmp_path / "exported")
    for path in (tmp_path / "run").glob("*.json"):
        path.unlink()
    with pytest.raises(OptionError, match="its run has not finished"):
        chat.main([str(tmp_path / "run")])
