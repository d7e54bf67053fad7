"""Samples: completions of --sample_prompts by the model that is being trained, in place, on all ranks together.

The model is not loaded a second time, so it generates as it is wrapped: DDP, sharded by FSDP, split by tensor or
context parallelism. Every forward pass may be a collective, so all ranks run the same number of them, over the same
prompts. There is no cache of keys and values, because the attention of packed documents and of split sequences has no
place for one. A token costs a forward pass over the prompts and what was written so far.

Shapes: B prompts, T tokens of a sequence, D hidden size, V vocabulary, K candidates.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint.ranks import broadcast_object
from config.options import Options
from data.batches import collate, to_device
from data.prepare import Data
from data.sequences import Sequence
from data.tokens import Prompt
from loss.next_token import bypass_head

NEW_TOKENS = 64  # of a completion, at most
TEMPERATURE, TOP_K = 0.7, 50  # those of --prompt (model/build.py)
MULTIPLE = 16  # of tokens: float8 needs it


def sample(
    wrapped: nn.Module,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    device: torch.device,
    stop: Callable[[], bool],
) -> list[dict[str, str]]:
    """The completions of `data.prompts`, as {"prompt", "completion"}; equal on all ranks. Every rank must call.

    Each evaluation draws with the same random numbers, of a generator of its own: texts differ because the model does,
    on any topology up to rounding, and training draws what it would draw without samples. `wrapped` is left in training
    mode. Ends early once `stop` is true, which must be equal on all ranks; the completions are cut then.
    """
    prompts: tuple[Prompt, ...] = broadcast_object(data.prompts)  # a file may differ between nodes
    stops = {*data.stop_tokens, tokenizer.eos_token_id}
    size, samples = options.per_device_eval_batch_size, []
    wrapped.eval()
    # A few short sequences are not worth a compilation for their shape.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            inputs = [prompt.tokens for prompt in batch]
            written = _generate(wrapped, inputs, start, stops, data, options, device, stop)
            for prompt, tokens in zip(batch, written, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                samples.append({"prompt": prompt.text, "completion": text})
    wrapped.train()
    return samples


def _generate(
    wrapped: nn.Module,
    prompts: list[list[int]],
    first: int,
    stops: set[int],
    data: Data,
    options: Options,
    device: torch.device,
    stop: Callable[[], bool],
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, without the token that stopped it. `first` is their number.

    Ends when all have stopped. The ranks agree on that, because all choose among the candidates of the same ranks.
    """
    assert options.block_size
    new_tokens = min(NEW_TOKENS, options.block_size // 2)
    length = max(map(len, prompts)) + new_tokens
    padded = min(-(-length // MULTIPLE) * MULTIPLE, max(options.block_size, length))
    padded = -(-padded // options.model_parallel_size) * options.model_parallel_size
    draws = [
        torch.rand(new_tokens, generator=torch.Generator().manual_seed(options.seed + first + number)).tolist()
        for number in range(len(prompts))
    ]
    written: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for position in range(new_tokens):
        if all(done) or stop():
            break
        sequences = [prompt + tokens for prompt, tokens in zip(prompts, written, strict=True)]
        values_BK, tokens_BK = _candidates(wrapped, sequences, padded, data.packing == "documents", options, device)
        for number, draw in enumerate(draws):
            token = _draw(values_BK[number], tokens_BK[number], draw[position])
            done[number] = done[number] or token in stops
            if not done[number]:
                written[number].append(token)
    return written


def _draw(values_K: Tensor, tokens_K: Tensor, draw: float) -> int:
    """The token of the candidates that a number from 0 to 1 chooses. Candidates are ordered by their tokens.

    So rounding, which may change the order of their values, hardly ever changes the choice.
    """
    best = values_K.topk(min(TOP_K, len(values_K))).indices
    chosen = best[tokens_K[best].argsort()]
    cumulative = functional.softmax(values_K[chosen] / TEMPERATURE, dim=0).cumsum(0)
    return int(tokens_K[chosen][int((cumulative < draw * cumulative[-1]).sum())])


def _candidates(
    wrapped: nn.Module, sequences: list[list[int]], padded: int, documents: bool, options: Options, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The most probable next tokens of each sequence: logits, fp64 [B, K], and tokens, int64 [B, K], on the CPU.

    Every rank must call. The candidates are those of rank 0; of all ranks of its group if they split the vocabulary, or
    a sequence, whose last token is on one of them.
    """
    objective = getattr(wrapped, "module", wrapped)  # DDP holds it as its module
    logits_BV, found_B = _last_logits(wrapped, objective, sequences, padded, documents, options, device)
    values_BK, tokens_BK = logits_BV.topk(min(TOP_K, logits_BV.shape[1]))
    rank = dist.get_rank() % options.tensor_parallel
    if options.tensor_parallel > 1 and getattr(objective, "ends_with_head", False):  # each has a shard of V
        tokens_BK = tokens_BK + rank * logits_BV.shape[1]
    elif rank > 0:  # each has all logits
        found_B = torch.zeros_like(found_B)
    values_BK = values_BK.double().masked_fill(~found_B[:, None], -torch.inf)
    mine = torch.stack([values_BK, tokens_BK.double()]).cpu()
    gathered = []
    for source in range(options.model_parallel_size):
        candidates = mine.clone()
        dist.broadcast(candidates, src=source)  # over gloo
        gathered.append(candidates)
    values_BK, candidates_BK = torch.cat(gathered, dim=2)
    return values_BK, candidates_BK.long()


def _last_logits(
    wrapped: nn.Module,
    objective: nn.Module,
    sequences: list[list[int]],
    padded: int,
    documents: bool,
    options: Options,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The logits [B, V] after the last token of each sequence, and whether this rank has that token: bool [B].

    The batch is made as in training, so everything that has changed the model finds what it expects. Padding comes
    after the last token, where causal attention never looks.
    """
    rows = []
    for number, tokens in enumerate(sequences):
        tokens_T = torch.tensor(tokens + [0] * (padded - len(tokens)))
        rows.append(Sequence(number, tokens_T, torch.ones_like(tokens_T, dtype=torch.bool), [padded]))
    inputs = to_device(collate(rows, padded if documents else None), device)
    last_B = torch.tensor([len(tokens) - 1 for tokens in sequences], device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)
    with _last_logits_of(objective, last_B) as results, autocast:
        wrapped(**inputs)
    return results[0]


@contextlib.contextmanager
def _last_logits_of(objective: nn.Module, last_B: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within this context, `objective` computes no loss: its forward appends a result of `_last_logits` to the list.

    It runs within the wrapped forward pass, where FSDP has gathered the head. `last_B` is the index in the full
    sequence. With context parallelism, this rank has a local sequence, and `position_ids` say which.
    """
    model: PreTrainedModel = objective.model
    head = model.get_output_embeddings()
    results: list[tuple[Tensor, Tensor]] = []

    def forward(input_ids: Tensor, position_ids: Tensor | None = None, **others: Tensor) -> Tensor:
        positions_BT = position_ids
        if positions_BT is None:
            positions_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        is_last_BT = positions_BT == last_B[:, None]
        rows_B, columns_B = torch.arange(len(last_B), device=last_B.device), is_last_BT.int().argmax(dim=1)
        given = {"document_ends": others["document_ends"]} if "document_ends" in others else {}
        given |= {"position_ids": position_ids} if position_ids is not None else {}
        if getattr(objective, "ends_with_head", False):  # apply the head to these positions only
            with bypass_head(head):
                hidden_BTD = model(input_ids=input_ids, use_cache=False, **given).logits
            hidden_BD = hidden_BTD[rows_B, columns_B]
            logits_BV = functional.linear(hidden_BD.to(head.weight.dtype), head.weight, head.bias)
        else:
            logits_BV = model(input_ids=input_ids, use_cache=False, **given).logits[rows_B, columns_B]
        results.append((logits_BV, is_last_BT.any(dim=1)))
        return logits_BV.new_zeros(())

    objective.forward = forward
    try:
        yield results
    finally:
        del objective.forward  # the method of its class remains
