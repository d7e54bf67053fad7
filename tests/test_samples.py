"""Proves loss/samples.py, config/prompts.py and encode_prompt in data/tokens.py: what the model writes while it trains.

Texts are equal on every topology, equal to what transformers computes with the exported model, and training does not
notice them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from config.errors import OptionError
from config.prompts import MOST_PROMPTS, read_prompts
from data.records import START, RawRecord
from data.tokens import Rendering, encode_prompt
from loss import samples
from metrics.records import read_records
from tests import world
from tests.launch import train, train_ok

PROMPTS = "Redistribution and use\nthe\n\nCOPYRIGHT HOLDERS AND CONTRIBUTORS\n"
QUICK = ["--max_steps", 4, "--eval_steps", 2, "--save_steps", 0]


def texts(directory: Path) -> list[Any]:
    """The samples of each evaluation."""
    return [record["samples"] for record in read_records(directory / "metrics.jsonl") if "samples" in record]


def numbers(directory: Path) -> list[dict[str, Any]]:
    """The records of training and evaluation, without what depends on the clock."""
    timed = ("tokens_per_second", "data_wait_seconds", "save_seconds", "peak_memory_gib", "slowest_rank")
    return [
        {name: value for name, value in record.items() if not name.startswith(timed)}
        for record in read_records(directory / "metrics.jsonl")
        if "samples" not in record
    ]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def alone(tiny: list[object], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    output = train_ok(1, *tiny, *QUICK, "--sample_prompts", prompts, "--output_dir", directory)
    assert "step 4: 'the' -> " in output
    return directory


def test_samples_are_those_of_transformers(alone: Path) -> None:
    """The last samples, drawn from the logits that transformers computes with the exported model."""
    model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(alone)
    assert [len(evaluation) for evaluation in texts(alone)] == [3, 3, 3]
    for number, sample in enumerate(texts(alone)[-1]):
        ids = tokenizer(sample["prompt"])["input_ids"]
        draws = torch.rand(32, generator=torch.Generator().manual_seed(42 + number)).tolist()  # half of block_size
        written: list[int] = []
        for draw in draws:
            with torch.no_grad():
                logits_V = model(torch.tensor([ids + written])).logits[0, -1].double()
            best = torch.topk(logits_V, samples.TOP_K).indices.sort().values
            cumulative = torch.softmax(logits_V[best] / samples.TEMPERATURE, 0).cumsum(0)
            token = int(best[int(torch.searchsorted(cumulative, draw))])
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
        assert sample["completion"] == tokenizer.decode(written, skip_special_tokens=True)
        assert sample["completion"]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ["--strategy", "fsdp"]),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(2, ["--strategy", "fsdp", "--reshard_after_forward", "false"], marks=pytest.mark.slow),
        pytest.param(2, ["--strategy", "fsdp", "--tensor_parallel", 2], marks=pytest.mark.slow),
        pytest.param(2, ["--context_parallel", 2], marks=pytest.mark.slow),
        pytest.param(4, ["--strategy", "fsdp", "--context_parallel", 2], marks=pytest.mark.slow),
        pytest.param(2, ["--per_device_eval_batch_size", 2, "--shard_optimizer"], marks=pytest.mark.slow),
        pytest.param(1, ["--torch_compile", "true"], marks=pytest.mark.slow),
    ],
)
def test_every_topology_writes_the_same(
    ranks: int, options: list[object], alone: Path, tiny: list[object], prompts: Path, tmp_path: Path
) -> None:
    train_ok(ranks, *tiny, *QUICK, *options, "--sample_prompts", prompts, "--output_dir", tmp_path)
    assert texts(tmp_path) == texts(alone)


@pytest.mark.parametrize(
    "options",
    [["--packing", "documents"], pytest.param(["--packing", "concat", "--strategy", "fsdp"], marks=pytest.mark.slow)],
)
def test_training_does_not_notice_samples(
    options: list[object], model_with_dropout: Path, tiny: list[object], prompts: Path, tmp_path: Path
) -> None:
    """With dropout, the curve with samples is equal to the bit: RNG, training mode and forward are as before."""
    shared = [*tiny, *QUICK, *options, "--model_name_or_path", model_with_dropout, "--eval_steps", 1]
    train_ok(1, *shared, "--output_dir", tmp_path / "without")
    train_ok(1, *shared, "--sample_prompts", prompts, "--output_dir", tmp_path / "with")
    assert len(texts(tmp_path / "with")) == 5
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")


@pytest.mark.slow
def test_training_of_a_mixture_does_not_notice_samples(
    model_dir: Path, tiny: list[object], prompts: Path, tmp_path: Path
) -> None:
    """Experts that are balanced by a loss count the tokens of training alone, also if they are split."""
    model = world.make_mixture(tmp_path / "mixture", model_dir)
    balanced = ["--router_aux_loss_coef", 0.01, "--strategy", "fsdp", "--expert_parallel", 2]
    shared = [*tiny, *QUICK, *balanced, "--model_name_or_path", model]
    train_ok(2, *shared, "--output_dir", tmp_path / "without")
    train_ok(2, *shared, "--sample_prompts", prompts, "--output_dir", tmp_path / "with")
    assert len(texts(tmp_path / "with")) == 3
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_preference_training_writes_samples(ranks: int, dpo: list[object], tmp_path: Path) -> None:
    strategy = ["--strategy", "fsdp"] if ranks == 2 else []
    train_ok(ranks, *dpo, *QUICK, *strategy, "--sample_prompts", "the copyright", "--output_dir", tmp_path)
    assert [len(evaluation) for evaluation in texts(tmp_path)] == [1, 1, 1]


def test_samples_without_validation_data(tiny: list[object], tmp_path: Path) -> None:
    """Prompts alone are reason enough for an evaluation. A text is a prompt, too."""
    none = ["--validation_split_percentage", 0, "--sample_prompts", "the copyright"]
    output = train_ok(1, *tiny, *QUICK, *none, "--output_dir", tmp_path)
    assert [len(evaluation) for evaluation in texts(tmp_path)] == [1, 1, 1]
    assert "no effect" not in output
    assert [record for record in read_records(tmp_path / "metrics.jsonl") if record.keys() <= {"step", "epoch"}] == []


def test_a_long_prompt_is_refused(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(1, [*tiny, "--sample_prompts", "copyright " * 40, "--output_dir", tmp_path / "output"])
    assert outcome.exit_codes == [2]
    assert "pass prompts of 1 to 32 tokens, which is half of block_size" in outcome.output


def test_a_long_prompt_for_the_end_is_refused_before_training(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(1, [*tiny, "--prompt", "copyright " * 40, "--output_dir", tmp_path / "output"])
    assert outcome.exit_codes == [2]
    assert "prompt copyright" in outcome.output
    assert "pass prompts of 1 to 32 tokens, which is half of block_size" in outcome.output


def rendering(tokenizer: PreTrainedTokenizerBase, shape: str) -> Rendering:
    return Rendering(shape, "text", 64, 0.1, tokenizer)


def test_a_chat_model_is_asked_as_a_user_would(tokenizer: PreTrainedTokenizerBase) -> None:
    """The chat template renders the prompt of a model that trains on conversations, and of no other."""

    def seen(shape: str, record: dict[str, Any]) -> str:
        raw = RawRecord("a.jsonl: line 1", json.dumps(record).encode(), START)
        return tokenizer.decode(encode_prompt("the use", rendering(tokenizer, shape), raw).tokens)

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = "<|im_start|>user\nthe use<|im_end|>\n<|im_start|>assistant\n"
    assert seen("messages", {"messages": turns}) == asked
    assert seen("alpaca", {"instruction": "a", "output": "b"}) == asked
    assert seen("prompt", {"prompt": "a", "completion": "b"}) == "the use"
    assert seen("text", {"text": "a"}) == "the use"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"two\\nlines"\n\n{"prompt": "one"}\n')
    assert read_prompts(str(path)) == ["two\nlines", "one"]
    (tmp_path / "prompts.txt").write_bytes("\ufeffa b \r\n\r\n  c\n".encode())
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a b ", "  c"]
    (tmp_path / "prompts.json").write_text('["one", {"prompt": "two"}]')
    assert read_prompts(str(tmp_path / "prompts.json")) == ["one", "two"]
    assert read_prompts("Hello") == ["Hello"]
    assert read_prompts("data") == ["data"]  # a directory is no file of prompts
    assert read_prompts("Read a.txt") == ["Read a.txt"]
    assert read_prompts("x" * 5000) == ["x" * 5000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "has 0 prompts; pass 1 to"),
        ("a\n" * (MOST_PROMPTS + 1), "has 17 prompts; pass 1 to 16"),
        ('"a"\n{"text": "a"}\n', "line 2 has no prompt"),
        ("[" * 100_000, "line 1 has no prompt"),
    ],
)
def test_prompts_that_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content if content.startswith(("{", "[", '"')) else content.replace("a", '"a"'))
    with pytest.raises(OptionError, match=message):
        read_prompts(str(path))
    with pytest.raises(OptionError, match="has 0 prompts"):
        read_prompts(" ")
    with pytest.raises(OptionError, match=r"~/none: No such file"):
        read_prompts("~/none")
    (tmp_path / "prompts.json").write_text('{"prompt": "a"}')
    with pytest.raises(OptionError, match="it has no list"):
        read_prompts(str(tmp_path / "prompts.json"))


def test_an_empty_prompt_is_refused(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(1, [*tiny, "--sample_prompts", "", "--output_dir", tmp_path / "output"])
    assert outcome.exit_codes == [2], outcome.output
    assert "sample_prompts : has 0 prompts" in outcome.output
