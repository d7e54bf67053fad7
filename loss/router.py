"""What balances the experts of a mixture, over the global batch: a loss, or biases; and the load of the experts.

Shapes: B sequences, T tokens of a sequence, S = B x T; L layers with experts; E experts of a layer; K experts of a
token.
"""

import inspect
import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from config.errors import OptionError
from config.options import Options
from data.batches import Batch, to_device

BIASES = ("e_score_correction_bias", "expert_bias")  # buffers [E]: a router adds one to scores, to choose experts


class RouterBalance:
    """What the routers of a model chose in this step, and the loss that keeps their choices balanced.

    The loss is that of transformers (Switch Transformer, Fedus et al. 2021, equation 4): E x the sum over experts of
    (fraction of tokens for this expert) x (mean probability of this expert), over all layers together. Both factors are
    means over the tokens of the global batch without padding, so the value does not depend on the number of ranks or
    micro-steps. A mean of the losses of micro-batches would: it is another function.
    """

    def __init__(self, model: PreTrainedModel, coefficient: float) -> None:
        self.coefficient = coefficient
        self.captured: tuple[tuple[Tensor, ...], int] = ((), 0)
        # transformers calls this function of the model's module with the logits of all routers. Its own would count
        # on the CPU, which synchronizes with the GPU, and knows only this micro-batch.
        sys.modules[type(model).__module__].load_balancing_loss_func = self._capture  # type: ignore[attr-defined]
        self.of_step: Tensor | None = None  # int64 [L, E]: tokens of the global batch, if they were counted before
        self.load = torch.zeros(0)  # int64 [L, E]: of the last step, over all ranks once `metrics` has added them
        self.loss_sum = torch.zeros(0)
        self.tokens = self.targets = 0
        self.counting = False

    def _capture(self, router_logits: tuple[Tensor, ...] | None, experts: int, choices: int, *others: object) -> int:
        self.captured = router_logits or (), choices
        return 0

    def begin(self, tokens: int, targets: int, device: torch.device) -> None:
        """Begin a step with so many tokens and targets in its global batch."""
        self.tokens, self.targets = tokens, targets
        self.of_step, self.load, self.loss_sum = None, torch.zeros(0), torch.zeros((), device=device)

    def count(self, lengths_B: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The tokens for each expert, int64 [L, E], and the sums of the probabilities [E], without padding."""
        router_logits, choices = self.captured
        if not router_logits:  # some models of transformers pass none
            raise OptionError(
                f"router_aux_loss_coef {self.coefficient}: this model does not give the logits of its routers\n"
                "pass --router_aux_loss_coef 0"
            )
        self.captured = (), 0
        real_S = real_positions(lengths_B, shape)
        counts, probabilities_E = [], torch.zeros((), device=lengths_B.device)
        for logits_SE in router_logits:
            # In the dtype of the logits, as transformers does, so that ties are broken in the same way.
            probabilities_SE = functional.softmax(logits_SE, dim=-1)
            chosen_SK = probabilities_SE.topk(choices, dim=-1).indices
            zeros_E = torch.zeros(logits_SE.shape[-1], dtype=torch.int64, device=logits_SE.device)
            counts.append(zeros_E.scatter_add(0, chosen_SK.flatten(), real_S.long().repeat_interleave(choices)))
            probabilities_E = probabilities_E + (probabilities_SE.float() * real_S[:, None]).sum(0)
        return torch.stack(counts), probabilities_E

    def loss(self, lengths_B: Tensor, shape: torch.Size) -> Tensor:
        """This micro-batch's part of the loss, times the targets of the global batch: a scalar. Every rank must call.

        The caller divides by these targets, as it does with the sum of the token losses.
        """
        if not self.captured[0] and not self.coefficient:
            return torch.zeros((), device=lengths_B.device)
        counts_LE, probabilities_E = self.count(lengths_B, shape)
        self.load = counts_LE if len(self.load) == 0 else self.load + counts_LE
        if not self.coefficient:
            return torch.zeros((), device=lengths_B.device)
        of_step_LE = self.of_step
        if of_step_LE is None:  # one micro-step: its counts are those of the step
            of_step_LE = counts_LE.clone()
            dist.all_reduce(of_step_LE)
        layers, experts = of_step_LE.shape
        rows = max(1, self.tokens) * layers
        part = experts * ((of_step_LE.sum(0) / rows) * (probabilities_E / rows)).sum()
        self.loss_sum += part.detach()
        return part * self.coefficient * self.targets

    def metrics(self) -> dict[str, float]:
        """The loss and the load of the experts in the last step, over all ranks. Every rank must call.

        expert_load_max is the largest number of tokens of an expert, relative to the mean of its layer; experts_unused
        is the fraction of experts without a token.
        """
        if len(self.load) == 0:
            return {}
        dist.all_reduce(self.load)
        load_LE = self.load.double()
        relative_LE = load_LE / load_LE.mean(1, keepdim=True).clamp(min=1e-9)
        result = {"expert_load_max": relative_LE.max().item(), "experts_unused": (load_LE == 0).double().mean().item()}
        if self.coefficient:
            dist.all_reduce(self.loss_sum)
            result["router_aux_loss"] = self.loss_sum.item()
        return result


def real_positions(lengths_B: Tensor, shape: torch.Size) -> Tensor:
    """Whether each position of a micro-batch [B, T] is no padding: bool [S]. An empty micro-batch is all padding."""
    padded_B = functional.pad(lengths_B, (0, shape[0] - len(lengths_B)))
    return (torch.arange(shape[1], device=lengths_B.device) < padded_B[:, None]).flatten()


class RouterBias:
    """Keeps experts balanced without a loss (Wang et al. 2024; DeepSeek-V3 report 2024, section 2.1.2).

    After each step, the bias of an expert rises by `rate` if fewer tokens of the global batch came to it than the mean
    of its layer, and falls if more did. Biases are saved buffers of the model, equal on all ranks, without a gradient.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.owners: list[tuple[nn.Module, str]] = []  # the module of each layer's bias, and the bias's name in it
        self.counts: list[Tensor] = []  # int64 [E] each: tokens of this rank for each expert in this step
        self.real_S: Tensor | None = None  # whether a position of the micro-batch is no padding
        for parent in model.modules():
            experts = getattr(parent, "experts", None)
            owners = [
                (module, name)
                for module in parent.modules()
                for name in BIASES
                if name in dict(module.named_buffers(recurse=False))
            ]
            if isinstance(experts, nn.Module) and len(owners) == 1:
                experts.register_forward_pre_hook(partial(self._count, len(self.owners)))
                self.owners += owners

    def begin(self, device: torch.device) -> None:
        """Begin a step: forget the counts of the last one."""
        biases = [owner.get_buffer(name) for owner, name in self.owners]
        self.counts = [torch.zeros(bias_E.shape, dtype=torch.int64, device=device) for bias_E in biases]

    def _count(self, layer: int, experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count the choices [S, K], the second argument of an experts function of transformers: a forward pre-hook.

        A layer that is recomputed counts twice. That is so for all of its experts, and does not change the comparison.
        """
        if torch.is_grad_enabled() and self.real_S is not None:
            chosen_SK = inputs[1]
            real_R = self.real_S.long().repeat_interleave(chosen_SK.shape[1])
            self.counts[layer].scatter_add_(0, chosen_SK.flatten(), real_R)

    def update(self, skip: Tensor) -> None:
        """Move the biases after a step, unless `skip`, a bool on the device, says that it changes nothing.

        Every rank must call. The CPU does not synchronize with the GPU.
        """
        counts_LE = torch.stack(self.counts)
        dist.all_reduce(counts_LE)
        moves_LE = self.rate * (counts_LE.double().mean(1, keepdim=True) - counts_LE).sign() * ~skip
        for (owner, name), move_E in zip(self.owners, moves_LE, strict=True):
            bias_E = owner.get_buffer(name)
            bias_E += move_E.to(bias_E.dtype)


def build_router_bias(model: PreTrainedModel, options: Options) -> RouterBias | None:
    """What moves the biases of the routers, if --router_bias_update_rate asks for it. Raises OptionError."""
    if not options.router_bias_update_rate:
        return None
    bias, source = (
        RouterBias(model, options.router_bias_update_rate),
        f"router_bias_update_rate {options.router_bias_update_rate}",
    )
    if not bias.owners:
        raise OptionError(
            f"{source}: {model.config.model_type} has no bias of its routers as a buffer\n"
            "remove --router_bias_update_rate; --router_aux_loss_coef balances other mixtures"
        )
    if options.model_parallel_size > 1 or options.objective == "dpo":
        other = "objective dpo" if options.objective == "dpo" else "tensor or context parallelism"
        raise OptionError(f"{source}: cannot be combined with {other}\nremove one of them")
    return bias


def update_router_bias(objective: nn.Module, skip: Tensor) -> None:
    """Move the biases of a mixture's routers after a step, if an option asks for it. Every rank must call."""
    bias: Any = getattr(objective, "router_bias", None)
    if bias is not None:
        bias.update(skip)


def build_router_balance(model: PreTrainedModel, options: Options) -> RouterBalance | None:
    """The load-balancing loss that configuration and options ask for; None for a model without known routers.

    As in transformers, a configuration asks with output_router_logits true; --router_aux_loss_coef overrides it. With a
    coefficient of 0, only the load of experts is measured. Raises OptionError if the loss cannot be computed.
    """
    config = model.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_coef")
    from_config = next((getattr(config, name) for name in names if hasattr(config, name)), 0.0) or 0.0
    asked = options.router_aux_loss_coef
    coefficient = asked if asked is not None else from_config * bool(getattr(config, "output_router_logits", False))
    source = f"router_aux_loss_coef {coefficient}" + (" of the model's configuration" if asked is None else "")
    formula = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    # Some models have another formula by this name, with other arguments.
    known = formula is not None and [*inspect.signature(formula).parameters][:3] == [
        "gate_logits",
        "num_experts",
        "top_k",
    ]
    known = known and hasattr(config, "output_router_logits")
    if coefficient and not known:
        raise OptionError(
            f"{source}: {config.model_type} has no load-balancing loss in transformers\npass --router_aux_loss_coef 0"
        )
    if coefficient and (options.model_parallel_size > 1 or options.objective == "dpo"):
        other = "objective dpo" if options.objective == "dpo" else "tensor or context parallelism"
        raise OptionError(f"{source}: cannot be combined with {other}\npass --router_aux_loss_coef 0, or remove it")
    if not known or options.model_parallel_size > 1:
        return None
    return RouterBalance(model, coefficient)


def begin_step(
    objective: nn.Module, wrapped: nn.Module, batches: list[Batch], tokens: int, targets: int, device: torch.device
) -> None:
    """Tell a mixture the counts of the global batch, before the first micro-step. Every rank must call.

    With several micro-steps and a load-balancing loss, the experts are first chosen for all of them, in a forward pass
    without gradients each: the loss of a micro-step needs the choices of the global batch. A step takes about a third
    longer then.
    """
    bias: Any = getattr(objective, "router_bias", None)
    if bias is not None:
        bias.begin(device)
    balance: Any = getattr(objective, "router_balance", None)
    if balance is None:
        return
    balance.begin(tokens, targets, device)
    if len(batches) == 1 or not balance.coefficient:
        return
    of_step: Tensor | None = None
    balance.counting = True
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for batch in batches:
            counts_LE = wrapped(**to_device(batch, device))
            of_step = counts_LE if of_step is None else of_step + counts_LE
    balance.counting = False
    dist.all_reduce(of_step)
    balance.of_step = of_step


def router_metrics(objective: nn.Module) -> dict[str, float]:
    """What metrics.jsonl says of the routers of the last step; {} for a model without. Every rank must call."""
    balance: Any = getattr(objective, "router_balance", None)
    return balance.metrics() if balance is not None else {}
