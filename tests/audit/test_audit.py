"""The whole audit reaches the right verdicts: on memories built for each of them, and on the shipped one."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from picture_questions import even, question

import vismem
from vismem import cli
from vismem.audit import audit as running
from vismem.audit.activations import ActivationStore
from vismem.audit.audit import AuditOptions, audit
from vismem.audit.interventions import formed_by
from vismem.audit.names import INTERVENTIONS
from vismem.audit.questions import questions
from vismem.audit.reference import intact_answers
from vismem.audit.verdicts import NO, UNTESTED, YES
from vismem.data import Row
from vismem.decoding.policies import Forced
from vismem.evaluation.records import Record, RecordFile
from vismem.pocket import MEMORY_PATH
from vismem.training.rewards import load_rewards

SHORT = Forced([(0, 1, "short")])
MEMORY, IMAGE, QUESTION, KIND, ORDER = (
    "Does the answer depend on the memory?",
    "Does it depend on the image?",
    "Does it depend on the question?",
    "Does it depend on the kind?",
    "Does it depend on the order of the slots?",
)
MORE, FACTS, LOOK = "Is it more than extra computation?", "Can facts be read from it?", "Do later tokens look at it?"


def pictures(count: int) -> list[Row]:
    """Questions about random pictures, with two facts of each that no pixel shows."""
    facts = [{"carried one": f"value{n * 7 % 3}", "absent one": f"value{n * n % 5 % 3}"} for n in range(count)]
    return [question(number, attributes=own) for number, own in enumerate(facts)]


def audited(model, rows, out, invocation=SHORT, page=False, **options):
    """The numbers of an audit; the page, which takes longer than they do, only with `page`."""
    options = {"batch_size": 40, "max_new_tokens": 5, **options}
    with pytest.MonkeyPatch.context() as patch:
        if not page:
            patch.setattr(running, "write_report", lambda *_: None)
        return audit(model, rows, load_rewards([even]), AuditOptions(out, invocation=invocation, **options))


def answers(found, kinds="all"):
    return {one["question"]: one["answer"] for one in found["verdicts"] if one["kinds"] == kinds}


def told(found, question, kinds="all"):
    return next(one for one in found["verdicts"] if (one["question"], one["kinds"]) == (question, kinds))


@pytest.fixture(scope="module")
def model():
    return tiny.equip("idefics3")


@pytest.fixture(scope="module")
def shipped():
    return vismem.VisMem.from_pretrained(MEMORY_PATH, dtype=torch.float32)


def spread(vector: torch.Tensor, kind: str) -> torch.Tensor:
    """Four multiples of a vector at the scale of embeddings; long memory's are reversed."""
    steps = torch.linspace(0.5, 2, 4)[:, None]
    return (vector if kind == "short" else vector.flip(0))[None] * steps


def test_a_memory_that_ignores_the_image_is_called_image_independent(model, tmp_path):
    """Planted: the memory is made of the observed words alone."""
    plant = lambda form: lambda kind, seen: [spread(one.segment.mean(0) * 5, kind) for one in seen]  # noqa: E731
    with formed_by(model, plant):
        found = audited(model, pictures(24), tmp_path, interventions=("another_image", "another_question", "shuffled"))
    image = told(found, IMAGE)
    assert (
        image["answer"] == NO and "the memory is the same" in image["text"] and "0.0 % of its length" in image["text"]
    )
    assert found["effects"]["all"][1]["moved"]["high"] < 1e-5
    moved = {row["name"]: row["moved"]["low"] for row in found["effects"]["all"] if "moved" in row}
    assert moved["another_question"] > 0.05 and moved["shuffled"] > 0.05  # the audit is not blind


def test_a_memory_that_sees_the_image_alone_is_called_question_independent(model, tmp_path):
    """Planted: the memory is made of the visual states alone."""
    plant = lambda form: lambda kind, seen: [spread(one.visual.mean(0) * 5, kind) for one in seen]  # noqa: E731
    with formed_by(model, plant):
        found = audited(model, pictures(24), tmp_path, interventions=("another_image", "another_question"))
    verdict = told(found, QUESTION)
    assert verdict["answer"] == NO and "the memory is the same" in verdict["text"]
    assert "the memory is the same" not in told(found, IMAGE)["text"]
    assert found["effects"]["all"][1]["moved"]["low"] > 0.05


def test_a_memory_that_copies_a_fact_is_found_by_the_probe(model, tmp_path):
    """Planted: noise, and in one direction of it a fact that neither picture nor words show."""
    rows = pictures(64)
    facts = {row.id: int(row.columns["attributes"]["carried one"][-1]) for row in rows}
    chance = torch.Generator().manual_seed(3)
    directions = torch.randn(3, model.backbone.hidden_size, generator=chance)
    noise = {row.id: torch.randn(4, model.backbone.hidden_size, generator=chance) for row in rows}

    def plant(form):
        return lambda kind, seen: [noise[o.origin[0]] + 4 * directions[facts[o.origin[0]]] for o in seen]

    with formed_by(model, plant):
        found = audited(model, rows, tmp_path, n=12, interventions=("zeros",), page=True)
    facts_read = told(found, FACTS, "short")
    assert facts_read["answer"] == YES and facts_read["text"].startswith("carried 100 %")
    assert "absent 1" not in facts_read["text"].split("; not decidable")[0]
    families = found["probes"]["short"]["families"]
    assert families["carried"]["memory"]["value"] > 0.95
    for other in ("visual tokens", "query", "memory shuffled"):
        assert families["carried"][other]["value"] < 0.6
    assert families["absent"]["gain"]["low"] < 0.05
    assert 'aria-label="probes of short memory"' in (tmp_path / "report.html").read_text()


def test_a_memory_that_the_model_ignores_shows_no_effect(tmp_path):
    """Planted: attention's output is zero, so the next word depends only on the last one."""
    deaf = tiny.equip("idefics3")
    with torch.no_grad():
        for layer in deaf.backbone.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    found = audited(deaf, pictures(80), tmp_path, max_new_tokens=3, batch_size=80)
    given = answers(found)
    assert {given[q] for q in (MEMORY, IMAGE, QUESTION, KIND, ORDER, MORE)} == {NO}
    for row in found["effects"]["all"][1:]:
        assert row["flips"]["value"] == row["change"]["value"] == 0 and row["kl_first"]["high"] < 1e-5
        assert (
            row["moved"]["low"] > 0.01 or row["name"] == "another_question"
        )  # memories do differ; the model ignores them
    assert found["checks"]["formed again"] == {"memories": 80, "furthest": pytest.approx(0, abs=1e-4)}


def test_the_packaged_short_memory_depends_on_the_image_and_helps(shipped, tmp_path):
    """Late questions: the picture has left the window, so what the memory holds decides the answer."""
    rows = questions("pocket:late", 12, 1)
    options = AuditOptions(
        tmp_path, n=12, batch_size=12, max_new_tokens=24, about={"base": "pocket", "data": "pocket:late"}
    )
    unread = [Record.failed("gone", "no such image")]
    found = audit(shipped, rows, load_rewards("pocket"), options, unread)
    assert found["overview"]["gain"]["low"] > 0.5 and found["failed"] == {"gone": "no such image"}
    for asked in (MEMORY, IMAGE, MORE):
        assert told(found, asked)["answer"] == YES and told(found, asked)["large"], asked
    assert "points" in told(found, IMAGE)["text"] and "n = 12" in told(found, IMAGE)["text"]
    assert told(found, LOOK, "short")["answer"] == YES
    assert told(found, FACTS, "short")["answer"] == UNTESTED and "fewer than 40" in told(found, FACTS, "short")["text"]
    rows_of = {row["name"]: row for row in found["effects"]["all"]}
    assert set(rows_of) == {"off", *INTERVENTIONS} and all(row["n"] == 12 for row in rows_of.values())
    assert rows_of["another_image"]["change"]["high"] < -0.4 and rows_of["another_image"]["kl_first"]["value"] > 0.1
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 5 and "pocket:late" in page and told(found, ORDER)["answer"] in page
    assert not re.search(r'(src|href)="(?!data:|#)', page.replace("xlink:href", "href")), "the page loads something"
    assert json.loads((tmp_path / "audit.json").read_text()) == json.loads(json.dumps(found))


def test_batched_rows_are_kept_apart(shipped, tmp_path):
    """Learned invocations let waiting prompts be read in one batch; each look is still recorded for its own row."""
    rows = questions("pocket:late", 4, 1)
    bank, store = ActivationStore(shipped, rows, tmp_path / "bank"), RecordFile(tmp_path / "intact.jsonl", {})
    intact_answers(bank, load_rewards("pocket"), store, batch_size=4, max_new_tokens=24)
    for row_id, entry in bank.entries.items():
        seen = bank.observation(row_id, 0)
        query = shipped.memory.builder([seen.visual], [seen.states])[0]
        assert torch.allclose(entry.queries[0], query, atol=1e-3)
        assert torch.allclose(entry.visual, seen.visual, atol=1e-3)


def test_each_kind_is_replaced_on_its_own(shipped, tmp_path):
    """Withheld rules: a look and a recall in every answer; another image does not change long memory's recall."""
    rows = questions("pocket:rules", 10, 1)
    options = AuditOptions(
        tmp_path, n=10, batch_size=10, max_new_tokens=40, interventions=("zeros", "another_image", "another_question")
    )
    found = audit(shipped, rows, load_rewards("pocket"), options)
    assert set(found["effects"]) == {"all", "short", "long"}
    by_kind = {k: {row["name"]: row for row in found["effects"][k]} for k in ("short", "long")}
    assert by_kind["short"]["another_image"]["flips"]["low"] > 0.5 > by_kind["long"]["another_image"]["flips"]["high"]
    assert (
        by_kind["long"]["another_question"]["flips"]["low"]
        > 0.3
        > by_kind["short"]["another_question"]["flips"]["high"]
    )
    assert answers(found, "short")[IMAGE] == YES and answers(found, "long")[QUESTION] == YES


def test_a_resumed_audit_gives_the_same_numbers(model, tmp_path, monkeypatch):
    rows, chosen = pictures(14), ("zeros", "noise", "another_image")
    whole = audited(model, rows, tmp_path / "whole", n=10, interventions=chosen)
    inner, missing = running.answer, []

    def stopping(model_, asked_rows, *given, **named):
        missing.append(sum(row.id not in named["store"].done for row in asked_rows))
        if stops and len(missing) == 3:
            raise KeyboardInterrupt
        return inner(model_, asked_rows, *given, **named)

    monkeypatch.setattr(running, "answer", stopping)
    stops = True
    with pytest.raises(KeyboardInterrupt):
        audited(model, rows, tmp_path / "stopped", n=10, interventions=chosen)
    cut = (tmp_path / "stopped" / "zeros.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped" / "zeros.jsonl").write_text("".join(cut[:-3]) + cut[-3][:20])  # killed while it wrote
    stops = False
    missing.clear()
    again = audited(model, rows, tmp_path / "stopped", n=10, interventions=chosen, batch_size=3)
    assert missing == [0, 3, 10, 10]  # off was complete, zeros lost three lines, the rest had not started
    for part in ("overview", "effects", "gaze"):
        assert json.dumps(again[part]) == json.dumps(whole[part])
    with pytest.raises(ValueError, match="seed=0, not 1"):
        audited(model, rows, tmp_path / "stopped", n=10, interventions=chosen, seed=1)
    with pytest.raises(ValueError, match="rewards="):
        audit(
            model, rows, load_rewards("exact"), AuditOptions(tmp_path / "stopped", invocation=SHORT, max_new_tokens=5)
        )


def test_an_audit_without_invocations_tests_nothing(model, tmp_path):
    found = audited(model, pictures(12), tmp_path, invocation="off", n=12, page=True)
    assert {one["answer"] for one in found["verdicts"]} == {UNTESTED}
    assert "no answer invoked it" in told(found, IMAGE)["text"]
    assert "No answer invoked memory" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="no question"):
        audited(model, [], tmp_path)
    with pytest.raises(ValueError, match="have the id 'row0'"):
        audited(model, pictures(1) * 2, tmp_path / "twice")


def test_attention_that_cannot_be_measured_is_explained(model, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("layer 2 returns no attention weights")

    monkeypatch.setattr(running, "measure_attention", refuse)
    found = audited(model, pictures(3), tmp_path, interventions=("zeros",))
    assert (told(found, LOOK, "short")["answer"], told(found, LOOK, "short")["text"]) == (
        UNTESTED,
        "layer 2 returns no attention weights",
    )


def test_the_command_reads_a_file_and_prints_verdicts(capsys, caplog, tmp_path):
    lines = []
    for number, row in enumerate(questions("pocket:in_view", 12, 2)):
        row.images[0].save(tmp_path / f"{number}.png")
        text = row.prompt[-1]["content"][0].get("text") or row.prompt[-1]["content"][-1]["text"]
        lines.append({"prompt": text, "image": f"{number}.png", "answer": row.answer, "half": number % 2})
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    command = f"audit --data {data} --n 8 --reference 12 --out {out} --invocation short@1 --max-new-tokens 12"
    command += " --interventions zeros,another_image --probe half,answer --map tsne --batch-size 8"
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr()
    assert f"All memory\n  {MEMORY}" in printed.out and printed.out.rstrip().endswith("report.html")
    found = json.loads((out / "audit.json").read_text())
    assert found["settings"]["questions"] == 8 and found["settings"]["reference"] == 12
    assert "fewer than 40" in found["probes"]["short"]["skipped"]
    assert cli.main(command.split()) == 0 and "found from an earlier run" in caplog.text
    assert capsys.readouterr().out == printed.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("", 2, "--data"),
        ("--data pocket:late --n 9 --reference 3", 2, "--reference 3 is less than --n 9"),
        ("--data pocket:late --interventions ones", 2, "must be some of zeros, mean"),
        ("--data pocket:late --invocation sometimes", 2, "unknown policy"),
        ("--data pocket:lte", 1, "unknown pocket suite 'lte'"),
        ("--data nowhere.jsonl", 1, "no such file or folder"),
        ("--data pocket:late --rewards beauty", 2, "no reward 'beauty'"),
    ],
)
def test_misuse_is_reported_in_one_line(capsys, tmp_path, options, code, message):
    assert cli.main(["audit", "--out", str(tmp_path / "out"), *options.split()]) == code
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
