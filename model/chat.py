"""Talk to a finished model in the terminal: python -m model.chat output.

The model answers through transformers' own `generate`. With a chat template, it answers messages and remembers the
conversation; a base model completes each text. Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D ends.
"""

import argparse
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from config.errors import OptionError, first_line
from model.adapters import CONFIG
from model.export import load_finished

HELP = "Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D ends"


class Answer(TextStreamer):
    """Prints the text of an answer while it is generated, and keeps it, because Ctrl-C may end it early."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a fragment. Characters that control a terminal are left out."""
        self.text += text
        shown = "".join(character for character in text if character.isprintable() or character in "\n\t")
        print(shown, end="\n" if stream_end else "", flush=True)


class Interrupt(StoppingCriteria):
    """Ends `generate` at the next token after Ctrl-C. An exception could come where Python drops it: in `__del__`."""

    def __init__(self) -> None:
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, self.press)

    def press(self, *_: Any) -> None:
        """Remember Ctrl-C."""
        self.pressed = True

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        return torch.full((len(input_ids),), self.pressed, dtype=torch.bool, device=input_ids.device)


def require_model(directory: Path) -> None:
    """Refuse a directory without a finished model, with what to do instead. Raises OptionError."""
    if (directory / CONFIG).exists() or (directory / "config.json").exists():
        return
    if (directory / "state.json").exists():
        step = directory.name.partition("-")[2] or "STEP"
        raise OptionError(
            f"{directory}: a checkpoint of a run, from which transformers cannot load a model\n"
            f"to export it, repeat the run's command with --resume_from_checkpoint {directory} --max_steps {step} "
            "--output_dir ANOTHER"
        )
    if checkpoints := sorted(directory.glob("checkpoint-*/state.json")):
        raise OptionError(
            f"{directory}: its run has not finished, so there is no model yet (checkpoints: {len(checkpoints)})\n"
            "continue it: repeat its command with --resume_from_checkpoint auto"
        )
    raise OptionError(
        f"{directory}: there is no model\ntrain one with `make train`, or pass its directory: python -m model.chat DIR"
    )


def load(directory: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on the GPU if there is one, else in fp32 on the CPU, and its tokenizer. Raises OptionError."""
    require_model(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        model = load_finished(str(directory), trust_remote_code, dtype=dtype, use_safetensors=True)
        return model.to(device).eval(), tokenizer
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"{directory}: transformers cannot load it: {first_line(error)}") from error


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> None:
    """Read lines from the terminal and print answers, until the input ends."""
    conversation = tokenizer.chat_template is not None
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if system and not conversation:
        raise OptionError(f"system {arguments.system}: the model has no chat template, so it has no system message")
    messages: list[dict[str, Any]] = list(system)
    kind = "it answers" if conversation else "a base model without a chat template: it completes your text"
    print(f"{arguments.model}: {kind}. {HELP}.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if not text.strip():
            continue
        if text.strip() == "/help":
            print(HELP)
            continue
        if text.strip() == "/reset":
            messages = list(system)
            print("the conversation is forgotten")
            continue
        messages.append({"role": "user", "content": text})
        try:
            prompt = (
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                if conversation
                else tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            )
            answer = generate(model, tokenizer, prompt, arguments)
        except Exception as error:  # of a template, or too little memory: the user may go on
            print(f"error: {first_line(error)}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Any, arguments: argparse.Namespace
) -> str:
    """Print the answer to a tokenized prompt, and return it; what there is of it after Ctrl-C. Raises OptionError."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    room = positions - prompt["input_ids"].shape[1]
    if room < 1:
        raise OptionError(f"the conversation is longer than the {positions} positions of the model: type /reset")
    answer = Answer(tokenizer)
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.temperature else {}
    interrupt = Interrupt()
    try:
        model.generate(
            **prompt.to(model.device),
            max_new_tokens=min(room, arguments.max_new_tokens),
            do_sample=bool(sampling),
            streamer=answer,
            stopping_criteria=StoppingCriteriaList([interrupt]),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            **sampling,
        )
    finally:
        signal.signal(signal.SIGINT, interrupt.before)
    return answer.text


def main(argv: list[str]) -> None:
    """Load the model that `argv` names, and talk. Raises OptionError."""
    parser = argparse.ArgumentParser(
        prog="python -m model.chat", description=f"Talk to a finished model. {HELP}.", allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", default="output", metavar="DIR", help="output_dir of a run [output]")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token [0.7]")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from the likeliest tokens [0.95]")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer [512; base model: 100]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling [0]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python files that come with the model")
    arguments = parser.parse_args(argv)
    longest = arguments.max_new_tokens
    if not (arguments.temperature >= 0 and 0 < arguments.top_p <= 1 and (longest is None or longest > 0)):
        raise OptionError("pass --temperature of at least 0, --top_p above 0 and up to 1, and --max_new_tokens above 0")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        __import__("readline")  # lets input() edit lines
    model, tokenizer = load(Path(arguments.model).expanduser(), arguments.trust_remote_code)
    if longest is None:
        arguments.max_new_tokens = 512 if tokenizer.chat_template else 100
    torch.manual_seed(arguments.seed)
    chat(model, tokenizer, arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"chat: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
