"""Which models tensor, context and expert parallelism can split, and the errors for other models."""

import math
import re
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from config.errors import OptionError


def check_tensor_parallel(config: PretrainedConfig, ranks: int) -> None:
    """Raise OptionError if parallel/tensor.py cannot split a model with this configuration over `ranks` ranks."""
    name, plan = config.model_type, config.base_model_tp_plan or {}
    remedy = "remove --tensor_parallel; --strategy fsdp shards any model"
    if not plan:
        raise OptionError(f"tensor_parallel {ranks}: {name} has no tensor-parallel plan\n{remedy}")
    # The embedding is always split by vocabulary, whatever the plan says.
    known = {"colwise", "rowwise", "replicated_with_grad_allreduce", "embedding_rowwise"}
    if unknown := {module: style for module, style in plan.items() if style not in known}:
        module, style = min(unknown.items())
        raise OptionError(
            f"tensor_parallel {ranks}: the plan of {name} has the unknown style {style} for {module}\n{remedy}"
        )
    try:
        heads = attention_heads(config)
    except RuntimeError as error:  # transformers raises it where layers differ (Gemma 4)
        raise OptionError(
            f"tensor_parallel {ranks}: the layers of {name} have different numbers of heads\n{remedy}"
        ) from error
    if not isinstance(config.intermediate_size, int):  # one for each layer (Gemma 3n)
        raise OptionError(f"tensor_parallel {ranks}: the layers of {name} have different sizes\n{remedy}")
    sizes = {
        "attention heads": heads.queries,
        "key-value heads": heads.key_values,
        "intermediate features": config.intermediate_size,
        "tokens in its vocabulary": config.vocab_size,
    }
    common = math.gcd(*sizes.values())
    for what, size in sizes.items():
        if size % ranks:
            raise OptionError(
                f"tensor_parallel {ranks}: {name} has {size:,} {what}, and {size:,} / {ranks} = {size / ranks:,.6g}\n"
                + (f"pass a divisor of {common}, which divides every size that is split" if common > 1 else remedy)
            )


def check_context_parallel(config: PretrainedConfig, ranks: int) -> None:
    """Raise OptionError if parallel/context.py cannot split the sequences of a model over `ranks` ranks.

    Its layers may look at other positions in attention only. A tensor-parallel plan is taken as a sign of that, and
    `attention_obstacle` in model/documents/attention.py checks what the layers do. Each rank must get an equal number
    of query heads, together with their key-value heads.
    """
    name = config.model_type
    remedy = "remove --context_parallel; --gradient_checkpointing also saves memory with long sequences"
    if not config.base_model_tp_plan:
        raise OptionError(
            f"context_parallel {ranks}: {name} has no plan that shows where it looks at other positions\n{remedy}"
        )
    if "longrope" in repr(getattr(config, "rope_parameters", None)):
        raise OptionError(
            f"context_parallel {ranks}: {name} rotates long sequences differently from short ones (longrope), and "
            f"each rank would decide by its local sequence\n{remedy}"
        )
    try:
        heads, keys, _ = attention_heads(config)
    except RuntimeError as error:  # transformers raises it where layers differ (Gemma 4)
        raise OptionError(
            f"context_parallel {ranks}: the layers of {name} have different numbers of heads\n{remedy}"
        ) from error
    if heads % (shared := math.lcm(keys, ranks)):
        fitting = [str(other) for other in range(2, heads + 1) if heads % math.lcm(keys, other) == 0]
        raise OptionError(
            f"context_parallel {ranks}: {name} has {heads} attention heads; {keys} key-value heads and {ranks} "
            f"ranks need a multiple of {shared}, and {heads} / {shared} = {heads / shared:,.6g}\n"
            + (f"pass {', '.join(fitting)}, or {remedy}" if fitting else remedy)
        )


def check_plan_is_complete(model: PreTrainedModel, ranks: int) -> None:
    """Raise OptionError if the plan leaves out a linear module: each rank of a group would count its gradient."""
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    plan = tensor_parallel_plan(model)
    # A module that holds split modules may have parameters of its own, such as one for each attention head.
    own = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if any(f"{name}.{child}" in plan for child, _ in module.named_children())
        for parameter, _ in module.named_parameters(recurse=False)
    }
    if missing := (linear | own) - plan.keys():
        raise OptionError(
            f"tensor_parallel {ranks}: the plan of {model.config.model_type} leaves out {min(missing)}\n"
            "remove --tensor_parallel; --strategy fsdp shards any model"
        )


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that follow the experts interface of transformers: use_experts_implementation.

    They hold the parameters of all experts of a layer, stacked along the first dimension, and nothing else. They take
    tokens, the experts of each token, and their weights.
    """
    modules = [module for module in model.modules() if hasattr(module, "is_transposed") and hasattr(module, "has_gate")]
    return [module for module in modules if all(len(stack) == module.num_experts for stack in module.parameters())]


def check_expert_parallel(model: PreTrainedModel, ranks: int) -> None:
    """Raise OptionError if parallel/experts.py cannot split the experts of `model` over `ranks` ranks."""
    name, modules = model.config.model_type, expert_modules(model)
    if not modules:
        raise OptionError(
            f"expert_parallel {ranks}: {name} has no experts that follow the experts interface of transformers\n"
            "remove --expert_parallel; --strategy fsdp shards any model"
        )
    common = math.gcd(*(len(next(module.parameters())) for module in modules))
    if common % ranks:
        raise OptionError(
            f"expert_parallel {ranks}: {name} has {common} experts in a layer, and {common} / {ranks} = "
            f"{common / ranks:,.6g}\npass a divisor of {common}"
        )


class Heads(NamedTuple):
    """The attention heads of a layer: the number of query heads, of key-value heads, and head_dim."""

    queries: int
    key_values: int
    head_dim: int


def attention_heads(config: PretrainedConfig) -> Heads:
    """The heads of a model's layers. Without head_dim in the configuration, it is hidden size / query heads.

    Raises RuntimeError, as transformers does, if layers differ in their heads (Gemma 4).
    """
    config = config.get_text_config()
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    head_dim = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None)  # JetMoE
    return Heads(queries, keys, head_dim or config.hidden_size // queries)


def tensor_parallel_plan(model: PreTrainedModel) -> dict[str, str]:
    """The tensor-parallel style of each module in the plan of the model's configuration: "colwise", "rowwise", ...

    The model must have a plan. Embedding and head are split by vocabulary, whatever the plan says.
    """
    plan = {f"{model.base_model_prefix}.{key}": style for key, style in model.config.base_model_tp_plan.items()}
    names = {name: re.sub(r"\.\d+(?=\.)", ".*", name) for name, _ in model.named_modules()}
    return {name: plan[each] for name, each in names.items() if each in plan}
