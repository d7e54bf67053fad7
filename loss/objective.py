"""The objective of a run: which one, and what it needs of the initial model."""

import torch
from torch import nn
from transformers import PreTrainedModel

from config.options import Options
from data.prepare import Data
from loss.dpo import Preference
from loss.dpo_reference import add_reference
from loss.next_token import NextToken


def build_objective(model: PreTrainedModel, options: Options) -> NextToken | Preference:
    """The module whose forward returns the sum of the losses of a micro-batch. It holds the model as `.model`."""
    if options.objective == "dpo":
        return Preference(model, options.dpo_beta)
    return NextToken(model, options.torch_compile)


def prepare_objective(
    objective: NextToken | Preference, data: Data, wrapped: nn.Module, options: Options, device: torch.device
) -> Data:
    """The data with what the objective needs of the initial model. Every rank must call, before a checkpoint is loaded.

    For dpo: the log-probability of each answer by the initial model, and a fingerprint that depends on it. For next
    tokens, the data as they are.
    """
    if isinstance(objective, Preference):
        return add_reference(data, wrapped, objective.model, options, device)
    return data
