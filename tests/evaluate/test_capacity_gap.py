import pytest

from potstill.evaluate.capacity_gap import advise_sizes, compute_best_student, compute_best_teacher


def test_the_law_gives_the_numbers_of_its_paper():
    assert compute_best_teacher(1e9) == pytest.approx(2486.502e6)  # 2.498 * 1000 - 11.498, in millions
    assert compute_best_teacher(3e9) == pytest.approx(7482.502e6)  # the paper's pair: LLaMA2 7B and a student of 3B
    assert compute_best_student(7e9) == pytest.approx(2806.844e6, rel=1e-6)
    assert compute_best_student(1e9) / 1e9 == pytest.approx(0.4, abs=0.01)  # "the best student keeps two fifths"


@pytest.mark.parametrize("student", [8e6, 140e6, 3e9])
def test_the_best_student_of_the_best_teacher_is_the_student(student):
    teacher = compute_best_teacher(student)
    assert teacher is not None
    assert compute_best_student(teacher) == pytest.approx(student)


def test_students_below_the_line_have_no_teacher_on_it():
    assert compute_best_teacher(4e6) is None
    assert compute_best_teacher(7e6) is None  # the line gives 6.0M, smaller than the student
    assert compute_best_teacher(8e6) == pytest.approx(8.486e6)


@pytest.mark.parametrize(
    ("teacher", "said"), [(135e6, "inside the fit"), (7e9, "one pair"), (13e9, "extrapolated"), (30e6, "extrapolated")]
)
def test_the_range_of_validity_is_said(teacher, said):
    assert said in advise_sizes(teacher=teacher, student=teacher / 2).range
