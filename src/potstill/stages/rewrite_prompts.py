"""Rewrites the prompts of a data set before a model answers them: new ones in their manner, or translations.

    potstill generate MODEL --data seeds.jsonl --self-instruct 500 --translate --languages en:0.4,zh:0.3,fr:0.3 --out F

`--self-instruct N` shows the model prompts of the data, with their system prompts as roles, and lets it write others. A
prompt is left out if its ROUGE-L F1 with an earlier one is 0.7 or more. `--translate` draws the language of each prompt
by the given probabilities, and lets the model translate the prompt; the answer is then written in that language.

The seed and the number of a prompt determine its language, its examples and its random numbers. The examples come from
the data and, one of four, from prompts of finished parts. So a stopped run continues to the same prompts.

Source: Phoenix (arXiv:2304.10453), section 3.1: post-translation multilingual instructions and user-centered
instructions. Self-Instruct (arXiv:2212.10560), section 2.2: examples of both kinds, and the threshold of 0.7; it shows
eight examples where this shows four, since small models read short prompts better.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from potstill.data.turns import is_trained, to_message
from potstill.evaluate.similarity import PromptPool
from potstill.stages.answer_writer import Answer, AnswerWriter, Line
from potstill.stages.dataset_parts import load_part, load_parts
from potstill.stages.generate_options import GenerateDatasetOptions, parse_language_shares

Document = Mapping[str, Any]
TRANSLATION_DRAW, INSTRUCTION_DRAW = 1, 2  # of random numbers; answers have the draw 0
NUM_EXAMPLES = 4  # prompts that the model sees before it writes another
MAX_SIMILARITY = 0.7
MAX_ATTEMPTS = 4  # for each new prompt that is wanted
PLACEHOLDER = "..."  # where the answer of a new prompt will stand
REPEATED = "a prompt like an earlier one"
NO_FORM = "a new prompt without the form of the examples"
UNTRANSLATED = "a translation that equals its prompt"
TRANSLATE_PROMPT = (
    "Translate the task below into {language}. Do not carry it out: write its translation, and nothing else.\n\n{text}"
)
INSTRUCT_PROMPT = (
    "Here are tasks that people give to an assistant.\n\n{examples}\n\nWrite one more task in exactly this form. "
    "Choose another topic, and another kind of task."
)
FIELD = re.compile(
    r"^[\s*#>-]*(role|instruction|task|question|input|output|answer)s?[\s*]*:[\s*]*", re.IGNORECASE | re.MULTILINE
)
INSTRUCTION, OTHER_INSTRUCTIONS, END_NAMES = "instruction", ("task", "question"), ("output", "answer")
NO_INPUT = ("", "none", "<noinput>", "n/a")


class RewrittenPrompts(NamedTuple):
    """The documents to answer, the reasons why others were left out, and the facts for the card."""

    documents: Sequence[Document]
    drop_counts: Counter[str]
    facts: Mapping[str, Any]


class Prompt(NamedTuple):
    """What a document asks: the role of its system prompt, and the words of its user."""

    role: str
    text: str

    def format(self, *, has_roles: bool) -> str:
        """The prompt in the form of the examples; a blank line parts the instruction from its input."""
        instruction, _, context = self.text.partition("\n\n")
        role = f"Role: {self.role}\n" if has_roles else ""
        return f"{role}Instruction: {instruction.strip()}\nInput: {context.strip() or 'none'}"


def rewrite_prompts(
    options: GenerateDatasetOptions, writer: AnswerWriter, documents: Sequence[Document], folder: Path, *, size: int
) -> RewrittenPrompts:
    """The documents to answer; with neither option, those given. `folder` keeps finished parts of `size` prompts.

    Raises: DataError for a chat that the template refuses, if such rows are to be refused.
    """
    drop_counts: Counter[str] = Counter()
    facts: dict[str, Any] = {}
    if options.self_instruct:
        lines = InstructionWriter(options, writer, documents).write(folder, size)
        documents = _take_documents(lines, drop_counts)[: options.self_instruct]
        facts["new_prompts"] = {"written": len(lines), "taken": len(documents)}
    if options.translate:
        lines = load_parts(folder, "translate", documents, partial(_translate, options, writer), size=size)
        documents = list(_drop_repetitions(_take_documents(lines, drop_counts), drop_counts))
        facts["languages"] = dict(Counter(document["language"] for document in documents).most_common())
    return RewrittenPrompts(documents, drop_counts, facts)


def _take_documents(lines: Sequence[Line], drop_counts: Counter[str]) -> list[Document]:
    """The documents in the lines; counts the reasons of those left out."""
    drop_counts.update(line["left_out"] for line in lines if "left_out" in line)
    return [line["document"] for line in lines if "document" in line]


def _drop_repetitions(documents: Sequence[Document], drop_counts: Counter[str]) -> Iterator[Document]:
    texts: set[str] = set()
    for document in documents:
        text = _normalize(read_prompt(document).text)
        if text in texts:
            drop_counts[REPEATED] += 1
        else:
            yield document
        texts.add(text)


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def read_prompt(document: Document) -> Prompt:
    """The system prompt of a document, and the user's turn before its first answer."""
    if "messages" not in document:
        return Prompt("", document["prompt"])
    messages = [to_message(turn) for turn in document["messages"]]
    roles = [message["content"] for message in messages if message["role"] == "system"]
    return Prompt(roles[0] if roles else "", messages[_find_user(messages)]["content"])


def replace_prompt(document: Document, text: str) -> Document:
    """The document up to its first answer, with `text` as the user's turn before it."""
    if "messages" not in document:
        return {**document, "prompt": text}
    turns = list(document["messages"])
    position = _find_user([to_message(turn) for turn in turns])
    turns[position] = {**turns[position], "content": text}
    return {**document, "messages": turns}


def _find_user(messages: Sequence[Mapping[str, Any]]) -> int:
    """The last user's turn before the first answer that is trained on, or the first turn if there is none."""
    first_answer = next((n for n, message in enumerate(messages) if is_trained(message)), len(messages))
    return max((n for n in range(first_answer) if messages[n]["role"] == "user"), default=0)


def draw_language(options: GenerateDatasetOptions, number: int) -> str:
    """The language of prompt `number`, drawn by the probabilities of --languages."""
    shares = parse_language_shares(options.languages)
    return random.Random(f"language {options.seed} {number}").choices(list(shares), list(shares.values()))[0]


def _translate(
    options: GenerateDatasetOptions, writer: AnswerWriter, documents: Sequence[Document], offset: int
) -> list[Line]:
    """Each document in its language, or the reason why it is left out."""
    languages = [draw_language(options, offset + n) for n in range(len(documents))]
    prompts = [read_prompt(document).text for document in documents]
    requests = {
        offset + n: make_request(
            options.translate_prompt or TRANSLATE_PROMPT, language=get_language_name(language), text=prompts[n]
        )
        for n, language in enumerate(languages)
        if language != options.source_language
    }
    answers = writer.answer(requests, draw=TRANSLATION_DRAW)
    lines: list[Line] = []
    for n, (document, language) in enumerate(zip(documents, languages, strict=True)):
        answer = answers.get(offset + n)
        text = prompts[n] if answer is None else answer.text.strip()
        if answer is not None and answer.lack:
            lines.append({"left_out": f"{answer.lack} to the request for a translation"})
        elif answer is not None and _normalize(text) == _normalize(prompts[n]):
            lines.append({"left_out": UNTRANSLATED})
        else:
            lines.append({"document": {**replace_prompt(document, text), "language": language}})
    return lines


def make_request(template: str, **values: str) -> Document:
    """A request to the model as a document: the template with each value in place of its name in braces."""
    names = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
    return {"prompt": names.sub(lambda match: values[match[0][1:-1]], template), "response": PLACEHOLDER}


class InstructionWriter:
    """Lets a model write prompts in the manner of `seeds`, which are pairs or chats as the new documents are."""

    def __init__(self, options: GenerateDatasetOptions, writer: AnswerWriter, seeds: Sequence[Document]) -> None:
        self.options, self.writer = options, writer
        self.seeds = [read_prompt(seed) for seed in seeds]
        self.is_chat = any("messages" in seed for seed in seeds)
        self.has_roles = any(seed.role.strip() for seed in self.seeds)

    def write(self, folder: Path, size: int) -> list[Line]:
        """The lines of all parts, until enough of them hold a prompt or the attempts are over."""
        wanted, lines, prompts = self.options.self_instruct, list[Line](), list[Prompt]()
        for number, offset in enumerate(range(0, MAX_ATTEMPTS * wanted, size)):
            write = partial(self._write_part, range(offset, offset + size), prompts)
            lines += load_part(folder / f"instruct-{number:05}.jsonl", write)
            prompts = [read_prompt(line["document"]) for line in lines if "document" in line]
            if len(prompts) >= wanted:
                break
        return lines

    def _write_part(self, numbers: range, prompts: Sequence[Prompt]) -> list[Line]:
        """A line for each number: a document with a new prompt, or the reason why it is left out."""
        requests = {}
        for number in numbers:
            examples = draw_examples(self.seeds, prompts, seed=self.options.seed, number=number)
            text = "\n\n".join(example.format(has_roles=self.has_roles) for example in examples)
            requests[number] = make_request(self.options.instruct_prompt or INSTRUCT_PROMPT, examples=text)
        pool = PromptPool(prompt.text for prompt in (*self.seeds, *prompts))
        answers = self.writer.answer(requests, draw=INSTRUCTION_DRAW).values()
        return [self._make_line(answer, pool) for answer in answers]

    def _make_line(self, answer: Answer, pool: PromptPool) -> Line:
        """The line of an answer, whose prompt joins the pool."""
        prompt = parse_prompt(answer.text)
        if answer.lack or prompt is None:
            return {"left_out": f"{answer.lack} to the request for a prompt" if answer.lack else NO_FORM}
        if pool.find_similarity(prompt.text) >= MAX_SIMILARITY:
            return {"left_out": REPEATED}
        pool.add(prompt.text)
        return {"document": make_document(prompt if self.has_roles else Prompt("", prompt.text), is_chat=self.is_chat)}


def draw_examples(seeds: Sequence[Prompt], accepted: Sequence[Prompt], *, seed: int, number: int) -> list[Prompt]:
    """The prompts that the model sees before it writes prompt `number`: the last may be one that it wrote itself."""
    generator = random.Random(f"examples {seed} {number}")
    num_accepted = min(1, len(accepted))
    examples = generator.sample(seeds, min(NUM_EXAMPLES - num_accepted, len(seeds)))
    return examples + generator.sample(accepted, num_accepted)


def parse_prompt(text: str) -> Prompt | None:
    """The role, the instruction and its input in the form of the examples; None without an instruction.

    `Task:` or `Question:` begins an instruction too, and `Output:` or `Answer:` ends the prompt, as small models write.
    """
    fields = list(_find_fields(text))
    ends = [*(start for _, start, _ in fields[1:]), len(text)]
    values: dict[str, str] = {}
    for (name, _, start), end in zip(fields, ends, strict=False):
        if name in END_NAMES or name in values:
            break  # an answer, or a second prompt
        values[name] = text[start:end].strip()
    instruction, context = values.get(INSTRUCTION, ""), values.get("input", "")
    if not instruction:
        return None
    has_input = context.strip("*. ").lower() not in NO_INPUT
    return Prompt(values.get("role", ""), f"{instruction}\n\n{context}" if has_input else instruction)


def _find_fields(text: str) -> Iterator[tuple[str, int, int]]:
    """The name of each field with the places where its line and its text begin.

    A task or question is the instruction where no field has that name; else it is text.
    """
    matches = list(FIELD.finditer(text))
    has_instruction = any(match[1].lower() == INSTRUCTION for match in matches)
    for match in matches:
        name = match[1].lower()
        if name in OTHER_INSTRUCTIONS:
            if has_instruction:
                continue
            name, has_instruction = INSTRUCTION, True
        yield name, match.start(), match.end()


def make_document(prompt: Prompt, *, is_chat: bool) -> Document:
    """A pair, or a chat whose system prompt is the role; the answer is to be written."""
    if not is_chat:
        return {"prompt": prompt.text, "response": PLACEHOLDER}
    turns = [("system", prompt.role), ("user", prompt.text), ("assistant", PLACEHOLDER)]
    return {"messages": [{"role": role, "content": content} for role, content in turns if content]}


def get_language_name(language: str) -> str:
    """The English name of a language by its code, such as Chinese for `zh`; any other text as it is."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES  # a table that a library keeps

    name: str = LANGUAGES.get(language.lower(), language)
    return name[:1].upper() + name[1:]
