"""The random number generators of a rank: seeded, saved and restored."""

import base64
import hashlib

import torch


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seed this rank's generators from seed, step and rank, because equal dropout on all ranks would be biased."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4]))


def rng_state() -> dict[str, str]:
    """The states of torch's generators on the CPU and on this rank's GPU, in base64."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore_rng(state: dict[str, str]) -> None:
    """Set torch's generators to the states that `rng_state` returned."""
    states = {
        device: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for device, text in state.items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
