"""A plain and slow definition of the loss; the checks compare the fast loss with it."""

import torch
from torch import Tensor, nn

from potstill.core.errors import UnsupportedModel
from potstill.core.types import IGNORE
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import unwrap_model
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_token_ids
from potstill.ops.divergence import apply_temperature
from potstill.stages.checks.inputs import CheckInputs


@torch.no_grad()
def reference_loss(inputs: CheckInputs, student: nn.Module, *, compute_dtype: torch.dtype) -> Tensor:
    """The sums of cross-entropy and, for a pair, of the divergence: from each model's own logits, in float64."""
    divergence = apply_temperature(inputs.logit_objective.divergence, inputs.logit_objective.temperature)
    num_ids, models = _count_shared_ids(inputs), [student, *([] if inputs.teacher is None else [inputs.teacher])]
    sums = torch.zeros(len(models), dtype=torch.float64)
    for document in inputs.batch["documents"].unique():
        in_document = inputs.batch["documents"][0] == document
        ids, labels = inputs.batch["input_ids"][:, in_document], inputs.batch["labels"][0, in_document]
        rows, targets = labels[1:] != IGNORE, labels[1:][labels[1:] != IGNORE].cpu()
        log_q, *teacher_log_probs = (_compute_log_probs(model, ids, num_ids, compute_dtype)[rows] for model in models)
        sums[0] -= log_q.gather(-1, targets[:, None]).sum()
        for log_p in teacher_log_probs:
            sums[1] += divergence(log_p, log_q).sum()
    return sums


def _count_shared_ids(inputs: CheckInputs) -> int:
    """The number of ids that are a token, and for a pair the same token."""
    if inputs.teacher is None:
        return min(count_token_ids(inputs.student_tokenizer), inputs.vocabulary)  # an external teacher may have fewer
    if inputs.teacher_tokenizer is None:
        raise UnsupportedModel("the teacher has no tokenizer, so its loss cannot be computed; add one")
    return count_shared_ids(inputs.teacher_tokenizer, inputs.student_tokenizer)


def _compute_log_probs(model: nn.Module, ids: Tensor, num_ids: int, compute_dtype: torch.dtype) -> Tensor:
    """log softmax of a model's own logits of one document over the real ids, except at the last token."""
    causal_lm = unwrap_model(model)
    use_autocast = compute_dtype != torch.float32 and causal_lm.dtype == torch.float32
    with eval_mode(causal_lm), torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=use_autocast):
        logits = causal_lm(input_ids=ids, use_cache=False).logits
    return logits[0, :-1, :num_ids].double().log_softmax(-1).cpu()
