"""Prints an answer while it is written, and a note on its tokens and its speed."""

from potstill.core.notes import print_note
from potstill.decode.answer_stream import AnswerStream

GREEN, UNDERLINED, RESET = "\x1b[32m", "\x1b[4m", "\x1b[0m"


def choose_draft_style() -> str:
    """The code that marks the tokens of a draft on stdout, and a note on what it means.

    They are green, with NO_COLOR underlined. Off a terminal nothing is marked.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        print_note("--show marks tokens on a terminal only; here the text is plain")
        return ""
    name, style = ("underlined", UNDERLINED) if console.no_color else ("green", GREEN)
    print_note(f"what the draft wrote and the model kept is {name}; the rest is the model's own")
    return style


def show_answer(answer: AnswerStream, *, marks_draft: bool) -> None:
    """Print an answer as it is written, and a note on it."""
    print_answer(answer, draft_style=choose_draft_style() if marks_draft else "")
    print_note(describe_answer(answer))


def print_answer(answer: AnswerStream, *, draft_style: str = "") -> None:
    """Print the text of an answer piece by piece, then a line break, also where it ends early.

    `draft_style` begins what a drafter proposed.
    """
    is_marked = False
    try:
        for event in answer:
            if draft_style and event.text and event.drafted != is_marked:
                is_marked = event.drafted
                print(draft_style if is_marked else RESET, end="")
            print(event.text, end="", flush=True)
    finally:
        print(RESET if is_marked else "", flush=True)


def describe_answer(answer: AnswerStream) -> str:
    """The counts and speeds of an answer, such as `41 tokens at 93 tokens/s; prompt: 36 tokens at 812 tokens/s`."""
    prompt_length, num_read = len(answer.request.prompt), answer.stats.prompt_tokens
    parts = [
        _format_speed(len(answer.completion.tokens), answer.tokens_per_second),
        f"prompt: {_format_speed(num_read, answer.prompt_tokens_per_second)}"
        + (f" and {prompt_length - num_read} from before" if num_read < prompt_length else ""),
    ]
    if answer.stats.drafted:
        parts.append(
            f"{answer.num_accepted} of {answer.stats.drafted} draft tokens kept, "
            f"{answer.tokens_per_pass or 1:.1f} tokens per pass"
        )
    if answer.completion.finish_reason == "length":
        parts.append(f"the answer has reached its limit of {answer.request.max_new_tokens} tokens (--max-tokens)")
    return "; ".join(parts)


def _format_speed(number: int, rate: float | None) -> str:
    noun = "token" if number == 1 else "tokens"
    return f"{number} {noun}" if rate is None else f"{number} {noun} at {rate:,.{1 if rate < 10 else 0}f} tokens/s"
