"""The same work in other trainers: the model, the blocks and the options of train.py.

    python -m compare.peers NAME [options of train.py]

Prints, from rank 0, one line of JSON: the tokens per second of each window of steps, the peak memory in GiB and the
seconds of the first window. `compare.bench` starts it, in one process or several.
"""

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from config.command_line import parse
from config.options import ALL_LINEAR, Options
from data.batches import collate
from data.prepare import prepare_data
from data.sequences import PreparedDataset, Sequence
from metrics.hardware import peak_memory_gib
from model.build import load_config_and_tokenizer

WINDOW = 5 if torch.cuda.is_available() else 50  # steps between two readings of the clock
WINDOWS = 6


class Clock:
    """Reads the clock after each window of steps, when the GPU has done them."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def step(self, step: int) -> None:
        """Call after each optimizer step, counted from 1."""
        if step % WINDOW == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def inputs(sequences: list[Sequence]) -> dict[str, Tensor]:
    """What transformers' own loss takes: the labels are shifted inside of the model."""
    batch = collate(sequences)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def hf_trainer(
    model: PreTrainedModel, dataset: PreparedDataset, options: Options, clock: Clock, compiled: bool
) -> None:
    """transformers.Trainer."""

    class Step(TrainerCallback):
        def on_step_end(self, arguments: object, state: object, control: object, **others: object) -> None:
            clock.step(state.global_step)  # type: ignore[attr-defined]

    arguments = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.per_device_train_batch_size,
        max_steps=WINDOW * WINDOWS,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused",
        torch_compile=compiled,
        dataloader_num_workers=options.dataloader_num_workers,
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=inputs, callbacks=[Step()]).train()


def accelerate(
    model: PreTrainedModel, dataset: PreparedDataset, options: Options, clock: Clock, compiled: bool
) -> None:
    """The loop of Accelerate's documentation."""
    from accelerate import Accelerator  # optional

    accelerator = Accelerator(mixed_precision="bf16" if options.bf16 else "no", cpu=not torch.cuda.is_available())
    if compiled:
        model.compile()
    loader = DataLoader(
        dataset,
        batch_size=options.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=inputs,
        num_workers=options.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in zip(range(1, WINDOW * WINDOWS + 1), loader, strict=False):
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(step)


def with_peft(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """The adapters of PEFT with our options, in fp32 beside a frozen model."""
    peft: Any = importlib.import_module("peft")  # optional
    modules = options.lora_target_modules
    config = peft.LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=modules if modules == ALL_LINEAR else modules.split(","),
        use_rslora=options.use_rslora,
        task_type="CAUSAL_LM",
    )
    adapted: PreTrainedModel = peft.get_peft_model(model, config)
    return adapted


ADAPTERS: dict[str, tuple[Callable[..., None], bool]] = {  # for compare/adapters.py
    "HF Trainer, LoRA of PEFT": (hf_trainer, False),
    "HF Trainer, LoRA of PEFT, compiled": (hf_trainer, True),
}

PEERS: dict[str, tuple[Callable[..., None], bool]] = {
    "HF Trainer": (hf_trainer, False),
    "HF Trainer, compiled": (hf_trainer, True),
    "Accelerate": (accelerate, False),
    "Accelerate, compiled": (accelerate, True),
}


def main(name: str, argv: list[str]) -> None:
    """Train, and print what was measured."""
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_config, tokenizer = load_config_and_tokenizer(options)
    dataset = prepare_data(options, tokenizer).train
    torch.manual_seed(options.seed)
    if options.use_peft:
        frozen = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=torch.bfloat16)
        model = with_peft(frozen.to(device), options)
    else:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).to(device)
    trainer, compiled = (PEERS | ADAPTERS)[name]
    clock = Clock()
    trainer(model, dataset, options, clock, compiled)
    seconds = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tokens = WINDOW * ranks * options.per_device_train_batch_size * (options.block_size or 0)
    if os.environ.get("RANK", "0") == "0":
        speeds = [tokens / window for window in seconds]
        print(json.dumps({"speeds": speeds, "gib": peak_memory_gib(device), "first": seconds[0]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m compare.peers", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=PEERS | ADAPTERS, metavar="NAME", help="; ".join(PEERS | ADAPTERS))
    arguments, options = parser.parse_known_args()
    main(arguments.name, options)
