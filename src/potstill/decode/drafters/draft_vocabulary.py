"""The draft vocabulary: the token ids that a draft model scores, in a file of its folder.

The head is most of a small model with a large vocabulary. A draft that scores the frequent tokens alone is faster; the
target reads its tokens as before, so the text is the same. Sampled drafts give all other tokens the probability 0.

Source: Zhao et al., "FR-Spec" (arXiv:2502.14856), section 3.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from potstill.core.errors import ArtifactError

DRAFT_VOCABULARY_FILE = "draft_vocabulary.json"  # a list of ids


def read_draft_vocabulary(folder: Path, vocabulary: int) -> Int[Tensor, " S"] | None:
    """The ids of the draft in `folder`; None for a draft that scores all `vocabulary` tokens.

    Raises: ArtifactError unless the file is a list of different ids below `vocabulary`.
    """
    file = folder / DRAFT_VOCABULARY_FILE
    if not file.is_file():
        return None
    try:
        token_ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        token_ids = None
    is_list = isinstance(token_ids, list) and len(token_ids) > 0 and all(type(token) is int for token in token_ids)
    if not is_list or not 0 <= min(token_ids) <= max(token_ids) < vocabulary or len({*token_ids}) < len(token_ids):
        raise ArtifactError(
            f"{file} is no list of different token ids below {vocabulary:,}; train the draft again, or delete the "
            f"file to draft with all tokens"
        )
    return torch.tensor(token_ids)
