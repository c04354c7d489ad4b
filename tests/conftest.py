"""Shared settings: no network, two threads, and the tiny models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import tiny
import torch

torch.set_num_threads(2)


@pytest.fixture(params=list(tiny.FAMILIES))
def family(request) -> str:
    """Each supported family in turn."""
    return request.param
