"""What every rank would do first, done once in the server from which ranks are forked: see tests/launch.py."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen3")  # compiles 700 regular expressions, and keeps them
