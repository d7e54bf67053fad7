"""The best model: which evaluated checkpoint has it, and whether evaluations still improve."""

import dataclasses
import math
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedModel

from checkpoint.files import MANIFEST
from checkpoint.identity import Best, Progress
from checkpoint.load import load_tensors, problems
from checkpoint.ranks import broadcast_object
from config.errors import OptionError
from config.options import Options
from config.validation import best_metric
from model.export import checkpoint_tensors


class Selection:
    """Compares the evaluations of a run, as transformers does. Its decisions are equal on all ranks.

    Every rank must make one, and call it with the same metrics.
    """

    def __init__(self, options: Options, progress: Progress) -> None:
        self.options, self.metric = options, best_metric(options)
        self.best = dataclasses.replace(progress.best)
        self.evaluation = 0, math.nan  # the step of the last evaluation, and its value
        self.resumed = progress.step  # whose checkpoint exists
        path, warning = _path(options, self.best), ""
        if self.best.metric != self.metric:
            self.best = Best(self.metric)
            if self.metric and progress.step:
                warning = f"warning: {self.metric}: the evaluations before step {progress.step} were not compared by it"
        elif self.best.step and not broadcast_object((path / MANIFEST).exists()):
            self.best.step, self.best.value = 0, None
            warning = f"warning: {path}: the best checkpoint so far is missing; the next ones are compared without it"
        if warning and dist.get_rank() == 0:
            print(warning, file=sys.stderr, flush=True)

    @property
    def over(self) -> bool:
        """Whether training ends here, because `early_stopping_patience` is exhausted."""
        patience = self.options.early_stopping_patience
        return patience is not None and self.best.without_improvement >= patience

    def reason(self) -> str:
        """The reason for which training ends early."""
        than = "" if self.best.lowest is None else f" than {self.best.lowest:.4f}"
        return f"stopped early: {self.best.without_improvement} evaluations in a row had no lower {self.metric}{than}"

    def evaluated(self, step: int, metrics: dict[str, float] | None) -> None:
        """Compare an evaluation with those before it. NaN is no improvement.

        The evaluation before the first step is not compared, nor None, one that a signal has ended.
        """
        if not self.metric or not step or not metrics:
            return
        value, lowest = metrics[self.metric], self.best.lowest
        lowest = math.inf if lowest is None else lowest
        improved = lowest - value > self.options.early_stopping_threshold
        self.best.without_improvement = 0 if improved else self.best.without_improvement + 1
        if value < lowest:
            self.best.lowest = value
        self.evaluation = step, value
        if step == self.resumed:
            self.saved(step)

    def saved(self, step: int) -> Best:
        """The best evaluations, for a checkpoint of `step`. It is the best one if its evaluation is."""
        evaluated, value = self.evaluation
        if evaluated == step and value < (math.inf if self.best.value is None else self.best.value):
            self.best.step, self.best.value = step, value
        return dataclasses.replace(self.best)


def load_best_model(options: Options, model: PreTrainedModel, best: Best) -> str:
    """Load the parameters of the best checkpoint, if `load_best_model_at_end`. Every rank must call.

    Returns in words which model it is. Raises OptionError on all ranks if that checkpoint is damaged.
    """
    exported = "the adapters" if options.use_peft and not options.merge_lora else "the model"
    if not options.load_best_model_at_end:
        return exported
    if not best.step:
        return f"{exported} of the last step, because no checkpoint has {best.metric}"
    if found := broadcast_object(problems(_path(options, best)) if dist.get_rank() == 0 else None):
        raise OptionError(
            f"load_best_model_at_end true: the best checkpoint is damaged: {found[0]}\n"
            "to export the last model, resume without --load_best_model_at_end"
        )
    path = _path(options, best)
    load_tensors(path / "model", checkpoint_tensors(model))
    return f"{exported} of {path.name}, the best with {best.metric} {best.value:.4f}"


def _path(options: Options, best: Best) -> Path:
    return Path(options.output_dir) / f"checkpoint-{best.step}"
