"""What one rank of many does and holds: Qwen3-8B, FSDP, one GPU, and a group whose other ranks do not exist.

    python -m compare.sharded [--ranks 8] [--batch 4] [--gradient_checkpointing] [--tiny]

The collectives of torch's fake process group move nothing, so that gathered weights are whatever was in memory: time
and memory are those of a rank without its communication, and losses mean nothing. Prints the tokens per second of the
rank, its model TFLOP/s, their share of the rate of a plain matrix product, and the peak memory. --tiny is for a CPU.
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3Config

import fsdp
from compare.bench import ON_GPU, matmul_rate
from compare.packing import QWEN3_600M
from config import Options
from metrics import peak_memory_gib
from model.build import build_model
from model.compiled import compile_layers
from model.loss import flops_per_token
from model.objective import NextToken
from model.optimizer import build_optimizer
from model.weights import fill, find_weights

QWEN3_8B = {
    **QWEN3_600M,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
TINY = {**QWEN3_8B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
STEPS = 5


def main() -> None:
    """Train a few steps, and print what the last of them took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    options = Options(gradient_checkpointing=arguments.gradient_checkpointing)
    length = 128 if arguments.tiny else 4096
    rate = matmul_rate()

    dist.init_process_group("fake", rank=0, world_size=arguments.ranks, store=FakeStore())
    device = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
    model = build_model(options, Qwen3Config(**(TINY if arguments.tiny else QWEN3_8B)))
    flops = flops_per_token(model, length) or 0.0
    objective = NextToken(model, options.torch_compile)
    if options.torch_compile:
        compile_layers(model)
    mesh = init_device_mesh(device.type, (1, arguments.ranks, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    wrapped = fsdp.wrap(objective, mesh, device, options.bf16, options.reshard_after_forward)
    fill(model, find_weights(options, model))
    optimizer = build_optimizer(model, options)

    tokens_BT = torch.randint(0, 512, (arguments.batch, length), device=device)
    start = 0.0
    for step in range(3 + STEPS):
        if step == 3:  # the first were for compilation
            start = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = wrapped(tokens_BT, tokens_BT)
        (loss / tokens_BT.numel()).backward()
        fsdp.clip_grad_norm(wrapped, options.max_grad_norm)
        optimizer.step()
        wrapped.zero_grad()
    speed = tokens_BT.numel() * STEPS / (clock() - start)
    print(
        f"rank 0 of {arguments.ranks}: {speed:,.0f} tokens/s, {speed * flops / 1e12:,.2f} model TFLOP/s, "
        f"{speed * flops / rate:.0%} of a matrix product, {peak_memory_gib(device):.1f} GiB"
    )


def clock() -> float:
    """Seconds, when the GPU has done what it was given."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
