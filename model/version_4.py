"""What transformers 4 and the serving programs that use it read in an export, beside what transformers 5 writes.

transformers 5 has new names for some keys of config.json and tokenizer_config.json, and reads the old names, too.
transformers 4 ignores the new names: it would serve another rope than the model was trained with, without a word.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Fast tokenizers of transformers 4 that replace the post-processor of tokenizer.json by one of their own.
OWN_POST_PROCESSOR = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")


def add_config_keys(path: Path, config: PretrainedConfig) -> None:
    """Add the keys of version 4 to the config.json at `path`, if version 5 reads the same configuration with them."""
    values = json.loads(path.read_text())
    added = _with_rope_keys(values)
    for name, new_name in config.attribute_map.items():  # such as num_experts, which version 5 calls num_local_experts
        if "experts" in name and new_name in values:
            added.setdefault(name, values[new_name])
    if "dtype" in values:
        added["torch_dtype"] = values["dtype"]
    new = added.keys() - values.keys()
    if _as_read(config, added, new) == _as_read(config, values, new):
        values = added
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def rename_tokenizer_keys(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer_config.json at `path` the names of version 4, which version 5 reads, too."""
    values = json.loads(path.read_text())
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):  # a mapping in version 4
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values.get("tokenizer_class") in OWN_POST_PROCESSOR:
        ids = tokenizer("a")["input_ids"]
        values["add_bos_token"] = ids[0] == tokenizer.bos_token_id
        values["add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _with_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the rope settings of version 4, also in the configurations inside it."""
    config = {key: _with_rope_keys(value) if _has_rope(value) else value for key, value in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    full = rope.get("full_attention", rope)
    if not isinstance(full, dict) or "rope_theta" not in full:
        return config
    family, fraction = str(config.get("model_type")), full.get("partial_rotary_factor")
    if family == "gpt_neox":
        return {"rotary_emb_base": full["rope_theta"], "rotary_pct": 1.0 if fraction is None else fraction} | config
    keys = {"rope_theta": full["rope_theta"]}
    scaling = {key: value for key, value in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type") == "longrope" and family == "phi3":  # refuses other keys
        scaling = {"type": "longrope", "short_factor": full["short_factor"], "long_factor": full["long_factor"]}
    if scaling.get("rope_type") != "default":
        keys["rope_scaling"] = scaling
    if fraction is not None:
        keys["partial_rotary_factor"] = fraction
    if family.startswith("gemma3") and isinstance(sliding := rope.get("sliding_attention"), dict):
        keys["rope_local_base_freq"] = sliding["rope_theta"]
    return keys | config


def _has_rope(value: object) -> bool:
    return isinstance(value, dict) and "rope_parameters" in value


def _as_read(config: PretrainedConfig, values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """The configuration that version 5 reads from `values`, without `keys` and the older name of rope_type."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # in a file, infinity is a dict that version 5 reads
        json.dump(values, file)
        file.flush()
        try:
            read = type(config).from_json_file(file.name).to_dict()
        except Exception:  # version 5 refuses keys of version 4 (Gemma 4): these values are unlike any that it reads
            return {"unreadable": values}
    if isinstance(rope := read.get("rope_parameters"), dict):
        rope.pop("type", None)
    return {key: value for key, value in read.items() if key not in keys}
