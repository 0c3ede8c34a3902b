"""What each query may see: the dense masks, by hand."""

import pytest
import torch

from potstill.core.blueprint import Rotary
from potstill.layers.positions import Positions


def positions(ids: list[list[int]], **rest: object) -> Positions:
    return Positions(torch.tensor(ids), Rotary(), 32, **rest)


def test_a_rotation_of_its_own_stands_in_for_the_model_s() -> None:
    found = positions([[0, 1, 2]])
    slow, own = found.get_cos_sin(4, torch.float32), found.get_cos_sin(4, torch.float32, Rotary(50.0))
    expected = Positions(torch.tensor([[0, 1, 2]]), Rotary(50.0), 32).get_cos_sin(4, torch.float32)
    assert torch.equal(own[0], expected[0])
    assert not torch.equal(own[0], slow[0])


def test_one_new_token_sees_all_that_came_before_without_a_mask() -> None:
    assert positions([[4]], past_length=4).get_mask(5, None) is None
    assert positions([[4]], past_length=4).get_mask(5, 5) is None


def test_a_window_hides_what_is_older() -> None:
    assert positions([[4]], past_length=4).get_mask(5, 2).tolist() == [[[[False, False, False, True, True]]]]


def test_several_new_tokens_see_the_state_and_their_own_past() -> None:
    seen = positions([[2, 3]], past_length=2).get_mask(4, None)
    assert seen.tolist() == [[[[True, True, True, False], [True] * 4]]]


def test_keys_beyond_the_last_token_of_a_preallocated_state_stay_hidden() -> None:
    seen = positions([[2]], past_length=2).get_mask(5, None)
    assert seen.tolist() == [[[[True, True, True, False, False]]]]


def test_keys_of_the_last_positions_alone_have_the_last_columns_of_the_mask() -> None:
    whole = positions([[4, 5]], past_length=4).get_mask(6, 3)
    assert torch.equal(positions([[4, 5]], past_length=4).get_mask(4, 3), whole[..., 2:])
    assert positions([[4]], past_length=4).get_mask(3, 3) is None
    real = torch.tensor([[False, False, False, True, True, True]])
    whole = positions([[1, 2]], past_length=4, token_mask=real).get_mask(6, 3)
    assert torch.equal(positions([[1, 2]], past_length=4, token_mask=real).get_mask(4, 3), whole[..., 2:])


def test_padding_is_seen_by_nobody_but_itself() -> None:
    real = torch.tensor([[False, True, True]])
    seen = positions([[0, 0, 1]], token_mask=real).get_mask(3, None)
    assert seen.tolist() == [[[[True, False, False], [False, True, False], [False, True, True]]]]


def test_documents_stay_apart_under_padding_too() -> None:
    real = torch.tensor([[True, True, True, False]])
    seen = positions([[0, 1, 0, 1]], token_mask=real).get_mask(4, None)
    rows = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert seen.int().tolist() == [[rows]]


def test_masks_and_angles_are_made_once() -> None:
    found = positions([[2, 3]], past_length=2)
    assert found.get_mask(4, None) is found.get_mask(4, None)
    assert found.get_cos_sin(4, torch.float32) is found.get_cos_sin(4, torch.float32)
    assert found.get_mask(4, 1) is not found.get_mask(4, None)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
def test_a_text_starts_after_the_padding_on_its_left(ids: list[int]) -> None:
    real = torch.tensor([[False, False, True, True, True]])
    places = positions([ids], token_mask=real)
    assert torch.equal(places.is_token, real)
    assert places.starts.int().tolist() == [[0, 0, 1, 0, 0]]
    rest = positions([ids[3:]], token_mask=real, past_length=3)
    assert rest.is_token.int().tolist() == [[1, 1]]
    assert rest.starts.int().tolist() == [[0, 0]]


def test_a_text_starts_late_where_all_tokens_so_far_are_padding() -> None:
    real = torch.tensor([[False, False, False, True], [False, True, True, True]])
    places = positions([[2, 3], [2, 3]], token_mask=real, past_length=2)
    assert places.starts.int().tolist() == [[0, 1], [0, 0]]


def test_each_document_starts_at_its_first_token_that_is_no_padding() -> None:
    real = torch.tensor([[True, True, False, True, False, True]])
    assert positions([[0, 1, 0, 1, 2, 3]], token_mask=real).starts.int().tolist() == [[1, 0, 0, 1, 0, 0]]
    assert positions([[0, 1, 0, 1, 2, 3]]).starts.int().tolist() == [[1, 0, 1, 0, 0, 0]]
    assert positions([[4]], past_length=4).starts.int().tolist() == [[0]]


def test_rows_with_distances_start_at_position_0_each_by_itself() -> None:
    distances = torch.zeros(2, 2, 6, dtype=torch.long)
    places = positions([[0, 1], [4, 5]], past_length=4, distances=distances)
    assert places.starts.int().tolist() == [[1, 0], [0, 0]]
    assert bool(places.is_token.all())
