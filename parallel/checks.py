"""Which models tensor parallelism and context parallelism can split, and the messages for those that they cannot."""

import math
import re
from typing import NamedTuple

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from config.errors import OptionError


def check_tensor_parallel(config: PretrainedConfig, ranks: int) -> None:
    """Refuse a model whose layers `ranks` ranks cannot divide as fsdp/tensor_parallel.py does. Raises OptionError."""
    name, plan = config.model_type, config.base_model_tp_plan or {}
    remedy = "leave it out: --strategy fsdp shards any model"
    if not plan:
        raise OptionError(f"tensor_parallel {ranks}: {name} has no plan of how its layers are divided\n{remedy}")
    # The embedding is divided in any case.
    known = {"colwise", "rowwise", "replicated_with_grad_allreduce", "embedding_rowwise"}
    if unknown := {module: style for module, style in plan.items() if style not in known}:
        module, style = min(unknown.items())
        raise OptionError(f"tensor_parallel {ranks}: the plan of {name} has {module} {style}, unknown here\n{remedy}")
    heads = attention_heads(config)
    sizes = {
        "attention heads": heads.queries,
        "heads of keys and values": heads.keys,
        "entries between the projections of a layer": config.intermediate_size,
        "tokens in its vocabulary": config.vocab_size,
    }
    common = math.gcd(*sizes.values())
    for what, size in sizes.items():
        if size % ranks:
            raise OptionError(
                f"tensor_parallel {ranks}: {name} has {size:,} {what}, and {size:,} / {ranks} = {size / ranks:,.6g}\n"
                + (f"pass a divisor of {common}, which divides all that must be divided" if common > 1 else remedy)
            )


def check_context_parallel(config: PretrainedConfig, ranks: int) -> None:
    """Refuse a model whose rows `ranks` ranks cannot divide as model/context_parallel.py does. Raises OptionError.

    Its layers must look at other positions in their attention alone: a plan of how they are divided is taken for a sign
    of that, and `attention_obstacle` in model/attention.py looks at what they do. Each rank must get as
    many heads, together with those of keys that these share.
    """
    name, remedy = config.model_type, "leave it out; --gradient_checkpointing is for long rows, too"
    if not config.base_model_tp_plan:
        raise OptionError(f"context_parallel {ranks}: it is not known where {name} looks at other positions\n{remedy}")
    if "longrope" in repr(getattr(config, "rope_parameters", None)):
        raise OptionError(
            f"context_parallel {ranks}: {name} rotates long rows in another way than short ones (longrope), and each "
            f"rank would decide for its piece\n{remedy}"
        )
    try:
        heads, keys, _ = attention_heads(config)
    except RuntimeError as error:  # transformers' answer where layers differ (Gemma 4)
        raise OptionError(f"context_parallel {ranks}: the layers of {name} have different heads\n{remedy}") from error
    if heads % (shared := math.lcm(keys, ranks)):
        fitting = [str(other) for other in range(2, heads + 1) if heads % math.lcm(keys, other) == 0]
        raise OptionError(
            f"context_parallel {ranks}: {name} has {heads} attention heads and {keys} of keys and values, which "
            f"{ranks} ranks share as {shared}; {heads} / {shared} = {heads / shared:,.6g}\n"
            + (f"pass {', '.join(fitting)}, or {remedy}" if fitting else remedy)
        )


def check_plan_is_complete(model: PreTrainedModel, ranks: int) -> None:
    """Refuse a model whose plan leaves a linear module whole: each rank of a group would count its gradient."""
    head = model.get_output_embeddings()
    linear = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    if whole := linear - tensor_parallel_plan(model).keys():
        raise OptionError(
            f"tensor_parallel {ranks}: the plan of {model.config.model_type} leaves {min(whole)} whole\n"
            "leave it out: --strategy fsdp shards any model"
        )


class Heads(NamedTuple):
    """The attention of a layer: heads of queries, those of keys and values, and the entries of each."""

    queries: int
    keys: int
    entries: int


def attention_heads(config: PretrainedConfig) -> Heads:
    """What a model's configuration says of them, or leaves to follow from its width."""
    config = config.get_text_config()
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries)


def tensor_parallel_plan(model: PreTrainedModel) -> dict[str, str]:
    """How ranks would divide the modules of a model, by name, as its configuration plans it: "colwise", "rowwise", ...

    Of a model that has such a plan. Embedding and head are divided by rows, whatever it says of them.
    """
    plan = {f"{model.base_model_prefix}.{key}": style for key, style in model.config.base_model_tp_plan.items()}
    names = {name: re.sub(r"\.\d+(?=\.)", ".*", name) for name, _ in model.named_modules()}
    return {name: plan[each] for name, each in names.items() if each in plan}
