"""The tensors of a checkpoint: which of them this rank writes, and the optimizer's state by parameter name."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def tensors_to_write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that this rank writes: its shards, and an equal fraction of the tensors that all ranks hold."""
    loads = [0] * dist.get_world_size()
    share = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        owner = dist.get_rank() if isinstance(tensor, DTensor) else loads.index(min(loads))
        loads[owner] += tensor.numel()
        if owner == dist.get_rank():
            share[name] = tensor.detach()
    return share


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The optimizer's state by parameter name: moments, sharded like their parameter, and AdamW's step counts.

    Creates a state of zeros where none exists yet, as the optimizer's first step would, for `load_checkpoint` to fill.
    """
    moments: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        kinds = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")  # Muon, AdamW
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                dtype = group.get("state_dtype", parameter.dtype)  # optim/bf16_adamw.py
                state.update({kind: torch.zeros_like(parameter, dtype=dtype) for kind in kinds})
                if "momentum" not in group:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments |= {f"{kind}.{name}": state[kind] for kind in kinds}
            if "step" in state:
                steps[name] = state["step"]
    return moments, dict(zip(steps, torch.stack(list(steps.values())).tolist(), strict=True))


def named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that the optimizer updates, by parameter name; a sharded optimizer updates its shards."""
    groups = optimizer.param_groups
    return {name: part for group in groups for name, part in zip(group["param_names"], group["params"], strict=True)}
