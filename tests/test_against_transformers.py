"""Proves train.py and optim/ against the Trainer of transformers: equal data and weights give equal losses."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from config.command_line import parse
from data.ledger import read
from data.prepare import prepare_data
from metrics.records import read_records
from model.build import load_config_and_tokenizer
from tests.launch import PROCESSES, train_ok

STEPS, ACCUMULATION, MICRO_BATCH = 20, 2, 8


class InOrder(Trainer):
    """A Trainer that reads its data in order, and records the loss of each step."""

    losses: list[float]
    micro_step = 0

    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any, **more: Any) -> Any:
        loss = super().training_step(*arguments, **more)
        if self.micro_step % ACCUMULATION == 0:
            self.losses.append(0.0)
        self.micro_step += 1
        self.losses[-1] += loss.item()
        return loss


def train_with_transformers(model_dir: Path, blocks: list[list[int]], output_dir: Path) -> None:
    """Runs in its own process: write the losses of 20 steps to losses.json."""
    trainer = InOrder(
        AutoModelForCausalLM.from_pretrained(model_dir),
        TrainingArguments(
            str(output_dir),
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=STEPS,
            learning_rate=3e-3,
            weight_decay=0.1,
            warmup_steps=2,
            max_grad_norm=0.4,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
    )
    trainer.losses = []
    trainer.train()
    (output_dir / "losses.json").write_text(json.dumps(trainer.losses))


def test_same_curve_as_trainer(tiny: list[object], model_dir: Path, tmp_path: Path) -> None:
    """20 steps in fp32 on two ranks here, on one process there: losses within 1e-4."""
    options = [*tiny, "--packing", "concat", "--block_size", 32, "--output_dir", tmp_path / "ours", "--ledger"]
    train_ok(2, *options, "--max_steps", STEPS)
    parsed = parse(list(map(str, options)))
    rows = prepare_data(parsed, load_config_and_tokenizer(parsed)[1]).train
    steps = read(tmp_path / "ours")
    assert len(rows) > STEPS * ACCUMULATION * MICRO_BATCH, "no block comes twice"
    blocks = [rows[number].tokens.tolist() for entries in steps.values() for number, *_ in entries]
    (tmp_path / "theirs").mkdir()
    process = PROCESSES.Process(target=train_with_transformers, args=(model_dir, blocks, tmp_path / "theirs"))
    process.start()
    process.join()
    assert process.exitcode == 0
    theirs = json.loads((tmp_path / "theirs" / "losses.json").read_text())
    ours = [row["loss"] for row in read_records(tmp_path / "ours" / "metrics.jsonl") if "loss" in row]
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.3
