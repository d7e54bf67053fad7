"""What options of other trainers mean here: an option of ours, no effect because nothing depends on it, or a refusal.

Names are those of transformers 5.17 (TrainingArguments, run_clm.py) and of earlier versions, TRL 1.16 (SFTConfig,
DPOConfig, ModelConfig, ScriptArguments), LLaMA-Factory 0.9.5, ms-swift 4.6, axolotl, nanoGPT, and of launchers. A value
is accepted only if it means the same here. docs/options.md shows the table.
"""

import dataclasses

from config.errors import OptionError
from config.peers import answers
from config.peers.answers import ANY, Answer, Given, Words, alias, no_effect, only, refused

CUT = "a conversation is cut there, text goes on in the next sequence"

STEPS = "the option of the steps decides"

TRACKER = "trackers are set up by their own environment variables"

ALWAYS_LOGGED = "metrics.jsonl always has it"

ONE_LEVEL = "there is one level of messages"

REENTRANT = "a recomputed layer has the same gradients either way"

LOADER = "it only moves the work of the loader"

DDP_DETAILS = "it only moves communication or memory of DDP"

SUMS = "evaluation keeps the sums of loss and targets only"

NOTHING_GENERATED = "only --sample_prompts and --prompt generate text, both with settings of their own"

KERNEL = "the GPU and the packing decide on the kernel of attention"

LIGER = "the loss never holds all logits, and --torch_compile fuses the layers"

UPLOAD = "nothing is uploaded"

FP32 = "parameters are fp32 whatever the file has, and matrix products are bf16 with --bf16"

FULL = "all parameters are trained, or with --use_peft, LoRA adapters of all linear modules"

LORA = "adapters are LoRA of linear modules, with the initial values and the scale of PEFT"

NOT_QUANTIZED = "a frozen model is bf16"

DTYPE = Answer({"float32": "", "fp32": "", "torch.float32": ""}, FP32, "remove it; --bf16 true computes in bf16")

SHUFFLED = "each epoch has its own random order of sequences"

CAUSAL_LM = "the model is a causal language model"

EOS = "the tokenizer's own special tokens are used"

LAUNCHER = "it belongs to a launcher, before train.py"

DATA_FILE = "training data is named by --train_file, --train_mixture or --dataset_name"

MULTIMODAL = "text is the only modality"

# The options of other trainers, by what they mean here.
TABLE: tuple[tuple[str, Answer], ...] = (
    # Model
    ("model base_model", alias("model_name_or_path")),
    ("chat_template_path chat_template_jinja", alias("chat_template")),
    (
        "model_type",
        refused("config.json says the type", "pass --config_name DIR for random weights of a configuration"),
    ),
    (
        "config_overrides rope_scaling model_kwargs model_init_kwargs n_layer n_head n_embd dropout bias",
        refused("config.json decides", "change config.json"),
    ),
    (
        "init_from",
        Answer(
            {"resume": "--resume_from_checkpoint auto"},
            "an option of its own says where weights come from",
            "pass --config_name DIR for random weights, or --model_name_or_path DIR for those of a model",
        ),
    ),
    ("cache_dir", refused("the hub's cache decides", "set the environment variable HF_HOME")),
    (
        "model_revision",
        Answer(
            {"main": "", "master": ""},
            "a hub id means its main revision",
            "pass the directory of `hf download ID --revision REVISION --local-dir DIR`",
        ),
    ),
    ("use_fast_tokenizer", only("true", "tokenizers are fast ones")),
    ("low_cpu_mem_usage", no_effect("each rank reads its own slices of the files")),
    (
        "token use_auth_token hf_hub_token ms_hub_token",
        dataclasses.replace(refused("tokens are not options", "run `hf auth login`, or set HF_TOKEN"), secret=True),
    ),
    (
        "use_hf",
        only("true", "a hub id is one of Hugging Face", "download the model and the data, and pass their directories"),
    ),
    ("torch_dtype dtype infer_dtype", DTYPE),
    ("pure_bf16", only("false", FP32, "pass --bf16 true")),
    ("upcast_layernorm upcast_lmhead_output", no_effect("norms and the loss are computed in fp32")),
    (
        "attn_implementation attn_impl flash_attn flash_attention use_flash_attn use_flash_attention_2 sdp_attention",
        no_effect(KERNEL),
    ),
    ("shift_attn", only("false", "attention is full")),
    ("experts_impl", no_effect("experts are grouped matrix products")),
    ("resize_vocab resize_token_embeddings", only("false", "the vocabulary is the model's")),
    (
        "add_tokens add_special_tokens new_special_tokens eos_token special_tokens",
        refused(EOS, "add tokens to the model and its tokenizer, save both, and pass their directory"),
    ),
    (
        "pad_token ignore_pad_token_for_loss pad_to_multiple_of pad_to_max_length padding_side pad_to_sequence_len",
        no_effect("padding is masked by length, and changes nothing"),
    ),
    ("task_type", only("causal_lm", CAUSAL_LM)),
    ("num_labels problem_type label_names", refused(CAUSAL_LM)),
    (
        "train_from_scratch",
        only("false", "--model_name_or_path loads weights", "pass --config_name DIR instead of --model_name_or_path"),
    ),
    (
        "finetuning_type tuner_type train_type sft_type",
        Answer({"full": "", "lora": "--use_peft true"}, FULL, "pass full or lora"),
    ),
    ("use_lora", Answer({"true": "--use_peft true", "false": ""}, FULL, "pass true or false")),
    ("adapter", Answer({"lora": "--use_peft true"}, LORA, "pass --use_peft, or remove it")),
    ("lora_rank", alias("lora_r", "lora_alpha does not follow it")),
    (
        "lora_target target_modules",
        Answer({"all": "--lora_target_modules all-linear", ANY: "--lora_target_modules {}"}),
    ),
    ("lora_target_linear", Answer({"true": "--lora_target_modules all-linear"}, LORA, "pass --lora_target_modules")),
    ("lora_bias", only("none", "biases are frozen")),
    ("lora_task_type", only("causal_lm", CAUSAL_LM)),
    ("use_dora use_swift_lora use_llama_pro", only("false", LORA)),
    (
        "load_in_8bit load_in_4bit use_bnb_nested_quant double_quantization",
        only("false", NOT_QUANTIZED, "pass --cpu_offload or more ranks with fsdp, if it is too large for a GPU"),
    ),
    ("bnb_ quantization_bit quantization_method quant_method quant_bits", refused(NOT_QUANTIZED)),
    (
        "lora_ peft_ modules_to_save additional_target create_new_adapter tuner_backend pissa_ loraplus_",
        refused(LORA),
    ),
    (
        "adapter_name_or_path adapters",
        refused(
            "a run starts from a model",
            "continue adapters with --resume_from_checkpoint, or export the model with them by --merge_lora",
        ),
    ),
    (
        "freeze_parameters freeze_parameters_ratio freeze_trainable_layers freeze_trainable_modules "
        "trainable_parameters unfrozen_parameters",
        only("0", FULL),
    ),
    ("freeze_llm freeze_language_model", only("false", FULL)),
    (
        "freeze_vit freeze_aligner freeze_vision_tower freeze_multi_modal_projector",
        no_effect("there is a language model only, and all of it is trained"),
    ),
    (
        "use_unsloth use_unsloth_gc mixture_of_depths",
        only(
            "false",
            "layers are those of transformers",
            "pass --torch_compile, or --gradient_checkpointing --offload_activations",
        ),
    ),
    # Data
    ("train_data train_path data_path", alias("train_file")),
    ("eval_file validation_path", alias("validation_file")),
    ("dataset_config", alias("dataset_config_name")),
    ("dataset_streaming", alias("streaming")),
    ("dataset_dir", alias("dataset_info")),
    ("dataset_text_field text_field", alias("text_column")),
    ("dataset_num_proc num_proc", alias("preprocessing_num_workers")),
    (
        "datasets data_files data_dir",
        refused(DATA_FILE, "pass --train_file FILE; docs/data.md lists the shapes of records"),
    ),
    (
        "eval_dataset val_dataset test_file",
        refused("validation data is named by --validation_file", "pass --validation_file FILE"),
    ),
    ("dataset_train_split", only("train", "the split train is trained on")),
    ("dataset_test_split", only("validation", "the split validation is evaluated", "pass --validation_file FILE")),
    (
        "split_dataset_ratio val_size val_set_size test_split_size test_size",
        Answer(
            {"0": "--validation_split_percentage 0"},
            "the last records are held out, without a shuffle",
            "pass --validation_split_percentage N",
        ),
    ),
    (
        "mix_strategy interleave_probs interleave_prob stopping_strategy",
        refused("--train_mixture has sources with weights", "pass --train_mixture a.jsonl=0.7,b.jsonl=0.3"),
    ),
    ("buffer_size shuffle_buffer_size", no_effect("a stream is shuffled within a window of its own (data/stream.py)")),
    (
        "max_samples max_train_samples max_eval_samples num_samples",
        refused("all records are used", "pass a shorter file, or --max_steps"),
    ),
    (
        "overwrite_cache load_from_cache_file preprocessing_batch_size lazy_tokenize lazy_preprocess packing_num_proc "
        "data_shared_file_system",
        no_effect("prepared data is stored by content, so it is never stale"),
    ),
    (
        "tokenized_path cached_dataset dataset_prepared_path cached_val_dataset",
        refused("prepared data is in --data_cache_dir", "pass --data_cache_dir DIR"),
    ),
    ("dataset_kwargs columns", refused("--data_format and --text_column say what a record holds")),
    ("model_author model_name", refused("records are used as they are", "write the names into the records")),
    ("keep_linebreaks", only("true", "a document keeps its line breaks")),
    ("remove_unused_columns", no_effect("columns outside --data_format are not read")),
    ("media_dir max_pixels image_max_pixels image_min_pixels video_max_pixels video_fps", refused(MULTIMODAL)),
    # From records to sequences
    (
        "max_seq_length max_length cutoff_len model_max_length max_seq_len seq_length seq_len "
        "sequence_len sequence_length packing_length context_length",
        alias("block_size", CUT),
    ),
    ("truncation_mode truncation_strategy", Answer({"keep_start": "", "right": ""}, CUT)),
    (
        "max_source_length max_prompt_length max_completion_length max_target_length",
        refused("prompt and answer share --block_size", "pass --block_size N"),
    ),
    (
        "packing_strategy",
        Answer(
            fact="--packing decides",
            translate=answers.packing_strategy,
            shown="with `--packing true`: `documents`, `concat` for `wrapped`",
        ),
    ),
    ("sample_packing", Answer({"true": "--packing documents", "false": "--packing none"})),
    (
        "neat_packing",
        Answer({"true": "--packing documents", "false": ""}, "--packing documents has no attention between documents"),
    ),
    ("eval_packing", no_effect("the mean loss does not depend on the packing of --packing documents")),
    ("padding_free", no_effect("--packing documents needs no padding")),
    (
        "template template_name chat_template_name template_type agent_template tool_format",
        refused("the tokenizer's own chat template is used", "remove it, or pass --chat_template FILE for another one"),
    ),
    ("use_chat_template apply_chat_template", only("true", "conversations are rendered by the chat template")),
    ("system default_system", refused("a system message belongs to a record", "write it into the records")),
    (
        "enable_thinking",
        Answer(
            {
                "true": '--chat_template_kwargs {"enable_thinking":true}',
                "false": '--chat_template_kwargs {"enable_thinking":false}',
            },
            "it is a variable of the chat template",
        ),
    ),
    (
        "preserve_thinking",
        refused(
            "the template decides about earlier reasoning", "pass it in --chat_template_kwargs if the template reads it"
        ),
    ),
    (
        "completion_only_loss assistant_only_loss",
        only(
            "true",
            "prompts and users' turns are masked, answers are trained on",
            "for all tokens, write each record as text in --text_column",
        ),
    ),
    (
        "mask_history",
        Answer({"true": "--train_on_last_turn true", "false": "--train_on_last_turn false"}),
    ),
    (
        "train_on_prompt train_on_inputs",
        only(
            "false",
            "every answer is trained on, and no prompt",
            "for all tokens, write each record as text in --text_column",
        ),
    ),
    (
        "loss_scale",
        Answer(
            {"default": ""},
            "every answer is trained on, with equal weights",
            "pass --train_on_last_turn to train on the last answer only",
        ),
    ),
    # Batches
    ("lr", alias("learning_rate")),
    ("epochs num_epochs", alias("num_train_epochs")),
    ("steps max_train_steps max_iters", alias("max_steps")),
    ("max_epochs", refused("a run ends after its epochs or steps", "pass --num_train_epochs or --max_steps")),
    ("micro_batch_size per_gpu_train_batch_size", alias("per_device_train_batch_size")),
    ("per_gpu_eval_batch_size", alias("per_device_eval_batch_size")),
    ("grad_accum_steps accumulate_grad_batches", alias("gradient_accumulation_steps")),
    (
        "batch_size train_batch_size eval_batch_size",
        refused(
            "it may mean two things",
            "pass --per_device_train_batch_size for a rank's micro-batch, or --global_batch_size",
        ),
    ),
    ("num_workers", refused("it may mean two things", "pass --dataloader_num_workers or --preprocessing_num_workers")),
    (
        "auto_find_batch_size",
        only(
            "false",
            "the batch is not changed",
            "pass --per_device_train_batch_size; `python -m estimate` predicts the memory",
        ),
    ),
    (
        "accelerator_config split_batches dispatch_batches",
        refused("each rank reads its own sequences of a global batch"),
    ),
    ("group_by_length", only("false", SHUFFLED, "pass --packing documents, which needs no padding")),
    ("train_sampling_strategy", only("random", SHUFFLED)),
    ("length_column_name", no_effect(SHUFFLED)),
    ("shuffle_dataset dataset_shuffle", no_effect(SHUFFLED)),
    ("train_dataloader_shuffle", only("true", SHUFFLED)),
    ("val_dataset_shuffle", no_effect("the mean loss does not depend on the order")),
    ("disable_shuffling", only("false", SHUFFLED)),
    ("data_seed", refused("one seed decides on data order, weights and dropout", "pass --seed")),
    ("dataloader_drop_last", only("true", "an epoch has whole global batches only")),
    ("dataloader_in_order", only("true", "batches keep their order")),
    ("dataloader_pin_memory dataloader_persistent_workers dataloader_multiprocessing_context", no_effect(LOADER)),
    ("average_tokens_across_devices", only("true", "the loss is one mean over the targets of all ranks")),
    # Objective
    (
        "stage",
        Answer(
            {"sft": "--objective sft", "pt": "--objective sft", "dpo": "--objective dpo"},
            "--objective is sft or dpo",
            "pass sft, pt or dpo",
        ),
    ),
    ("rlhf_type", Answer({"dpo": "--objective dpo"}, "--objective is sft or dpo", "pass dpo")),
    ("beta pref_beta", alias("dpo_beta")),
    (
        "loss_type pref_loss",
        Answer(
            {"nll": "", "sigmoid": ""},
            "the loss is cross-entropy, and for --objective dpo the sigmoid loss",
            "pass sigmoid, or use a trainer with this loss",
        ),
    ),
    ("label_smoothing_factor label_smoothing dpo_label_smoothing", only("0", "the loss has no label smoothing")),
    ("neftune_noise_alpha", only("0", "embeddings get no noise")),
    ("moe_aux_loss_coef", alias("router_aux_loss_coef")),
    ("moe_router_bias_update_rate load_balance_coeff", alias("router_bias_update_rate")),
    (
        "use_dft_loss use_asft_loss use_eaft_loss enable_dft_loss enable_channel_loss",
        only("false", "the loss is cross-entropy"),
    ),
    (
        "ref_model ref_model_adapters ref_adapters reward_model",
        refused("the initial model is the reference", "pass it as --model_name_or_path"),
    ),
    (
        "precompute_ref_log_probs precompute_ref_batch_size",
        no_effect("the reference's log probabilities are computed once, before the first step"),
    ),
    (
        "sync_ref_model use_weighting reference_free",
        only("false", "the reference is the initial model, and pairs have equal weights"),
    ),
    ("ref_model_mixup_alpha ref_model_sync_steps", no_effect("the reference does not change")),
    (
        "loss_weights discopop_tau simpo_gamma cpo_alpha f_alpha_divergence_coef",
        refused("--objective dpo has one term, the sigmoid loss"),
    ),
    ("rpo_alpha pref_ftx pref_bco_weight", only("0", "--objective dpo has one term, the sigmoid loss")),
    ("ld_alpha", only("1", "all tokens of an answer have equal weights")),
    ("f_divergence_type", Answer({"reverse_kl": ""}, "the divergence is the reverse KL")),
    (
        "disable_dropout",
        only(
            "false",
            "dropout is what config.json says",
            "write 0 for the dropouts in config.json, where most models have 0 already",
        ),
    ),
    # Optimizer and schedule
    (
        "optimizer",
        Answer(
            {
                "adamw": "--optim adamw_torch_fused",
                "adamw_torch": "--optim adamw_torch_fused",
                "adamw_torch_fused": "--optim adamw_torch_fused",
            },
            "",
            "pass --optim adamw_torch_fused or muon",
        ),
    ),
    ("lr_scheduler scheduler", alias("lr_scheduler_type")),
    (
        "warmup_ratio",
        Answer(
            fact="a warmup_steps above 0 decides",
            translate=answers.warmup_ratio,
            shown="`--warmup_steps`, where a value below 1 is a fraction",
            overrides=True,
        ),
    ),
    ("warmup num_warmup_steps lr_warmup_steps", alias("warmup_steps")),
    ("warmup_iters", alias("warmup_steps", "the first step has a rate of 0, not of 1 / (warmup_iters + 1)")),
    (
        "decay_lr",
        Answer(
            {"true": "--lr_scheduler_type cosine_with_min_lr", "false": "--lr_scheduler_type constant"},
            "it is true or false",
        ),
    ),
    (
        "lr_decay_iters",
        Answer(
            fact="the rate falls until the last step",
            remedy="pass the value of max_iters, or remove it",
            translate=answers.lr_decay_iters,
            shown="no effect if it equals `max_iters`: the rate falls until the last step",
        ),
    ),
    ("max_norm gradient_clipping clip_grad_norm grad_clip", alias("max_grad_norm")),
    ("beta1", alias("adam_beta1")),
    ("beta2", alias("adam_beta2")),
    (
        "optim_args adam_betas betas",
        refused("AdamW has options of its own", "pass --adam_beta1, --adam_beta2 and --adam_epsilon"),
    ),
    ("optim_target_modules", refused("it is for GaLore and APOLLO, which are not here")),
    ("use_muon", only("false", "--optim decides", "pass --optim muon, which scales updates in another way")),
    ("use_galore use_apollo use_badam use_adam_mini adafactor", only("false", "--optim is adamw_torch_fused or muon")),
    ("galore_ apollo_ badam_ lisa_", refused("--optim is adamw_torch_fused or muon")),
    ("vit_lr aligner_lr", refused(MULTIMODAL)),
    # Strategy
    (
        "fsdp",
        Answer(
            fact="sharding is off",
            translate=answers.fsdp,
            shown="`--strategy`, `--reshard_after_forward`, `--replicas`, `--cpu_offload`; each layer is a unit",
        ),
    ),
    (
        "fsdp_config",
        Answer(
            fact="layers are the units, and checkpoints hold full tensors",
            translate=answers.fsdp_config,
            shown="the same, and `--gradient_checkpointing`, with fsdp only",
        ),
    ),
    ("fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap", no_effect("each decoder layer is a unit")),
    (
        "parallelism_config",
        refused("options of their own set the mesh", "pass --tensor_parallel, --context_parallel or --replicas"),
    ),
    ("sequence_parallel_size context_parallel_size ulysses_size", alias("context_parallel")),
    ("tensor_parallel_size tp_size deepspeed_autotp_size", alias("tensor_parallel")),
    ("expert_parallel_size ep_size", alias("expert_parallel")),
    ("pipeline_parallel_size pp_size", only("1", "there is no pipeline parallelism")),
    ("deepspeed_config", alias("deepspeed")),
    ("zero_hpz_partition_size", refused("hybrid sharding is --replicas", "pass --replicas N")),
    (
        "zero_stage",
        refused(
            "the stage is a choice of options",
            "pass --shard_optimizer for 1, --strategy fsdp for 2 and 3 (2: --reshard_after_forward false)",
        ),
    ),
    ("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph", no_effect(DDP_DETAILS)),
    ("device_map", refused("each rank has one GPU", "remove it, and start with torchrun --nproc_per_node=N train.py")),
    ("backend", alias("ddp_backend")),
    ("device", only("cuda", "a visible GPU is used", "set CUDA_VISIBLE_DEVICES= in the environment for the CPU")),
    ("use_cpu no_cuda", only("false", "a visible GPU is used", "set CUDA_VISIBLE_DEVICES= in the environment")),
    ("use_mps_device use_ipex tpu_num_cores", Answer({"false": "", "0": ""}, "the device is a CUDA GPU or the CPU")),
    (
        "local_rank",
        Answer(
            fact="LOCAL_RANK of the environment decides",
            translate=answers.local_rank,
            shown="the rank that LOCAL_RANK says; start with `torchrun`",
        ),
    ),
    (
        "num_processes num_machines machine_rank main_process_ip main_process_port config_file use_fsdp "
        "use_deepspeed deepspeed_config_file gpu_ids nproc_per_node nnodes node_rank master_addr "
        "master_port num_gpus num_nodes hostfile rdzv_ ray_ standalone",
        refused(LAUNCHER, "start with torchrun --nproc_per_node=N train.py"),
    ),
    # Precision, compilation and memory
    ("fp16 fp16_full_eval half", only("false", "fp16 needs loss scaling, which is not here", "pass --bf16 true")),
    ("bf16_full_eval", only("false", "evaluation computes as training does", "pass --bf16 true")),
    (
        "mixed_precision",
        Answer({"bf16": "--bf16 true", "no": "--bf16 false"}, "--bf16 is on or off", "pass --bf16 true"),
    ),
    ("fp16_opt_level fp16_backend half_precision_backend", no_effect("there is no fp16")),
    ("tf32", only("false", "fp32 matrix products are exact", "remove it; --bf16 true is faster")),
    ("fp8", only("false", "float8 is off", "pass --float8, which scales per tensor")),
    (
        "gradient_checkpointing_kwargs",
        Answer(fact=REENTRANT, translate=answers.gradient_checkpointing_kwargs, shown="no effect: " + REENTRANT),
    ),
    ("use_reentrant_gc", no_effect(REENTRANT)),
    (
        "disable_gradient_checkpointing",
        Answer({"true": "--gradient_checkpointing false", "false": "--gradient_checkpointing true"}),
    ),
    ("activation_offloading", alias("offload_activations")),
    ("compile", alias("torch_compile")),
    ("torch_compile_backend", Answer({"inductor": "--torch_compile true"}, "the compiler is inductor")),
    ("torch_compile_mode", Answer({"default": "--torch_compile true"}, "the mode is default")),
    ("use_liger_kernel liger_kernel_config enable_liger_kernel use_liger", no_effect(LIGER)),
    ("use_cache use_kv_cache", no_effect("training keeps no keys and values")),
    ("torch_empty_cache_steps", no_effect("the memory of the GPU stays with its allocator")),
    # Output directory and checkpoints
    ("output output_path save_path out_dir", alias("output_dir")),
    (
        "save_strategy",
        Answer(
            fact=STEPS, translate=answers.interval("save_steps"), shown="`--save_steps N`, `epoch` or 0", overrides=True
        ),
    ),
    (
        "save_only_model resume_only_model",
        only(
            "false",
            "a checkpoint can always be resumed",
            "pass --save_steps 0, which writes the final model and no checkpoint",
        ),
    ),
    ("save_safetensors safe_serialization", only("true", "files are safetensors")),
    ("max_shard_size", no_effect("the final model's files have a fixed size")),
    (
        "save_on_each_node log_on_each_node",
        no_effect("rank 0 logs, and a checkpoint is written once, into an output_dir that all nodes see"),
    ),
    ("enable_jit_checkpoint", no_effect("SIGTERM always finishes the step and saves")),
    (
        "always_save_checkpoint",
        only(
            "true",
            "a checkpoint is written every --save_steps",
            "pass --load_best_model_at_end, which exports the best one",
        ),
    ),
    ("ignore_data_skip", only("false", "a resumed run continues with the next sequence")),
    (
        "restore_callback_states_from_checkpoint add_version",
        no_effect("there are no callbacks, and output_dir is used as it is given"),
    ),
    ("create_checkpoint_symlink", only("false", "--resume_from_checkpoint auto finds the newest checkpoint")),
    (
        "greater_is_better",
        only("false", "each metric is better when it is lower", "remove it; --metric_for_best_model names the metric"),
    ),
    ("early_stopping_steps early_stop_interval", alias("early_stopping_patience")),
    ("push_to_hub", only("false", UPLOAD, "run `hf upload ID OUTPUT_DIR` after training")),
    ("hub_token push_to_hub_token", dataclasses.replace(no_effect(UPLOAD), secret=True)),
    ("hub_ push_to_hub_ export_hub_model_id", no_effect(UPLOAD)),
    # Evaluation and logging
    (
        "do_train",
        Answer(
            {"true": "", "false": "--num_train_epochs 0 --max_steps -1"},
            "a run trains unless num_train_epochs is 0",
            overrides=True,
        ),
    ),
    (
        "do_eval",
        Answer(
            {"true": "", "false": ""},
            "validation data is evaluated if there is any, and --validation_split_percentage 0 holds out none",
            translate=answers.do_eval,
            shown="no effect: validation data is evaluated if there is any; without `do_train`, `max_steps` and "
            "`num_train_epochs`: `--num_train_epochs 0`",
        ),
    ),
    ("eval_only", only("false", "a run trains", "pass --num_train_epochs 0 and no number of steps")),
    ("eval_interval", alias("eval_steps", "checkpoints are written every --save_steps")),
    ("log_interval", alias("logging_steps")),
    (
        "eval_iters",
        refused(
            "an evaluation reads all validation data",
            "pass --validation_split_percentage N or a shorter --validation_file",
        ),
    ),
    ("do_predict predict_with_generate", only("false", NOTHING_GENERATED)),
    (
        "eval_strategy evaluation_strategy",
        Answer(
            fact=STEPS,
            translate=answers.interval("eval_steps"),
            shown="`--eval_steps N`, `epoch` or 0; `steps` without `--eval_steps`: `--logging_steps`",
            overrides=True,
        ),
    ),
    (
        "logging_strategy",
        Answer(
            fact=STEPS,
            translate=answers.interval("logging_steps"),
            shown="`--logging_steps N` or `epoch`",
            overrides=True,
        ),
    ),
    ("eval_delay", only("0", "evaluations begin with the run")),
    (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "batch_eval_metrics eval_on_each_dataset use_logits_to_keep",
        no_effect(SUMS),
    ),
    (
        "include_for_metrics include_inputs_for_metrics compute_accuracy acc_strategy eval_metric",
        Answer({"false": "", "[]": "", "": ""}, SUMS),
    ),
    ("logging_nan_inf_filter", no_effect("a loss that is not finite is logged as it is, and its step skipped")),
    (
        "include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second "
        "skip_memory_metrics plot_loss",
        no_effect(ALWAYS_LOGGED),
    ),
    ("env", refused("options set no variables of the environment", "export them before the start")),
    ("wandb_run_name wandb_name swanlab_run_name swanlab_exp_name", alias("run_name")),
    ("tensorboard_dir", alias("logging_dir")),
    ("use_wandb wandb_log", Answer({"true": "--report_to wandb", "false": ""}, "--report_to decides")),
    ("use_swanlab", Answer({"true": "--report_to swanlab", "false": ""}, "--report_to decides")),
    ("use_tensorboard", Answer({"true": "--report_to tensorboard", "false": ""}, "--report_to decides")),
    (
        "project",
        Answer({"huggingface": ""}, TRACKER, "set WANDB_PROJECT or SWANLAB_PROJ_NAME"),
    ),
    ("wandb_project", refused(TRACKER, "set WANDB_PROJECT")),
    ("wandb_entity", refused(TRACKER, "set WANDB_ENTITY")),
    (
        "wandb_mode",
        Answer({"online": ""}, TRACKER, "set WANDB_MODE"),
    ),
    (
        "wandb_watch wandb_log_model",
        only("false", "weights are not sent"),
    ),
    ("swanlab_mode", Answer({"cloud": "", "online": ""}, TRACKER, "set SWANLAB_MODE")),
    (
        "swanlab_",
        refused(TRACKER, "set SWANLAB_PROJ_NAME or SWANLAB_WORKSPACE"),
    ),
    (
        "swanlab_api_key wandb_api_key swanlab_lark_secret swanlab_token",
        dataclasses.replace(refused("keys are not options", "run `swanlab login` or `wandb login`"), secret=True),
    ),
    ("trackio_", no_effect("there is no Trackio; --report_to names the trackers")),
    ("log_level log_level_replica print_param_status verbose", no_effect(ONE_LEVEL)),
    (
        "debug",
        Answer(
            {"": "", "[]": ""}, "a step that is not finite is skipped and counted", "pass --trace_steps N for a trace"
        ),
    ),
    ("enable_torch_profiler", Answer({"false": ""}, "--trace_steps decides", "pass --trace_steps N")),
    (
        "num_beams eval_num_beams max_new_tokens temperature top_p top_k do_sample repetition_penalty "
        "length_penalty generation_max_length generation_num_beams infer_backend stream",
        no_effect(NOTHING_GENERATED),
    ),
    ("vllm_ sglang_ infer_ export_", refused(NOTHING_GENERATED)),
)

ANSWERS = {name: answer for names, answer in TABLE for name in names.split() if not name.endswith("_")}

# By the beginning of their names, which ends with an underscore.
FAMILIES = {name: answer for names, answer in TABLE for name in names.split() if name.endswith("_")}

# Values of our own options that other trainers write in another way.
VALUES = {
    "optim": Answer({"adamw_torch": "--optim adamw_torch_fused", "adamw": "--optim adamw_torch_fused"}),
    "packing": Answer(translate=answers.packing, shown="`true`: `--packing documents`; `false`: `--packing none`"),
    "deepspeed": Answer(
        fact="deepspeed_config names the file",
        translate=answers.deepspeed,
        shown="a file, or a switch beside `deepspeed_config`",
    ),
    "resume_from_checkpoint": Answer(fact="nothing is resumed", translate=answers.resume, shown="`true`: pass auto"),
    "report_to": Answer({"[]": "--report_to none", "": "--report_to none"}),
}


def find_answer(name: str) -> Answer | None:
    """The answer for an option of another trainer, or for the longest family that it belongs to. None: unknown."""
    families = [family for family in FAMILIES if name.startswith(family)]
    return ANSWERS.get(name) or (FAMILIES[max(families, key=len)] if families else None)


def translate(name: str, value: str, given: Given) -> tuple[Words, str]:
    """Our options for an option of another trainer, and a line that says so. Raises OptionError for a refused value."""
    answer = find_answer(name)
    assert answer
    words = answers.accepted_words(answer, value, given)
    text = f"{name} {'***' if answer.secret else value}"
    if words is None:
        raise OptionError(f"{text}: {answer.fact}\n{answer.remedy or f'remove --{name}'}")
    return words, explain(text, answer, words)


def explain(text: str, answer: Answer, words: Words) -> str:
    """A line that says what an accepted option and its value, `text`, have become."""
    if not words:
        return f"{text}: no effect: {answer.fact}"
    return f"{text}: here {join(words)}" + (f" ({answer.note})" if answer.note else "")


def join(words: Words) -> str:
    """Options as they stand on the command line."""
    return " ".join(f"--{option} {setting}" for option, setting in words.items())


def table() -> str:
    """The table of docs/options.md: every option of other trainers, and what it means here."""
    rows = [
        *((names, _meaning(answer)) for names, answer in TABLE),
        *((name, _meaning(VALUES[name])) for name in VALUES),
    ]
    lines = []
    for names, meaning in rows:
        shown = [f"`{name}*`" if name in FAMILIES else f"`{name}`" for name in names.split()]
        lines.append(f"| {', '.join(shown)} | {meaning} |")
    return "\n".join(["| option | here |", "|---|---|", *lines])


def _meaning(answer: Answer) -> str:
    """What an answer says, in a cell of the table."""
    if answer.shown:
        return answer.shown
    remedy = f"; {answer.remedy}" if answer.remedy else ""
    if not answer.accepted:
        return f"refused: {answer.fact}{remedy}"
    texts: dict[str, list[str]] = {}  # the values of each meaning
    for value, text in answer.accepted.items():
        meaning = f"`{join(answers.parse_words(text, 'N'))}`" if text else ""
        texts.setdefault(meaning, []).append(f"`{value}`" if value else "empty")
    if ANY in answer.accepted:
        name = answer.accepted[ANY].split(" ")[0]
        return f"`{name}`" + (f"; {answer.note}" if answer.note else "") if name else f"no effect: {answer.fact}"
    if "" not in texts:
        return "; ".join(f"{', '.join(values)}: {meaning}" for meaning, values in texts.items())
    harmless = texts.pop("")
    cells = [f"{', '.join(values)}: {meaning}" for meaning, values in texts.items()]
    return "; ".join(
        [*cells, f"{', '.join(harmless)}{'' if cells else ' only'}: {answer.fact}{'' if cells else remedy}"]
    )
