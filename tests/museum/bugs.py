"""The bugs: classics of distributed training, each a wrong line instead of a right one.

The order is roughly that of a run: data, loss, gradients, the update, the evaluation, the checkpoint.
"""

from dataclasses import dataclass

GROUPS = {  # as docs/museum.md shows them
    "data": "the tokens that a step trains on",
    "loss": "the value that a step minimizes, and the values that a run reports",
    "gradients": "one sum over micro-steps and ranks",
    "sharding": "parameters and sequences that are split over ranks",
    "numbers": "precision, random numbers and the update",
    "checkpoints": "the saved state, and the state that a resumed run restores",
}


CHAPTERS = {  # of docs/book; `make quiz CHAPTER=n` plants a bug of one
    1: "one process",
    2: "ranks and data",
    3: "DDP",
    4: "FSDP and ZeRO",
    5: "numbers",
    6: "memory and time",
    7: "checkpoints",
    8: "splitting layers, sequences, experts",
}


@dataclass(frozen=True)
class Change:
    """A fragment of a file, and the text that the bug puts there."""

    file: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Curve:
    """The run whose loss curve shows the symptom: options beyond those of tests/world.py."""

    ranks: int = 2
    options: tuple[object, ...] = ()
    resume_at: int | None = None  # stop after so many steps and resume
    value: str = "loss"  # the field of metrics.jsonl


@dataclass(frozen=True)
class Bug:
    """A bug: its story, its symptom, the changes that plant it, and the test that kills it."""

    name: str
    group: str  # of GROUPS
    chapter: int  # of CHAPTERS
    story: str
    symptom: str
    changes: tuple[Change, ...]
    killer: str
    curve: Curve | None = None
    source: str | None = None  # where it happened: an issue or pull request on GitHub, owner/name#number


def one(file: str, right: str, wrong: str) -> tuple[Change, ...]:
    """A single change."""
    return (Change(file, right, wrong),)


def curve_test(case: str) -> str:
    """The test that holds the gates of one topology."""
    return f"tests/test_topology.py::test_same_curve[{case}]"


SCALE = "world_size / max(1, targets))\n"
BACKWARD = "(loss * scale).backward()\n"
MICRO_STEP = f"            loss_sum += micro_step(to_device(batch, device), {SCALE}"
NUMERICS = "tests/test_numerics.py::test_changes_nothing"
RESUME_TO_THE_BIT = "tests/test_resume.py::test_same_ranks_to_the_bit[ddp]"
SPLIT = "tests/test_tensor_parallel.py::test_family[qwen3]"
CONTEXT_PARALLEL = "tests/test_context_parallel.py::test_family[qwen3]"
LOADED_STATE = "tests/test_resume.py::test_other_ranks_and_strategies[1-ddp]"

BUGS = [
    Bug(
        "no set_epoch",
        "data",
        2,
        "A DistributedSampler shuffles by seed and epoch, so the loop must tell it the epoch. PyTorch's documentation "
        "warns of this, and loops still forget it.",
        "Nothing breaks. Every epoch has the order of the first one, and the training loss gets a pattern that "
        "repeats.",
        one(
            "train.py",
            "            sampler.set_epoch(epoch)  # without it, every epoch would have the order of the first\n",
            "",
        ),
        "tests/test_ledger.py::test_batches_of_two_epochs",
        source="pytorch/pytorch#31771",
    ),
    Bug(
        "a different shuffle on each rank",
        "data",
        2,
        "Each rank seeds its own sampler, because seeds 'must differ between ranks'. This is true for dropout. It is "
        "wrong for the permutation that all ranks shard.",
        "Ranks read overlapping shards: some sequences come twice in an epoch and others never. No curve shows it.",
        one(
            "train.py",
            "shuffle=True, seed=options.seed, drop_last=True",
            "shuffle=True, seed=options.seed + dist.get_rank(), drop_last=True",
        ),
        "tests/test_ledger.py::test_batches_of_two_ranks",
        source="mlcommons/training#625",
    ),
    Bug(
        "the epoch starts again on resume",
        "data",
        2,
        "The checkpoint holds the step, but the loader starts its epoch from the beginning. The sequences before the "
        "interruption are seen twice, and the last ones of the epoch are not seen at all.",
        "After each resume the training loss is a little too low, because the model has seen these sequences before.",
        one("train.py", "first, end = steps_into_epoch * plan.accumulation,", "first, end = 0,"),
        "tests/test_ledger.py::test_batches_of_a_resumed_run[3]",
        source="catalyst-team/catalyst#764",
    ),
    Bug(
        "the position restored without its epoch",
        "data",
        2,
        "The position within the epoch is restored, but the number of the epoch is not. The run continues at the right "
        "position of the wrong permutation.",
        "None in the curve. From the second epoch on, every resume repeats some sequences and loses others.",
        one(
            "train.py",
            "epoch, steps_into_epoch = divmod(done.step, plan.steps_per_epoch)",
            "epoch, steps_into_epoch = 0, done.step % plan.steps_per_epoch",
        ),
        "tests/test_ledger.py::test_batches_of_a_resumed_run[20]",
        source="huggingface/accelerate#4071",
    ),
    Bug(
        "documents without EOS",
        "data",
        2,
        "Documents are concatenated without an EOS token between them, so the model never trains on the end of a text.",
        "The loss looks normal. The model never stops generating.",
        one("data/tokens.py", "before * raw.begins + ids + after * raw.ends", "before * raw.begins + ids"),
        "tests/test_data.py::test_no_token_is_lost[None-.jsonl]",
    ),
    Bug(
        "EOS masked as padding",
        "data",
        2,
        "The tokenizer has no pad token, so EOS is used for padding. Labels are masked where the token is the pad "
        "token, and this masks every true EOS too.",
        "The loss changes a little, because one kind of token is missing. The model never learns to stop.",
        one(
            "data/batches.py",
            "tokens.where(trained_on, IGNORE_INDEX)",
            "tokens.where(trained_on & (tokens != 0), IGNORE_INDEX)",
        ),
        "tests/test_data.py::test_collate_masks_by_length",
        source="huggingface/transformers#23530",
    ),
    Bug(
        "padding is trained on",
        "data",
        2,
        "Labels are a copy of the padded inputs, and the code does not set them to -100 at the padding.",
        "The loss is far too low, because padding is easy to predict. The shorter the documents, the lower it is.",
        one("data/batches.py", "torch.full(shape, IGNORE_INDEX)", "torch.zeros(shape, dtype=torch.int64)"),
        "tests/test_data.py::test_collate_masks_by_length",
        Curve(),
        source="NovaSky-AI/SkyRL#462",
    ),
    Bug(
        "the question is trained on",
        "data",
        2,
        "The template marks the assistant's answer, but the labels are the whole text. The model learns to ask "
        "questions.",
        "The loss is too high, because questions are hard to predict. Generated answers continue with the next "
        "question.",
        one("data/batches.py", "tokens.where(trained_on, IGNORE_INDEX)", "tokens"),
        "tests/test_packing.py::test_collate_keeps_documents_apart",
        source="marin-community/marin#7237",
    ),
    Bug(
        "the end of the answer is masked",
        "data",
        2,
        "The mask selects the answer, but not the token that ends the turn. The template writes this token after the "
        "answer.",
        "None in the loss. The model answers, and then does not stop.",
        one("chat/template.py", "words[1] + len(_closing(renderings, index, words)) if words", "words[1] if words"),
        "tests/test_chat.py::test_what_is_learned",
        source="huggingface/trl#5988",
    ),
    Bug(
        "attention leaks between packed documents",
        "data",
        2,
        "Several documents share a sequence, but the model is not told where each begins. Every document attends to "
        "all documents before it.",
        "The loss is a little too low where documents resemble each other. The model has learned to copy from "
        "unrelated text.",
        one(
            "data/batches.py",
            "            position_ids_BT[index, start : start + length] = torch.arange(length)\n",
            "",
        ),
        "tests/test_packing.py::test_packed_is_one_by_one[full_attention]",
        source="huggingface/trl#1230",
    ),
    Bug(
        "the next document is predicted",
        "data",
        2,
        "The label of the first token of a packed document is not masked, so the last token of the document before has "
        "to predict it.",
        "The loss is a little too high, and grows with the number of documents in a sequence.",
        one("data/batches.py", "            if start > 0:\n", "            if start < 0:\n"),
        "tests/test_packing.py::test_collate_keeps_documents_apart",
    ),
    Bug(
        "labels shifted twice",
        "loss",
        1,
        "The model shifts the labels by one, and the loss function that it calls shifts them again. The model is "
        "trained to predict the token after the next one.",
        "The loss falls, but stays too high. Generated text skips every other word.",
        one("data/batches.py", "labels_BT[:, 1:], (0, 1)", "labels_BT[:, 2:], (0, 2)"),
        "tests/test_rooms.py::test_labels_are_the_next_tokens",
        Curve(),
        source="huggingface/transformers#47395",
    ),
    Bug(
        "labels not shifted",
        "loss",
        1,
        "The loss function expects shifted labels and gets the inputs. Each position has to predict its own token.",
        "The loss is the best ever seen and falls towards zero: a residual connection is enough to copy the input.",
        one(
            "data/batches.py", "return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)", "return labels_BT"
        ),
        "tests/test_rooms.py::test_labels_are_the_next_tokens",
        Curve(),
    ),
    Bug(
        "a mean over padding",
        "loss",
        1,
        "The sum of the token losses is right, but the divisor counts every position, including padding.",
        "Loss and gradient shrink with the amount of padding, so short documents count less.",
        one(
            "data/batches.py",
            '"targets": (next_tokens(labels_BT) != IGNORE_INDEX).sum()',
            '"targets": torch.tensor(labels_BT.numel())',
        ),
        "tests/test_data.py::test_collate_masks_by_length",
        Curve(),
        source="voidism/DiffCSE#25",
    ),
    Bug(
        "targets counted before the shift",
        "loss",
        1,
        "Targets are counted in the labels before the shift: one too many in each sequence.",
        "The loss is too low by a factor of (T - 1) / T for sequences of T tokens: by half for two tokens.",
        one("data/batches.py", "(next_tokens(labels_BT) != IGNORE_INDEX).sum()", "(labels_BT != IGNORE_INDEX).sum()"),
        "tests/test_data.py::test_collate_masks_by_length",
        source="huggingface/transformers#46204",
    ),
    Bug(
        "NaN when all labels are masked",
        "numbers",
        5,
        "A mean over no target is 0 / 0. A long prompt that is truncated before its answer gives such a micro-batch on "
        "one rank, and the all-reduce spreads the NaN to all ranks.",
        "At some step the loss is NaN, and from then on every weight is NaN.",
        one("loss/cross_entropy.py", 'reduction="sum")', 'reduction="mean") * (targets_N != IGNORE_INDEX).sum()'),
        "tests/test_rooms.py::test_a_batch_without_targets_is_finite",
        source="allenai/OLMo-core#657",
    ),
    Bug(
        "mean of means over ranks",
        "loss",
        3,
        "Each rank divides by its own number of targets, and DDP averages over ranks. Where a rank has fewer targets, "
        "each of them counts more. This bug remained when transformers had fixed its accumulation.",
        "The curve depends on the number of GPUs. It looks like noise, but it is a bias.",
        one("train.py", SCALE, '1 / max(1, int(total(step_batches, "targets"))))\n'),
        curve_test("DDP-2x8"),
        Curve(4, ("--per_device_train_batch_size", 4)),
        source="huggingface/transformers#34242",
    ),
    Bug(
        "mean of means over micro-steps",
        "loss",
        1,
        "The mean of each micro-batch is divided by the number of micro-steps. The most used trainer did this until "
        "October 2024, when users showed that one large batch and many small ones gave different curves.",
        "The curve depends on the number of micro-steps, and more so when sequence lengths vary.",
        one("train.py", SCALE, '1 / max(1, int(batch["targets"])) / plan.accumulation)\n'),
        curve_test("single-1x4"),
        Curve(1, ("--per_device_train_batch_size", 1)),
        source="huggingface/transformers#34191",
    ),
    Bug(
        "reference log-probabilities rounded to bf16",
        "numbers",
        5,
        "FSDP casts the floating-point inputs of a module to bf16. The reference log-probability of an answer is a sum "
        "of some hundred nats, and bf16 represents it with three digits. The DPO loss consists of differences of such "
        "sums.",
        "Preference tuning seems to work, but its first loss is not ln 2.",
        one("fsdp/wrap.py", "mp_policy=root_precision", "mp_policy=precision"),
        "tests/test_preference.py::test_bf16",
    ),
    Bug(
        "divided by the micro-steps twice",
        "gradients",
        1,
        "The loop divides the loss by the number of micro-steps, and the library that it calls divides again.",
        "AdamW hides it, because its update does not depend on the scale of the gradient. Clipping and epsilon depend "
        "on it. With SGD, the learning rate is too small by the number of micro-steps.",
        one("train.py", SCALE, "world_size / max(1, targets) / plan.accumulation)\n"),
        curve_test("single-1x4"),
        Curve(1, ("--adam_epsilon", 1000, "--learning_rate", 500, "--adam_beta1", 0, "--weight_decay", 0)),
        source="huggingface/transformers#35808",
    ),
    Bug(
        "divided by the world size twice",
        "gradients",
        3,
        "DDP averages gradients over ranks. Code that divides a sum by the global number of targets must multiply by "
        "the world size to undo the average.",
        "Invisible with AdamW until the norm is clipped. With SGD, the learning rate is too small by the world size.",
        one("train.py", SCALE, "1 / max(1, targets))\n"),
        curve_test("DDP-2x8"),
        Curve(4, ("--adam_epsilon", 1000, "--learning_rate", 500, "--adam_beta1", 0, "--weight_decay", 0)),
        source="meta-pytorch/torchtune#2172",
    ),
    Bug(
        "only the last micro-step counts",
        "gradients",
        1,
        "zero_grad is called inside the accumulation loop, one line too deep.",
        "A noisier curve at the cost of a large batch: all micro-steps are computed, and only the last one is used.",
        one("train.py", BACKWARD, f"wrapped.zero_grad()\n        {BACKWARD}"),
        curve_test("single-1x4"),
        Curve(1, ("--per_device_train_batch_size", 1)),
        source="pytorch/torchtitan#3575",
    ),
    Bug(
        "never synchronized",
        "gradients",
        3,
        "no_sync() covers the last micro-step too, because an index is off by one. Each rank trains a model of its "
        "own.",
        "No error, and faster steps. The replicas diverge, and only the replica of rank 0 is saved.",
        one("train.py", "index == plan.accumulation - 1", "index == plan.accumulation"),
        curve_test("DDP-2x2"),
        Curve(4),
        source="modelscope/FunASR#3472",
    ),
    Bug(
        "accumulated gradients summed in every micro-step",
        "gradients",
        3,
        "A handwritten all-reduce in the micro-step loop sums the gradient that has accumulated so far. The first "
        "micro-steps are summed again each time, and are multiplied by the world size each time.",
        "The first micro-batches of a step outweigh the last ones by powers of the world size.",
        (
            Change(
                "train.py",
                "strategy.set_gradient_sync(wrapped, options.sync_each_batch or index == plan.accumulation - 1)",
                "strategy.set_gradient_sync(wrapped, False)",
            ),
            Change(
                "train.py",
                SCALE,
                "1 / max(1, targets))\n"
                "            for parameter in model.parameters():\n"
                "                dist.all_reduce(parameter.grad)\n",
            ),
        ),
        curve_test("DDP-2x2"),
        Curve(4, ("--per_device_train_batch_size", 1)),
    ),
    Bug(
        "clipped by the norm of a shard",
        "sharding",
        5,
        "The norm for clipping is computed from the shards of one rank. With sharding, this is a fraction of the "
        "gradient, and each rank finds a different norm.",
        "Steps are clipped too little, by about the square root of the number of ranks, and each shard by a different "
        "factor.",
        one("fsdp/gradients.py", "    dist.all_reduce(squares)\n", ""),
        curve_test("FSDP-2x8"),
        Curve(4, ("--strategy", "fsdp")),
        source="pytorch/pytorch#72548",
    ),
    Bug(
        "replicated gradients counted on every rank",
        "sharding",
        8,
        "Tensor parallelism splits the matrices and replicates the norm weights. A sum of squares over all ranks "
        "counts the replicated gradients once per rank.",
        "The gradient norm is a little too large, and more so with more tensor-parallel ranks. Steps are clipped a "
        "little too much.",
        one("fsdp/gradients.py", "nn.utils.get_total_norm(same) ** 2 / replicas", "nn.utils.get_total_norm(same) ** 2"),
        SPLIT,
    ),
    Bug(
        "the gradient of one vocabulary shard",
        "sharding",
        8,
        "The output projection is split by vocabulary. Each rank computes the gradient of the hidden states from its "
        "own logits, and these gradients must be summed. The missing call is Megatron's all-reduce in the backward "
        "pass.",
        "The loss is right to the last digit, and falls. Every layer below the output projection gets a gradient from "
        "a fraction of the vocabulary, a different one on each rank, and replicated weights diverge.",
        one("parallel/tensor.py", "_AllGather.apply(*inputs, group, True)", "_AllGather.apply(*inputs, group, False)"),
        SPLIT,
    ),
    Bug(
        "the last token of a local sequence has no target",
        "sharding",
        8,
        "Context parallelism cuts a sequence into local sequences, and cuts inputs and labels at the same places. The "
        "loss shifts the labels by one, so the last position of each local sequence has no label.",
        "One target is missing at each cut. The curve is a little off, and no error appears.",
        one("parallel/context.py", '["labels"][:, start : end + 1]', '["labels"][:, start:end]'),
        CONTEXT_PARALLEL,
    ),
    Bug(
        "clipped before the all-reduce",
        "gradients",
        3,
        "The gradient is clipped after each micro-step, before it holds the other micro-steps and ranks.",
        "Steps are shorter and have a different direction. With a low limit, the curve depends on ranks and "
        "micro-steps.",
        one(
            "train.py",
            MICRO_STEP,
            f"{MICRO_STEP}            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), options.max_grad_norm)\n",
        ),
        curve_test("single-1x4"),
        Curve(2, ("--max_grad_norm", 0.1)),
        source="huggingface/transformers#1563",
    ),
    Bug(
        "different dropout in the recomputation",
        "numbers",
        6,
        "Activation checkpointing recomputes the forward pass, but the random state has advanced. The backward pass "
        "uses other dropout masks than the loss.",
        "Gradients contain noise. The loss is a little worse than without activation checkpointing.",
        one("model/build.py", '{"use_reentrant": False}', '{"use_reentrant": False, "preserve_rng_state": False}'),
        "tests/test_topology.py::test_checkpointing_repeats_the_dropout",
        source="allenai/OLMo-core#828",
    ),
    Bug(
        "the same dropout on all ranks",
        "numbers",
        3,
        "One seed for all ranks is right for the initial weights and the data order. With the same seed for dropout, "
        "all ranks drop the same positions.",
        "None in the curve. The noise of a large batch is as large as that of a small one.",
        one("checkpoint/rng.py", 'f"{seed} {step} {rank}"', 'f"{seed} {step}"'),
        "tests/test_resume.py::test_each_rank_draws_its_own_dropout",
        source="huggingface/transformers#31412",
    ),
    Bug(
        "different initial weights on each rank",
        "sharding",
        4,
        "Every rank draws its random weights with a different seed. DDP hides this, because it broadcasts the weights "
        "of rank 0. FSDP takes a shard from each rank, and the full model is one that no rank initialized.",
        "The curve of FSDP differs from that of DDP, and depends on the number of ranks.",
        one("train.py", "torch.manual_seed(options.seed)  #", "torch.manual_seed(options.seed + rank)  #"),
        "tests/test_topology.py::test_random_weights_do_not_depend_on_ranks",
        source="mosaicml/llm-foundry#830",
    ),
    Bug(
        "the head untied by wrapping",
        "sharding",
        4,
        "Embedding and output projection share one tensor until some call replaces one of them: wrapping, a move, a "
        "cast, or leaving the meta device.",
        "The model has more parameters than its configuration says, and embedding and output projection train "
        "separately.",
        one(
            "ddp/wrap.py",
            "    model.tie_weights()  # because to_empty gave a tied weight new memory for each of its uses\n",
            "",
        ),
        "tests/test_topology.py::test_wrapping_keeps_the_head_tied",
        Curve(2),
        source="huggingface/accelerate#3154",
    ),
    Bug(
        "buffers missing from the checkpoint",
        "sharding",
        4,
        "A model on the meta device gets memory, and then its weights from files. The frequencies of rotary embeddings "
        "are buffers, which no file holds, so they keep the values of uninitialized memory.",
        "The model does not know positions if the memory was zero. The loss is NaN in some runs if it was not.",
        one("model/weights.py", "    _initialize(model, filled | _initialize_adapters(model))\n", ""),
        "tests/test_topology.py::test_the_exported_model_is_the_trained_one",
        source="huggingface/transformers#45902",
    ),
    Bug(
        "all-reduced in every micro-step",
        "gradients",
        6,
        "set_gradient_sync is called with True before each micro-step. The sum of averages is still the right "
        "gradient, so no test of numbers sees it.",
        "None in any curve. A step is slower by one all-reduce of all gradients for each further micro-step.",
        one("train.py", "index == plan.accumulation - 1", "True"),
        "tests/test_memory.py::test_a_stage[DDP]",
    ),
    Bug(
        "one FSDP unit for the whole model",
        "sharding",
        6,
        "fully_shard is called on the root only, and not on the decoder layers. The root unit then holds all "
        "parameters.",
        "None in any curve. Every parameter is gathered before the first layer runs, communication does not overlap "
        "with computation, and each rank needs memory for the full model.",
        one("fsdp/wrap.py", "    for layer in decoder_layers:\n", "    for layer in decoder_layers[:0]:\n"),
        "tests/test_memory.py::test_a_stage[FSDP (ZeRO-3)]",
    ),
    Bug(
        "bf16 master weights",
        "numbers",
        5,
        "The files of the model are bf16, so the weights are bf16 too, and the optimizer updates them. An update "
        "smaller than 1/256 of a weight is rounded away.",
        "The loss falls at first. With a small learning rate most weights never change.",
        one(
            "model/build.py",
            "config, dtype=torch.float32, trust_remote_code=options.trust_remote_code",
            "config, dtype=torch.bfloat16, trust_remote_code=options.trust_remote_code",
        ),
        "tests/test_topology.py::test_bf16_stays_near[DDP, bf16-2x4]",
        Curve(2, ("--bf16", "true", "--learning_rate", 1e-4, "--max_grad_norm", 0)),
        source="pytorch/ao#1124",
    ),
    Bug(
        "weight decay on norms",
        "numbers",
        1,
        "All parameters are in one group, so the scales of the norms decay towards zero with the matrices.",
        "A slightly worse model with the same curve at first. The scales shrink by the learning rate times the weight "
        "decay in each step.",
        one(
            "optim/adamw.py",
            '"weight_decay": 0.0}]',
            '"weight_decay": options.weight_decay}]',
        ),
        "tests/test_rooms.py::test_decay_is_for_matrices_alone",
        source="huggingface/transformers#35927",
    ),
    Bug(
        "the schedule steps with micro-steps",
        "numbers",
        1,
        "scheduler.step() is called once per micro-batch, or once per process.",
        "The warmup is too short, and the learning rate reaches its end long before the training does.",
        one(
            "train.py",
            "learning_rate(step, plan.total_steps, options)",
            "learning_rate(min(plan.total_steps, step * plan.accumulation), plan.total_steps, options)",
        ),
        curve_test("single-1x4"),
        Curve(1, value="learning_rate"),
        source="Lightning-AI/pytorch-lightning#1476",
    ),
    Bug(
        "a logarithmic warmup taken for a linear one",
        "numbers",
        4,
        "WarmupLR in a DeepSpeed file rises logarithmically, unless the file says linear. A port of the file often "
        "uses the common linear warmup.",
        "The learning rate is far too low for most of the warmup. Two runs with the same settings have different "
        "curves.",
        one("optim/schedule.py", 'parameters.get("warmup_type") == "linear"', 'kind == "WarmupLR"'),
        "tests/test_deepspeed.py::test_schedules[WarmupLR]",
        Curve(1, ("--lr_scheduler_type", "WarmupLR", "--warmup_steps", 30), value="learning_rate"),
    ),
    Bug(
        "skipped by one rank alone",
        "numbers",
        5,
        "One rank sees that its numbers are not finite and skips the update. The other ranks do not know it.",
        "All weights but those of one rank are NaN. If the skipped code contains a collective, the run hangs.",
        one("train.py", "~torch.isfinite(grad_norm) | (targets == 0)", "~torch.isfinite(loss_sum) | (targets == 0)"),
        f"{NUMERICS}[nan_on_rank_1-ddp]",
        source="facebookresearch/fairscale#180",
    ),
    Bug(
        "a stale gradient after a skipped step",
        "numbers",
        5,
        "A step with a gradient that is not finite is skipped, together with the line that clears the gradient.",
        "After one NaN every later gradient is NaN, and no weight changes any more.",
        one("train.py", "        wrapped.zero_grad()\n", "        if not skip:\n            wrapped.zero_grad()\n"),
        f"{NUMERICS}[nan_on_rank_1-ddp]",
        source="espnet/espnet#3283",
    ),
    Bug(
        "a step without targets still updates",
        "numbers",
        5,
        "Without targets the gradient is zero, but momentum and weight decay still act, and AdamW counts a step.",
        "None in the curve: weights change although the step has no target.",
        one("train.py", "~torch.isfinite(grad_norm) | (targets == 0)", "~torch.isfinite(grad_norm)"),
        f"{NUMERICS}[all_masked-ddp]",
    ),
    Bug(
        "updated shards that are not gathered",
        "sharding",
        4,
        "With a sharded optimizer each rank updates its own shard of the parameters, and must gather the shards of the "
        "other ranks.",
        "Each rank trains its own shard and keeps the initial values of all others.",
        one(
            "train.py",
            "        strategy.gather_parameters(optimizer)  # with a sharded optimizer: the shards that other ranks "
            "have updated\n",
            "",
        ),
        curve_test("DDP, sharded optimizer-2x2"),
        Curve(4, ("--shard_optimizer",)),
        source="NVIDIA/Megatron-LM#950",
    ),
    Bug(
        "the loss of rank 0 alone",
        "loss",
        3,
        "Rank 0 logs its own loss. With the global number of targets as the divisor, this loss is also too small by "
        "the number of ranks.",
        "The training loss jumps when the number of ranks changes, and it has the noise of one rank.",
        one("train.py", "            dist.all_reduce(loss_sum)\n", ""),
        curve_test("DDP-2x8"),
        Curve(4),
        source="huggingface/transformers#13681",
    ),
    Bug(
        "evaluated on duplicates",
        "loss",
        2,
        "When the number of sequences is not a multiple of the number of ranks, a DistributedSampler repeats some "
        "sequences. They count twice.",
        "The validation loss depends on the number of ranks, in the third digit.",
        one(
            "data/batches.py",
            "np.arange(sequences), batches)",
            "np.resize(np.arange(sequences), batches * size), batches)",
        ),
        "tests/test_data.py::test_validation_rows_count_once[4-23-2]",
        source="pytorch/pytorch#25162",
    ),
    Bug(
        "evaluated as a mean of batches",
        "loss",
        1,
        "The validation loss is the mean of the batches' means. A last batch with one short sequence counts as much as "
        "a full batch.",
        "The validation loss depends on the batch size and the number of ranks.",
        (
            Change(
                "loss/evaluation.py",
                "totals[0] += loss\n",
                'totals[0] += loss / batch["targets"]\n',
            ),
            Change("loss/evaluation.py", 'totals[1] += batch["targets"]', "totals[1] += 1"),
        ),
        curve_test("DDP-4x4"),
        source="NVIDIA/Megatron-LM#7207",
    ),
    Bug(
        "evaluated by rank 0 alone",
        "loss",
        3,
        "Each rank evaluates its shard of the sequences, but the sums are not all-reduced.",
        "The validation loss covers a fraction of the sequences, and this fraction depends on the number of ranks.",
        one("loss/evaluation.py", "        dist.all_reduce(totals)\n", ""),
        curve_test("DDP-2x8"),
    ),
    Bug(
        "left in evaluation mode",
        "loss",
        1,
        "After the first evaluation the code does not call train() again.",
        "Dropout is off for the rest of the run. The training loss drops at once, and overfitting begins early.",
        one("loss/evaluation.py", "    wrapped.train()\n", ""),
        "tests/test_topology.py::test_evaluation_changes_nothing",
        source="wkentaro/pytorch-fcn#57",
    ),
    Bug(
        "the head untied on disk",
        "checkpoints",
        7,
        "The files hold the shared tensor once, but the configuration does not say that it is shared.",
        "Training was right. When the model is loaded, its output projection gets random values, with a warning at "
        "best.",
        one(
            "model/export.py",
            "        config.dtype, config.architectures = dtype, [type(model).__name__]\n",
            "        config.dtype, config.architectures = dtype, [type(model).__name__]\n"
            "        config.tie_word_embeddings = False\n",
        ),
        "tests/test_topology.py::test_the_exported_model_is_the_trained_one",
    ),
    Bug(
        "saved while the weights change",
        "checkpoints",
        7,
        "A checkpoint is written in the background from the live tensors. Some are from this step, and some from later "
        "steps.",
        "None until a run resumes. Then the loss jumps a little.",
        one("checkpoint/save.py", "        if self.options.async_save:\n", "        if False:\n"),
        "tests/test_saving.py::test_the_bytes_are_those_of_the_saved_step[topology0]",
        source="Lightning-AI/pytorch-lightning#21079",
    ),
    Bug(
        "written under its final name",
        "checkpoints",
        7,
        "The checkpoint is written under its final name, so an incomplete checkpoint looks like a complete one.",
        "None, until the power fails during a save.",
        one(
            "checkpoint/save.py",
            '    saving = output_dir / broadcast_object(f".saving-{uuid.uuid4().hex}", group)\n',
            "    saving = final\n",
        ),
        "tests/test_atomic.py::test_killed_at_every_change",
        source="Lightning-AI/pytorch-lightning#688",
    ),
    Bug(
        "the old checkpoint is deleted first",
        "checkpoints",
        7,
        "To save disk space, the last checkpoint is deleted before the next one is written.",
        "None, until a save fails and no checkpoint is left.",
        (
            Change(
                "checkpoint/save.py",
                "        run_together(write_state, group)\n",
                '        for old in output_dir.glob("checkpoint-*") if rank == 0 else []:\n'
                "            shutil.rmtree(old)\n"
                "        run_together(write_state, group)\n",
            ),
        ),
        "tests/test_atomic.py::test_killed_at_every_change",
        source="Lightning-AI/pytorch-lightning#1150",
    ),
    Bug(
        "checkpoints sorted as text",
        "checkpoints",
        7,
        "The newest checkpoint is taken to be the last one by name, but checkpoint-99 sorts after checkpoint-100.",
        "From step 100 on, new checkpoints are pruned, and every resume starts from step 99.",
        one(
            "checkpoint/files.py",
            "if step_of(path) >= 0), key=step_of, reverse",
            "if step_of(path) >= 0), key=str, reverse",
        ),
        "tests/test_saving.py::test_many_saves_that_keep_two[12]",
        source="allenai/open-instruct#541",
    ),
    Bug(
        "moments dropped on resume",
        "checkpoints",
        7,
        "Weights are restored, but the optimizer starts with empty moments: its file was saved under a name that the "
        "resuming code did not look for.",
        "The first resumed loss is right, so a test of one step does not see the bug. Then the loss jumps.",
        one(
            "checkpoint/load.py",
            '    load_tensors(path / "optimizer", moments, convert=True)  # optim_state_dtype may differ\n',
            "",
        ),
        LOADED_STATE,
        Curve(2, ("--lr_scheduler_type", "constant_with_warmup"), resume_at=20),
        source="huggingface/transformers#25852",
    ),
    Bug(
        "the step count dropped on resume",
        "checkpoints",
        7,
        "AdamW divides its moments by 1 - beta ** step. With the moments of many steps and a step count of one, this "
        "divisor is far too small.",
        "The loss jumps at the resume: the second moment is too large by a factor of a thousand, the first by a factor "
        "of ten.",
        one("checkpoint/load.py", '["step"].fill_(step)', '["step"].fill_(0)'),
        LOADED_STATE,
        Curve(2, ("--lr_scheduler_type", "constant_with_warmup"), resume_at=20),
        source="NVIDIA/TransformerEngine#1986",
    ),
    Bug(
        "random numbers dropped on resume",
        "checkpoints",
        7,
        "Random generators start from the seed again, so dropout repeats the masks of the first steps.",
        "None. The curve is different, and as good.",
        one("checkpoint/load.py", 'restore_rng(state["rng"][rank])', "seed_rank(identity.seed, 0, rank)"),
        RESUME_TO_THE_BIT,
        source="huggingface/transformers#17055",
    ),
    Bug(
        "the resumed model taken as the reference",
        "checkpoints",
        7,
        "The DPO loss compares the model with the initial model. A resumed run loads its checkpoint, and then takes "
        "the loaded model as the reference.",
        "After a resume the loss is ln 2 again, and the model can move further from the initial model with each "
        "resume.",
        (
            Change("train.py", "    data = prepare_objective(objective, data, wrapped, options, device)\n", ""),
            Change(
                "train.py",
                "    checkpoint.clean_output_dir(options, progress.step, progress.best.step)\n",
                "    data = prepare_objective(objective, data, wrapped, options, device)\n"
                "    checkpoint.clean_output_dir(options, progress.step, progress.best.step)\n",
            ),
        ),
        "tests/test_preference.py::test_resumed_to_the_bit[kept]",
    ),
    Bug(
        "the schedule starts again on resume",
        "checkpoints",
        7,
        "The checkpoint does not hold the scheduler, so a resumed run starts its schedule from the beginning.",
        "The curve has a second warmup in the middle, and the learning rate never reaches its end.",
        (
            Change(
                "train.py",
                "    skipped, skipped_in_a_row = torch.tensor([progress.skipped_steps, 0], device=device)\n",
                "    skipped, skipped_in_a_row = torch.tensor([progress.skipped_steps, 0], device=device)\n"
                "    start = progress.step\n",
            ),
            Change(
                "train.py", "learning_rate(step, plan.total_steps,", "learning_rate(step - start, plan.total_steps,"
            ),
        ),
        RESUME_TO_THE_BIT,
        Curve(2, resume_at=20, value="learning_rate"),
        source="lightly-ai/lightly-train#301",
    ),
]
