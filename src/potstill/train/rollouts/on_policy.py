"""Rollouts: who writes the tokens that a step trains on, before they are counted.

A rollout is `(batch, student, frozen, generator) -> Batch`. It gets a packed batch and gives one in the same format, in
which the completions of some documents are replaced by what the student wrote after their prompts. Only completions are
trained; the batch's key `sampled` says which documents they are. No gradient goes through the sampling.

A prompt is what precedes the first token of a document that is trained. A document that is trained from its start on
(plain text, or the next window of a long answer) has none, and its first `opening` tokens serve as one. A completion is
at most as long as what it replaces, so that no pass grows; without a stop token by then it is cut, and trained as far
as it goes. An empty one is its stop token alone.

All randomness is a row of noise per document, drawn in the order of the documents: the same ones are rolled out, into
the same tokens, however a step is cut into passes. The generator is on the CPU, where drawing in parts is drawing at
once; `generator_of` seeds it anew for each step and rank.

Networks with tokens of their own: the author is told what stands `beside` a pack (`data.pairs.Paired.beside`), and
a rolled-out batch is read anew by it, as the data was.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from potstill.core.types import Batch
from potstill.data.packing import Pack, collate
from potstill.decode.generate import generate
from potstill.decode.sampling import Sampling
from potstill.train.rollouts.base import (
    Document,
    count_completions,
    count_prompt_tokens,
    find_trainable_documents,
    make_sampled_document,
    split_documents,
)


@dataclass(frozen=True, kw_only=True)
class CompletionSampler:
    """Writes the completions of documents of at most `longest` tokens.

    With a share of the `teacher`, each token is drawn from share * teacher + (1 - share) * student. `beside` adds to a
    pack what a companion with tokens of its own reads; by default, nothing.
    """

    sampling: Sampling
    max_length: int
    default_prompt_length: int = 16
    teacher_share: float = 0.0
    extend_pack: Callable[[Pack], Pack] = dict

    def draw_noise(self, num_documents: int, generator: torch.Generator) -> Float[Tensor, "D W"]:
        """A row of noise per document: two numbers to choose by, the others for its tokens."""
        return torch.rand(num_documents, 2 + self.max_length, generator=generator)

    def sample_completions(
        self,
        documents: Sequence[Document],
        student: nn.Module,
        frozen: Mapping[str, nn.Module],
        noise: Float[Tensor, "D W"],
        tally: Counter[str],
    ) -> list[Document]:
        """The documents with completions of their own."""
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
        count_completions(tally, completions, self.sampling.stop)
        new_documents = (
            make_sampled_document(prompt.cpu(), tokens) for prompt, tokens in zip(prompts, completions, strict=True)
        )
        return [new._replace(route=old.route) for new, old in zip(new_documents, documents, strict=True)]

    def make_batch(self, documents: Sequence[Document], device: torch.device) -> Batch:
        """The documents as one packed batch that says which of them were sampled."""
        lengths = torch.tensor([len(document.input_ids) for document in documents])
        ids, labels = [document.input_ids for document in documents], [document.labels for document in documents]
        routes = [document.route for document in documents if document.route is not None]
        pack = {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "lengths": lengths}
        pack |= {"routes": torch.tensor(routes)} if routes else {}
        sampled = torch.tensor([document.sampled for document in documents]).repeat_interleave(lengths)
        batch = {**collate([self.extend_pack(pack)]), "sampled": sampled[None]}
        return {name: values.to(device) for name, values in batch.items()}


@dataclass(frozen=True, kw_only=True)
class OnPolicyRollout:
    """The share of the documents that the student writes, each drawn alone: generalised knowledge distillation.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (arXiv:2306.13649), algorithm 1, where the
    divergence is the objective's. With `author.teacher` it is the sampling of MiniLLM (arXiv:2306.08543, section 2.2).
    Departs from the paper: there a whole step is either; here documents are, so that every step has its share of both.
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
