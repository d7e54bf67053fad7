"""Proves loss/evaluation.py and loss/token_bytes.py: validation sets by name, and bits per byte."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.plan import Plan
from config.validation import validation_files
from data.prepare import prepare_data
from data.sequences import PreparedDataset
from loss.evaluation import evaluate
from loss.token_bytes import bytes_of_tokens
from metrics.recorder import Recorder
from metrics.records import read_records
from tests.launch import train_ok

PACKINGS: tuple[Literal["none", "documents"], ...] = ("none", "documents")

TEXT = "Grüße, 世界! \U0001f600 ok"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jsonl", {"eval": "a.jsonl"}),
        ("a.jsonl,b.jsonl", {"eval": "a.jsonl,b.jsonl"}),
        ("./lr=0.1/a.jsonl", {"eval": "./lr=0.1/a.jsonl"}),
        ("code=a.jsonl,web-2=data/*.jsonl", {"eval_code": "a.jsonl", "eval_web-2": "data/*.jsonl"}),
        ("x=lr=0.1/a.jsonl", {"eval_x": "lr=0.1/a.jsonl"}),
        ('{"code": "a.jsonl", "web": ["b.jsonl", "c.jsonl"]}', {"eval_code": "a.jsonl", "eval_web": "b.jsonl,c.jsonl"}),
    ],
)
def test_names_of_validation_sets(value: str, expected: dict[str, str]) -> None:
    assert validation_files(value) == expected


def test_a_path_with_a_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert validation_files("lr=1.jsonl") == {"eval_lr": "1.jsonl"}
    (tmp_path / "lr=1.jsonl").touch()
    assert validation_files("lr=1.jsonl") == {"eval": "lr=1.jsonl"}


def test_a_set_that_is_too_small(tokenizer: PreTrainedTokenizerBase, train_file: Path, tmp_path: Path) -> None:
    options = Options(data_cache_dir=str(tmp_path), train_file=str(train_file), block_size=64)
    options.validation_file = write(tmp_path / "short.jsonl", {"text": "the"})
    with pytest.raises(
        OptionError, match=r"validation_file .*: it has \d tokens, less than one sequence of block_size 64"
    ):
        prepare_data(options, tokenizer)


@pytest.mark.parametrize(
    "value",
    [
        *("code=a.jsonl,b.jsonl", "code=a.jsonl,code=b.jsonl", "code=", "code=a.jsonl,=b.jsonl"),
        *('{"code": 1}', '{"a b": "c"}', '{"code": "a", "code": "b"}', '{"code"', "{}"),
    ],
)
def test_sets_that_are_refused(value: str) -> None:
    with pytest.raises(OptionError, match=r"validation_file .*: pass "):
        validation_files(value)


def test_evaluation_alone(tiny: list[object], train_file: Path, tmp_path: Path) -> None:
    """The model is evaluated as before a training, without training data, and nothing else is written.

    A checkpoint is evaluated if the run is resumed from it.
    """
    trained, evaluated = tmp_path / "trained", tmp_path / "evaluated"
    quick = ["--max_steps", 2, "--validation_file", train_file]
    output = train_ok(1, *tiny, *quick, "--output_dir", trained)
    first, last = (record for record in read_records(trained / "metrics.jsonl") if "eval_loss" in record)
    position = tiny.index("--train_file")
    only = [*tiny[:position], *tiny[position + 2 :], "--max_steps", -1, "--num_train_epochs", 0]
    output = train_ok(2, *only, "--validation_file", train_file, "--output_dir", evaluated)
    assert "none: only evaluates" in output
    assert "stopped" not in output
    assert "complete" not in output
    assert read_records(evaluated / "metrics.jsonl") == [pytest.approx(first)]
    assert {path.name for path in evaluated.iterdir()} == {".lock", "metrics.jsonl", "events.jsonl"}
    resumed = ["--resume_from_checkpoint", trained / "checkpoint-2", "--train_file", train_file]
    train_ok(1, *only, *resumed, "--validation_file", train_file, "--output_dir", trained)
    (*_, again) = read_records(trained / "metrics.jsonl")
    assert again == pytest.approx(last | {"epoch": again["epoch"]})


def test_evaluation_alone_needs_validation_data(
    tokenizer: PreTrainedTokenizerBase, train_file: Path, tmp_path: Path
) -> None:
    options = Options(data_cache_dir=str(tmp_path), train_file=str(train_file), block_size=64, num_train_epochs=0)
    options.validation_split_percentage = 0
    with pytest.raises(OptionError, match="num_train_epochs 0: only evaluates, and there is no validation data\npass "):
        prepare_data(options, tokenizer)
    with pytest.raises(OptionError, match="prompt Hi: num_train_epochs 0 writes no model to complete it\nremove "):
        check(parse(["--config_name", "x", "--num_train_epochs", "0", "--prompt", "Hi"]), 1)


def sentence_piece(prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as those of Llama 2 (with a prefix) and Gemma: spaces are U+2581, unknown characters are bytes."""
    tokens = [
        "<unk>",
        "<eos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"\u2581thecat\n",
        "\u2581t",
        "th",
        "\u2581the",
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [("t", "h"), ("\u2581", "t")]
    bpe = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "\u2581")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte level", "with a prefix", "without a prefix"])
def test_bytes_of_tokens_add_up_to_the_text(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Characters of one to four bytes, over several tokens each; a special token has no text, an added one has."""
    tokenizer = tokenizer if kind == "byte level" else sentence_piece(prefix=kind == "with a prefix")
    tokenizer.add_tokens([AddedToken("<ü>", special=False, normalized=False)])
    counts = bytes_of_tokens(tokenizer)
    assert counts is not None
    for text in (TEXT, "the cat", " the  cat\n", "a<ü>b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prefix = kind == "with a prefix"
        assert counts[ids].sum() == len(text.encode()) + prefix * (1 + text.count("<ü>")), text
    assert counts[tokenizer.eos_token_id] == 0


def test_another_kind_of_tokenizer_has_no_bytes() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert bytes_of_tokens(PreTrainedTokenizerFast(tokenizer_object=words)) is None


class TwoNats(nn.Module):
    """A model whose loss is 2 nats for each target."""

    def forward(self, input_ids: Tensor, labels: Tensor, **others: Tensor) -> Tensor:
        return 2.0 * (labels[:, 1:] != -100).sum()


def evaluated(options: Options, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    data = prepare_data(options, tokenizer)
    recorder = Recorder(options, Plan(64, 1, 1, 1, 1), 0, torch.device("cpu"), None)
    metrics = evaluate(TwoNats(), data, tokenizer, options, recorder)
    assert metrics is not None
    recorder.evaluation(0, metrics)
    return metrics


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_bits_per_byte_by_hand(tokenizer: PreTrainedTokenizerBase, alone: None, tmp_path: Path) -> None:
    """Texts: all bytes but those of the first token, and the bits of EOS. Conversations: the bytes of the answers."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    texts = [TEXT, "the"]
    answers = ["Ja, natürlich.", "No"]
    options = Options(data_cache_dir=str(tmp_path), output_dir=str(tmp_path), block_size=64, packing="none")
    options.train_file = write(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    options.validation_file = options.train_file
    metrics = evaluated(options, tokenizer)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    targets = sum(map(len, ids))  # all but the first token of each, and its EOS
    text_bytes = sum(
        len(text.encode()) - len(tokenizer.decode(tokens[:1])) for text, tokens in zip(texts, ids, strict=True)
    )
    bits = targets * 2 / math.log(2)
    assert metrics == {
        "eval_loss": 2.0,
        "eval_perplexity": pytest.approx(math.exp(2)),
        "eval_bits_per_byte": pytest.approx(bits / text_bytes, rel=1e-12),
        "eval_tokens": targets,
    }
    chats = (
        {"messages": [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    )
    options.train_file = options.validation_file = write(tmp_path / "chats.jsonl", *chats)
    for packing in PACKINGS:
        options.packing = packing
        metrics = evaluated(options, tokenizer)
        targets = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in answers)
        assert metrics["eval_tokens"] == targets
        text_bytes = sum(len(answer.encode()) for answer in answers)
        assert metrics["eval_bits_per_byte"] == pytest.approx(targets * 2 / math.log(2) / text_bytes, rel=1e-12)


def test_several_sets(tiny: list[object], train_file: Path, model_dir: Path, tmp_path: Path) -> None:
    """Each set has its own metrics, those of transformers; also a set that has fewer sequences than ranks."""
    lines = train_file.read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text('{"text": "the license"}\n')
    (tmp_path / "long.jsonl").write_text("".join(lines[:9]))
    sets = f"short={tmp_path / 'short.jsonl'},long={tmp_path / 'long.jsonl'}"
    options = [*tiny, "--max_steps", 1, "--output_dir", tmp_path / "run", "--validation_file", sets]
    output = train_ok(2, *options)
    assert ": 1 short, " in output
    assert "\nstep 0: validation short loss " in output
    record = read_records(tmp_path / "run" / "metrics.jsonl")[0]
    names = ("loss", "perplexity", "bits_per_byte", "tokens")
    assert set(record) - {"step", "epoch", "tokens_seen"} == {
        f"{name}_{part}" for name in ("eval_short", "eval_long") for part in names
    }
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    counts = bytes_of_tokens(tokenizer)
    assert counts is not None
    data = prepare_data(parse(list(map(str, options))), tokenizer)
    for name, dataset in data.validation.items():
        sequences = [dataset[index].tokens for index in range(len(dataset)) if len(dataset[index].tokens) > 1]
        targets = sum(len(tokens) - 1 for tokens in sequences)
        losses = (
            model(input_ids=tokens[None], labels=tokens[None]).loss.item() * (len(tokens) - 1) for tokens in sequences
        )
        loss, text = sum(losses), int(sum(counts[tokens[1:]].sum() for tokens in sequences))
        expected = [loss / targets, math.exp(loss / targets), loss / math.log(2) / text, targets]
        assert [record[f"{name}_{part}"] for part in names] == pytest.approx(expected, rel=1e-5)


def test_nothing_to_predict_is_no_number(tokenizer: PreTrainedTokenizerBase, alone: None, tmp_path: Path) -> None:
    """A set in which no token is a target has no loss: null in the record, not 0."""
    options = Options(data_cache_dir=str(tmp_path), output_dir=str(tmp_path), block_size=2, packing="none")
    options.train_file = options.validation_file = write(tmp_path / "texts.jsonl", {"text": TEXT})
    data = prepare_data(options, tokenizer)
    dataset = data.validation["eval"]
    assert isinstance(dataset, PreparedDataset)
    dataset.segments, dataset.first_segments = np.array([[0, 1]]), np.array([0, 1])  # type: ignore[assignment]
    recorder = Recorder(options, Plan(2, 1, 1, 1, 1), 0, torch.device("cpu"), None)
    recorder.evaluation(0, evaluate(TwoNats(), data, tokenizer, options, recorder))
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert (record["eval_loss"], record["eval_bits_per_byte"], record["eval_tokens"]) == (None, None, 0)
