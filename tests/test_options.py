"""Proves config/peers/names.py, config/peers/answers.py, config/run_file.py, and words in config/command_line.py.

Every option of other trainers is translated with the same meaning, or answered in a line. Every form of a run file is
read as its author means it, or refused with file and line.
"""

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import EPOCH, LISTS, PATHS, Options
from config.peers import names
from config.peers.answers import ANY, FSDP_CONFIG, SHARDING, Answer, check_accelerate
from config.peers.names import ANSWERS, FAMILIES, TABLE, VALUES, find_answer
from config.plan import plan_run
from metrics.records import read_records
from tests.launch import ROOT, train_ok

OURS = {field.name for field in dataclasses.fields(Options)}

# The fields of ModelArguments and DataTrainingArguments in transformers' examples/pytorch/language-modeling/run_clm.py,
# of main in 2026 and of 4.x.
RUN_CLM = """
model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer model_revision
token use_auth_token trust_remote_code torch_dtype dtype low_cpu_mem_usage attn_implementation dataset_name
dataset_config_name train_file validation_file max_train_samples max_eval_samples streaming block_size overwrite_cache
validation_split_percentage preprocessing_num_workers keep_linebreaks
"""

# Fields of TrainingArguments in transformers 4.x that 5.17 does not have.
EARLIER = """
overwrite_output_dir evaluation_strategy warmup_ratio logging_dir save_safetensors no_cuda use_mps_device use_ipex
half_precision_backend fp16_backend fp16_opt_level tpu_num_cores group_by_length include_inputs_for_metrics
include_tokens_per_second per_gpu_train_batch_size per_gpu_eval_batch_size adafactor split_batches dispatch_batches
fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap push_to_hub_model_id push_to_hub_token predict_with_generate
generation_max_length generation_num_beams
"""

# The fields of SFTConfig, DPOConfig, ModelConfig and ScriptArguments in TRL 1.16.0 beyond those of TrainingArguments,
# and of max_seq_length and others that earlier versions had.
TRL = """
model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs
dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing packing_strategy padding_free
pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type activation_offloading pad_token
disable_dropout precompute_ref_log_probs precompute_ref_batch_size loss_weights ld_alpha f_divergence_type
f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau sync_ref_model ref_model_mixup_alpha
ref_model_sync_steps model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout
lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit
load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage datasets streaming test_split_size
dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming max_seq_length max_prompt_length
max_completion_length torch_dtype rpo_alpha reference_free
"""

# The keys in the published examples of LLaMA-Factory 0.9.5 and ms-swift 4.6, and of axolotl.
OTHERS = """
stage finetuning_type template dataset dataset_dir eval_dataset cutoff_len max_samples overwrite_cache
preprocessing_num_workers dataloader_num_workers plot_loss overwrite_output_dir save_only_model val_size flash_attn
enable_liger_kernel neat_packing packing mask_history train_on_prompt tokenized_path mix_strategy interleave_probs
lora_rank lora_alpha lora_dropout lora_target pref_beta pref_loss pref_ftx pure_bf16 use_unsloth use_galore galore_rank
use_badam use_swanlab swanlab_project disable_gradient_checkpointing upcast_layernorm rope_scaling resize_vocab
freeze_trainable_layers quantization_bit default_system enable_thinking include_effective_tokens_per_second
early_stopping_steps ray_run_name trust_remote_code ddp_timeout use_muon infer_backend export_dir
model model_type train_type tuner_type val_dataset split_dataset_ratio torch_dtype attn_impl lazy_tokenize system
max_length truncation_strategy padding_free packing_length loss_scale sequence_parallel_size dataset_num_proc use_hf
target_modules freeze_vit freeze_llm rlhf_type ref_model model_author model_name add_version max_epochs
base_model micro_batch_size sequence_len sample_packing train_on_inputs val_set_size optimizer lr_scheduler
dataset_prepared_path pad_to_sequence_len wandb_project datasets
"""

# The settings of nanoGPT's train.py, beyond those with our names.
NANOGPT = """
out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log wandb_project
wandb_run_name dataset batch_size n_layer n_head n_embd dropout bias max_iters beta1 beta2 grad_clip decay_lr
warmup_iters lr_decay_iters min_lr backend device dtype compile
"""

LAUNCHERS = """
num_processes num_machines machine_rank mixed_precision config_file main_process_port use_fsdp use_deepspeed
nproc_per_node nnodes node_rank master_addr master_port rdzv_endpoint num_gpus hostfile local_rank
"""

MODEL = ["--model_name_or_path", "m", "--train_file", "t.jsonl"]


def changed(*argv: object) -> dict[str, object]:
    """The options that `argv` changes."""
    before, after = vars(parse(MODEL)), vars(parse([*MODEL, *map(str, argv)]))
    return {name: value for name, value in after.items() if before[name] != value}


def refusal(*argv: object) -> str:
    with pytest.raises(OptionError) as error:
        parse([*MODEL, *map(str, argv)])
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_every_training_argument_is_answered() -> None:
    """Each field of the installed TrainingArguments is ours or has an answer, and so is each field of earlier ones."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(fields) > 100
    assert {name for name in fields if name not in OURS and not find_answer(name)} == set()


@pytest.mark.parametrize(
    "names", [EARLIER, RUN_CLM, TRL, OTHERS, NANOGPT, LAUNCHERS], ids=["4.x", "run_clm", "trl", "lf", "nanogpt", "run"]
)
def test_every_option_of_other_trainers_is_answered(names: str) -> None:
    assert [name for name in names.split() if name not in OURS and not find_answer(name)] == []


# Defaults of TrainingArguments that mean another thing than what happens here, with what the message says.
OTHER_DEFAULTS = {"dataloader_drop_last": "whole global batches only"}


def test_defaults_of_training_arguments_are_accepted() -> None:
    """A file with all values of a TrainingArguments trains, but for those that this trainer does otherwise."""
    for field in dataclasses.fields(TrainingArguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is None or field.name == "output_dir":
            continue
        value = str(getattr(default, "value", default))
        if field.name in OTHER_DEFAULTS:
            assert OTHER_DEFAULTS[field.name] in refusal(f"--{field.name}={value}")
        else:
            options = parse([*MODEL, f"--{field.name}={value}"])
            assert options.evaluates_only == (field.name == "do_train")


def test_table_is_sound() -> None:
    """A name has one answer, no answer hides one of our options, and options named in messages exist."""
    names = [name for names, _ in TABLE for name in names.split()]
    assert len(names) == len(set(names)) == len(ANSWERS) + len(FAMILIES)
    assert not OURS & set(names), "an option of ours needs no answer: remove its row"
    assert VALUES.keys() <= OURS
    foreign = {"revision", "local-dir", "nproc_per_node"}
    answers = [*ANSWERS.values(), *FAMILIES.values(), *VALUES.values(), *FSDP_CONFIG.values()]
    answers += [Answer({"": words}) for words in SHARDING.values()]
    for answer in answers:
        text = " ".join([*answer.accepted.values(), answer.fact, answer.remedy, answer.note, answer.shown])
        assert set(re.findall(r"--([\w-]+)", text)) <= OURS | foreign, text
        assert not re.search(r"[;.] *$|\n", answer.fact + answer.remedy)
        assert answer.accepted.get(ANY) != "" or answer.fact or answer in FSDP_CONFIG.values()


def test_docs_have_the_table() -> None:
    """docs/options.md shows what names.table() returns."""
    assert names.table() in (ROOT / "docs" / "options.md").read_text()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--eval_strategy", "steps"], {"eval_steps": 10}),
        (["--eval_strategy", "steps", "--logging_steps", 3], {"eval_steps": 3, "logging_steps": 3}),
        (["--eval_strategy", "steps", "--eval_steps", 7], {"eval_steps": 7}),
        (["--evaluation_strategy=epoch"], {"eval_steps": EPOCH}),
        (["--eval_strategy", "no", "--eval_steps", 7], {}),
        (["--save_strategy", "epoch", "--save_steps", 7], {"save_steps": EPOCH}),
        (["--save_strategy", "no"], {"save_steps": 0}),
        (["--save_strategy", "steps", "--save_steps", 0.1], {"save_steps": 0.1}),
        (["--logging_strategy", "epoch"], {"logging_steps": EPOCH}),
        (["--warmup_ratio", 0.03], {"warmup_steps": 0.03}),
        (["--warmup_ratio", 0.03, "--warmup_steps", 0], {"warmup_steps": 0.03}),
        (["--warmup_ratio", 0.03, "--warmup_steps", 5], {"warmup_steps": 5}),
        (["--warmup_ratio", 0], {}),
        (["--max_seq_length", 64], {"block_size": 64}),
        (["--max-length", 64], {"block_size": 64}),
        (["--cutoff_len=64"], {"block_size": 64}),
        (["--optim", "adamw_torch"], {}),
        (["--do_train", "--do_eval", "True"], {}),
        (["--do_eval"], {"num_train_epochs": 0}),
        (["--do_eval", "--do_train", "false", "--max_steps", 9], {"num_train_epochs": 0}),
        (["--do_eval", "--max_steps", 9], {"max_steps": 9}),
        (["--fsdp", "full_shard auto_wrap"], {"strategy": "fsdp"}),
        (["--fsdp"], {"strategy": "fsdp"}),
        (["--fsdp", ""], {}),
        (["--fsdp", "shard_grad_op"], {"strategy": "fsdp", "reshard_after_forward": False}),
        (["--fsdp", "full_shard offload"], {"strategy": "fsdp", "cpu_offload": True}),
        (["--fsdp", "no_shard"], {}),
        (
            [
                "--fsdp",
                "full_shard",
                "--fsdp_config",
                '{"fsdp_offload_params": true, "activation_checkpointing": true}',
            ],
            {"strategy": "fsdp", "cpu_offload": True, "gradient_checkpointing": True},
        ),
        (["--fsdp_config", '{"min_num_params": 0, "xla": false}'], {}),
        (["--torch_dtype", "float32"], {}),
        (["--fp16", "false", "--fp16_full_eval", "no", "--tf32", "0"], {}),
        (["--no_bf16", "--no-async-save", "--no_remove_unused_columns"], {"async_save": False}),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'], {}),
        (["--label_smoothing_factor", "0.0", "--neftune_noise_alpha", "0"], {}),
        (["--skip_memory_metrics", "--use_liger_kernel", "--trackio_space_id", "a", "--hub_model_id", "b"], {}),
        (["--lr", "1e-4", "--epochs", 2], {"learning_rate": 1e-4, "num_train_epochs": 2}),
        (["--stage", "dpo", "--finetuning_type", "full", "--pref_beta", 0.2], {"objective": "dpo", "dpo_beta": 0.2}),
        (
            ["--finetuning_type", "lora", "--lora_rank", 8, "--lora_target", "q_proj,v_proj"],
            {"use_peft": True, "lora_r": 8, "lora_target_modules": "q_proj,v_proj", "learning_rate": 2e-4},
        ),
        (
            ["--lora_target_modules", "q_proj", "v_proj", "--use_peft"],
            {"use_peft": True, "lora_target_modules": "q_proj,v_proj", "learning_rate": 2e-4},
        ),
        (["--packing"], {"packing": "documents"}),
        (["--packing", "true", "--packing_strategy", "wrapped"], {"packing": "concat"}),
        (["--packing", "False"], {"packing": "none"}),
        (["--packing", "bfd"], {"packing": "documents"}),
        (["--packing", "none"], {"packing": "none"}),
        (["--stage", "pt", "--packing", "true"], {"packing": "concat"}),
        (["--stage", "sft", "--packing", "true", "--neat_packing", "true"], {"packing": "documents"}),
        (["--assistant_only_loss", "--completion_only_loss", "true"], {}),
        (["--mixed_precision", "no"], {}),
        (["--torch_compile_backend", "inductor"], {"torch_compile": True}),
        (["--disable_gradient_checkpointing", "false"], {"gradient_checkpointing": True}),
        (["--activation_offloading"], {"offload_activations": True}),
        (["--sequence_parallel_size", 2], {"context_parallel": 2}),
        (["--val_size", 0], {"validation_split_percentage": 0}),
        (["--max_steps", "1e3"], {"max_steps": 1000}),
        (["--resume_from_checkpoint", "false"], {}),
        (["--max_iters", 9, "--lr_decay_iters", 9, "--beta2", 0.95], {"max_steps": 9, "adam_beta2": 0.95}),
        (["--decay_lr=True", "--min_lr=1e-5"], {"lr_scheduler_type": "cosine_with_min_lr", "min_lr": 1e-5}),
        (["--decay_lr=False", "--grad_clip=0.0"], {"lr_scheduler_type": "constant", "max_grad_norm": 0}),
        (["--init_from=resume", "--device=cuda"], {"resume_from_checkpoint": "auto"}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_accepted(argv: list[object], expected: dict[str, object]) -> None:
    bf16 = {"bf16": False} if parse([]).bf16 and {"--no_bf16", "--mixed_precision"} & set(argv) else {}
    assert changed(*argv) == expected | bf16


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--fp16"], "fp16 true: fp16 needs loss scaling, which is not here\npass --bf16 true"),
        (["--torch_dtype", "bfloat16"], "torch_dtype bfloat16: parameters are fp32 whatever the file has"),
        (
            ["--label_smoothing_factor", "0.1"],
            "label_smoothing_factor 0.1: the loss has no label smoothing\nremove --la",
        ),
        (["--save_strategy", "best"], "save_strategy best: it is no, steps or epoch here\npass --save_steps N"),
        (["--logging_strategy", "no"], "logging_strategy no: it is steps or epoch here\npass --logging_steps N"),
        (
            ["--warmup_ratio", "3"],
            "warmup_ratio 3: it is a fraction below 1\npass --warmup_steps for a number of steps",
        ),
        (["--fsdp", "full_shard zero"], "fsdp full_shard zero: zero is none of full_shard"),
        (
            ["--fsdp", "full_shard", "--fsdp_config", '{"mixed": 1}'],
            "fsdp_config: mixed 1 has no meaning here\nremove it",
        ),
        (["--fsdp", "full_shard", "--fsdp_config", "none.json"], "fsdp_config none.json: [Errno 2] No such file"),
        (["--gradient_checkpointing_kwargs", '{"a": 1}'], 'gradient_checkpointing_kwargs {"a": 1}: every layer is'),
        (["--max_length", 8, "--block_size", 9], "max_length 8: it means block_size 8, and cannot be combined with"),
        (["--packing", "true", "--packing_strategy", "x"], "packing_strategy x: "),
        (["--max_iters", 9, "--lr_decay_iters", 8], "lr_decay_iters 8: the rate falls until the last step\npass the"),
        (
            ["--init_from", "gpt2"],
            "init_from gpt2: an option of its own says where weights come from\npass --config_name",
        ),
        (
            ["--template", "qwen3"],
            "template qwen3: the tokenizer's own chat template is used\nremove it, or pass --chat",
        ),
        (["config/train_gpt2.py"], "a Python file of nanoGPT becomes a YAML file: docs/coming-from.md"),
        (["--batch_size", "8"], "batch_size 8: it may mean two things\npass --per_device_train_batch_size for"),
        (["--finetuning_type", "freeze"], "finetuning_type freeze: all parameters are trained, or with --use_peft"),
        (["--use_dora", "true"], "use_dora true: adapters are LoRA of linear modules"),
        (["--load_in_4bit", "true"], "load_in_4bit true: a frozen model is bf16"),
        (["--token", "hf_abc"], "token ***: tokens are not options\nrun `hf auth login`, or set HF_TOKEN"),
        (["--nproc_per_node=8"], "nproc_per_node 8: it belongs to a launcher, before train.py\nstart with torchrun"),
        (["--resume_from_checkpoint", "True"], "resume_from_checkpoint True: it is a checkpoint directory, or auto"),
        (["--logging_dir"], "argument --logging_dir: expected one argument"),
        (["--stage", "sft", "--packing", "true"], "packing true: in LLaMA-Factory, packed records attend to each"),
        (["--freeze_llm", "true"], "freeze_llm true: all parameters are trained"),
        (["--deepspeed"], "deepspeed true: it is a file\npass --deepspeed FILE"),
        (["--block_size"], "argument --block_size: expected one argument"),
        (["--block_size", "--seed", "1"], "argument --block_size: expected one argument"),
        (["--save_steps", "1.5"], "1.5: pass a number of steps, a fraction of all steps below 1, or epoch"),
        (["--max_steps", "1.5"], "argument --max_steps: invalid int value: '1.5'"),
        (["--max_step", "3"], "--max_step: unknown option; did you mean --max_steps?"),
        (["--model_name_or_path", ""], "model_name_or_path: it is empty; pass a value, or remove --model_name_or_path"),
        (["--train_file="], "train_file: it is empty"),
        (["--tokenizer_name", ""], "tokenizer_name: it is empty"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_refused(argv: list[object], expected: str) -> None:
    assert expected in refusal(*argv)


def test_each_translation_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*MODEL, "--max_length", "64", "--log_level", "info", "--optim", "adamw_torch", "--hub_token", "hf_abc"]
    parse(argv)
    assert capsys.readouterr().err.splitlines() == [
        "optim adamw_torch: here --optim adamw_torch_fused",
        "max_length 64: here --block_size 64 (a conversation is cut there, text goes on in the next sequence)",
        "log_level info: no effect: there is one level of messages",
        "hub_token ***: no effect: nothing is uploaded",
    ]
    monkeypatch.setenv("RANK", "1")
    parse(argv)
    assert not capsys.readouterr().err


@pytest.mark.fault(
    "configuration",
    "unknown options",
    "all are named in one start, with the names that they resemble",
)
def test_all_problems_are_named_in_one_start() -> None:
    message = refusal("--zzz", "--leaning_rate", 1, "--max_stepz=3", "--yyy")
    assert message == (
        "--zzz, --leaning_rate (did you mean --learning_rate?), --max_stepz (did you mean --max_steps?), --yyy: "
        "unknown options\n`python train.py --help` lists every option"
    )
    message = refusal("--fp16", "--zzz", "--neftune_noise_alpha", 5)
    assert message.startswith(
        "fp16 true: fp16 needs loss scaling, which is not here\npass --bf16 true\nand --zzz: unknown"
    )
    assert message.endswith("neftune_noise_alpha 5: embeddings get no noise; remove --neftune_noise_alpha")


def test_other_optimizers_are_refused() -> None:
    for name in OptimizerNames:
        if name.value not in ("adamw_torch", "adamw_torch_fused"):
            assert f"argument --optim: invalid choice: '{name.value}'" in refusal("--optim", name.value)


def test_hybrid_sharding_has_a_replica_on_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert "LOCAL_WORLD_SIZE\npass --replicas NODES" in refusal("--fsdp", "hybrid_shard")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert changed("--fsdp", "hybrid_shard auto_wrap") == {"strategy": "fsdp", "replicas": 2}
    expected = {"strategy": "fsdp", "replicas": 2, "reshard_after_forward": False}
    assert changed("--fsdp", "hybrid_shard_zero2") == expected


def test_local_rank_of_launchers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`deepspeed` and torch.distributed.launch add it beside LOCAL_RANK; it may not say another rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for word in ("--local_rank=1", "--local-rank=1", "--local_rank=-1"):
        assert changed(word) == {}
    assert not capsys.readouterr().err
    assert refusal("--local_rank", 0).startswith(
        "local_rank 0: LOCAL_RANK in the environment is 1\nstart with torchrun"
    )
    monkeypatch.delenv("LOCAL_RANK")
    assert "LOCAL_RANK in the environment is missing" in refusal("--local_rank", 1)
    monkeypatch.delenv("WORLD_SIZE")
    assert changed("--local_rank", 0) == {}


def test_the_configuration_of_accelerate_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` puts its file into the environment, where only its own library looks."""
    for variable, value, option in (
        ("ACCELERATE_USE_FSDP", "true", "strategy"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "bf16"),
    ):
        monkeypatch.setenv(variable, value)
        with pytest.raises(OptionError, match=f"{variable}={value}: only Accelerate follows its own configuration"):
            check_accelerate(Options(bf16=False), [])
        check_accelerate(Options(bf16=False), [option])
        monkeypatch.delenv(variable)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "pass --strategy fsdp, or start with torchrun" in refusal()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert parse([*MODEL, "--fsdp"]).strategy == "fsdp"


def options_of(path: Path, text: str, *argv: str) -> Options:
    path.write_text(text)
    return parse([str(path), *argv])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 1e-5", {"learning_rate": 1e-5}),
        ("learning_rate: 1.0e-05", {"learning_rate": 1e-5}),
        ("max_steps: 1_000", {"max_steps": 1000}),
        ("bf16: on\nasync_save: off\nledger: yes\nstreaming: No", {"bf16": True, "async_save": False, "ledger": True}),
        ("seed:\nblock_size: ~\nsave_total_limit: null\nresume_from_checkpoint: NULL", {"seed": 42, "block_size": 128}),
        ('prompt: "null"', {"prompt": "null"}),
        ("prompt: yes", {"prompt": "yes"}),
        ("chat_template: 2024-01-01", {"chat_template": "2024-01-01"}),
        ("train_file: [a.jsonl, 'b c.jsonl']", {"train_file": "a.jsonl,b c.jsonl"}),
        ("train_file:\n  - a.jsonl\n  - b.jsonl", {"train_file": "a.jsonl,b.jsonl"}),
        ("train_mixture: {a.jsonl: 0.7, b.jsonl: 3e-1}", {"train_mixture": "a.jsonl=0.7,b.jsonl=0.3"}),
        (
            "lr_scheduler_kwargs:\n  min_lr: 1e-6\n  on: no\n  name: 'no'\n  steps: 10",
            {"lr_scheduler_kwargs": '{"min_lr": 1e-06, "true": false, "name": "no", "steps": 10}'},
        ),
        ("report_to: [tensorboard]", {"report_to": "tensorboard"}),
        ("report_to: []", {"report_to": "none"}),
        ("max-steps: 7 # so many\n", {"max_steps": 7}),
        ("\ufeffmax_steps: 7", {"max_steps": 7}),
        ("common: &c {seed: 3}\n", None),
        ("<<: {seed: 3}\nmax_steps: 7", {"seed": 3, "max_steps": 7}),
        ("save_strategy: epoch\neval_strategy: no\nmax_length: 64", {"save_steps": EPOCH, "block_size": 64}),
    ],
)
def test_yaml(text: str, expected: dict[str, object] | None, tmp_path: Path) -> None:
    if expected is None:
        with pytest.raises(OptionError, match="--common: unknown option"):
            options_of(tmp_path / "run.yaml", text)
        return
    options = options_of(tmp_path / "run.yaml", text)
    assert {name: getattr(options, name) for name in expected} == expected


def test_json_is_as_yaml(tmp_path: Path) -> None:
    values = {
        "learning_rate": 1e-5,
        "bf16": True,
        "async_save": False,
        "train_file": ["a.jsonl", "b.jsonl"],
        "seed": None,
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "max_steps": 1e2,
    }
    options = options_of(tmp_path / "run.json", json.dumps(values, indent="\t"))
    assert (options.learning_rate, options.bf16, options.async_save, options.max_steps) == (1e-5, True, False, 100)
    assert (options.train_file, options.lr_scheduler_kwargs) == ("a.jsonl,b.jsonl", '{"min_lr": 1e-06}')


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.yaml", "seed: 1\nmax_steps: 2\nseed: 3", "the key seed appears twice, in lines 1 and 3"),
        ("run.yaml", "lr_scheduler_kwargs:\n  a: 1\n  a: 2", "the key a appears twice, in lines 2 and 3"),
        ("run.json", '{"a": {"seed": 1},\n\t"seed": 1,\n\t"seed": 1}', "the key seed appears twice, in lines 2 and 3"),
        ("run.yaml", "max_steps: 1\nmax-steps: 2", "the option max_steps appears twice, with a hyphen and without"),
        ("run.yaml", "block_size: {a: 1}", 'block_size {"a": 1}: it takes one value, not a mapping'),
        ("run.yaml", "block_size: [1, 2]", 'block_size ["1", "2"]: it takes one value, not a list'),
        ("run.yaml", "train_file: [[a]]", 'train_file [["a"]]: it takes one value, not a list'),
        ("run.yaml", "seed: 1\n  x: 2", "cannot be read as a file of options: line 2: "),
        ("run.yaml", "a: &a [*a]", "cannot be read as a file of options: "),
        ("run.json", '{"a": 1,}', "cannot be read as a file of options: "),
        ("run.yaml", "- seed", "must hold one mapping from option to value"),
        ("run.yaml", "", "must hold one mapping from option to value"),
        ("run.yaml", "config: other.yaml", "--config: unknown option"),
        ("run.yaml", "datasets: [{path: a}]", 'datasets [{"path": "a"}]: training data is named by --train_file'),
        (
            "run.yaml",
            "dataset:\n  _component_: a.b",
            "a file of torchtune, whose _component_ keys name Python functions",
        ),
        ("run.yaml", "train_file: ''", "train_file: it is empty"),
        ("run.yaml", "learning_rate: fast", "argument --learning_rate: invalid float value: 'fast'"),
    ],
)
def test_refused_run_files(name: str, text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        options_of(tmp_path / name, text)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_run_file_stands_anywhere(tmp_path: Path) -> None:
    """Also after a switch and after --config; a later file wins over an earlier one, the command line over both."""
    (tmp_path / "a.yaml").write_text("seed: 1\nmax_steps: 1\nblock_size: 16")
    (tmp_path / "b.json").write_text('{"seed": 2, "max_length": 32}')
    first, second = str(tmp_path / "a.yaml"), str(tmp_path / "b.json")
    for argv in (
        [first, second, "--max_steps", "9", "--ledger"],
        ["--max_steps", "9", first, "--ledger", second],
        ["--config", first, "--ledger", "--max_steps=9", f"--config={second}"],
        ["--do_train", first, "--max_steps", "9", "--ledger", "true", second],
    ):
        options = parse(argv)
        assert (options.seed, options.max_steps, options.block_size, options.ledger) == (2, 9, 32, True)
    assert parse([second, "--block_size", "8"]).block_size == 8, "the command line wins under any name"
    assert "true: not an option" not in refusal("--config")
    assert "cannot be read as a file of options" in refusal("--config", tmp_path / "none.yaml")


def test_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "run.yaml").write_text("output_dir: ~/out\ntrain_file: [~/a.jsonl, ~/b.jsonl]\nprompt: ~/no")
    options = parse([str(tmp_path / "run.yaml"), "--model_name_or_path=~/model", "--data_cache_dir", "~/cache"])
    assert (options.output_dir, options.model_name_or_path) == ("/home/me/out", "/home/me/model")
    assert (options.train_file, options.prompt) == ("/home/me/a.jsonl,/home/me/b.jsonl", "~/no")
    assert parse(["--train_mixture", "a=1,~/b=2"]).train_mixture == "a=1,/home/me/b=2"
    (tmp_path / "ds.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for argv in (
        ["--deepspeed=~/ds.json"],
        ["--deepspeed", "~/ds.json"],
        ["--deepspeed", "--deepspeed_config=~/ds.json"],
    ):
        assert parse(argv).deepspeed == f"{tmp_path}/ds.json"
    assert parse(["~/run.yaml"]).output_dir == f"{tmp_path}/out"
    assert set(PATHS) | LISTS <= OURS


def test_an_empty_train_file_gives_way_to_another_source() -> None:
    assert parse(["--train_file", "", "--dataset_name", "d"]).dataset_name == "d"


@pytest.mark.parametrize(
    ("value", "steps"),
    [("epoch", 6), ("0.25", 3), ("0.3", 4), ("5", 5), ("0", 0)],
    ids=["epoch", "1/4", "0.3", "5", "0"],
)
def test_intervals(value: str, steps: int) -> None:
    """6 steps in an epoch, 12 in all; a fraction is rounded up, as transformers does."""
    argv = ["--save_steps", value, "--eval_steps", value, "--logging_steps", value if steps else "1"]
    options = parse([*MODEL, *argv, "--block_size", "8", "--num_train_epochs", "2"])
    check(options, world_size=1)
    plan = plan_run(options, sequences=50, world_size=1)
    assert (plan.steps_per_epoch, plan.total_steps) == (6, 12)
    assert (options.save_steps, options.eval_steps, options.logging_steps) == (steps, steps, steps or 1)


def test_an_epoch_needs_a_length() -> None:
    options = parse([*MODEL, "--streaming", "--max_steps", "9", "--save_strategy", "epoch"])
    with pytest.raises(OptionError, match="save_steps epoch: a stream has no epochs; pass a number of steps"):
        check(options, world_size=1)
    with pytest.raises(OptionError, match="logging_steps 0: pass at least 1"):
        check(parse([*MODEL, "--logging_steps", "0"]), world_size=1)


def test_a_run_in_the_words_of_transformers(tiny: list[object], tmp_path: Path) -> None:
    """It saves and evaluates at the end of each epoch, and nowhere else."""
    (tmp_path / "run.yaml").write_text(
        f"do_train: true\nsave_strategy: epoch\neval_strategy: epoch\nlogging_strategy: epoch\nnum_train_epochs: 2\n"
        f"optim: adamw_torch\nper_device_train_batch_size: 128\noutput_dir: {tmp_path}/run\nreport_to: []\n"
    )
    names = ("max_steps", "save_steps", "logging_steps", "global_batch_size", "per_device_train_batch_size")
    pairs = zip(tiny[::2], tiny[1::2], strict=True)
    options = [word for name, value in pairs if str(name)[2:] not in names for word in (name, value)]
    train_ok(1, *options, tmp_path / "run.yaml")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    half, end = sorted({record["step"] for record in records if record["step"]})
    assert end == 2 * half
    assert [record["step"] for record in records if "eval_loss" in record] == [0, half, end]
    assert [record["step"] for record in records if "loss" in record] == [half, end]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        f"checkpoint-{half}",
        f"checkpoint-{end}",
    }


@pytest.mark.parametrize(
    "module", ["compare.curves", "compare.packing", "compare.saving", "compare.peers.trainers", "estimate"]
)
def test_help_of_other_programs(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--help prints the program's own usage and starts nothing."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, f"{module}.__main__" if module == "estimate" else module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {module} [-h]")
