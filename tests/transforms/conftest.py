"""Fixtures of the transforms: one network of each kind, a trained one, batches."""

import pytest
from tests.transforms.small import KINDS, build, learnt, packed

from potstill.core.types import Batch
from potstill.models.backbone import Backbone


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Backbone:
    """One network of each kind."""
    return build(request.param)


@pytest.fixture
def llama() -> Backbone:
    """A tied Llama of 3 layers, 3 key/value heads with 2 queries each, 10 neurons, width 16."""
    return build("llama tied")


@pytest.fixture
def batches() -> list[Batch]:
    """Two packed batches."""
    return [packed(7, 5), packed(4, 9)]


@pytest.fixture(scope="session")
def trained() -> tuple[Backbone, list[Batch], list[Batch]]:
    """(a character model that has learnt, batches to measure on, batches to judge by)."""
    return learnt()
