"""Proves data/packing.py, data/batches.py and model/documents/: full sequences, no token lost, separate documents."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

import data.packing
import model.documents.attention
from data.batches import collate
from data.packing import Packing, pack, pack_in_parts
from data.sequences import Sequence
from loss.next_token import NextToken
from metrics.records import read_records
from model.documents.attention import NAME, attend_within_documents
from tests.proof import GATES, Case, first_gradient, relative_l2


def ragged_lengths(number: int) -> np.ndarray:
    """Log-normal lengths, like those of conversations: a median of 400, and a few of thousands."""
    return np.minimum(np.exp(np.random.default_rng(0).normal(6, 1.2, number)), 40_960).astype(np.int64)


@pytest.mark.parametrize("number", [1000, 20_000])
def test_no_slot_is_wasted(number: int) -> None:
    """At least 98% of the positions hold a token (99.7% with 1000 documents, 99.98% with 20,000)."""
    lengths = ragged_lengths(number)
    packed = pack(Packing("documents", 4096), lengths)
    assert lengths.sum() / ((len(packed.first_segments) - 1) * 4096) > 0.98


@pytest.mark.parametrize("packing", ["documents", "none", "concat"])
def test_no_token_is_lost(packing: str) -> None:
    """Each token is in one sequence. Only documents longer than a sequence are cut, even 100 times."""
    lengths = np.concatenate([ragged_lengths(300), [0, 25_600, 1, 256, 257]])
    packed = pack(Packing(packing, 256), lengths)
    sizes = packed.segments[:, 1] - packed.segments[:, 0]
    sequences = np.add.reduceat(sizes, packed.first_segments[:-1])
    assert sequences.max() <= 256
    assert sizes.min() > 0
    used = np.zeros(lengths.sum(), np.int64)
    for start, end in packed.segments:
        used[start:end] += 1
    assert used.max() == 1
    left_out = used.size - used.sum()
    assert left_out == (used.size % 256 if packing == "concat" else 0)
    if packing != "concat":
        assert len(sizes) == (-(-lengths // 256)).sum()


@pytest.mark.parametrize("tokens", [0, 7, 256 * 3, 256 * 7 + 5])
def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """concat gives the same sequences three at a time and all at once."""
    monkeypatch.setattr(data.packing, "SEQUENCES_OF_A_PART", 3)
    lengths = np.array([tokens // 2, 0, tokens - tokens // 2])
    parts = list(pack_in_parts(Packing("concat", 256), lengths))
    whole = pack(Packing("concat", 256), lengths)
    assert [segment for part in parts for segment in part.segments.tolist()] == whole.segments.tolist()
    assert sum(len(part.first_segments) - 1 for part in parts) == len(whole.first_segments) - 1 == tokens // 256
    assert len(parts) == -(-tokens // (256 * 3))


def tokens_of_documents(lengths: list[int], vocabulary: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, vocabulary, (length,)) for length in lengths]


def packed_row(documents: list[Tensor], number: int = 0) -> Sequence:
    tokens = torch.cat(documents)
    trained_on = torch.ones_like(tokens, dtype=torch.bool)
    trained_on[1:3] = False  # a question, say
    return Sequence(number, tokens, trained_on, [len(document) for document in documents])


def loss_and_gradient(
    small: PreTrainedModel, batches: list[dict[str, Tensor]], bf16: bool = False
) -> tuple[float, dict[str, Tensor]]:
    small.zero_grad()
    total, objective = 0.0, NextToken(small)
    for batch in batches:
        names = ("input_ids", "labels", "position_ids", "document_ends")
        with torch.autocast(small.device.type, torch.bfloat16, enabled=bf16):
            loss = objective(**{name: batch[name] for name in names if name in batch})
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in small.named_parameters()}


def sliding_model() -> PreTrainedModel:
    """A model whose layers look back 8 tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, vocab_size=384, sliding_window=8))


def packed_and_alone() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A micro-batch of two packed sequences, and each of their documents as a micro-batch of its own."""
    documents = tokens_of_documents([17, 30, 1, 9, 25, 31], 384)
    sequences = [packed_row(documents[:4]), packed_row(documents[4:], 1)]
    alone = []
    for sequence in sequences:
        start = 0
        for length in sequence.segment_lengths:
            part = slice(start, start + length)
            alone.append(collate([Sequence(0, sequence.tokens[part], sequence.trained_on[part], [length])]))
            start += length
    return collate(sequences, padded_length=64), alone


@pytest.mark.parametrize("model_name", ["full_attention", "sliding_window"])
def test_packed_is_one_by_one(model_dir: Path, model_name: str) -> None:
    """Loss and gradients of packed sequences equal those of their documents alone. Leaking attention changes them."""
    small = sliding_model() if "sliding" in model_name else AutoModelForCausalLM.from_pretrained(model_dir)
    packed, alone = packed_and_alone()
    assert int(packed["targets"]) == sum(int(batch["targets"]) for batch in alone)
    loss, gradient = loss_and_gradient(small, [packed])
    expected_loss, expected = loss_and_gradient(small, alone)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_l2(gradient, expected) < 1e-5
    leaking = {name: packed[name] for name in ("input_ids", "labels")}
    assert relative_l2(loss_and_gradient(small, [leaking])[1], expected) > 1e-2


def varlen_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """The result of torch.nn.attention.varlen.varlen_attn, computed one document after the other on any device."""
    assert query.shape[1] == key.shape[1] or enable_gqa
    results = []
    for start, end in pairwise(cu_seq_q.tolist()):
        position = torch.arange(end - start)
        distance = position[:, None] - position
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        results.append(attended[0].transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("model_name", ["full_attention", "sliding_window"])
def test_variable_length_attention(
    model_dir: Path, model_name: str, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU path gives the same loss and gradients. Its kernel is computed by hand here, and runs in the GPU test."""
    monkeypatch.setattr(model.documents.attention, "varlen_attn", varlen_by_hand)
    if older:
        monkeypatch.setattr(model.documents.attention, "VARLEN_HAS_GQA", False)
    small = sliding_model() if "sliding" in model_name else AutoModelForCausalLM.from_pretrained(model_dir)
    packed, alone = packed_and_alone()
    expected_loss, expected = loss_and_gradient(small, alone)
    attend_within_documents(small, torch.device("cuda"), bf16=True)
    assert small.config._attn_implementation == NAME
    loss, gradient = loss_and_gradient(small, [packed])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_l2(gradient, expected) < 1e-5


def test_collate_keeps_documents_apart() -> None:
    """In each document, positions start at 0 and the first token is no target. Ends count over all sequences."""
    batch = collate(
        [packed_row(tokens_of_documents([4, 3], 9)), packed_row(tokens_of_documents([8], 9), 1)], padded_length=8
    )
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch["document_ends"].tolist() == [0, 4, 7, 8, 16]
    assert int(batch["targets"]) == (4 - 1 - 2) + (3 - 1) + (8 - 1 - 2)
    assert batch["input_ids"].shape == (2, 8)


DOCUMENTS, ROWS = 46, 16


@pytest.fixture(scope="module")
def all_documents(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options for a step that trains on all documents at once. None is longer than a sequence."""
    path = tmp_path_factory.mktemp("packed") / "documents.jsonl"
    draw = random.Random(3)
    texts = ["the licence of software " * draw.randint(1, 2) + "a" * draw.randint(1, 9) for _ in range(DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [*tiny, "--train_file", path, "--validation_split_percentage", 0]


@pytest.fixture(scope="module")
def unpacked_gradient(all_documents: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    options = [*all_documents, "--packing", "none", "--global_batch_size", DOCUMENTS]
    return first_gradient(Case("unpacked", 1, DOCUMENTS), options, tmp_path_factory.mktemp("unpacked"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_packed_step_is_the_unpacked_step(
    all_documents: list[object], unpacked_gradient: dict[str, Tensor], tmp_path: Path, strategy: str
) -> None:
    """In a run on two ranks with micro-steps, the gradient of all documents is the same, packed or not."""
    options = [*all_documents, "--packing", "documents", "--global_batch_size", ROWS]
    gradient = first_gradient(Case("packed", 2, 2, ("--strategy", strategy)), options, tmp_path)
    assert read_records(tmp_path / "metrics.jsonl")[-1]["epoch"] == 1, "all documents are in the step"
    assert relative_l2(gradient, unpacked_gradient) < GATES.gradient


def test_packed_step_of_adapters(all_documents: list[object], tmp_path: Path) -> None:
    """The same for adapters (LoRA), on two ranks with FSDP."""
    options = [*all_documents, "--use_peft", "--lora_r", 4, "--lora_dropout", 0]
    whole = [*options, "--packing", "none", "--global_batch_size", DOCUMENTS]
    unpacked = first_gradient(Case("unpacked", 1, DOCUMENTS), whole, tmp_path / "unpacked")
    options += ["--packing", "documents", "--global_batch_size", ROWS]
    packed = first_gradient(Case("packed", 2, 2, ("--strategy", "fsdp")), options, tmp_path / "packed")
    assert all("lora" in name for name in packed)
    assert relative_l2(packed, unpacked) < GATES.gradient
