"""Serves the application of `guarded_site.py`. The tests are skipped without the `serve` extra."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def dropped() -> list[str]:
    """Why connections were dropped."""
    return []


@pytest.fixture(scope="module")
def site():
    from guarded_site import Site

    return Site()


@pytest.fixture(scope="module")
def port(site, dropped):
    from guarded_site import GUARDS
    from loopback import listening

    from vismem.serving.connections import ConnectionLimits, uvicorn_settings
    from vismem.serving.guards import guarded

    limits = ConnectionLimits(head=0.5, idle=1.0, write=0.5, connections=60, on_drop=dropped.append)
    with listening(guarded(site.app, **GUARDS), **uvicorn_settings(limits)) as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Clients that were refused are not waited for long."""
    monkeypatch.setattr("vismem.serving.errors.LINGER", 0.3)
