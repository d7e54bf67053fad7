"""The bugs: classics of distributed training, each as a wrong line instead of a right one.

The order is roughly that of a run: data, loss, gradients, the update, the evaluation, the checkpoint.
"""

from dataclasses import dataclass

GROUPS = {  # as docs/museum.md shows them
    "data": "what a step trains on",
    "loss": "what is minimized, and what is reported",
    "gradients": "how micro-steps and ranks add up to one gradient",
    "sharding": "parameters and sequences that are split over ranks",
    "numbers": "precision, random numbers and the update",
    "checkpoints": "what is saved, and what a resumed run restores",
}


@dataclass(frozen=True)
class Change:
    """A piece of a file's text, and what the bug makes of it."""

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
    """A bug with its story, what one sees of it, the changes that plant it, and the test that kills it."""

    name: str
    group: str  # of GROUPS
    story: str
    symptom: str
    changes: tuple[Change, ...]
    killer: str
    curve: Curve | None = None
    source: str | None = None  # where it happened: an issue or pull request on GitHub, owner/name#number


def one(file: str, right: str, wrong: str) -> tuple[Change, ...]:
    """The most common case: one change."""
    return (Change(file, right, wrong),)


def curve_test(case: str) -> str:
    """The test that holds the gates of one topology."""
    return f"tests/test_topology.py::test_same_curve[{case}]"


BACKWARD = "(loss * (world_size / max(1, targets))).backward()"
NUMERICS = "tests/test_numerics.py::test_changes_nothing"
RESUME_TO_THE_BIT = "tests/test_resume.py::test_same_ranks_to_the_bit[ddp]"
DIVIDED = "tests/test_tensor_parallel.py::test_family[qwen3]"
ROWS_DIVIDED = "tests/test_context_parallel.py::test_family[qwen3]"
LOADED_STATE = "tests/test_resume.py::test_other_ranks_and_strategies[1-ddp]"

BUGS = [
    Bug(
        "no set_epoch",
        "data",
        "A DistributedSampler shuffles by seed and epoch, and nobody tells it the epoch: PyTorch's own documentation "
        "warns of it, and loops still forget it.",
        "Nothing breaks. Every epoch has the order of the first one; the training loss gets a pattern that repeats.",
        one(
            "train.py",
            "            sampler.set_epoch(epoch)  # without it, every epoch would have the order of the first\n",
            "",
        ),
        "tests/test_ledger.py::test_epochs_have_other_orders",
        source="pytorch/pytorch#31771",
    ),
    Bug(
        "another shuffle on each rank",
        "data",
        "Each rank seeds its own sampler, because seeds 'must differ between ranks'. For dropout they must; for the "
        "permutation that all ranks divide among themselves they must not.",
        "Ranks take overlapping shares: in an epoch some rows come twice and others never, which no curve shows.",
        one(
            "train.py",
            "shuffle=True, seed=options.seed, drop_last=True",
            "shuffle=True, seed=options.seed + dist.get_rank(), drop_last=True",
        ),
        "tests/test_ledger.py::test_the_same_global_batches[2-4-more0]",
        source="mlcommons/training#625",
    ),
    Bug(
        "the epoch starts again on resume",
        "data",
        "The checkpoint knows the step, but the loader begins its epoch anew: the rows before the cut are seen twice, "
        "and the last ones of the epoch wait for the next.",
        "After each resume the training loss is a little too good: the model has seen these rows before.",
        one("train.py", "first, end = steps_into_epoch * plan.accumulation,", "first, end = 0,"),
        "tests/test_ledger.py::test_two_resumes_in_one_epoch",
        source="catalyst-team/catalyst#764",
    ),
    Bug(
        "the cursor without its permutation",
        "data",
        "The position in the epoch is restored, and the number of the epoch is not: the right place of another order.",
        "None in the curve. From the second epoch on, rows are repeated and lost at every resume.",
        one(
            "train.py",
            "epoch, steps_into_epoch = divmod(done.step, plan.steps_per_epoch)",
            "epoch, steps_into_epoch = 0, done.step % plan.steps_per_epoch",
        ),
        "tests/test_ledger.py::test_two_resumes_in_one_epoch",
        source="huggingface/accelerate#4071",
    ),
    Bug(
        "documents without EOS",
        "data",
        "Documents are joined without a token between them, so that the end of a text is never learned.",
        "The loss looks normal; the model never stops writing.",
        one("data/tokens.py", "bos * raw.begins + row + eos * raw.ends", "bos * raw.begins + row"),
        "tests/test_data.py::test_no_token_is_lost[None-.jsonl]",
    ),
    Bug(
        "EOS masked as padding",
        "data",
        "The tokenizer has no pad token, so EOS is used to pad, and labels are masked where the token is the pad "
        "token: every true EOS goes with them.",
        "The loss is a little lower, because an easy or a hard token is missing; the model never learns to stop.",
        one(
            "data/batches.py",
            "tokens.where(learned, IGNORE_INDEX)",
            "tokens.where(learned & (tokens != 0), IGNORE_INDEX)",
        ),
        "tests/test_data.py::test_collate_masks_by_length",
        source="huggingface/transformers#23530",
    ),
    Bug(
        "padding is learned",
        "data",
        "Labels are a copy of the padded inputs, and nobody sets them to -100 where there is no text.",
        "A loss that is far too good, the shorter the documents the better: padding is easy to predict.",
        one("data/batches.py", "torch.full(shape, IGNORE_INDEX)", "torch.zeros(shape, dtype=torch.int64)"),
        "tests/test_data.py::test_collate_masks_by_length",
        Curve(),
        source="NovaSky-AI/SkyRL#462",
    ),
    Bug(
        "the question is learned",
        "data",
        "The template marks what the assistant says, and the labels are the whole text: the model learns to ask.",
        "A loss that is too high, because questions cannot be predicted; answers that go on with the next question.",
        one("data/batches.py", "tokens.where(learned, IGNORE_INDEX)", "tokens"),
        "tests/test_packing.py::test_collate_keeps_documents_apart",
        source="marin-community/marin#7237",
    ),
    Bug(
        "the end of the answer is masked",
        "data",
        "The mask covers the answer, and not the token that ends the turn, which the template writes after it.",
        "None in the loss. The model answers, and then does not stop.",
        one("data/conversations.py", "spans.append((start, end + len(closing)))", "spans.append((start, end))"),
        "tests/test_chat.py::test_what_is_learned",
        source="huggingface/trl#5988",
    ),
    Bug(
        "attention leaks between packed documents",
        "data",
        "Several documents share a row, and nothing tells the model where one ends: each sees all that come before it.",
        "The loss is a little lower than it should be where documents resemble each other; the model has learned to "
        "copy from strangers.",
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
        "The label of the first token of a packed document stays, and the last token of another one has to predict it.",
        "A loss that is a little too high, and grows with the number of documents in a row.",
        one("data/batches.py", "            if start > 0:\n", "            if start < 0:\n"),
        "tests/test_packing.py::test_collate_keeps_documents_apart",
    ),
    Bug(
        "labels shifted twice",
        "loss",
        "The model shifts the labels by one, and so does the loss function that it calls: what is learned is the token "
        "after next.",
        "The loss falls, and stays too high; samples skip every other word.",
        one("data/batches.py", "labels_BT[:, 1:], (0, 1)", "labels_BT[:, 2:], (0, 2)"),
        "tests/test_rooms.py::test_labels_are_the_next_tokens",
        Curve(),
        source="huggingface/transformers#47395",
    ),
    Bug(
        "labels not shifted",
        "loss",
        "The loss expects shifted labels and gets the inputs: each position has to predict itself.",
        "The best loss ever seen, falling towards zero: a residual connection is all it takes.",
        one(
            "data/batches.py", "return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)", "return labels_BT"
        ),
        "tests/test_rooms.py::test_labels_are_the_next_tokens",
        Curve(),
    ),
    Bug(
        "a mean over padding",
        "loss",
        "The sum of the losses is right, and what it is divided by counts every position, padding too.",
        "A loss and a gradient that shrink with the amount of padding, so that short documents count less.",
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
        "The number of targets is that of the labels before they are shifted: one too many in each row.",
        "The loss is too low by one part in the row length, 50% for a row of two tokens.",
        one("data/batches.py", "(next_tokens(labels_BT) != IGNORE_INDEX).sum()", "(labels_BT != IGNORE_INDEX).sum()"),
        "tests/test_data.py::test_collate_masks_by_length",
        source="huggingface/transformers#46204",
    ),
    Bug(
        "all masked is not a number",
        "numbers",
        "A mean over no target is 0 / 0. A long prompt that is cut before its answer gives such a micro-batch, on one "
        "rank, and the all-reduce hands it on to the others.",
        "One day the loss is NaN, and from then on every weight is.",
        one("loss/cross_entropy.py", 'reduction="sum")', 'reduction="mean") * (targets_N != IGNORE_INDEX).sum()'),
        "tests/test_rooms.py::test_a_batch_without_targets_is_finite",
        source="allenai/OLMo-core#657",
    ),
    Bug(
        "mean of means over ranks",
        "loss",
        "Each rank divides by its own number of targets, and DDP averages the ranks: where a rank has fewer targets, "
        "each of them counts more. It was left over when transformers had mended its accumulation.",
        "The curve depends on the number of GPUs. It looks like noise, and it is a bias.",
        one("train.py", BACKWARD, '(loss / max(1, int(total(step_batches, "targets")))).backward()'),
        curve_test("DDP-2x8"),
        Curve(4, ("--per_device_train_batch_size", 4)),
        source="huggingface/transformers#34242",
    ),
    Bug(
        "mean of means over micro-steps",
        "loss",
        "Each micro-batch's mean is divided by the accumulation. The most used trainer of all did this until October "
        "2024, when users showed that one large batch and many small ones gave different curves.",
        "The curve depends on the accumulation, and the more ragged the rows, the more.",
        one("train.py", BACKWARD, '(loss / max(1, int(batch["targets"])) / plan.accumulation).backward()'),
        curve_test("single-1x4"),
        Curve(1, ("--per_device_train_batch_size", 1)),
        source="huggingface/transformers#34191",
    ),
    Bug(
        "the reference rounded on its way",
        "numbers",
        "FSDP casts what it passes into a module to bf16, tokens excepted. The log-probability of an answer by the "
        "reference model is a sum of some hundred nats, of which bf16 keeps three digits; the loss is made of "
        "differences.",
        "Preference tuning seems to work. Its first loss is not ln 2.",
        one("fsdp/wrap.py", "mp_policy=root_precision", "mp_policy=precision"),
        "tests/test_preference.py::test_bf16",
    ),
    Bug(
        "divided by the accumulation twice",
        "gradients",
        "The loop divides by the accumulation, and the library underneath does so, too.",
        "AdamW hides it: its update does not depend on the gradient's scale. Clipping and epsilon do, and with SGD the "
        "learning rate is too small by the accumulation.",
        one("train.py", BACKWARD, "(loss * (world_size / max(1, targets) / plan.accumulation)).backward()"),
        curve_test("single-1x4"),
        Curve(1, ("--adam_epsilon", 1000, "--learning_rate", 500, "--adam_beta1", 0, "--weight_decay", 0)),
        source="huggingface/transformers#35808",
    ),
    Bug(
        "divided by the ranks once too often",
        "gradients",
        "DDP averages gradients over ranks. Who divides a sum by the global number of targets must undo that.",
        "The same as above: invisible with AdamW until the norm is clipped, or another optimizer is chosen.",
        one("train.py", BACKWARD, "(loss / max(1, targets)).backward()"),
        curve_test("DDP-2x8"),
        Curve(4, ("--adam_epsilon", 1000, "--learning_rate", 500, "--adam_beta1", 0, "--weight_decay", 0)),
        source="meta-pytorch/torchtune#2172",
    ),
    Bug(
        "only the last micro-step counts",
        "gradients",
        "zero_grad stands inside the accumulation loop, a line too deep.",
        "A noisier curve at the price of a large batch: all micro-steps are computed, and one is used.",
        one("train.py", BACKWARD, f"wrapped.zero_grad()\n            {BACKWARD}"),
        curve_test("single-1x4"),
        Curve(1, ("--per_device_train_batch_size", 1)),
        source="pytorch/torchtitan#3575",
    ),
    Bug(
        "never synchronized",
        "gradients",
        "no_sync() covers the last micro-step too, by an index that is off by one: ranks train models of their own.",
        "No error and no slow step, rather a fast one. The replicas drift apart; what is saved is that of one of them.",
        one("train.py", "index == plan.accumulation - 1", "index == plan.accumulation"),
        curve_test("DDP-2x2"),
        Curve(4),
        source="modelscope/FunASR#3472",
    ),
    Bug(
        "summed in every micro-step",
        "gradients",
        "A handwritten all_reduce stands in the micro-step loop and sums what has added up so far: the first "
        "micro-steps are exchanged again and again, and count world size times each time.",
        "The first micro-batches of a step outweigh the last ones by powers of the number of ranks.",
        (
            Change(
                "train.py",
                "strategy.set_gradient_sync(wrapped, options.sync_each_batch or index == plan.accumulation - 1)",
                "strategy.set_gradient_sync(wrapped, False)",
            ),
            Change(
                "train.py",
                BACKWARD,
                "(loss / max(1, targets)).backward()\n"
                "            for parameter in model.parameters():\n"
                "                dist.all_reduce(parameter.grad)",
            ),
        ),
        curve_test("DDP-2x2"),
        Curve(4, ("--per_device_train_batch_size", 1)),
    ),
    Bug(
        "clipped by the norm of a shard",
        "sharding",
        "clip_grad_norm_ runs on what this rank holds. With sharding that is a part, and each rank finds another norm.",
        "Steps are clipped too little, by the square root of the number of ranks, and each shard by another factor.",
        one("fsdp/gradients.py", "    dist.all_reduce(squares)\n", ""),
        curve_test("FSDP-2x8"),
        Curve(4, ("--strategy", "fsdp")),
        source="pytorch/pytorch#72548",
    ),
    Bug(
        "what all have, counted by each",
        "sharding",
        "With tensor parallelism, weights are divided and norms are not: each rank of a group has them whole. Who adds "
        "up the squares of all ranks has those of the norms as often as there are ranks.",
        "The gradient norm is a little too large, and the more so the more ranks divide a layer; steps are clipped a "
        "little too much.",
        one("fsdp/gradients.py", "nn.utils.get_total_norm(same) ** 2 / alike", "nn.utils.get_total_norm(same) ** 2"),
        DIVIDED,
    ),
    Bug(
        "the gradient of a part of the vocabulary",
        "sharding",
        "The vocabulary is divided among ranks, and each makes the gradient by the hidden states that its part of the "
        "logits gives. Megatron's word for what was forgotten: the all-reduce in the backward.",
        "The loss is right to the last digit, and falls. Each layer below the head learns from a part of the "
        "vocabulary, another one on each rank, and replicas drift apart.",
        one("parallel/tensor.py", "_Join.apply(*inputs, group, True)", "_Join.apply(*inputs, group, False)"),
        DIVIDED,
    ),
    Bug(
        "nobody predicts how the next piece begins",
        "sharding",
        "A row is cut into pieces, one a rank, and inputs and labels are cut alike. The shift by one position happens "
        "in the loss, and the last position of each piece has no label any more.",
        "As many targets are missing as there are cuts. The curve is a little off, and nothing says so: the model does "
        "not learn one token in as many as a piece has.",
        one("parallel/context.py", '["labels"][:, start : end + 1]', '["labels"][:, start:end]'),
        ROWS_DIVIDED,
    ),
    Bug(
        "clipped before the exchange",
        "gradients",
        "The gradient is clipped after each micro-step, while it is still that of one rank and of a part of the batch.",
        "Steps are shorter and turned; with a low limit, the curve depends on ranks and accumulation.",
        one(
            "train.py",
            "            loss_sum += loss.detach()\n",
            "            loss_sum += loss.detach()\n"
            "            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), options.max_grad_norm)\n",
        ),
        curve_test("single-1x4"),
        Curve(2, ("--max_grad_norm", 0.1)),
        source="huggingface/transformers#1563",
    ),
    Bug(
        "another dropout in the recomputation",
        "numbers",
        "Activation checkpointing runs the forward again, and the random numbers have moved on: the backward belongs "
        "to another network than the loss.",
        "Gradients that are wrong by a noise that nobody asked for; the loss is a little worse than without.",
        one("model/build.py", '{"use_reentrant": False}', '{"use_reentrant": False, "preserve_rng_state": False}'),
        "tests/test_topology.py::test_checkpointing_repeats_the_dropout",
        source="allenai/OLMo-core#828",
    ),
    Bug(
        "the same dropout on all ranks",
        "numbers",
        "One seed for all ranks is right for the weights and the data order. Kept for dropout, all ranks drop the same "
        "places.",
        "None in the curve: the noise of a large batch is that of a small one.",
        one("checkpoint/rng.py", 'f"{seed} {step} {rank}"', 'f"{seed} {step}"'),
        "tests/test_resume.py::test_each_rank_draws_its_own_dropout",
        source="huggingface/transformers#31412",
    ),
    Bug(
        "other weights on each rank",
        "sharding",
        "Every rank draws its random weights with a seed of its own. DDP can cover it up by a broadcast from rank 0; "
        "sharding takes a slice from each, and the whole is a model that nobody initialized.",
        "The same job has another curve under FSDP than under DDP, and on another number of ranks.",
        one("train.py", "torch.manual_seed(options.seed)  #", "torch.manual_seed(options.seed + rank)  #"),
        "tests/test_topology.py::test_random_weights_do_not_depend_on_ranks",
        source="mosaicml/llm-foundry#830",
    ),
    Bug(
        "the head untied by wrapping",
        "sharding",
        "Embedding and head share one tensor until something rebuilds one of them: wrapping, a move, a cast, a model "
        "that was made on the meta device.",
        "A model with more parameters than it says, whose head and embedding learn apart from each other.",
        one(
            "ddp/wrap.py",
            "    model.tie_weights()  # one tensor again, where each use of it got memory of its own\n",
            "",
        ),
        curve_test("FSDP-2x8"),
        Curve(2),
        source="huggingface/accelerate#3154",
    ),
    Bug(
        "buffers that nobody saved",
        "sharding",
        "A model that was made on the meta device gets memory, and then its weights. The frequencies of its rotary "
        "embeddings are no weights: no file has them, and they stay what was in that memory.",
        "Tokens do not know their positions, if the memory was zeros; NaN at some starts, if it was not.",
        one("model/weights.py", "    _draw(model, filled)\n", ""),
        "tests/test_topology.py::test_the_exported_model_is_the_trained_one",
        source="huggingface/transformers#45902",
    ),
    Bug(
        "exchanged in every micro-step",
        "gradients",
        "set_gradient_sync is called before each micro-step and always says yes. An average of averages over ranks is "
        "still the right gradient, so that no test of numbers sees it.",
        "None in any curve: the step is slower, by an exchange of all gradients for each further micro-step.",
        one("train.py", "index == plan.accumulation - 1", "True"),
        "tests/test_memory.py::test_a_stage[DDP]",
    ),
    Bug(
        "one unit for the whole model",
        "sharding",
        "Only the root is sharded, without its layers: fully_shard takes what no inner call has taken, all of it.",
        "None in any curve: every parameter is gathered before the first layer runs, nothing overlaps, and each rank "
        "needs memory for the whole model.",
        one("fsdp/wrap.py", "    for layer in decoder_layers:\n", "    for layer in decoder_layers[:0]:\n"),
        "tests/test_memory.py::test_a_stage[FSDP (ZeRO-3)]",
    ),
    Bug(
        "bf16 masters",
        "numbers",
        "The checkpoint's files are bf16, so the weights are, and the optimizer works on them: an update that is "
        "smaller than 1/256 of a weight is rounded away.",
        "The loss falls at first. With a small learning rate most weights never move.",
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
        "All parameters are in one group: the scales of the norms are pulled towards zero with the matrices.",
        "Slightly worse, with the same curve at first; the scales shrink by the learning rate times the decay.",
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
        "scheduler.step() is called once a micro-batch, or once for every process.",
        "The warmup is over too soon, and the rate is at its end long before the training.",
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
        "a logarithmic warmup taken for a line",
        "numbers",
        "WarmupLR in a DeepSpeed file rises along a logarithm, unless the file says linear. Who ports the file writes "
        "the warmup that everybody else means.",
        "The rate is far too low for most of the warmup: two runs that are the same on paper part.",
        one("optim/schedule.py", 'parameters.get("warmup_type") == "linear"', 'kind == "WarmupLR"'),
        "tests/test_deepspeed.py::test_schedules[WarmupLR]",
        Curve(1, ("--lr_scheduler_type", "WarmupLR", "--warmup_steps", 30), value="learning_rate"),
    ),
    Bug(
        "skipped by one rank alone",
        "numbers",
        "A rank sees that its own numbers are not finite and skips the update; the others have not seen it.",
        "NaN in all weights but those of one rank, or a hang, when the lonely rank skips a collective, too.",
        one("train.py", "~torch.isfinite(grad_norm) | (targets == 0)", "~torch.isfinite(loss_sum) | (targets == 0)"),
        f"{NUMERICS}[nan_on_rank_1-ddp]",
        source="facebookresearch/fairscale#180",
    ),
    Bug(
        "a stale gradient after a skipped step",
        "numbers",
        "A step with a gradient that is not finite is skipped, together with the line that clears it.",
        "One NaN, and every later gradient is NaN plus something: training stands still.",
        one("train.py", "        wrapped.zero_grad()\n", "        if not skip:\n            wrapped.zero_grad()\n"),
        f"{NUMERICS}[nan_on_rank_1-ddp]",
        source="espnet/espnet#3283",
    ),
    Bug(
        "a step without targets still moves",
        "numbers",
        "No target, no gradient; but momentum and weight decay go on, and AdamW counts a step.",
        "None to see: weights move where nothing was learned.",
        one("train.py", "~torch.isfinite(grad_norm) | (targets == 0)", "~torch.isfinite(grad_norm)"),
        f"{NUMERICS}[all_masked-ddp]",
    ),
    Bug(
        "parts that are not gathered",
        "sharding",
        "With a sharded optimizer each rank updates its part of the weights, and must get the parts of the others.",
        "Each rank trains its own part of the model and leaves the rest as it was at the start.",
        one(
            "train.py",
            "        strategy.gather_parameters(optimizer)  # with a sharded optimizer: the shards that other ranks have "
            "updated\n",
            "",
        ),
        curve_test("DDP, sharded optimizer-2x2"),
        Curve(4, ("--shard_optimizer",)),
        source="NVIDIA/Megatron-LM#950",
    ),
    Bug(
        "the loss of rank 0 alone",
        "loss",
        "Rank 0 logs its own loss. With one global mean as the divisor it is even too small by the number of ranks.",
        "A training loss that jumps when the number of ranks changes, and whose noise is that of one rank.",
        one("train.py", "            dist.all_reduce(loss_sum)\n", ""),
        curve_test("DDP-2x8"),
        Curve(4),
        source="huggingface/transformers#13681",
    ),
    Bug(
        "evaluated on duplicates",
        "loss",
        "Where rows do not divide by ranks, a DistributedSampler repeats some until they do; these count twice.",
        "The validation loss depends on the number of ranks, in the third digit.",
        one("data/batches.py", "np.arange(rows), batches)", "np.resize(np.arange(rows), batches * size), batches)"),
        "tests/test_data.py::test_validation_rows_count_once[4-23-2]",
        source="pytorch/pytorch#25162",
    ),
    Bug(
        "evaluated as a mean of batches",
        "loss",
        "The mean of the batches' means: a last batch of one short row weighs as much as a full one.",
        "The validation loss depends on the batch size and the number of ranks.",
        (
            Change(
                "train.py",
                "totals[0] += loss\n",
                'totals[0] += loss / batch["targets"]\n',
            ),
            Change("train.py", 'totals[1] += batch["targets"]', "totals[1] += 1"),
        ),
        curve_test("DDP-4x4"),
        source="NVIDIA/Megatron-LM#7207",
    ),
    Bug(
        "evaluated by rank 0 alone",
        "loss",
        "Each rank evaluates its share, and the shares are never added up.",
        "The validation loss is that of a part of the rows, and which part depends on the number of ranks.",
        one("train.py", "    dist.all_reduce(totals)\n", ""),
        curve_test("DDP-2x8"),
    ),
    Bug(
        "left in evaluation mode",
        "loss",
        "After the first evaluation nobody calls train() again.",
        "Dropout is off for the rest of the run: the training loss steps down, and overfitting begins early.",
        one("loss/evaluation.py", "    wrapped.train()\n", ""),
        "tests/test_topology.py::test_evaluation_changes_nothing",
        source="wkentaro/pytorch-fcn#57",
    ),
    Bug(
        "the head untied on disk",
        "checkpoints",
        "The files hold the shared tensor once, and the configuration does not say that it is shared.",
        "Training was fine. Whoever loads the model gets a head of random numbers, with a warning at best.",
        one(
            "model/export.py",
            "    config.dtype, config.architectures = dtype, [type(model).__name__]\n",
            "    config.dtype, config.architectures = dtype, [type(model).__name__]\n"
            "    config.tie_word_embeddings = False\n",
        ),
        "tests/test_topology.py::test_the_exported_model_is_the_trained_one",
    ),
    Bug(
        "saved while it changes",
        "checkpoints",
        "A checkpoint is written beside training from the live tensors: some are of this step, some of later ones.",
        "None, until one resumes: a small jump in the loss that nobody can explain.",
        one("checkpoint/save.py", "        if self.options.async_save:\n", "        if False:\n"),
        "tests/test_saving.py::test_the_bytes_are_those_of_the_saved_step[topology0]",
        source="Lightning-AI/pytorch-lightning#21079",
    ),
    Bug(
        "written in its place",
        "checkpoints",
        "The checkpoint is written under its final name, so that one that was cut off looks like one that was not.",
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
        "the old one is deleted first",
        "checkpoints",
        "To save room, the last checkpoint goes before the next one is written.",
        "None, until a save fails, and there is no checkpoint any more.",
        one(
            "checkpoint/save.py",
            "    run_together(write_state, group)\n",
            "    for old in list_checkpoints(output_dir) if rank == 0 else []:\n"
            "        shutil.rmtree(old)\n"
            "    run_together(write_state, group)\n",
        ),
        "tests/test_atomic.py::test_killed_at_every_change",
        source="Lightning-AI/pytorch-lightning#1150",
    ),
    Bug(
        "sorted as text",
        "checkpoints",
        "The newest checkpoint is the last one by name, and checkpoint-99 comes after checkpoint-100.",
        "From step 100 on, the new checkpoints are pruned, and the run resumes at step 99 for ever.",
        one(
            "checkpoint/files.py",
            "if step_of(path) >= 0), key=step_of, reverse",
            "if step_of(path) >= 0), key=str, reverse",
        ),
        "tests/test_saving.py::test_a_hundred_saves_that_keep_two",
        source="allenai/open-instruct#541",
    ),
    Bug(
        "moments dropped on resume",
        "checkpoints",
        "Weights are restored and the optimizer begins anew: its file was saved under a name that resuming did not "
        "look for.",
        "The first resumed loss is right, which is why a test of one step finds nothing; then the loss jumps.",
        one(
            "checkpoint/load.py",
            '(("model", unique_tensors(model)), ("optimizer", moments))',
            '(("model", unique_tensors(model)),)',
        ),
        LOADED_STATE,
        Curve(2, ("--lr_scheduler_type", "constant"), resume_at=20),
        source="huggingface/transformers#25852",
    ),
    Bug(
        "the step count dropped on resume",
        "checkpoints",
        "AdamW divides by 1 - beta ** step: with the moments of many steps and a count of one, by too little.",
        "A jump at the resume: the second moment is blown up a thousandfold, the first one tenfold.",
        one("checkpoint/load.py", '["step"].fill_(step)', '["step"].fill_(0)'),
        LOADED_STATE,
        Curve(2, ("--lr_scheduler_type", "constant"), resume_at=20),
        source="NVIDIA/TransformerEngine#1986",
    ),
    Bug(
        "random numbers dropped on resume",
        "checkpoints",
        "Generators start from the seed again, so that dropout repeats the masks of the beginning.",
        "None: the curve is another one, and as good.",
        one("checkpoint/load.py", 'restore_rng(state["rng"][rank])', "seed_rank(progress.seed, 0, rank)"),
        RESUME_TO_THE_BIT,
        source="huggingface/transformers#17055",
    ),
    Bug(
        "the reference is the model that was resumed",
        "checkpoints",
        "Preference tuning holds the model to the one that it began as. A run that is resumed loads its checkpoint, "
        "and then takes the model for its own reference.",
        "After a resume the loss is ln 2 again, and the model is free to drift: with each resume further.",
        (
            Change("train.py", "    data = prepare_objective(objective, data, wrapped, options, device)\n", ""),
            Change(
                "train.py",
                "    if rank == 0:\n        clean_output_dir(options, progress.step)\n",
                "    data = prepare_objective(objective, data, wrapped, options, device)\n"
                "    if rank == 0:\n        clean_output_dir(options, progress.step)\n",
            ),
        ),
        "tests/test_preference.py::test_resumed_to_the_bit[kept]",
    ),
    Bug(
        "the schedule starts again on resume",
        "checkpoints",
        "The scheduler is not in the checkpoint: a resumed run begins its schedule again.",
        "A second warmup in the middle of the curve; the rate never reaches its end.",
        (
            Change(
                "train.py",
                "    skipped_in_a_row = torch.zeros_like(skipped)\n",
                "    skipped_in_a_row = torch.zeros_like(skipped)\n    start = progress.step\n",
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
