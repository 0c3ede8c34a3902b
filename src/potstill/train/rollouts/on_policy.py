"""On-policy rollouts: the student samples completions, and the step trains on them.

A rollout is `(batch, student, frozen, generator) -> Batch`. It takes a packed batch and returns one in the same format,
in which some documents have completions that the student sampled after their prompts. Only completions are trained on.
The key `sampled` of the batch marks these documents. No gradient flows through the sampling.

A prompt is all that precedes the first trained token of a document. A document that is trained from its start (plain
text) has no prompt; its first `default_prompt_length` tokens serve as one. A
completion is at most as long as the one it replaces, so no pass grows. Without a stop token by then it is cut, and
trained as it is. An empty completion is its stop token alone. A sampled document keeps its declared fields.

All randomness is a row of noise per document, drawn in the order of the documents. So the same documents get the same
completions, however a step is divided into passes. The generator is on the CPU, where drawing in parts equals drawing
at once; `make_generator` seeds it for each step and rank.

Where a network has a tokenizer of its own, `extend_pack` adds its inputs
(`data.cross_tokenizer.packs.CrossTokenizerPacks.add_teacher_inputs`), as it does for the data set.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from potstill.core.types import Batch, move_batch
from potstill.data.packing import Pack, collate
from potstill.decode.generate import generate
from potstill.decode.sampling import Sampling
from potstill.train.rollouts.base import (
    Document,
    count_completions,
    count_prompt_tokens,
    find_trainable_documents,
    join_documents,
    make_sampled_document,
    split_documents,
)


@dataclass(frozen=True, kw_only=True)
class CompletionSampler:
    """Samples completions for documents of at most `max_length` tokens.

    With a share a of the teacher, each token is drawn from a * teacher + (1 - a) * student. `extend_pack` adds to a
    pack the inputs of a network with another tokenizer; by default it adds nothing.
    """

    sampling: Sampling
    max_length: int
    default_prompt_length: int = 16
    teacher_share: float = 0.0
    extend_pack: Callable[[Pack], Pack] = dict

    def draw_noise(self, num_documents: int, generator: torch.Generator) -> Float[Tensor, "D W"]:
        """A row of noise per document: two numbers to choose documents by, and one for each token."""
        return torch.rand(num_documents, 2 + self.max_length, generator=generator)

    def sample_completions(
        self,
        documents: Sequence[Document],
        student: nn.Module,
        frozen: Mapping[str, nn.Module],
        noise: Float[Tensor, "D W"],
        tally: Counter[str],
    ) -> list[Document]:
        """The documents with sampled completions. Adds to `tally` what was sampled."""
        if not documents:
            return []
        device = next(student.parameters()).device
        prompts = [
            document.input_ids[: count_prompt_tokens(document.labels, self.default_prompt_length)].to(device)
            for document in documents
        ]
        limits = [len(document.input_ids) - len(prompt) for document, prompt in zip(documents, prompts, strict=True)]
        weighted_models = [(1 - self.teacher_share, student)]
        if self.teacher_share:
            weighted_models.append((self.teacher_share, frozen["teacher"]))
        completions = generate(weighted_models, prompts, noise[:, 2:].to(device), limits, self.sampling)
        tally.update(count_completions(completions, self.sampling.stop))
        return [
            make_sampled_document(document, len(prompt), tokens)
            for document, prompt, tokens in zip(documents, prompts, completions, strict=True)
        ]

    def make_batch(self, documents: Sequence[Document], device: torch.device) -> Batch:
        """The documents as one packed batch on `device`; its key `sampled [1 T]` marks the sampled ones."""
        pack = join_documents(documents)
        sampled = torch.tensor([document.sampled for document in documents]).repeat_interleave(pack["lengths"])
        batch = {**collate([self.extend_pack(pack)]), "sampled": sampled[None]}
        return move_batch(batch, device)


@dataclass(frozen=True, kw_only=True)
class OnPolicyRollout:
    """Generalized knowledge distillation: the student samples completions for a `share` of the documents.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (arXiv:2306.13649), algorithm 1; the divergence
    belongs to the objective. With `sampler.teacher_share` this samples as MiniLLM does (arXiv:2306.08543, section 2.2).
    Departs from the paper: there a whole step is sampled or not. Here each document is, so that every step has both.
    """

    share: float
    sampler: CompletionSampler
    tally: Counter[str] = field(default_factory=Counter)

    def __call__(
        self, batch: Batch, student: nn.Module, frozen: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Batch:
        documents = split_documents(batch)
        noise = self.sampler.draw_noise(len(documents), generator)
        indices = ((noise[:, 0] < self.share) & find_trainable_documents(documents)).nonzero()[:, 0]
        if not len(indices):
            return batch
        selected_documents = [documents[n] for n in indices.tolist()]
        new_documents = self.sampler.sample_completions(selected_documents, student, frozen, noise[indices], self.tally)
        for n, new_document in zip(indices.tolist(), new_documents, strict=True):
            documents[n] = new_document
        return self.sampler.make_batch(documents, batch["input_ids"].device)
