"""The same work in other trainers: the model, the options of train.py, and its blocks in its order.

    python -m compare.peers.trainers NAME [options of train.py]

Prints, from rank 0, one line of JSON: the tokens per second of each window of steps, the peak memory in GiB, the time
at which training begins and the seconds of the first window. `compare.bench` starts it, in one process or several;
`compare.peers.same` starts it with --witness, to see what a peer really trains.
"""

import argparse
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from compare.peers import titan
from compare.peers.witness import Witness
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
    """Reads the clock after each window of steps, when the GPU has done them. A peer makes so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.began = steps, time.time()
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


def in_our_order(dataset: PreparedDataset, options: Options) -> Subset[Sequence]:
    """The sequences of the first epoch in the order of train.py: a peer that does not shuffle has the same batches."""
    sampler: DistributedSampler[int] = DistributedSampler(
        dataset, num_replicas=1, rank=0, shuffle=True, seed=options.seed, drop_last=True
    )
    return Subset(dataset, dataset.epoch_indices(0, options.seed)[list(sampler)].tolist())


def loader_of(dataset: Subset[Sequence], options: Options, shards: bool) -> DataLoader[Sequence]:
    """The loader of a loop; if it `shards`, rank r of N has the sequences r, r + N, ..., else all."""
    return DataLoader(
        dataset,
        batch_size=options.per_device_train_batch_size,
        sampler=DistributedSampler(dataset, shuffle=False, drop_last=True) if shards else None,
        drop_last=True,
        collate_fn=inputs,
        num_workers=options.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def adamw(model: nn.Module, options: Options, fused: bool = True) -> torch.optim.Optimizer:
    """What users of a loop write: one group of all parameters."""
    decay, betas = options.weight_decay, (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(model.parameters(), options.learning_rate, betas, weight_decay=decay, fused=fused)


def hf_trainer(
    model: PreTrainedModel, dataset: Subset[Sequence], options: Options, clock: Clock, compiled: bool
) -> None:
    """transformers.Trainer."""

    class Step(TrainerCallback):
        def on_step_end(self, arguments: object, state: object, control: object, **others: object) -> None:
            clock.step(state.global_step)  # type: ignore[attr-defined]

    arguments = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.per_device_train_batch_size,
        max_steps=clock.steps,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        adam_beta2=options.adam_beta2,
        weight_decay=options.weight_decay,
        train_sampling_strategy="sequential",
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
    model: PreTrainedModel, dataset: Subset[Sequence], options: Options, clock: Clock, compiled: bool
) -> None:
    """The loop of Accelerate's documentation."""
    from accelerate import Accelerator  # optional

    accelerator = Accelerator(mixed_precision="bf16" if options.bf16 else "no", cpu=not torch.cuda.is_available())
    if compiled:
        model.compile()
    loader, optimizer = loader_of(dataset, options, shards=False), adamw(model, options)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in zip(range(1, clock.steps + 1), loader, strict=False):
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(step)


def lightning(
    model: PreTrainedModel, dataset: Subset[Sequence], options: Options, clock: Clock, compiled: bool
) -> None:
    """A LightningModule and Lightning's Trainer."""
    pl: Any = importlib.import_module("lightning")  # optional

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model, options, fused=not options.bf16)  # Lightning cannot clip for a fused one

        def on_train_batch_end(self, *_: Any) -> None:
            clock.step(self.global_step)

    if compiled:
        model.compile()
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="bf16-mixed" if options.bf16 else "32-true",
        max_steps=clock.steps,
        gradient_clip_val=options.max_grad_norm,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    trainer.fit(Module(), loader_of(dataset, options, shards=ranks > 1))


def deepspeed(
    model: PreTrainedModel, dataset: Subset[Sequence], options: Options, clock: Clock, compiled: bool
) -> None:
    """The loop of DeepSpeed's documentation: ZeRO-1, and with bf16, weights in bf16 with fp32 masters."""
    ds: Any = importlib.import_module("deepspeed")  # optional
    config = {
        "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.bf16},
    }
    ds.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    engine, _, _, _ = ds.initialize(model=model, optimizer=adamw(model, options), config=config)
    if compiled:
        engine.compile()
    for step, batch in zip(range(1, clock.steps + 1), loader_of(dataset, options, shards=True), strict=False):
        loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        clock.step(step)


def torchtitan(
    model: PreTrainedModel, dataset: Subset[Sequence], options: Options, clock: Clock, compiled: bool
) -> None:
    """torchtitan's own model and Trainer: compare/peers/titan.py."""
    options.torch_compile = compiled
    titan.train(model, lambda: loader_of(dataset, options, shards=True), options, clock.steps, clock.step)


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


# A trainer and whether it is compiled. The name of the package is the first word of a name.
ADAPTERS: dict[str, tuple[Callable[..., None], bool]] = {  # for compare/adapters.py
    "HF Trainer, LoRA of PEFT": (hf_trainer, False),
    "HF Trainer, LoRA of PEFT, compiled": (hf_trainer, True),
}

PEERS: dict[str, tuple[Callable[..., None], bool]] = {
    "HF Trainer": (hf_trainer, False),
    "HF Trainer, compiled": (hf_trainer, True),
    "Accelerate": (accelerate, False),
    "Accelerate, compiled": (accelerate, True),
    "Lightning": (lightning, False),
    "Lightning, compiled": (lightning, True),
    "DeepSpeed": (deepspeed, False),
    "DeepSpeed, compiled": (deepspeed, True),
    "torchtitan": (torchtitan, False),
    "torchtitan, compiled": (torchtitan, True),
}


def package_of(name: str) -> str:
    """The package that a peer needs; HF Trainer needs Accelerate."""
    return {"HF": "accelerate"}.get(name.partition(" ")[0], name.partition(",")[0].lower())


def versions_of(names: Iterable[str]) -> str:
    """The installed packages of some peers with their versions."""
    packages = dict.fromkeys(["torch", "transformers", *map(package_of, names)])
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages if importlib.util.find_spec(name))


def main(name: str, argv: list[str], witness: Witness | None = None) -> None:
    """Train, and print what was measured."""
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_config, tokenizer = load_config_and_tokenizer(options)
    dataset = in_our_order(prepare_data(options, tokenizer).train, options)  # type: ignore[arg-type]  # no stream
    torch.manual_seed(options.seed)
    if options.use_peft:
        frozen = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=torch.bfloat16)
        model = with_peft(frozen.to(device), options)
    else:
        path = options.model_name_or_path
        model = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            if path
            else AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        ).to(device)
    trainer, compiled = (PEERS | ADAPTERS)[name]
    if witness:
        witness.look_at(model)
    clock = Clock(witness.steps if witness else WINDOW * WINDOWS)
    trainer(model, dataset, options, clock, compiled)
    if witness:
        return
    seconds = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tokens = WINDOW * ranks * options.per_device_train_batch_size * (options.block_size or 0)
    if os.environ.get("RANK", "0") == "0":
        speeds = [tokens / window for window in seconds]
        print(json.dumps({"speeds": speeds, "gib": peak_memory_gib(device), "first": seconds[0], "began": clock.began}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m compare.peers.trainers", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=PEERS | ADAPTERS, metavar="NAME", help="; ".join(PEERS | ADAPTERS))
    parser.add_argument("--witness", metavar="FILE", help="where compare/peers/witness.py writes what it sees")
    arguments, options = parser.parse_known_args()
    main(arguments.name, options, Witness(arguments.witness) if arguments.witness else None)
