"""An independent draft: a smaller model with the target's tokenizer.

Source: Leviathan et al. (arXiv:2211.17192), section 2.
"""

from potstill.core.errors import VocabularyMismatch
from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.draft_vocabulary import read_draft_vocabulary
from potstill.decode.drafters.model_drafter import ModelDrafter, make_model_drafter
from potstill.models.tokenizers.vocabulary import count_shared_ids


def make_independent(setup: DraftSetup, name: str) -> ModelDrafter:
    """A drafter with the model `name`, which drafts the tokens of its draft vocabulary alone if it has one.

    Raises: VocabularyMismatch if its tokenizer gives other ids, or misses some of the target's; ArtifactError for a
    damaged draft vocabulary.
    """
    draft = setup.load_draft(name)
    try:
        num_shared = count_shared_ids(setup.tokenizer, draft.tokenizer)
    except VocabularyMismatch as error:
        raise VocabularyMismatch(_describe(name)) from error
    rows = len(draft.model.get_input_embeddings().weight)
    if min(num_shared, rows) < setup.vocabulary:
        raise VocabularyMismatch(_describe(name))
    token_ids = read_draft_vocabulary(draft.path, setup.vocabulary)
    return make_model_drafter(setup, draft.model, token_ids=token_ids)


def _describe(name: str) -> str:
    return (
        f"the draft {name} has another vocabulary than the model; write --draft translated:{name}, which encodes its "
        f"text again"
    )


SPEC = DrafterSpec(
    name="model",
    argument="MODEL",
    help="a smaller model with the same tokenizer; --draft MODEL is short for it",
    length="4",
    make=make_independent,
)
