"""An all-reduce by hand, DDP's average, and the order of buckets. docs/book/3-ddp.md explains what it prints.

torchrun --nproc_per_node=2 -m examples.all_reduce
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp.buckets import FixedBuckets
from ddp.gradients import set_gradient_sync

GRADIENTS = [[4.0], [1.0, 2.0, 3.0]]  # on each rank, one for each of its targets


def main() -> None:
    """Print both demonstrations. Every rank must call, and rank 0 prints."""
    dist.init_process_group("gloo")
    lines = [*averages(torch.tensor(GRADIENTS[dist.get_rank()])), "", *order_of_buckets()]
    if dist.get_rank() == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


def averages(gradients: Tensor) -> list[str]:
    """The gradient of one weight: by hand, and by DDP with three scales. `gradients` has one number for each target."""
    counts = torch.tensor([gradients.sum(), len(gradients)])
    dist.all_reduce(counts)  # in place: each rank has the sums over all ranks
    total, targets = counts.tolist()

    def by_ddp(scale: float) -> float:
        linear = nn.Linear(1, 1, bias=False)
        wrapped = FixedBuckets(linear, [])
        loss = wrapped(gradients[:, None]).sum()  # a sum over this rank's targets
        (loss * scale).backward()  # DDP averages the gradient here
        assert linear.weight.grad is not None
        return linear.weight.grad.item()

    ranks = dist.get_world_size()
    return [
        f"by hand: {total:g} / {targets:g} = {total / targets}",
        f"DDP, scale 1 / targets of the rank: {by_ddp(1 / len(gradients))}",
        f"DDP, scale 1 / targets: {by_ddp(1 / targets)}",
        f"DDP, scale ranks / targets: {by_ddp(ranks / targets)}",
    ]


def order_of_buckets() -> list[str]:
    """What happens in the backward passes of two micro-steps, for four layers in buckets of two layers."""
    model, lines = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4))), list[str]()
    wrapped = FixedBuckets(model, [], bucket_cap_mb=32 / 2**20)  # 32 bytes: the gradients of two layers
    names: dict[Tensor, str] = {}
    for number, parameter in enumerate(model.parameters(), 1):
        names[parameter] = f"layer {number}"
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda weight: lines.append(f"  gradient of {names[weight]}")
        )

    def all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        lines.append(f"  all-reduce of {' and '.join(names[parameter] for parameter in bucket.parameters())} starts")
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)  # returns before it ends
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, all_reduce)
    for micro_step in (1, 2):
        lines.append(f"micro-step {micro_step}")
        set_gradient_sync(wrapped, micro_step == 2)
        wrapped(torch.ones(1, 2)).sum().backward()
    return lines


if __name__ == "__main__":
    main()
