"""The objective of a run: build it, and prepare what it needs from the initial model."""

import torch
from torch import nn
from transformers import PreTrainedModel

from config.options import Options
from data.prepare import Data
from loss.dpo import Preference
from loss.dpo_reference import add_reference
from loss.next_token import NextToken
from loss.router import build_router_balance, build_router_bias


def build_objective(model: PreTrainedModel, options: Options) -> NextToken | Preference:
    """The module whose forward returns the sum of the losses of a micro-batch. It holds the model as `.model`."""
    router_balance, router_bias = build_router_balance(model, options), build_router_bias(model, options)
    if options.objective == "dpo":
        return Preference(model, options.dpo_beta)
    return NextToken(model, options.torch_compile, router_balance, router_bias)


def prepare_objective(
    objective: NextToken | Preference, data: Data, wrapped: nn.Module, options: Options, device: torch.device
) -> Data:
    """The data with what the objective needs from the initial model. Every rank must call, before loading a checkpoint.

    DPO needs the log-probability of each answer by the initial model, and a fingerprint that depends on that model.
    Next-token prediction needs nothing: the data are returned unchanged.
    """
    if isinstance(objective, Preference):
        return add_reference(data, wrapped, objective.model, options, device)
    return data
