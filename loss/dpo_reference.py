"""The reference of direct preference optimization: the log-probabilities of the initial model, computed once."""

import dataclasses
import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint.identity import fingerprint_weights
from checkpoint.ranks import compute_once
from config.options import Options
from data.prepare import Data
from data.sequences import Mixture, PreparedDataset
from loss.evaluation import forward_no_grad


def add_reference(data: Data, wrapped: nn.Module, model: nn.Module, options: Options, device: torch.device) -> Data:
    """The data with the log-probabilities of each pair by the current model. Every rank must call.

    Costs a forward pass over all pairs. The result is cached in `data_cache_dir` for the same pairs and weights. The
    returned fingerprint depends on the weights, so a run cannot resume with another reference.
    """
    fingerprint = hashlib.sha256(f"{data.fingerprint} {fingerprint_weights(model)}".encode()).hexdigest()
    datasets = {"train": data.train} | {f"validation{name[4:]}": part for name, part in data.validation.items()}
    splits = {name: part for name, part in datasets.items() if isinstance(part, PreparedDataset | Mixture)}

    def compute() -> dict[str, Tensor]:
        reference = {name: torch.zeros(2, len(dataset)) for name, dataset in splits.items()}
        for name, table in reference.items():
            results = forward_no_grad(wrapped, splits[name], options, device)
            for batch, log_probabilities in tqdm(results, f"Reference for {name}", disable=dist.get_rank() > 0 or None):
                pairs = len(batch["indices"])
                table[:, batch["indices"]] = log_probabilities[: 2 * pairs].view(2, pairs).cpu()
            dist.all_reduce(table)  # all ranks of a tensor-parallel group filled the same columns
            table /= options.tensor_parallel
        return reference

    # In bf16, these options change the fourth digit.
    bf16 = ["bf16", options.strategy, "float8" * options.float8, "residual" * options.bf16_residual]
    computed = "-".join(filter(None, bf16)) if options.bf16 else "fp32"
    path = Path(options.data_cache_dir).expanduser() / f"reference-{fingerprint[:32]}-{computed}.safetensors"
    for name, table in compute_once(path, compute).items():
        splits[name].reference = table
    return dataclasses.replace(data, fingerprint=fingerprint)
