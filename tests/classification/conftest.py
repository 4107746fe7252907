"""Checkpoints that several files load, made once."""

import pytest

from tests.classification.models import save_checkpoint, save_quantised


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def quantised_checkpoint(checkpoint, tmp_path_factory) -> str:
    return save_quantised(checkpoint, tmp_path_factory.mktemp("quantised"))
