"""A short soak test of the server: all kinds of requests, and no errors but the clients' own."""

from __future__ import annotations

import json

import pytest
from benchmark_programs import benchmark


def test_a_short_soak(tmp_path, capsys):
    soak = benchmark("serve")
    path = tmp_path / "soak.json"
    assert soak.main(["--requests", "60", "--clients", "6", "--seed", "1", "--json", str(path)]) == 0, (
        capsys.readouterr()
    )
    found = json.loads(path.read_text())
    assert found["requests"] == 60 == sum(found["outcomes"].values())
    assert not found["faults"] and not found["log"] and found["shutdown"]["status"] == 0
    assert {"good", "abort"} < found["outcomes"].keys()
    assert found["same_request_again"]["compared"] and not found["same_request_again"]["differing"]
    assert len(found["requests_per_second"]["many"]) == len(found["requests_per_second"]["one"]) == 4


def test_what_the_soak_counts_as_an_error():
    soak = benchmark("serve")
    rest = {"rss_mb": 100.0, "threads": 11, "files": 20}
    assert soak.grown([rest, {"rss_mb": 104.0, "threads": 11, "files": 21}]) == []
    assert soak.grown([rest, {"rss_mb": 110.0, "threads": 12, "files": 25}]) == [
        "rss_mb grew from 100 to 110",
        "threads grew from 11 to 12",
        "files grew from 20 to 25",
    ]
    kinds = soak.Kinds(3)
    drawn = [kinds.draw() for _ in range(2000)]
    assert {kind for kind, _ in drawn} == {"good", "abort", *soak.BAD}
    assert soak.Kinds(3).draw() == drawn[0]
    with pytest.raises(SystemExit):
        soak.main(["--requests", "59"])
