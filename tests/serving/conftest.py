"""The pocket model, loaded once for the tests of the server."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def model():
    from vismem.loading import load_model

    return load_model().model
