"""A draft with another tokenizer: the draft reads the text of the target, and its own text becomes the target's tokens.

The whole text is encoded anew for every draft, because a new token may merge with the ones before it. The draft keeps
keys and values of all but the last `MARGIN` tokens, which such a merge reaches. Its begin-of-text token comes once.
The draft is greedy, and its tokens are a fixed choice for the target.

Source: Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
Vocabularies" (arXiv:2502.05202), algorithm 2, and Hugging Face's universal assisted generation.
"""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.draft_vocabulary import read_draft_vocabulary
from potstill.decode.drafters.drafter import Draft, DraftContext
from potstill.decode.drafters.model_drafter import ModelDrafter
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.models.tokenizers.vocabulary import count_usable_ids

MARGIN = 8  # tokens at the end of a text that a new token may change
TAIL = 8  # tokens of the target that are encoded again with the draft's text
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TranslatedDrafter(ModelDrafter):
    """Drafts with `runner`, whose model has the tokenizer `draft_tokenizer`, for a target with `tokenizer`."""

    def __init__(
        self,
        runner: ModelRunner,
        draft_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: int,
        widths: Sequence[int],
        confidence: float = 0.0,
    ) -> None:
        super().__init__(runner, widths=widths, confidence=confidence)
        self.draft_tokenizer, self.tokenizer, self.vocabulary = draft_tokenizer, tokenizer, vocabulary
        self.sampling = Sampling(vocabulary=runner.vocabulary, stop=frozenset(), temperature=0.0)
        self.prefix = _find_prefix(draft_tokenizer)
        self.read_ids: dict[int, list[int]] = {}  # by slot: the draft's ids with keys and values

    def start(self, slot: int, ids: Sequence[int], hidden: Float[Tensor, "T D"] | None = None) -> None:
        """Reads the prompt, in the draft's tokens."""
        self._read_text(slot, self._encode(ids))

    def propose_batch(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """The drafts of several texts, as chains of the target's tokens."""
        draft_contexts = []
        for context in contexts:
            ids = self._encode(context.ids)
            if ids[: len(self.read_ids[context.slot])] != self.read_ids[context.slot]:
                super().free(context.slot)
                self._read_text(context.slot, ids)
            draft_contexts.append(replace(context, ids=ids, sampling=self.sampling, limit=context.limit if ids else 0))
        drafts = super().propose_batch(draft_contexts)
        return [
            Draft.chain(self._translate(context, draft_context.ids, draft.tokens))
            for context, draft_context, draft in zip(contexts, draft_contexts, drafts, strict=True)
        ]

    def accept(self, slot: int, path: Sequence[int], token: int, hidden: Float[Tensor, "P D"] | None = None) -> None:
        """Keeps what was read of the text, but for its end."""
        tree = self._trees.pop(slot, None)
        if tree is not None and tree.tokens:
            stable = tree.unread[: max(0, len(tree.unread) - MARGIN)]
            self.runner.commit(slot, range(len(stable)))
            self.read_ids[slot] += stable

    def free(self, slot: int) -> None:
        """Forgets a text."""
        super().free(slot)
        self.read_ids.pop(slot, None)

    def _read_text(self, slot: int, ids: Sequence[int]) -> None:
        stable = list(ids[: max(0, len(ids) - MARGIN)])
        self.read_ids[slot] = stable
        if stable and len(ids) < self.runner.context:
            self.runner.prefill(slot, stable)

    def _encode(self, ids: Sequence[int]) -> list[int]:
        """The text in the draft's tokens; empty while its last character is incomplete."""
        first = 1 if ids[0] == self.tokenizer.bos_token_id else 0
        text = _decode(self.tokenizer, ids[first:])
        if text.endswith(INCOMPLETE):
            return []
        encoded: list[int] = self.draft_tokenizer(text, add_special_tokens=False).input_ids
        return self.prefix + encoded

    def _translate(self, context: DraftContext, draft_ids: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The draft's new tokens as tokens of the target, up to a special token or an incomplete character."""
        special = set(self.draft_tokenizer.all_special_ids)
        end = next((n for n, token in enumerate(tokens) if token in special), len(tokens))
        tail = list(draft_ids[-TAIL:])
        before, after = (_decode(self.draft_tokenizer, ids) for ids in (tail, [*tail, *tokens[:end]]))
        addition = after[len(before) :].rstrip(INCOMPLETE) if after.startswith(before) else ""
        new_ids = self._encode_addition(list(context.ids[-TAIL:]), addition) if addition else []
        if end < len(tokens) and tokens[end] == self.draft_tokenizer.eos_token_id:
            stop = sorted(context.sampling.stop)
            new_ids += [self.tokenizer.eos_token_id if self.tokenizer.eos_token_id in stop or not stop else stop[0]]
        first_bad = next((n for n, token in enumerate(new_ids) if not 0 <= token < self.vocabulary), len(new_ids))
        return new_ids[: min(first_bad, context.depth)]

    def _encode_addition(self, tail: list[int], addition: str) -> list[int]:
        """The target's tokens of a text after the tokens `tail`; by itself where it would change them."""
        encoded: list[int] = self.tokenizer(
            _decode(self.tokenizer, tail) + addition, add_special_tokens=False
        ).input_ids
        if encoded[: len(tail)] == tail:
            return encoded[len(tail) :]
        alone: list[int] = self.tokenizer(addition, add_special_tokens=False).input_ids
        return alone


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _find_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token, if the tokenizer writes one."""
    ids = tokenizer("a").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def make_translated(setup: DraftSetup, name: str) -> TranslatedDrafter:
    """A drafter with the model `name` and its own tokenizer.

    Raises: UsageError for a tree; ArtifactError for a damaged draft vocabulary.
    """
    setup.refuse_options("translated", tree=True)
    draft = setup.load_draft(name)
    vocabulary = count_usable_ids(draft.tokenizer, draft.model)
    token_ids = read_draft_vocabulary(draft.path, vocabulary)
    runner = ModelRunner(draft.model, vocabulary=vocabulary, slots=setup.slots, token_ids=token_ids)
    return TranslatedDrafter(
        runner,
        draft.tokenizer,
        setup.tokenizer,
        vocabulary=setup.vocabulary,
        widths=setup.widths,
        confidence=setup.confidence,
    )


SPEC = DrafterSpec(
    name="translated",
    argument="MODEL",
    help="a smaller model with another tokenizer, whose text is encoded again",
    length="4",
    make=make_translated,
)
