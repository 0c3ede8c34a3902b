"""The law of capacity gap: every student has a best teacher size, and a larger teacher gives a worse student.

    N_T = 2.498 N_S - 11.498      in millions of parameters, R^2 = 0.9957

Source: Zhang et al., "Towards the Law of Capacity Gap in Distilling Language Models" (MiniMA), arXiv:2311.07052. The
line was fitted to students pruned from GPT-2 teachers of 140M to 1.6B and Pythia teachers of 70M to 2.8B parameters.
The paper checks it once beyond: of LLaMA2 7B, 13B and 70B, the 7B was the best teacher of a 3B student.
"""

from dataclasses import asdict, dataclass
from typing import Any

SLOPE, OFFSET = 2.498, -11.498e6
FITTED_RANGE = (70e6, 2.8e9)  # parameters of the teachers that the line was fitted to
CHECKED_SIZE = 7e9  # parameters of the one larger teacher in the paper


@dataclass(frozen=True)
class CapacityGapAdvice:
    """The best teacher size for this student and the best student size for this teacher, in parameters.

    `teacher_for_student` is None for a student that is too small for the line. `range` says in words whether the law
    was fitted to teachers of this size.
    """

    teacher_for_student: float | None
    student_for_teacher: float
    range: str

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return asdict(self)


def compute_best_teacher(student: float) -> float | None:
    """The parameters of the best teacher for a student of this size; None where the line gives no larger model."""
    size = SLOPE * student + OFFSET
    return size if size > student else None


def compute_best_student(teacher: float) -> float:
    """The parameters of the student whose best teacher has this size."""
    return (teacher - OFFSET) / SLOPE


def advise_sizes(*, teacher: float, student: float) -> CapacityGapAdvice:
    """The law applied to a teacher and a student with these numbers of parameters."""
    return CapacityGapAdvice(compute_best_teacher(student), compute_best_student(teacher), describe_fit_range(teacher))


def describe_fit_range(teacher: float) -> str:
    """In words, whether the law was fitted to teachers of this size."""
    low, high = FITTED_RANGE
    if low <= teacher <= high:
        return "inside the fit: GPT-2 and Pythia teachers of 70M to 2.8B parameters"
    if high < teacher <= CHECKED_SIZE:
        return "beyond the fit (70M to 2.8B), but up to 7B checked with one pair: LLaMA2 7B and a 3B student"
    return f"extrapolated: the fit is of teachers of 70M to 2.8B parameters, and this one has {teacher / 1e6:,.1f}M"
