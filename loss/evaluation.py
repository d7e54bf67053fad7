"""Evaluation: the forward pass without gradients over whole data sets, and the metrics that come of it."""

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from checkpoint.ranks import raise_together
from config.errors import OptionError
from config.options import Options
from config.plan import data_parallel_rank_and_size
from config.validation import best_metric
from data.batches import IGNORE_INDEX, Batch, next_tokens, to_device, validation_batches
from data.loader import ReadableBatches, collate_function, make_loader
from data.prepare import Data
from data.sequences import Mixture, PreparedDataset
from loss.samples import sample
from loss.token_bytes import bytes_of_tokens
from metrics.recorder import Recorder
from runtime import stop_requested

AGREEMENT = 1.0  # seconds between two looks for a signal


def evaluate(
    wrapped: nn.Module, data: Data, tokenizer: PreTrainedTokenizerBase, options: Options, recorder: Recorder
) -> dict[str, float] | None:
    """The metrics of each validation set (metrics/recorder.py defines them) by name. Every rank must call.

    They are equal on all ranks. A set in which nothing is a target has NaN. Also completes the prompts of the data, and
    records what the model writes. If a signal asks any rank to stop, the evaluation ends early on all ranks, within
    about a second, and the result is None. Raises OptionError if the metric that chooses the best model cannot be
    computed.
    """
    metrics: dict[str, float] = {}
    stop = AgreedStop()
    bytes_of_token = bytes_of_tokens(tokenizer) if options.objective == "sft" else None
    if bytes_of_token is None and (best_metric(options) or "").endswith("bits_per_byte"):
        raise OptionError(
            f"metric_for_best_model {best_metric(options)}: the bytes of this tokenizer's tokens are not known\n"
            "pass --metric_for_best_model with a loss, which is the lowest at the same step"
        )
    for name, dataset in data.validation.items():
        totals = torch.zeros(3, dtype=torch.float64, device=recorder.device)  # loss, targets and their bytes of text
        with recorder.pause("evaluate"):
            for batch, loss in forward_no_grad(wrapped, dataset, options, recorder.device, stop):
                totals[0] += loss
                totals[1] += batch["targets"]
                if bytes_of_token is not None:
                    tokens = next_tokens(batch["labels"])
                    totals[2] += bytes_of_token[tokens[tokens != IGNORE_INDEX]].sum()
        if stop.agreed:
            return None
        dist.all_reduce(totals)
        loss_sum, targets, text = totals.tolist()
        mean = loss_sum / targets if targets else math.nan
        targets //= options.model_parallel_size  # as many ranks counted each target
        metrics[f"{name}_loss"] = mean
        if options.objective == "dpo":
            metrics[f"{name}_pairs"] = int(targets)
            continue
        metrics[f"{name}_perplexity"] = math.exp(min(mean, 700.0))
        metrics[f"{name}_bits_per_byte"] = loss_sum / math.log(2) / text if text else math.nan
        metrics[f"{name}_tokens"] = int(targets)
    if data.prompts:
        with recorder.pause("evaluate"):
            samples = sample(wrapped, data, tokenizer, options, recorder.device, stop)
        if stop.agreed:
            return None
        recorder.samples(samples)
    return metrics


class AgreedStop:
    """Whether a signal asks any rank to stop. All ranks learn it before the same micro-batch.

    An all-reduce before each micro-batch would let the ranks wait for each other. So it comes once a second: each tells
    all ranks how many micro-batches they compute until the next one.
    """

    def __init__(self) -> None:
        self.agreed = False
        self.batches = self.interval = 1
        self.before = time.perf_counter()

    def __call__(self) -> bool:
        """Call before each micro-batch. Every rank must call."""
        self.batches -= 1
        if self.batches == 0 and not self.agreed:
            now = time.perf_counter()
            stop_and_seconds = torch.tensor([float(stop_requested()), now - self.before], dtype=torch.float64)
            dist.all_reduce(stop_and_seconds)  # over gloo, like the events of a step
            stop, seconds = stop_and_seconds.tolist()
            per_batch = seconds / dist.get_world_size() / self.interval
            self.agreed, self.before = stop > 0, now
            self.batches = self.interval = max(1, min(2 * self.interval, int(AGREEMENT / per_batch)))
        return self.agreed


def forward_no_grad(
    wrapped: nn.Module,
    dataset: PreparedDataset | Mixture,
    options: Options,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yields this rank's batches of `dataset`, each with the result of `wrapped`. Every rank must call.

    Ends early once `stop` is true, which must be equal on all ranks. Raises OptionError, on all ranks, if a rank could
    not read its sequences.
    """
    wrapped.eval()
    rank, size = data_parallel_rank_and_size(options, dist.get_rank(), dist.get_world_size())
    indices = validation_batches(len(dataset), rank, size, options.per_device_eval_batch_size)
    empty = collate_function(dataset, options)([])
    batches = ReadableBatches(make_loader(dataset, indices, options, workers=0), empty)
    for batch in islice(batches, len(indices)):
        if stop():
            break
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            result = wrapped(**to_device(batch, device))
        yield batch, result
    else:
        raise_together(batches.error)
    wrapped.train()
