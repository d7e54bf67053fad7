"""What a trainer really does, seen from inside its process: tokens, losses, and the dtypes that it computes in.

    python -m compare.peers.witness FILE [options of train.py]

The command runs train.py with hooks. They are torch's own, and the same for all trainers: before and after an optimizer
step, around the forward pass of a model of transformers, and around each operator. Rank R writes FILE-R.json.
"""

import hashlib
import json
import os
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 20
LOOKED_AT = 2  # the step whose dtypes are seen. No compiled code runs in it: torch compiles nothing under a mode
IGNORED = -100  # of labels
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"}


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the dtypes of the factors of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = [tensor for tensor in args if isinstance(tensor, Tensor) and tensor.dim() > 1][-2:]
        # A sum of one term, as of positions and frequencies (rotary embeddings), is no matrix product.
        if function.overloadpacket.__name__ in PRODUCTS and factors[0].shape[-1] > 1:
            self.dtypes |= set(dtypes(factors))
        return function(*args, **(kwargs or {}))


class Witness:
    """Sees the optimizer steps of this process; `seen` is what the file gets."""

    def __init__(self, path: str, steps: int = STEPS) -> None:
        self.path, self.steps = Path(f"{path}-{os.environ.get('RANK', '0')}.json"), steps
        self.products = Products()
        self.seen: dict[str, Any] = {"tokens": [], "losses": []}
        self.step, self.losses, self.hashes = 0, list[Tensor](), list[str]()
        register_optimizer_step_pre_hook(self.before_update)
        register_optimizer_step_post_hook(self.after_update)

    def look_at(self, model: nn.Module) -> None:
        """Note what `model` is called with, and its loss: the mean over the micro-batch."""
        model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        model.register_forward_hook(self.after_forward, with_kwargs=True)

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hash each sequence, as data/ledger.py does."""
        ids_BT = kwargs["input_ids"].cpu()
        self.hashes += [hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()[:16] for ids_T in ids_BT]

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the loss on its device. HF Trainer lets the model divide its sum by the targets of the global batch."""
        loss = output.loss.detach()
        if (all_targets := kwargs.get("num_items_in_batch")) is not None:
            loss = loss * all_targets / (kwargs["labels"][:, 1:] != IGNORED).sum()
        self.losses.append(loss)

    def before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer step begins. Lightning runs the forward and the backward pass within it."""
        self.step += not hasattr(optimizer, "optimizers")  # torchtitan has an optimizer that holds optimizers

    def after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer step is done, and its gradients are still there: write what was seen until now."""
        if hasattr(optimizer, "optimizers"):
            return
        if self.step == LOOKED_AT - 1:
            self.products.__enter__()  # type: ignore[no-untyped-call]
        if self.step == LOOKED_AT:
            self.products.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
            self.seen["weights"] = dtypes(parameters)
            self.seen["gradients"] = dtypes(parameter.grad for parameter in parameters if parameter.grad is not None)
            self.seen["moments"] = dtypes(value for value in moments if isinstance(value, Tensor))
            self.seen["products"] = sorted(self.products.dtypes)
        self.seen["tokens"].append(self.hashes)
        self.seen["losses"].append([loss.item() for loss in self.losses])
        self.losses, self.hashes = [], []
        self.path.write_text(json.dumps(self.seen))


def dtypes(tensors: Iterable[Tensor]) -> list[str]:
    """Their names, such as bfloat16, each once."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


if __name__ == "__main__":
    Witness(sys.argv[1])
    sys.argv = ["train.py", *sys.argv[2:]]
    runpy.run_path("train.py", run_name="__main__")
