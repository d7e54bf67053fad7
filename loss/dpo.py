"""Direct preference optimization: the loss of pairs."""

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from loss.cross_entropy import log_probabilities


class Preference(nn.Module):
    """Direct preference optimization (Rafailov et al. 2023, equation 7): no reward model, no sampling."""

    needs_initial_model = True  # also in a resumed run: rewards refer to it

    def __init__(self, model: PreTrainedModel, beta: float) -> None:
        super().__init__()
        self.model = model
        self.beta = beta

    def forward(self, input_ids: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
        """The sum over pairs of -log sigmoid(reward of the chosen answer - that of the rejected one): a scalar in fp32.

        `input_ids` and `labels` are as above, the chosen sequences of all pairs before the rejected ones. `reference`,
        fp32, has for each of them its log-probability by a model that stays as it is; a reward is beta times how much
        higher this model's is. Without `reference`, the log-probabilities themselves, fp32 [B]: how one is made.

        Without any pair, `reference` is empty, and what stands in `input_ids` counts for nothing.
        """
        logits_BTV = self.model(input_ids=input_ids, use_cache=False).logits
        learned_B = log_probabilities(logits_BTV, labels)
        if reference is None:
            return learned_B
        chosen, rejected = (self.beta * (learned_B[: len(reference)] - reference)).chunk(2)
        return -functional.logsigmoid(chosen - rejected).sum()
