"""torchtitan 0.2: its Trainer with a model of our sizes, our weights and our batches.

torchtitan 0.3 needs a newer torch than 2.11: it imports `DataParallelMeshDims` from torch.distributed.fsdp.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from config.options import Options
from data.batches import next_tokens
from data.sequences import Sequence

Inputs = tuple[dict[str, Tensor], Tensor]


def train(
    model: PreTrainedModel,
    make_loader: Callable[[], DataLoader[Sequence]],
    options: Options,
    steps: int,
    done: Callable[[int], None],
) -> None:
    """Make `steps` steps from the weights of `model`, and call `done` after each.

    `make_loader` makes the loader of this rank's batches. It needs the process group, which torchtitan creates.

    After each micro-batch, `model` is called with the token ids and the mean loss, and returns that loss: it shows the
    hooks of a witness what torchtitan's own model was trained on.
    """
    spec: Any = importlib.import_module("torchtitan.protocols.train_spec")  # optional
    trainer_of: Any = importlib.import_module("torchtitan.train")

    class Trainer(trainer_of.Trainer):
        def forward_backward_step(self, *, input_dict: Any, labels: Tensor, global_valid_tokens: Tensor) -> Tensor:
            loss: Tensor = super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
            )
            model(input_ids=input_dict["input"], loss=loss.detach() * torch.distributed.get_world_size())
            return loss

    sizes = model_arguments(model)
    of_qwen3 = spec.get_train_spec("qwen3")
    own = {
        "model_args": {"same": sizes},
        "build_tokenizer_fn": None,
        "build_dataloader_fn": lambda **_: Batches(make_loader()),
    }
    spec.register_train_spec("same", dataclasses.replace(of_qwen3, **own))
    trainer = Trainer(job(options, steps))
    if options.model_name_or_path:
        tensors: dict[str, Tensor] = {}
        for file in sorted(Path(options.model_name_or_path).glob("*.safetensors")):
            tensors |= load_file(file)
        weights = of_qwen3.state_dict_adapter(sizes, None).from_hf(tensors)
        set_model_state_dict(trainer.model_parts[0], weights, options=StateDictOptions(full_state_dict=True))
    model.to_empty(device="meta")  # its memory is not torchtitan's
    model.forward = lambda input_ids, loss: SimpleNamespace(loss=loss)
    trainer.optimizers.register_step_post_hook(lambda *_: done(trainer.step))
    trainer.train()
    trainer.close()


class Batches:
    """Batches as torchtitan takes them: token ids, and labels that are shifted already."""

    def __init__(self, loader: DataLoader[Sequence]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Inputs]:
        for batch in self.loader:
            yield {"input": batch["input_ids"]}, next_tokens(batch["labels"])


def model_arguments(model: PreTrainedModel) -> Any:
    """The sizes of a Qwen3 model of transformers, dense or a mixture, as torchtitan names them."""
    qwen3: Any = importlib.import_module("torchtitan.models.qwen3")
    config = model.config
    mixture = getattr(config, "num_experts", 0)
    arguments = dataclasses.replace(
        qwen3.qwen3_args["debugmodel_moe" if mixture else "0.6B"],
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_dim=config.intermediate_size,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        enable_weight_tying=config.tie_word_embeddings,
    )
    if mixture:
        experts = {"num_experts": mixture, "top_k": config.num_experts_per_tok, "load_balance_coeff": None}
        arguments.moe_args = dataclasses.replace(arguments.moe_args, **experts)
        arguments.moe_inter_dim = config.moe_intermediate_size
    return arguments


def job(options: Options, steps: int) -> Any:
    """Our options as the configuration of a run of torchtitan, with a constant learning rate."""
    job: Any = importlib.import_module("torchtitan.config").JobConfig()
    job.model.name, job.model.flavor = "same", "same"
    job.training.local_batch_size, job.training.seq_len = options.per_device_train_batch_size, options.block_size
    job.training.steps, job.training.max_norm = steps, options.max_grad_norm
    job.training.mixed_precision_param = "bfloat16" if options.bf16 else "float32"
    job.optimizer.lr, job.optimizer.weight_decay = options.learning_rate, options.weight_decay
    job.optimizer.beta1, job.optimizer.beta2 = options.adam_beta1, options.adam_beta2
    job.lr_scheduler.warmup_steps, job.lr_scheduler.min_lr_factor = 0, 1.0
    job.activation_checkpoint.mode = "full" if options.gradient_checkpointing else "none"
    job.compile.enable = options.torch_compile
    job.metrics.log_freq = steps + 1
    return job
