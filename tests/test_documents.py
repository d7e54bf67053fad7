"""Proves model/documents/: a model that mixes packed documents is found, whatever mixes them."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    Mamba2Config,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3 import modeling_qwen3

from config.command_line import parse
from config.errors import OptionError
from data.batches import collate
from data.prepare import prepare_data
from data.sequences import Sequence
from loss.next_token import NextToken
from metrics.records import read_records
from model.documents.trial import document_obstacle, keep_documents_apart, position_obstacle
from tests.families import FAMILIES, SIZES
from tests.proof import GATES, Case, first_gradient, relative_l2

ALIBI: dict[str, Any] = {"vocab_size": 389, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
# GPT-OSS and OPT build their mask without position ids, ALiBi counts from the start of the sequence, and chunks of
# four positions are shorter than the documents.
RIGHT: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "llama4": Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=4),
    "opt": OPTConfig(**{**SIZES, "ffn_dim": 48}, word_embed_proj_dim=32, dropout=0.0),
    "falcon": FalconConfig(**ALIBI, alibi=True, new_decoder_architecture=False),
    "bloom": BloomConfig(**ALIBI, n_head=4, n_layer=2),
    "mpt": MptConfig(vocab_size=389, d_model=32, n_heads=4, n_layers=2, max_seq_len=256),
    "gpt2": GPT2Config(vocab_size=389, n_embd=32, n_head=4, n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
QUICK = ("gpt_oss", "llama4", "falcon")
STATE: dict[str, PretrainedConfig] = {
    "mamba2": Mamba2Config(
        vocab_size=389, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, num_hidden_layers=2
    ),
    "lfm2": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}


@pytest.fixture(autouse=True)
def new_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the trials of other tests, because some tests change a model between two trials."""
    monkeypatch.setattr("model.documents.trial._results", {})


def error_of_packing(config: PretrainedConfig) -> float:
    """How far the gradient of packed documents is from that of each document alone, with the batches of training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    lengths = [6, 11, 9]
    tokens = torch.randint(1, 389, (sum(lengths),))

    def gradient(sequences: list[tuple[Tensor, list[int]]], padded: int | None) -> dict[str, Tensor]:
        model.zero_grad()
        for part, segments in sequences:
            sequence = Sequence(0, part, torch.ones(len(part), dtype=torch.bool), segments)
            batch = collate([sequence], padded)
            names = ("input_ids", "labels", "position_ids", "document_ends")
            NextToken(model)(**{name: batch[name] for name in names if name in batch}).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = gradient([(part, [len(part)]) for part in tokens.split_with_sizes(lengths)], None)
    keep_documents_apart(model, torch.device("cpu"), bf16=False)
    return relative_l2(gradient([(tokens, lengths)], padded=32), alone)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in RIGHT]
)
def test_attention_stays_within_documents(name: str) -> None:
    """The trial finds no obstacle, and the gradient of packed documents is the gradient of each document alone."""
    assert document_obstacle(RIGHT[name]) == ""
    assert error_of_packing(RIGHT[name]) < 1e-5


@pytest.mark.parametrize("name", STATE)
def test_the_trial_says_what_training_would_do(name: str) -> None:
    """A layer that carries a state is refused exactly if its gradient is another one in a packed sequence."""
    assert (document_obstacle(STATE[name]) == "") == (error_of_packing(STATE[name]) < 1e-4)


@pytest.mark.parametrize("name", STATE)
def test_padding_changes_no_document(name: str) -> None:
    """Without packing, padding comes after the document, so a state needs no mask for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(STATE[name])).eval()
    tokens = torch.randint(1, 389, (1, 9))
    padded = model(input_ids=nn.functional.pad(tokens, (0, 5)), use_cache=False).logits[:, :9]
    torch.testing.assert_close(padded, model(input_ids=tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_context_parallelism_takes_causal_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but causal attention, with or without a window, may look at other positions: no list of layer types."""
    for name in ("qwen3", "opt"):
        assert position_obstacle(RIGHT[name]) == ""
    assert position_obstacle(FAMILIES["gemma3"][0]) == "", "it has windows"
    for config in (RIGHT["gpt_oss"], RIGHT["llama4"], RIGHT["bloom"], *STATE.values()):
        assert "a position depends on others by more than causal attention" in position_obstacle(config)
    config = LeakyConfig(**SIZES)
    monkeypatch.setattr(LeakyForCausalLM, "leak", staticmethod(LEAKS["convolution over two tokens"]))
    assert position_obstacle(config) != ""
    monkeypatch.setattr(LeakyForCausalLM, "leak", staticmethod(torch.clone))
    assert position_obstacle(config) == ""


class LeakyConfig(Qwen3Config):
    model_type = "leaky"


class LeakyForCausalLM(Qwen3ForCausalLM):
    """Qwen3 with `leak` after the MLP of one of its layers. The tests set `leak`."""

    config_class = LeakyConfig
    leak: Callable[[Tensor], Tensor] = torch.clone

    def __init__(self, config: LeakyConfig) -> None:
        super().__init__(config)
        mlp = self.model.layers[-1].mlp
        mlp.register_forward_hook(lambda module, inputs, output: type(self).leak(output))


AutoConfig.register("leaky", LeakyConfig)
AutoModelForCausalLM.register(LeakyConfig, LeakyForCausalLM)
LEAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "cumulative mean": lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
    "convolution over two tokens": lambda x: x + 0.1 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1],
    "state that decays": lambda x: x + 0.1 * x.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[:, None],
    "backward only": lambda x: x + 0.1 * (x.mean(1, keepdim=True) - x.mean(1, keepdim=True).detach()),
    "normalization over the sequence": lambda x: x / x.std(1, keepdim=True),
    "a look ahead": lambda x: x + 0.1 * nn.functional.pad(x, (0, 0, 0, 1))[:, 1:],
    "an error": lambda x: x[:, :-1],
    "nan": lambda x: x * float("nan"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leak_on_purpose_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last layer only. Without the leak, the model is right."""
    config = LeakyConfig(**{**SIZES, "num_hidden_layers": 3})
    monkeypatch.setattr(LeakyForCausalLM, "leak", staticmethod(LEAKS[name]))
    assert document_obstacle(config) != ""
    monkeypatch.setattr(LeakyForCausalLM, "leak", staticmethod(torch.clone))
    monkeypatch.setattr("model.documents.trial._results", {})
    assert document_obstacle(config) == ""


def test_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that builds a causal mask of its own, which no document ends: its attention restarts at documents."""

    def mask(inputs_embeds: Tensor, **others: Any) -> Tensor:
        length = inputs_embeds.shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril()[None, None]

    monkeypatch.setattr(modeling_qwen3, "create_causal_mask", mask)
    assert document_obstacle(RIGHT["qwen3"]) == ""
    monkeypatch.setattr("model.documents.trial.stateful_kinds", lambda model: set())
    monkeypatch.setattr("model.documents.trial._results", {})
    assert "Qwen3DecoderLayer lets a document see another one" in document_obstacle(RIGHT["qwen3"])


def test_large_models_take_a_small_trial() -> None:
    """Configurations of 8 and of 30 billion parameters are shrunk, and every kind of layer remains."""
    large = Qwen3Config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, vocab_size=151936)
    mixed = GptOssConfig(sliding_window=4096)  # 36 layers, 128 experts
    before = torch.get_rng_state()
    for config in (large, mixed):
        shown = config.to_dict()
        assert document_obstacle(config) == ""
        assert config.to_dict() == shown, "the trial has a copy"
    assert torch.equal(torch.get_rng_state(), before)


def conversations(directory: Path) -> Path:
    path = directory / "chat.jsonl"
    turn = [{"role": "user", "content": "licence"}, {"role": "assistant", "content": "software"}]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for _ in range(40)))
    return path


def test_packing_is_decided_before_data_are_prepared(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conversations are not packed for a model that mixes them, and rank 0 says so. On request, that is refused."""
    monkeypatch.setattr(LeakyForCausalLM, "leak", staticmethod(LEAKS["cumulative mean"]))
    leaky, tokenizer = LeakyConfig(**SIZES), AutoTokenizer.from_pretrained(model_dir)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}"
    )
    tokenizer.chat_template = template.read_text()
    options = ["--train_file", conversations(tmp_path), "--data_cache_dir", tmp_path, "--block_size", 64]
    words = [str(word) for word in options]

    assert prepare_data(parse(words), tokenizer, RIGHT["qwen3"]).packing == "documents"
    capsys.readouterr()
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert prepare_data(parse(words), tokenizer, leaky).packing == "none"
        assert capsys.readouterr().err.count("packing: none, because packed conversations would mix in leaky: ") == said
    for more in ([], ["--streaming", "--max_steps", "1"]):
        with pytest.raises(OptionError, match=r"packing documents: .* leaky: .*\npass --packing none"):
            prepare_data(parse([*words, *more, "--packing", "documents"]), tokenizer, leaky)
    monkeypatch.setattr("data.prepare.document_obstacle", lambda *arguments: pytest.fail("a trial for no packing"))
    assert prepare_data(parse([*words, "--packing", "none"]), tokenizer, leaky).packing == "none"


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that multiply experts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grouped" in str(function):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_a_trial_multiplies_experts_as_training_does() -> None:
    with GroupedProducts() as mode:
        assert document_obstacle(FAMILIES["qwen3 moe"][0]) == position_obstacle(FAMILIES["qwen3 moe"][0]) == ""
    assert mode.names == {"trainer.grouped_product.default", "trainer.grouped_weight_gradient.default"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_packed_step_of_these_families(name: str, tiny: list[object], tmp_path: Path) -> None:
    """Loss, gradient norm and gradient of the first step of a run are equal, packed on two ranks or not packed."""
    RIGHT[name].save_pretrained(tmp_path / "config")
    path = tmp_path / "documents.jsonl"
    draw = random.Random(3)
    texts = ["the licence of software " * draw.randint(1, 2) + "a" * draw.randint(1, 9) for _ in range(46)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = tiny.index("--model_name_or_path")
    options = [*tiny[:model], *tiny[model + 2 :], "--tokenizer_name", tiny[model + 1], "--train_file", path]
    options += ["--config_name", tmp_path / "config"]
    gradients, records = [], []
    for case, packing, sequences in ((Case("alone", 1, 46), "none", 46), (Case("packed", 2, 2), "documents", 16)):
        words = [*options, "--packing", packing, "--global_batch_size", sequences]
        gradients.append(first_gradient(case, words, tmp_path / packing))
        records.append(read_records(tmp_path / packing / "metrics.jsonl")[-1])
    assert [record["epoch"] for record in records] == [1, 1], "all documents are in the step"
    assert records[1]["loss"] == pytest.approx(records[0]["loss"], abs=GATES.loss)
    assert records[1]["grad_norm"] == pytest.approx(records[0]["grad_norm"], rel=GATES.grad_norm)
    assert relative_l2(gradients[1], gradients[0]) < 1e-5
