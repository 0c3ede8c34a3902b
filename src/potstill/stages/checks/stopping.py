"""The check that what is trained stops: answers end in a stop token, and generation ends there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.core.types import IGNORE
from potstill.decode.generate import generate
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.stages.checks.inputs import CheckInputs
from potstill.stages.checks.report import Check

MAX_PROMPT, NUM_STEPS = 32, 3  # tokens before the end of an answer: read, and written
FLAT_TEMPERATURE = 1e15  # at which all tokens are equally likely


def check_stop_token(inputs: CheckInputs) -> Check | None:
    """Answers end in a stop token that is trained on, and the model stops when it writes a trained answer.

    The model writes the end of an answer of the data in the decoding loop of rollouts, samples and the server. The
    random numbers are chosen so that the tokens of the answer are drawn.
    """
    if inputs.kind == "text":
        return None
    passed, finding = inputs.stop_share >= 0.5, f"in {inputs.stop_share:.0%} of the answers"
    answer = _find_answer(inputs) if passed else None
    if answer is not None:
        prompt, tokens = answer
        stops = find_stop_tokens(inputs.student, inputs.student_tokenizer)
        written = write_tokens(inputs, prompt, tokens, stops)
        passed = written[-1] in stops and set(tokens[len(written) :]) <= stops
        names = inputs.student_tokenizer.convert_ids_to_tokens(written[-1:])
        finding += f"; generation {'stops' if passed else 'does not stop'} at {names[0]!r}"
    return Check.from_result(
        "stop token",
        passed,
        finding=finding,
        why="a student that never learns to stop writes on without end",
        remedy="give a chat template that ends each answer with a special token, with --chat-template; add the token "
        "to eos_token_id in generation_config.json; or give a larger --context if answers are cut",
    )


def _find_answer(inputs: CheckInputs) -> tuple[Tensor, list[int]] | None:
    """The end of an answer that is not cut: the tokens to read, and the trained tokens up to its end."""
    pack, stops = inputs.full_pack, find_stop_tokens(inputs.student, inputs.student_tokenizer)
    for number in range(int(pack["documents"].max()) + 1):
        inside = pack["documents"][0] == number
        ids, labels = pack["input_ids"][0][inside], pack["labels"][0][inside]
        trained = (labels != IGNORE).nonzero()[:, 0].tolist()
        if not trained or int(ids[trained[-1]]) not in stops:
            continue
        stop = trained[-1] + 1
        start = next(place for place in range(stop - 1, -1, -1) if place == 0 or place - 1 not in trained)
        start = max(start, stop - NUM_STEPS)
        if start:
            return ids[max(0, start - MAX_PROMPT) : start], ids[start:stop].tolist()
    return None


def write_tokens(inputs: CheckInputs, prompt: Tensor, tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """What the student writes after `prompt` if it draws `tokens`: all of them, or those up to a stop token.

    At the flat temperature each of the V ids has the probability 1 / V, so the number (i + 1/2) / V draws the id i.
    """
    sampling = Sampling(vocabulary=inputs.vocabulary, stop=stops, temperature=FLAT_TEMPERATURE)
    noise = (torch.tensor([list(tokens)], dtype=torch.float64, device=prompt.device) + 0.5) / inputs.vocabulary
    (written,) = generate([(1.0, inputs.student)], [prompt], noise, [len(tokens)], sampling)
    return written
