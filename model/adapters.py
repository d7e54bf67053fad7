"""Adapters (LoRA): the model is frozen, and a product of two small matrices is trained beside each linear module.

A module computes W x + s B A x (Hu et al. 2021, arXiv 2106.09685, section 4.1). W [O, I] is frozen, in bf16 with
--bf16. A [R, I] and B [O, R] are trained, in fp32. The scale s is lora_alpha / R, or lora_alpha / sqrt(R) with
--use_rslora (Kalajdzievski 2023, arXiv 2312.03732). B starts at zero, so training starts from the given model.

Parameters keep their names, and the names, shapes and files of adapters are those of PEFT. DDP, FSDP and optimizer need
nothing of their own: they reduce gradients of parameters that require them, and a frozen one does not.
Shapes: I inputs and O outputs of a linear module, R rank of its adapter (lora_r).
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from config.errors import OptionError
from config.options import ALL_LINEAR, Options
from model.experts import skipped_experts
from model.layers import compute_dtype, expert_stacks, text_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the files of PEFT
PREFIX = "base_model.model."  # of the names in these files


class LoraLinear(nn.Linear):
    """A linear module with an adapter. add_adapters makes it from a torch.nn.Linear, whose parameters it keeps."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_dropout: nn.Module
    scaling: float
    enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., O] for `input` [..., I], in the dtype of torch.autocast if it is on, otherwise of the input."""
        output = functional.linear(input, self.weight, self.bias)
        if not self.enabled:
            return output
        dropped = self.lora_dropout(input.to(compute_dtype(self.lora_A.weight)))
        adapted: Tensor = self.lora_B(self.lora_A(dropped)) * self.scaling
        return output + adapted.to(output.dtype)


def add_adapters(model: PreTrainedModel, options: Options) -> None:
    """Freeze `model`, on the meta device, and add an adapter to each module that `options` name, in place.

    Frozen parameters become bf16 with `options.bf16`, otherwise they stay fp32. Raises OptionError.
    """
    targets = _targets(model, options.lora_target_modules)
    for parameter in model.requires_grad_(False).parameters():
        if options.bf16:
            parameter.data = parameter.data.bfloat16()
    root = math.sqrt(options.lora_r) if options.use_rslora else options.lora_r
    for module in targets.values():
        device: dict[str, Any] = {"device": module.weight.device, "dtype": torch.float32, "bias": False}
        module.__class__ = LoraLinear
        module.lora_A = nn.Linear(module.in_features, options.lora_r, **device)
        module.lora_B = nn.Linear(options.lora_r, module.out_features, **device)
        module.lora_dropout = nn.Dropout(options.lora_dropout) if options.lora_dropout else nn.Identity()
        module.scaling, module.enabled = options.lora_alpha / root, True  # type: ignore[assignment]


def _targets(model: PreTrainedModel, names: str) -> dict[str, nn.Linear]:
    """The modules that get an adapter. Raises OptionError for a name without a module, or with one of another kind.

    As in PEFT, `all-linear` means all linear modules but the head, and a name means modules whose path ends with it.
    `all-linear` leaves out modules of subclasses, and modules that are not called (describe_adapters names them).
    """
    head, kind = model.get_output_embeddings(), type(model).__name__
    head_path = next((path for path, module in model.named_modules() if module is head), "")
    within = set(text_model(model).modules())  # tokens run through no other part of a multimodal model
    modules = {path: module for path, module in model.named_modules() if module in within and module is not head}
    linear = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
    known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in linear)) or "none"
    called = _called(model, linear)
    found = {path: module for path, module in linear.items() if type(module) is nn.Linear and path in called}
    if names != ALL_LINEAR:
        found = {}
        for name in map(str.strip, names.split(",")):
            named = {path: module for path, module in modules.items() if f".{path}".endswith(f".{name}")}
            if uncalled := named.keys() & linear.keys() - called:
                raise OptionError(
                    f"lora_target_modules {name}: {kind} reads the weight of {min(uncalled)} without calling it, so "
                    f"an adapter would have no effect\npass {ALL_LINEAR}, which leaves it out"
                )
            if not named or not named.items() <= linear.items():
                problem = "the adapters are for linear modules" if named else f"{kind} has no such module"
                if name and f".{head_path}".endswith(f".{name}"):
                    problem = "the head has no adapter, because the loss applies it in chunks"
                raise OptionError(
                    f"lora_target_modules {name}: {problem}\npass {ALL_LINEAR}, or some of its linear modules: {known}"
                )
            found |= named
    others = [module for module in (found or linear).values() if type(module) is not nn.Linear]
    if others or not found:
        problem = f"its modules are {type(others[0]).__name__}" if others else "it has none"
        raise OptionError(
            f"lora_target_modules {names}: adapters are for modules of torch.nn.Linear, and in {kind}, {problem}\n"
            "remove --use_peft, to train all parameters"
        )
    return found


def _called(model: PreTrainedModel, linear: dict[str, nn.Linear]) -> set[str]:
    """The paths of the linear modules that a forward pass calls. Some models read only the weight (dt_proj of Mamba).

    Runs the model on fake tensors. Experts do not run, so a linear module of one counts as not called: a rank may have
    no token for it. All count as called in a model that cannot run so.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, path=path: called.add(path))
        for path, module in linear.items()
    ]
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would print the error
    try:
        with skipped_experts(model), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    except Exception:
        return set(linear)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def adapted_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """The modules with an adapter, by name; empty for a model without adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters by name, in fp32 (DTensors where sharded); empty for a model without adapters."""
    names = [f"{path}.{own}.weight" for path in adapted_modules(model) for own in ("lora_A", "lora_B")]
    return {name: model.get_parameter(name) for name in names}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context, `model` computes as if it had no adapters. A compiled layer is compiled once more for it."""
    modules = adapted_modules(model).values()
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True


@torch.no_grad()
def merged_weight(module: LoraLinear) -> Tensor:
    """W + s B A [O, I] in fp32; where W is sharded by its rows, this rank's rows. Every rank must call: A is gathered.

    Needs memory for the matrix in fp32, on the device of W.
    """
    weight, a, b = module.weight, module.lora_A.weight, module.lora_B.weight
    if not isinstance(weight, DTensor):
        return weight.float() + module.scaling * (b.float() @ a.float())
    full_a: Tensor = a.cpu().full_tensor().to(weight.to_local().device)  # type: ignore[attr-defined]  # over gloo
    rows = weight.to_local().float() + module.scaling * (b.to_local() @ full_a)  # type: ignore[attr-defined]
    return DTensor.from_local(
        rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def adapter_config(model: nn.Module, options: Options) -> dict[str, Any]:
    """The content of adapter_config.json, as PEFT reads it. A local base model is named by its absolute path."""
    base, paths = str(options.model_name_or_path), list(adapted_modules(model))
    own_names = sorted({path.rpartition(".")[2] for path in paths})
    # PEFT adds an adapter to each module whose path ends with a name. Some name may also fit other modules.
    fitting = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in own_names]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).absolute()) if Path(base).exists() else base,
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "target_modules": own_names if sorted(fitting) == sorted(paths) else paths,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def describe_adapters(model: PreTrainedModel, options: Options) -> str:
    """The adapters in words: their size and modules, what is frozen in which dtype; "" for a model without adapters."""
    modules = adapted_modules(model)
    if not modules:
        return ""
    trained = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    dtype = str(frozen[0].dtype).removeprefix("torch.")
    own_names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in modules))
    experts = "; experts have none, because they are no linear modules" if expert_stacks(model) else ""
    inner, head = {own for module in modules.values() for own in module.children()}, model.get_output_embeddings()
    linear = {path: module for path, module in text_model(model).named_modules() if isinstance(module, nn.Linear)}
    others = {path for path, module in linear.items() if module not in inner and module is not head}
    left = sorted({path.rpartition(".")[2] for path in others} - {path.rpartition(".")[2] for path in modules})
    experts += f"; without an adapter: {', '.join(left)}" if left else ""
    return (
        f"LoRA, r {options.lora_r}, scale {next(iter(modules.values())).scaling:g}: {trained:,} parameters in "
        f"{len(modules)} modules ({own_names}); {sum(map(Tensor.numel, frozen)):,} frozen in {dtype}{experts}"
    )
