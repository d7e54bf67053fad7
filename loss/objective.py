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
    objective: NextToken | Preference
    if options.objective == "dpo":
        objective = Preference(model, options.dpo_beta)
    else:
        objective = NextToken(model, options.torch_compile, router_balance, router_bias)
    objective.needs_initial_model |= options.use_peft  # a checkpoint of adapters lacks the frozen model
    return objective


def prepare_objective(
    objective: NextToken | Preference, data: Data, wrapped: nn.Module, options: Options, device: torch.device
) -> Data:
    """The data with what the objective needs from the initial model. Every rank must call, before loading a checkpoint.

    DPO needs the log-probability of each answer by the initial model, and a fingerprint that depends on that model.
    Next-token prediction needs nothing, and neither does DPO with adapters: the data are returned unchanged.
    """
    if isinstance(objective, Preference) and not objective.adapters:
        return add_reference(data, wrapped, objective.model, options, device)
    return data
