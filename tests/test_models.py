"""Proves model/build.py, model/weights.py and model/export.py: every family loads and exports, or is refused."""

import copy
import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    Gemma4TextConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    masking_utils,
)

import ddp
import fsdp
import model.build
import model.export
import model.weights
from checkpoint.export import export_model
from config.errors import OptionError
from config.options import Options
from loss.next_token import NextToken
from metrics.records import read_records
from model.build import build_model, load_config_and_tokenizer
from model.documents.attention import expect_one_document_per_sequence
from model.export import write_model
from model.layers import decoder_layers
from model.version_4 import add_config_keys
from model.weights import Weights, find_weights, load_weights
from optim import build_optimizer
from parallel.checks import check_tensor_parallel
from tests import zoo
from tests.families import FAMILIES, SIZES, TIED, asked_for, make_family
from tests.launch import train, train_ok
from tests.proof import FSDP, GATES, TENSOR, relative_l2

RANKS = 4
CPU = torch.device("cpu")


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a directory."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The names of tensors that differ in name, dtype or any bit."""
    different = {
        n for n in ours.keys() & theirs.keys() if ours[n].dtype != theirs[n].dtype or not ours[n].equal(theirs[n])
    }
    return sorted(different | (ours.keys() ^ theirs.keys()))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(loaded: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters and buffers, including buffers that are not saved; tied tensors under each name."""
    names = [*loaded.named_parameters(remove_duplicate=False), *loaded.named_buffers(remove_duplicate=False)]
    return {name: whole(tensor.detach()) for name, tensor in names}


def loaded_whole(directory: Path, **options: Any) -> PreTrainedModel:
    """The model in one process, without replicas or shards."""
    options_ = Options(model_name_or_path=str(directory), **options)
    loaded = build_model(options_, load_config_and_tokenizer(options_)[0])
    weights = find_weights(options_, loaded)
    loaded.to_empty(device="cpu").tie_weights()
    load_weights(loaded, weights)
    return loaded


# --- Every family, under both strategies ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("families")
    return {name: make_family(name, directory, model_dir) for name in FAMILIES}


class NothingIsRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, reading the value of a tensor fails, because it would synchronize with a GPU."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        assert operator is not torch.ops.aten._local_scalar_dense.default
        return operator(*arguments, **(named or {}))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "moe" not in name])  # experts have to know their tokens
def test_a_step_does_not_wait_for_the_gpu(
    families: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = NextToken(loaded_whole(families[name]))
    tokens_BT = torch.randint(0, SIZES["vocab_size"], (2, 32))
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
    nothing_is_read = NothingIsRead()  # type: ignore[no-untyped-call]
    with nothing_is_read, pytest.raises(AssertionError):
        objective(tokens_BT, tokens_BT)
    expected = objective(tokens_BT, tokens_BT)
    expect_one_document_per_sequence()
    with nothing_is_read:
        loss = objective(tokens_BT, tokens_BT)
        loss.backward()
        ddp.grad_norm(objective)
    assert torch.equal(loss, expected)


@pytest.fixture(scope="module")
def findings(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of four ranks that loaded, evaluated and exported each family under both strategies."""
    directory = tmp_path_factory.mktemp("exported")
    outcome = train(RANKS, [], before=partial(try_all, families, directory))
    assert outcome.exit_codes == [0] * RANKS, outcome.output
    found: dict[str, Any] = json.loads((directory / "findings.json").read_text())
    return found


def try_all(families: dict[str, Path], directory: Path) -> None:
    """Replaces train.py in the subprocess."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {
        f"{name} {twin.__name__}": try_one(path, directory, twin)
        for name, path in families.items()
        for twin in (ddp, fsdp)
    }
    found["again"] = export_again(families["qwen3"], directory)
    if dist.get_rank() == 0:
        (directory / "findings.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def try_one(path: Path, directory: Path, twin: Any) -> dict[str, Any]:
    options = Options(model_name_or_path=str(path), output_dir=str(directory / f"{path.name} {twin.__name__}"))
    config, tokenizer = load_config_and_tokenizer(options)
    built = build_model(options, config)
    weights = find_weights(options, built)
    meta = {tensor.device.type for tensor in built.state_dict().values()}
    mesh = init_device_mesh("cpu", (1, RANKS, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    wrapped = twin.wrap(NextToken(built), decoder_layers(built), mesh, CPU, False, True, False)
    load_weights(built, weights)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    head, embedding = built.get_output_embeddings().weight, built.get_input_embeddings().weight
    input_ids = torch.arange(40).view(2, 20) + dist.get_rank()
    with torch.no_grad():
        loss = wrapped.eval()(input_ids=input_ids, labels=input_ids) / (2 * 19)
    options.save_dtype = str(FAMILIES[path.name][1]).removeprefix("torch.")  # type: ignore[assignment]
    Path(options.output_dir).mkdir(exist_ok=True)
    export_model(options, built, tokenizer, [])
    exported = AutoModelForCausalLM.from_pretrained(options.output_dir, dtype=torch.float32)
    with torch.no_grad():
        expected = exported(input_ids=input_ids, labels=input_ids).loss
    return {
        "meta": sorted(meta),
        "masters": sorted({str(parameter.dtype) for parameter in built.parameters()}),
        "different": same(everything(built), everything(reference)),
        "tied": head is embedding,
        "loss": abs(loss.item() - expected.item()),
        "exported": same(stored(Path(options.output_dir)), stored(path)),
        "sharded": sum(isinstance(parameter, DTensor) for parameter in built.parameters()),
    }


def export_again(path: Path, directory: Path) -> list[list[str]]:
    """The files after each of three exports to one directory: one file, then several, then one."""
    loaded, tokenizer = loaded_whole(path), AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = {"default": "{{ messages }}", "other": "{{ 1 }}"}
    there = []
    for largest_file in ("5GB", "30KB", "5GB"):
        model.export.LARGEST_FILE = largest_file
        export_model(Options(output_dir=str(directory)), loaded, tokenizer, [])
        there.append(sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()))
        dist.barrier()
    return there


@pytest.mark.parametrize("twin", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(findings: dict[str, Any], name: str, twin: str) -> None:
    """Loading bf16 or fp32 files, one or several, and exporting without a step preserves each bit.

    Tensors that are not saved are compared too: rotary frequencies, scales, and the one tensor of a tied head.
    """
    found = findings[f"{name} {twin}"]
    assert found["meta"] == ["meta"]
    assert found["masters"] == ["torch.float32"]
    assert found["different"] == []
    assert found["tied"] == FAMILIES[name][0].tie_word_embeddings
    assert found["exported"] == []
    assert found["loss"] < 1e-5
    assert (found["sharded"] > 0) == (twin == "fsdp")


def test_an_export_replaces_another(findings: dict[str, Any]) -> None:
    """No file of the previous model remains, because `from_pretrained` might load it."""
    one, several, one_again = ([name for name in names if "qwen" not in name] for names in findings["again"])
    assert one == one_again
    assert "additional_chat_templates/other.jinja" in one
    assert [name for name in one if name.startswith("model")] == ["model.safetensors"]
    assert set(several) - set(one) == {"model.safetensors.index.json", *SHARDS}
    assert "model.safetensors" not in several


SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def test_through_the_trainer(tiny: list[object], families: dict[str, Path], tmp_path: Path) -> None:
    """A run with learning rate 0 exports the bits of its files, and prints the dtypes."""
    path = families["gemma3"]
    options = [*tiny, "--model_name_or_path", path, "--output_dir", tmp_path, "--save_dtype", "bfloat16"]
    said = train_ok(2, *options, "--strategy", "fsdp", "--learning_rate", 0, "--max_steps", 1)
    assert same(stored(tmp_path), stored(path)) == []
    assert f"weights       bfloat16 in the files of {path}\n" in said
    assert "dtypes        parameters float32, gradients float32, optimizer state float32; compute float32\n" in said


def test_a_mixture_trains(tiny: list[object], families: dict[str, Path], tmp_path: Path) -> None:
    """Parameters that are joined from several stored tensors: a rank that joins only its experts has an equal curve."""
    options = [*tiny, "--model_name_or_path", families["qwen3 moe"], "--max_steps", 6]
    train_ok(1, *options, "--output_dir", tmp_path / "one")
    train_ok(2, *options, "--output_dir", tmp_path / "two", "--strategy", "fsdp")
    ours, theirs = (read_records(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    for row, expected in zip(ours, theirs, strict=True):
        for key in row.keys() & {"loss", "eval_loss"}:
            assert row[key] == pytest.approx(expected[key], abs=GATES.loss)
    assert relative_l2(stored(tmp_path / "two"), stored(tmp_path / "one")) < GATES.parameters


# Their initial values come from the module around the parameter (mamba2, qwen3_next), from the whole model (falcon_h1)
# or from a constructor (apertus, ernie4_5_moe).
UNUSUAL = ("mamba2", "qwen3_next", "falcon_h1", "apertus", "ernie4_5_moe", "gpt2")


def each(quick: Iterable[str]) -> list[Any]:
    """The names of tests/zoo.py as parameters of a test. All but `quick` are slow."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in zoo.NAMES]


@pytest.mark.parametrize("name", [*FAMILIES, *each(UNUSUAL)])
def test_random_weights_are_those_of_transformers(name: str) -> None:
    """Initial tensors have the distribution and constants of transformers, and depend only on the seed."""
    config = FAMILIES[name][0] if name in FAMILIES else zoo.config(name)
    torch.manual_seed(1)
    theirs = everything(AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32))
    drawn = [everything(drawn_whole(config, seed)) for seed in (2, 2)]
    assert same(drawn[0], drawn[1]) == []
    assert drawn[0].keys() == theirs.keys()
    for key, tensor in drawn[0].items():
        tensor, other = tensor.double(), theirs[key].double()
        deviations = 5 * (tensor.std(correction=0) if tensor.numel() > 1 else 0) / tensor.numel() ** 0.5
        assert abs(tensor.mean() - other.mean()) <= deviations * 2**0.5, key
        assert abs(tensor.std(correction=0) - other.std(correction=0)) <= deviations, key


def drawn_whole(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with random weights in one process, without replicas or shards."""
    loaded = build_model(Options(config_name="DIR"), copy.deepcopy(config))
    loaded.to_empty(device="cpu").tie_weights()
    torch.manual_seed(seed)
    load_weights(loaded, {})
    return loaded


SHARDED = ("mamba2", "falcon_h1", "ernie4_5_moe", "zamba2")  # zamba2: layers that share a block


@pytest.fixture(scope="module")
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks say about the shards of each family that this session tests."""
    directory = tmp_path_factory.mktemp("shards")
    names = asked_for(request, test_shards_are_of_the_weights_of_one_rank)
    outcome = train(2, [], before=partial(shard_all, names, directory))
    assert outcome.exit_codes == [0, 0], outcome.output
    found: dict[str, Any] = json.loads((directory / "findings.json").read_text())
    return found


def shard_all(names: list[str], directory: Path) -> None:
    """Replaces train.py in the subprocess."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    found: dict[str, Any] = {}
    for name in names:
        config = MULTIMODAL if name == "gemma3" else zoo.config(name)
        one = drawn_whole(config, 7).eval()
        built = build_model(Options(config_name=name), copy.deepcopy(config))
        wrapped = fsdp.wrap(NextToken(built), decoder_layers(built), mesh, CPU, False, True, False).eval()
        torch.manual_seed(7)
        load_weights(built, {})
        different = same(everything(built), everything(one))
        tokens_BT = torch.arange(10, 50).view(2, 20)
        losses = [objective(input_ids=tokens_BT, labels=tokens_BT) for objective in (wrapped, NextToken(one))]
        for loss in losses:
            loss.backward()
        norms = fsdp.grad_norm(wrapped).item(), ddp.grad_norm(one).item()
        idle = [key for key, parameter in one.named_parameters() if parameter.requires_grad and parameter.grad is None]
        found[name] = {"different": different, "losses": [loss.item() for loss in losses], "norms": norms, "idle": idle}
    if dist.get_rank() == 0:
        (directory / "findings.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("name", [*each(SHARDED), "gemma3"])
def test_shards_are_of_the_weights_of_one_rank(shards: dict[str, Any], name: str) -> None:
    """With one seed, the initial weights are equal on one rank and on two, and so are loss and gradient."""
    found = shards[name]
    assert found["different"] == []
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
    assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5)
    if name == "gemma3":
        assert found["idle"] == []  # DDP waits for the gradient of each parameter that is not frozen


def test_infinity_in_a_configuration(tmp_path: Path) -> None:
    """JSON has no infinity, so config.json holds a dict for it, which `add_config_keys` reads back."""
    config = zoo.config("mamba2")
    assert config.time_step_limit[1] == float("inf")
    config.save_pretrained(tmp_path)
    add_config_keys(tmp_path / "config.json", config)
    assert AutoConfig.from_pretrained(tmp_path).time_step_limit[1] == float("inf")


def test_heads_that_differ_cannot_be_split() -> None:
    config = Gemma4TextConfig()
    config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}
    with pytest.raises(OptionError, match="tensor_parallel 2: the layers of gemma4_text have different numbers of hea"):
        check_tensor_parallel(config, 2)


def test_an_optimizer_has_no_empty_group() -> None:
    optimizer = build_optimizer(drawn_whole(zoo.config("olmo"), 1), Options())
    assert [len(group["params"]) == len(group["param_names"]) > 0 for group in optimizer.param_groups] == [True]


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MULTIMODAL = Gemma3Config(
    text_config={**SIZES, "pad_token_id": 0, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2},
    vision_config={**VISION, "image_size": 28, "patch_size": 14},
    **{"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4},
)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_multimodal_model_keeps_its_vision_tower(
    tiny: list[object], model_dir: Path, tmp_path: Path, strategy: str
) -> None:
    """Only text is trained. The export has the vision tower of the files, bit for bit."""
    path = Path(shutil.copytree(model_dir, tmp_path / "DIR"))
    AutoModelForImageTextToText.from_config(MULTIMODAL, dtype=torch.float32).save_pretrained(path)
    options = [*tiny, "--model_name_or_path", path, "--output_dir", tmp_path, "--strategy", strategy]
    train_ok(2, *options, "--max_steps", 2, "--gradient_checkpointing", "true")
    changed = same(stored(tmp_path), stored(path))
    assert stored(tmp_path).keys() == stored(path).keys()
    assert len(changed) == sum("vision" not in key and "projector" not in key for key in stored(path))
    AutoModelForImageTextToText.from_pretrained(tmp_path)


# --- Complete or refused --------------------------------------------------------------------------------------------


@pytest.fixture(params=["qwen3", "qwen3 moe"])
def copied(request: pytest.FixtureRequest, families: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint to damage: one file with a tied head, or several with an index and a tensor per expert."""
    return Path(shutil.copytree(families[request.param], tmp_path / "DIR"))


def refused(directory: Path) -> str:
    """The message that refuses a checkpoint before training."""
    with pytest.raises(OptionError) as error:
        loaded_whole(directory)
    message = str(error.value)
    assert message.startswith(f"model_name_or_path {directory}: ")
    assert len(message.splitlines()) <= 3
    return message


def rewrite(directory: Path, change: Any) -> None:
    """Change the tensors of a checkpoint: `change` gets the tensors of one file. The index is updated."""
    index = directory / "model.safetensors.index.json"
    listed: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        listed |= dict.fromkeys(tensors, path.name)
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def test_missing(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.pop("model.norm.weight", None))
    assert "1 missing tensors, for instance model.norm.weight\n" in refused(copied)


def test_unexpected(copied: Path) -> None:
    rewrite(copied, lambda tensors: rename(tensors, "norm.weight", "norm.bias"))
    assert " missing tensors, for instance model.layers.0.input_layernorm.weight\n" in refused(copied)
    rewrite(copied, lambda tensors: rename(tensors, "norm.bias", "norm.weight"))
    rewrite(copied, lambda tensors: "model.norm.weight" in tensors and tensors.update(extra=torch.zeros(1)))
    assert "1 unexpected tensors, for instance extra\n" in refused(copied)


def test_unused(copied: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Tensors that transformers ignores: constants are silent, predictors of more tokens are named, others refused."""
    kind = type(build_model(Options(), AutoConfig.from_pretrained(copied)))
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"^mtp", r"^model.visual", r"layers\.\d\d?\."])

    def add(name: str) -> None:
        rewrite(copied, lambda tensors: "model.norm.weight" in tensors and tensors.update({name: torch.zeros(1)}))

    add("model.layers.0.self_attn.rotary_emb.inv_freq")
    loaded_whole(copied)
    assert capfd.readouterr().err == ""
    add("mtp.fc.weight")
    add("model.layers.2.eh_proj.weight")  # as DeepSeek-V3 stores it: a layer after the last
    loaded_whole(copied)
    assert capfd.readouterr().err == (
        "model_name_or_path: 2 tensors of multi-token prediction, for instance model.layers.2.eh_proj.weight, are "
        "neither trained nor exported\n"
    )
    add("model.visual.merger.weight")
    assert f"1 tensors, for instance model.visual.merger.weight, are not in {kind.__name__}, and " in refused(copied)


def test_misshapen(copied: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    rewrite(copied, lambda tensors: name in tensors and tensors.update({name: torch.zeros(32, 31)}))
    assert f"mismatched shapes: {name} is [32, 31], and [32, 32] in the model\n" in refused(copied)


def test_an_expert_is_missing(families: dict[str, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(families["qwen3 moe"], tmp_path / "DIR"))
    rewrite(copied, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.down_proj.weight", None))
    assert "model.layers.1.mlp.experts.down_proj is [2, 32, 16], and [3, 32, 16] in the model\n" in refused(copied)
    rewrite(copied, lambda tensors: tensors.pop("model.layers.0.mlp.experts.1.up_proj.weight", None))
    assert "model.layers.0.mlp.experts.gate_up_proj cannot be joined: " in refused(copied)


def test_truncated(copied: Path) -> None:
    path = max(copied.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path.name} is damaged: " in refused(copied)
    path.write_bytes(b"")
    assert f"{path.name} is damaged: " in refused(copied)


def test_quantized(copied: Path) -> None:
    name = "model.norm.weight"
    rewrite(copied, lambda t: name in t and t.update({name: t[name].to(torch.float8_e4m3fn)}))
    assert f"{name} is quantized, in torch.float8_e4m3fn\n" in refused(copied)


@pytest.mark.fault(
    "security", "../, absolute paths and devices in a model's index", "refused: its files are in its directory"
)
def test_wrong_index(families: dict[str, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(families["llama"], tmp_path / "DIR"))
    path = copied / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(copied / index["weight_map"]["model.norm.weight"], tmp_path / "outside.safetensors")

    def with_norm_in(file: Any) -> str:
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"model.norm.weight": file}}))
        return refused(copied)

    for outside in ("../outside.safetensors", f"{tmp_path}/outside.safetensors", "/dev/zero", 3):
        assert f"{path.name} names {outside}, which is not a file in its directory\n" in with_norm_in(outside)
    for nothing in ("model-00009-of-00009.safetensors", "..", ""):
        assert nothing in with_norm_in(nothing)
    assert "and the index do not agree about model.norm.weight\n" in with_norm_in(index["weight_map"]["lm_head.weight"])
    for text in ("[]", "{}", "{", '{"weight_map": 3}'):
        path.write_text(text)
        assert f"{path.name} is not an index: " in refused(copied)


def test_tied_tensors_that_differ(families: dict[str, Path], tmp_path: Path) -> None:
    """A file may hold a tied tensor under either name or both, but not with two different values."""
    copied = Path(shutil.copytree(families["qwen3"], tmp_path / "DIR"))
    name, head = "model.embed_tokens.weight", "lm_head.weight"
    expected = everything(loaded_whole(copied))
    rewrite(copied, lambda tensors: tensors.update({head: tensors[name].clone()}))
    assert same(everything(loaded_whole(copied)), expected) == []
    rewrite(copied, lambda tensors: tensors.pop(name))
    assert same(everything(loaded_whole(copied)), expected) == []
    rewrite(copied, lambda tensors: tensors.update({name: tensors[head] + 1}))
    assert f"{head} and {name} differ, but tie_word_embeddings is true" in refused(copied)


def test_names_of_other_checkpoints(families: dict[str, Path], tmp_path: Path) -> None:
    """A base model without head, buffers of older versions, and experts that are joined already can be loaded."""
    base = Path(shutil.copytree(families["qwen3"], tmp_path / "base"))
    rewrite(base, lambda tensors: rename(tensors, "model.", ""))
    assert same(everything(loaded_whole(base)), everything(loaded_whole(families["qwen3"]))) == []
    old = Path(shutil.copytree(families["llama"], tmp_path / "old"))
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(2)}
    rewrite(old, lambda tensors: "model.norm.weight" in tensors and tensors.update(frequencies))
    assert same(everything(loaded_whole(old)), everything(loaded_whole(families["llama"]))) == []
    joined = AutoModelForCausalLM.from_pretrained(families["qwen3 moe"])
    joined.save_pretrained(tmp_path / "joined", save_original_format=False)
    shutil.copy(families["qwen3 moe"] / "tokenizer.json", tmp_path / "joined")
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored(tmp_path / "joined")
    assert same(everything(loaded_whole(tmp_path / "joined")), everything(loaded_whole(families["qwen3 moe"]))) == []


def test_no_causal_language_model(model_dir: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model_dir, tmp_path / "DIR"))
    T5Config(vocab_size=389).save_pretrained(copied)
    assert "pass a model that AutoModelForCausalLM of transformers knows" in refused(copied)


def test_what_nobody_initializes(families: dict[str, Path]) -> None:
    """A buffer that is in no file and that only the constructor computes would be uninitialized memory."""
    loaded = build_model(Options(), FAMILIES["qwen3"][0])
    loaded.register_buffer("table", torch.ones(3, device="meta"), persistent=False)
    weights = find_weights(Options(model_name_or_path=str(families["qwen3"])), loaded)
    with pytest.raises(
        OptionError, match="table of its Qwen3ForCausalLM is in no file, and _init_weights of its class"
    ):
        load_weights(loaded.to_empty(device="cpu"), weights)


# --- Code that comes with files is not run --------------------------------------------------------------------------


class Payload:
    """An object that leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.fault("security", "pickles under the names of other trainers in a model or checkpoint", "never unpickled")
def test_nothing_is_unpickled(families: dict[str, Path], tiny: list[object], tmp_path: Path) -> None:
    """No pickle is loaded under any name that trainers use. A checkpoint with only pickled weights is refused."""
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the payload must work"
    trace.unlink()
    copied = Path(shutil.copytree(families["qwen3"], tmp_path / "DIR"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (copied / name).write_bytes(pickle.dumps(Payload(trace)))
    train_ok(1, *tiny, "--model_name_or_path", copied, "--max_steps", 1, "--output_dir", tmp_path / "run")
    (copied / "model.safetensors").write_bytes(pickle.dumps(Payload(trace)))
    assert "model.safetensors is damaged: " in refused(copied)
    (copied / "model.safetensors").unlink()
    assert "no model.safetensors and no index; pickled weights (.bin) are never read\n" in refused(copied)

    saved = tmp_path / "run" / "checkpoint-1"
    for name in ("model/.metadata", "optimizer/.metadata", "optimizer.pt", "rng_state_0.pth"):
        (saved / name).write_bytes(pickle.dumps(Payload(trace)))
    options = [*tiny, "--model_name_or_path", families["qwen3"], "--output_dir", tmp_path / "run", "--max_steps", 2]
    train_ok(1, *options, "--resume_from_checkpoint", saved)
    assert not trace.exists()


@pytest.mark.fault(
    "security", "a model that transformers does not know, with code of its own", "refused without --trust_remote_code"
)
def test_remote_code_is_asked_for(families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code runs only with trust_remote_code, which the message names. It is exported with the model."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    copied, trace = Path(shutil.copytree(families["llama"], tmp_path / "DIR")), tmp_path / "trace"
    (copied / "code.py").write_text(REMOTE_CODE.format(trace=trace))
    config = json.loads((copied / "config.json").read_text())
    auto_map = {"AutoConfig": "code.OtherConfig", "AutoModelForCausalLM": "code.OtherForCausalLM"}
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "other", "auto_map": auto_map}))
    message = refused(copied)
    assert message.splitlines()[-1] == "read that code, and pass --trust_remote_code if it may run here"
    assert not trace.exists()
    loaded = loaded_whole(copied, trust_remote_code=True)
    assert trace.exists()
    assert type(loaded).__name__ == "OtherForCausalLM"
    write_model(tmp_path, loaded, AutoTokenizer.from_pretrained(families["llama"]), torch.bfloat16)
    assert same(stored(tmp_path), stored(copied)) == []
    assert (tmp_path / "code.py").exists()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)).__name__ == "OtherForCausalLM"


REMOTE_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path("{trace}").touch()


class OtherConfig(LlamaConfig):
    model_type = "other"


class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""


# --- Exporting ------------------------------------------------------------------------------------------------------


def test_export(families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export is bf16 by default, has an index if there are several files, and stores tied tensors once."""
    loaded = loaded_whole(families["qwen3"])
    tokenizer = AutoTokenizer.from_pretrained(families["qwen3"])
    tokenizer.chat_template = "{{ messages }}"
    for name, largest_file in (("one", "5GB"), ("several", "20KB")):
        monkeypatch.setattr(model.export, "LARGEST_FILE", largest_file)
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, loaded, tokenizer, getattr(torch, Options().save_dtype))
        exported, loading = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(loading.values())
        assert exported.dtype == torch.bfloat16
        assert exported.config.architectures == ["Qwen3ForCausalLM"]
        assert same(exported.state_dict(), {n: t.bfloat16() for n, t in loaded.state_dict().items()}) == []
        assert "lm_head.weight" not in stored(tmp_path / name)
        assert exported.generation_config.temperature == 0.6
        assert exported.generation_config.eos_token_id == [0, 1]
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == "{{ messages }}"
    assert (tmp_path / "one" / "model.safetensors").exists()
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(tmp_path / "several").keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "several").values())
    assert all(path.stat().st_size < 40_000 for path in (tmp_path / "several").glob("*.safetensors"))


# --- Memory ---------------------------------------------------------------------------------------------------------

MIB = 2**20


def status(name: str) -> int:
    """A number of bytes from /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure(report: Path) -> None:
    """Patch a rank: record its peak resident memory above that before build_model, and exit after loading."""
    build, original = build_model, load_weights
    before = 0

    def note_and_build(*arguments: Any) -> PreTrainedModel:
        nonlocal before
        before = status("VmRSS")
        return build(*arguments)

    def fill_and_end(built: PreTrainedModel, weights: Weights) -> None:
        original(built, weights)
        kept = sum(parameter.to_local().nbytes for parameter in built.parameters() if isinstance(parameter, DTensor))
        measured = {"kept": kept, "peak": status("VmHWM") - before}
        (report / f"{dist.get_rank()}.json").write_text(json.dumps(measured))
        dist.barrier()
        os._exit(0)

    setattr(model.build, "build_model", note_and_build)  # noqa: B010
    setattr(model.weights, "load_weights", fill_and_end)  # noqa: B010


def make_big(name: str, model_dir: Path, path: Path) -> int:
    """Write a model of zeros; returns the bytes of its fp32 parameters."""
    shutil.copytree(model_dir, path, ignore=shutil.ignore_patterns("model.safetensors"))
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(BIG[name], dtype=torch.bfloat16)
    zeros = {key: torch.zeros_like(tensor, device="cpu") for key, tensor in shapes.state_dict().items()}
    shapes.save_pretrained(path, state_dict=zeros, max_shard_size="30MB")  # a mapped file counts as memory of its own
    return 4 * sum(parameter.numel() for parameter in shapes.parameters())


@pytest.mark.parametrize(
    ("name", "strategy"), [("dense", FSDP), ("mixture", FSDP), pytest.param("dense", TENSOR, marks=pytest.mark.slow)]
)
def test_memory(tiny: list[object], model_dir: Path, tmp_path: Path, name: str, strategy: tuple[str, ...]) -> None:
    """A rank of four needs host memory for its shard of the fp32 parameters and a small constant only.

    Resident memory counts the mapped pages of files beside what the process allocates. Measured above a shard of 94 MiB
    (of 374): 32 MiB, most of them for importing the model's class and for the process group; above one of 105 MiB
    (of 419): 49 to 62 MiB, where the rank joins its four experts of a layer.
    """
    path = tmp_path / "DIR"
    size = make_big(name, model_dir, path)
    options = [*tiny, "--model_name_or_path", path, "--output_dir", tmp_path / "run", *strategy]
    outcome = train(RANKS, options, before=partial(measure, tmp_path))
    assert outcome.exit_codes == [0] * RANKS, outcome.output
    for rank in range(RANKS):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        print(f"{name}: model {size / MIB:.0f} MiB, " + ", ".join(f"{k} {v / MIB:.1f}" for k, v in measured.items()))
        assert measured["kept"] < 1.01 * size / RANKS
        assert measured["peak"] < measured["kept"] + CONSTANT


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, RANKS])
def test_more_than_a_rank_may_hold(model_dir: Path, tmp_path: Path, ranks: int) -> None:
    """Four ranks load and export a model of which each may allocate only 60% in fp32; one rank fails."""
    path = tmp_path / "DIR"
    size = make_big("dense", model_dir, path)
    outcome = train(ranks, [], before=partial(export_within, int(0.6 * size), path, tmp_path / "out"))
    if ranks == 1:
        assert outcome.exit_codes != [0]
        assert "allocate memory" in outcome.output
    else:
        assert outcome.exit_codes == [0] * RANKS, outcome.output
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > RANKS
        assert stored(tmp_path / "out").keys() == stored(path).keys() - {"lm_head.weight"}  # which is tied


def export_within(limit: int, path: Path, output_dir: Path) -> None:
    """Replaces train.py: load and export, with `limit` bytes of additional private memory."""
    dist.init_process_group("gloo")
    options = Options(model_name_or_path=str(path), output_dir=str(output_dir))
    config, tokenizer = load_config_and_tokenizer(options)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard", "tensor"))
    before = status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (before + limit, before + limit))
    built = build_model(options, config)
    weights = find_weights(options, built)
    fsdp.wrap(NextToken(built), decoder_layers(built), mesh, CPU, False, True, False)
    load_weights(built, weights)
    output_dir.mkdir(exist_ok=True)
    model.export.LARGEST_FILE = "30MB"
    export_model(options, built, tokenizer, [])
    print(
        f"{limit / MIB:.0f} MiB above {before / MIB:.0f} are enough; {(status('VmData') - before) / MIB:.0f} at the end"
    )
    dist.barrier()
    os._exit(0)


CONSTANT = 96 * MIB
WIDE: dict[str, Any] = {**SIZES, "vocab_size": 8192, "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 64}
BIG = {
    "dense": Qwen3Config(**{**WIDE, **TIED, "intermediate_size": 4096, "num_hidden_layers": 6}),
    "mixture": Qwen3MoeConfig(
        **{**WIDE, **TIED, "num_hidden_layers": 3, "num_experts": 16, "moe_intermediate_size": 640}
    ),
}
