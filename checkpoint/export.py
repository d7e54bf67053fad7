"""The finished model at the root of output_dir, for `from_pretrained`."""

import os
import shutil
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint.files import WEIGHT_FILES, fsync
from checkpoint.ranks import broadcast_object, run_together
from config.errors import writing
from config.options import Options
from model.adapters import adapter_config
from model.export import write_adapters, write_model


def export_model(
    options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: list[int]
) -> None:
    """Write model, or adapters, and tokenizer to the root of output_dir, for `from_pretrained`. Every rank must call.

    `stop_tokens` become the EOS tokens of `generate`. New files replace those of an earlier model one by one, an index
    after the files that it lists. Raises OptionError on all ranks if one cannot write.
    """
    # With these, `generate` stops where the documents ended.
    model.generation_config.eos_token_id = stop_tokens or tokenizer.eos_token_id
    output_dir, rank, world_size = Path(options.output_dir), dist.get_rank(), dist.get_world_size()
    exporting = output_dir / broadcast_object(f".exporting-{uuid.uuid4().hex}")
    with writing(output_dir):
        run_together(lambda: exporting.mkdir(exist_ok=True))

    def replace() -> None:
        if rank > 0:
            return
        old = {path for pattern in WEIGHT_FILES for path in output_dir.glob(pattern)}
        for path in sorted(path for path in exporting.rglob("*") if path.is_file()):
            fsync(path)
            final = output_dir / path.relative_to(exporting)
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)
            old.discard(final)
        for path in old:
            path.unlink()
        fsync(output_dir)

    try:
        dtype = getattr(torch, options.save_dtype)
        with writing(output_dir):
            if options.use_peft and not options.merge_lora:
                config, base = adapter_config(model, options), str(options.model_name_or_path)
                write_adapters(exporting, model, tokenizer, dtype, config, base, rank, run_together)
            else:
                write_model(exporting, model, tokenizer, dtype, rank, world_size, run_together)
            run_together(replace)
    finally:
        shutil.rmtree(exporting, ignore_errors=True)
