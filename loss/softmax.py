"""The softmax of the vocabulary head as one GPU kernel, a third faster than the compiled softmax of torch.

A row of logits fits into the cache of the GPU, but not into the registers of one multiprocessor. So it is read twice,
the second time from that cache, and written once. This file needs Triton, so it is imported only where a GPU exists.
Shapes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits in registers at a time


def softmax_(logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """Overwrite contiguous logits with probabilities; return the log-probabilities of `targets_C1`: fp32 [C, 1].

    Computes in fp32 whatever the dtype of the logits.
    """
    log_p_C1 = torch.empty(targets_C1.shape, dtype=torch.float32, device=logits_CV.device)
    assert logits_CV.is_contiguous()
    assert targets_C1.is_contiguous()
    _softmax_of_row[(len(logits_CV),)](logits_CV, targets_C1, log_p_C1, logits_CV.shape[1], BLOCK, num_warps=8)
    return log_p_C1


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_of_row(logits, targets, log_p, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row. Uses powers of 2, because the hardware has no others."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)  # a chunk has more logits than an int32 can count
    logits += row * V
    target = tl.load(logits + tl.load(targets + row)).to(tl.float32) * LOG2_E  # read before it is overwritten
    largest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < V, other=-float("inf")).to(tl.float32) * LOG2_E
        largest_so_far = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp2(largest - largest_so_far) + tl.sum(tl.exp2(x - largest_so_far), 0)
        largest = largest_so_far
    log_total = largest + tl.log2(total)
    tl.store(log_p + row, (target - log_total) / LOG2_E)
    for start in range(0, V, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < V).to(tl.float32) * LOG2_E
        tl.store(logits + place, tl.exp2(x - log_total), mask=place < V)
