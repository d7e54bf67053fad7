"""What one rank of many does and holds: Qwen3-8B, FSDP, one GPU, and a group whose other ranks do not exist.

    python -m compare.sharded [--ranks 8] [--batch 4] [--gradient_checkpointing] [--tiny]

The collectives of torch's fake process group move nothing, so that gathered weights are whatever was in memory: time
and memory are those of a rank without its communication, and losses mean nothing. Prints the tokens per second of the
rank, its model TFLOP/s, that as a fraction of the rate of a plain matrix product, and the peak memory. --tiny is for a
CPU.
"""

import argparse
import time
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

import ddp
import fsdp
from compare.bench import ON_GPU, SHAPES, matmul_rate
from config.options import Options
from config.plan import mesh_shape
from estimate.flops import flops_per_token
from loss.objective import build_objective
from loss.router import begin_step
from metrics.hardware import peak_memory_gib
from model.adapt import adapt_model
from model.build import build_model
from model.layers import decoder_layers
from model.weights import find_weights, load_weights
from optim.adamw import build_optimizer

TINY = {**SHAPES["8B"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
STEPS = 5


class Rank(NamedTuple):
    """What the process of a rank holds."""

    options: Options
    strategy: ModuleType
    device: torch.device
    model: PreTrainedModel
    objective: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, tokens_BT: Tensor) -> None:
        """What train.py does in a step, on the same micro-batch each time."""
        accumulation = self.options.gradient_accumulation_steps
        batch = {
            "input_ids": tokens_BT,
            "labels": tokens_BT,
            "tokens": tokens_BT.new_full(tokens_BT.shape[:1], tokens_BT.shape[1]),
        }
        tokens = accumulation * tokens_BT.numel()
        begin_step(self.objective, self.wrapped, [batch] * accumulation, tokens, tokens, self.device)
        for index in range(accumulation):
            self.strategy.set_gradient_sync(self.wrapped, self.options.sync_each_batch or index == accumulation - 1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
                loss = self.wrapped(**batch)
            (loss / tokens_BT.numel()).backward()
        norm = self.strategy.grad_norm(self.wrapped)
        self.optimizer.grad_scale = ((norm + 1e-6) / self.options.max_grad_norm).clamp(min=1)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.strategy.gather_parameters(self.optimizer)
        self.wrapped.zero_grad()


def configuration(shape: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a Qwen3 model of these sizes: a mixture if it has experts."""
    return Qwen3MoeConfig(**shape) if "num_experts" in shape else Qwen3Config(**shape)


def build(options: Options, shape: dict[str, Any], ranks: int) -> Rank:
    """Rank 0 of `ranks`, without values yet. Among several, the others do not exist."""
    if ON_GPU:
        torch.cuda.set_device(0)
    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    else:
        backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"  # as in train.py: offloaded tensors are on the CPU
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    device = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
    model = build_model(options, configuration(shape))
    objective = build_objective(model, options)
    mesh = init_device_mesh(device.type, mesh_shape(options, ranks), mesh_dim_names=("replicate", "shard", "tensor"))
    adapt_model(objective, options, "none", mesh)
    strategy = {"ddp": ddp, "fsdp": fsdp}[options.strategy]
    wrapped = strategy.wrap(
        objective,
        decoder_layers(model),
        mesh,
        device,
        options.bf16,
        options.reshard_after_forward,
        options.cpu_offload,
        getattr(torch, options.reduce_dtype),
    )
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, skip_all_reduce)
    optimizer = build_optimizer(model, options)
    if options.shard_optimizer:
        strategy.shard_optimizer(optimizer, mesh)
    return Rank(options, strategy, device, model, objective, wrapped, optimizer)


def skip_all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Instead of DDP's all-reduce, which does not understand the fake group's answer: the bucket, in place."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def main() -> None:
    """Train a few steps, and print what the last of them took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    options = Options(strategy="fsdp", gradient_checkpointing=arguments.gradient_checkpointing)
    length = 128 if arguments.tiny else 4096
    rate = matmul_rate()

    rank = build(options, TINY if arguments.tiny else SHAPES["8B"], arguments.ranks)
    flops = flops_per_token(rank.model, length) or 0.0
    load_weights(rank.model, find_weights(options, rank.model))
    tokens_BT = torch.randint(0, 512, (arguments.batch, length), device=rank.device)
    start = 0.0
    for step in range(3 + STEPS):
        if step == 3:  # the first were for compilation
            start = clock()
        rank.step(tokens_BT)
    speed = tokens_BT.numel() * STEPS / (clock() - start)
    print(
        f"rank 0 of {arguments.ranks}: {speed:,.0f} tokens/s, {speed * flops / 1e12:,.2f} model TFLOP/s, "
        f"{speed * flops / rate:.0%} of a matrix product, {peak_memory_gib(rank.device):.1f} GiB"
    )


def clock() -> float:
    """Seconds, when the GPU has done what it was given."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
