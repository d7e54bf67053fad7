"""Options in the words of other trainers, read as options of this one.

names has a row for each option of TrainingArguments, TRL, LLaMA-Factory, ms-swift and launchers: it is translated,
accepted without effect, or refused with a remedy. answers has the values that need code. deepspeed and deepspeed_keys
read DeepSpeed files. Options of this trainer itself do not belong here: they are in config/options.py.
"""
