"""VisMem behind the real lmms-eval: its evaluator in this process, its command line in others, samples and cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmms_eval")

from accelerate.state import AcceleratorState
from datasets import Dataset
from forked import Forked, ranks, run_module
from lmms_eval import models
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.task import _resolve_hf_datasets_cache_dir
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_tasks import keep_own_index, own_index, write_task
from PIL import Image

from vismem.data import prompt_inputs
from vismem.evaluation.answering import answer
from vismem.evaluation.lmms import model as plug_in
from vismem.evaluation.lmms.messages import row_of
from vismem.evaluation.lmms.model import Traced, VisMemChat, until
from vismem.evaluation.lmms.run import records_of, run_task, scorer, task_records
from vismem.loading import load_model
from vismem.pocket.suites import rows

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
pytestmark = pytest.mark.xdist_group("lmms")  # one model, and one index of lmms-eval's tasks
SUITES = {"own_easy_vqa": ("easy_vqa", 2), "own_pocket": ("late", 1)}
COUNTS = {"own_easy_vqa": 24, "own_pocket": 20}  # of their questions


@pytest.fixture(scope="module")
def questions():
    return {name: rows(suite, n) for name, (suite, n) in SUITES.items()}


@pytest.fixture(scope="module")
def folder(questions, tmp_path_factory):
    """A folder of tasks, and a data set cache apart from the user's."""
    place = tmp_path_factory.mktemp("lmms")
    for name, found in questions.items():
        write_task(place / "tasks", name, found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(place / "cache"))
        keep_own_index(patch)
        yield place / "tasks"


@pytest.fixture(scope="module")
def model():
    return load_model().model


@pytest.fixture(scope="module")
def runs(model, folder):
    """Both tasks in this process."""
    settings = {"include_path": folder, "batch_size": 8}
    return {name: run_task(model, name, **settings) for name in SUITES}


def samples_of(output: Path) -> dict[str, list[dict]]:
    """What `--log_samples` wrote, by task, in the order of the samples."""
    found = {}
    for name in SUITES:
        (file,) = output.rglob(f"*_samples_{name}.jsonl")
        found[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return found


def ask(model, messages, generation=None, **settings):
    """One request through lmms-eval's own request type."""
    lm = VisMemChat(model, **settings)
    lm.task_dict = {"made_up": {"test": [{}]}}
    arguments = ("", lambda doc: messages, dict(generation or {}), 0, "made_up", "test")
    return lm, Instance("generate_until", arguments, 0, {"task": "made_up", "doc_id": 0, "repeats": 1})


def shown(row):
    """A row's messages as a task of lmms-eval gives them."""
    pictures = iter(row.images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "url": next(pictures)} if p["type"] == "image" else p for p in message["content"]
            ],
        }
        for message in row.prompt
    ]


# The evaluator in this process.


@pytest.mark.parametrize("task", SUITES)
def test_a_task_records_the_models_answers(task, model, questions, runs):
    """A record for each sample, in order, with the words, counts and invocations of the model asked directly."""
    records, metrics = runs[task].records, runs[task].metrics
    direct = answer(model, questions[task], ["exact"], max_new_tokens=24, batch_size=16)
    assert [record.id for record in records] == [f"{task}/{number}" for number in range(COUNTS[task])]
    for record, wanted, row in zip(records, direct, questions[task], strict=True):
        assert record.reply == wanted.reply
        assert (record.tokens, record.sampled, record.delimiters) == (wanted.tokens, wanted.sampled, wanted.delimiters)
        assert record.invocations == wanted.invocations and record.finish == wanted.finish
        assert record.columns["cell"] == row.columns["cell"] and record.columns["lmms_task"] == task
    mean = sum(record.score for record in records) / len(records)
    assert metrics[task]["right"] == pytest.approx(mean)
    assert mean > 0.5 and any(record.score == 0 for record in records)


def test_memory_is_invoked_and_traced(runs):
    records = runs["own_pocket"].records
    assert sum(bool(record.invocations) for record in records) > 10
    for record in records:
        places = [invocation["position"] for invocation in record.invocations]
        assert places == sorted(set(places)) and all(0 <= place < record.tokens for place in places)
        for invocation in record.invocations:
            assert invocation.keys() == {"kind", "position", "length", "forced"}
            assert invocation["kind"] in ("short", "long") and invocation["length"] > 0 and not invocation["forced"]
        assert record.tokens == record.sampled + len(record.invocations)  # the end tokens


def test_off_equals_the_base(model, questions, folder):
    """With invocation=off the answers are what transformers' generate writes with the base alone."""
    records = task_records(model, "own_pocket", limit=8, invocation="off", include_path=folder)
    assert not any(record.invocations for record in records)
    for record, row in zip(records, questions["own_pocket"], strict=False):
        inputs = prompt_inputs(model.processor, [row])
        out = model.base.generate(**inputs, max_new_tokens=24, do_sample=False)
        words = model.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record.reply == words
    learned = task_records(model, "own_pocket", limit=8, include_path=folder)
    assert [record.reply for record in learned] != [record.reply for record in records]


def test_random_invocation_does_not_depend_on_the_batch(model, folder):
    """Every sample draws for itself: the same whatever the batch, and not the same as its neighbours."""
    runs = [
        task_records(model, "own_pocket", limit=6, invocation="random:0.3@anywhere", include_path=folder, batch_size=n)
        for n in (1, 4)
    ]
    assert runs[0] == runs[1]
    assert all(invocation["forced"] for record in runs[0] for invocation in record.invocations)
    first = {record.invocations[0]["position"] for record in runs[0] if record.invocations}
    assert len(first) > 1


def test_the_files_that_lmms_eval_writes(model, folder, tmp_path):
    """`output_path` gets lmms-eval's own results and samples, traces among them."""
    run = run_task(model, "own_pocket", limit=3, include_path=folder, output_path=tmp_path)
    (results,) = tmp_path.rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["own_pocket"]["right,none"] == run.metrics["own_pocket"]["right"]
    (file,) = tmp_path.rglob("*_samples_own_pocket.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [sample["token_counts"][0]["invocations"] for sample in samples] == [r.invocations for r in run.records]


def test_the_first_of_two_filters_scores_a_record(model, folder, runs):
    """lmms-eval logs each sample once for each filter; a record is of the first."""
    filters = {"one": "{function: take_first}", "two": "{function: regex, regex_pattern: none}, {function: take_first}"}
    text = "include: own_pocket.yaml\ntask: two_filters\nfilter_list:\n"
    text += "".join(f"- name: {name}\n  filter: [{steps}]\n" for name, steps in filters.items())
    (folder / "two_filters.yaml").write_text(text)
    run, plain = run_task(model, "two_filters", limit=3, include_path=folder), runs["own_pocket"].records[:3]
    assert [(one.reply, one.score) for one in run.records] == [(one.reply, one.score) for one in plain]
    assert run.metrics["two_filters"]["right,two"] == 0 < run.metrics["two_filters"]["right,one"]


HUNDREDS = """
def hundreds(values):
    return 100 * len([value for value in values if value.get("said") == value.get("wanted")])

def with_arguments(values, args):
    raise AssertionError
"""


@pytest.mark.parametrize(
    ("value", "aggregation", "score"),
    [
        (0.25, "mean", 0.25),
        (True, "mean", 1.0),
        ({"overall": 0.5, "ocr": 1.0}, "!function own.hundreds", 0.5),
        ({"is_correct": True}, "!function own.hundreds", 1.0),
        ({"own": 0.75, "score": 0.1}, "!function own.hundreds", 0.75),
        ({"said": "a", "wanted": "a"}, "!function own.hundreds", 100.0),
        ({"said": "a", "wanted": "b"}, "!function own.hundreds", 0.0),
        ({"said": "a"}, "!function own.with_arguments", None),
        ("right", "mean", None),
        (float("nan"), "mean", None),
    ],
)
def test_a_sample_is_scored_by_the_first_metric_it_has(value, aggregation, score, tmp_path):
    (tmp_path / "own.py").write_text(HUNDREDS)
    metric = f"metric_list:\n- metric: absent\n- metric: found\n  aggregation: {aggregation}\n"
    (tmp_path / "own.yaml").write_text(f"task: own\nscore_key: own\n{metric}")
    of = scorer(str(tmp_path / "own.yaml"), "own")
    if score is None:
        with pytest.raises(ValueError, match="own: its metric 'found' gives no number for a single sample"):
            of({"found": value})
    else:
        assert of({"found": value}) == score
    with pytest.raises(ValueError, match="own: its samples have none of its metrics"):
        of({"other": 1.0})


def test_a_sample_without_an_answer_scores_nothing():
    """Some metrics give an empty answer a point, such as those that guess where they find no option."""
    samples = [{"doc_id": number, "doc": {"answer": "a"}} for number in range(4)]
    given = {"own": GenerationResult("a", Traced(1, 1)), "bad": GenerationResult("", Traced(0, 0, error="no image"))}
    written = {("own", number): given["bad" if number == 2 else "own"] for number in range(4)}
    found = records_of("own", samples, lambda sample: 1.0, written)
    assert [record.score for record in found] == [1.0, 1.0, 0.0, 1.0] and found[2].error == "no image"


def test_an_unknown_task_raises(model, folder):
    with pytest.raises(ValueError, match="no task 'mmstarr'"):
        run_task(model, "mmstarr", include_path=folder)


def write_benchmark(repository: str, split: str, docs: list[dict]) -> None:
    """A data set under its hub name in the working directory, where `datasets` looks first."""
    place = Path(repository)
    place.mkdir(parents=True)
    Dataset.from_list(docs).to_parquet(str(place / f"{split}.parquet"))
    files = f"configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: {split}.parquet"
    (place / "README.md").write_text(f"---\n{files}\n---\n")


def test_benchmarks_that_lmms_eval_has_give_a_score_per_sample(model, folder, tmp_path, monkeypatch):
    """Its own definitions of MMStar and MMMU: a number for each sample, also where a metric is made of dictionaries."""
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (24, 24), "red")
    common = {"question": "Which is <image 1>, beside <image 2>?\n(A) ring (B) box", "answer": "A"}
    star = {"category": "math", "l2_category": "geometry", "image": picture, **common}
    write_benchmark("Lin-Chen/MMStar", "val", [{"index": n, **star, "answer": "AN"[n]} for n in range(2)])
    mmmu = {"options": "['ring', 'no']", "question_type": "multiple-choice", "image_1": picture, "image_2": picture}
    docs = [{"id": f"validation_Art_{n}", **mmmu, **common, "answer": "AB"[n]} for n in range(2)]
    write_benchmark("lmms-lab-encoder/MMMU", "validation", docs)
    for task, metric in {"mmstar": "average", "mmmu_val": "mmmu_acc"}.items():
        run = run_task(model, task, max_new_tokens=8)
        scores = [record.score for record in run.records]
        assert len(scores) == 2 and {*scores} <= {0.0, 1.0}
        assert run.metrics[task][metric] == pytest.approx(sum(scores) / 2)
        assert [record.columns["answer"] for record in run.records] == (["A", "N"] if task == "mmstar" else ["A", "B"])
    assert run.records[0].reply and run.records[0].columns["id"] == "validation_Art_0"


# The command line, one process and two.


def test_the_command_line_and_several_processes(folder, runs, tmp_path):
    """The same answers and traces from lmms-eval's command line, in one process and split between two."""
    arguments = ["--model", "vismem", "--model_args", "invocation=learned,batch_size=8", "--tasks", ",".join(SUITES)]
    arguments += ["--include_path", str(folder), "--log_samples", "--output_path"]
    own_index()
    AcceleratorState._reset_state(reset_partial_state=True)  # forget that this is one process
    _resolve_hf_datasets_cache_dir.cache_clear()  # locks are not to be inherited
    processes = []
    for name, environments in {"one": [{}], "two": ranks(2)}.items():
        cache = {"LMMS_EVAL_DATASETS_CACHE": str(tmp_path / f"{name}_cache")}
        command = ["lmms_eval", *arguments, str(tmp_path / name)]
        processes += [Forked(run_module, *command, **cache, **own) for own in environments]
    with ThreadPoolExecutor() as pool:  # each reads what its process prints, as all wait for each other
        printed = ["".join(streams) for streams in pool.map(Forked.rest, processes)]
    assert [process.wait() for process in processes] == [0, 0, 0], printed
    assert not any("Error during evaluation" in text for text in printed), printed
    for name in ("one", "two"):
        for task, samples in samples_of(tmp_path / name).items():
            assert [sample["doc_id"] for sample in samples] == list(range(COUNTS[task]))
            for sample, record in zip(samples, runs[task].records, strict=True):
                assert sample["filtered_resps"] == record.reply and sample["right"] == record.score
                (trace,) = sample["token_counts"]
                assert trace["invocations"] == record.invocations and trace["sampled_tokens"] == record.sampled
                assert trace["output_tokens"] == record.tokens and trace["input_tokens"] > 0
                assert trace["finish"] == record.finish and trace["delimiters"] == record.delimiters
    assert "own_pocket" in printed[0]


# The plug-in.


def test_lmms_eval_finds_the_model():
    assert "vismem" in models.list_available_models()
    assert models.get_model("vismem") is VisMemChat


def test_lmms_eval_is_told_which_process_this_is(model, monkeypatch):
    """It splits the samples by these numbers."""
    monkeypatch.setattr(plug_in, "Accelerator", lambda: SimpleNamespace(process_index=1, num_processes=3))
    lm = VisMemChat(model)
    assert (lm.rank, lm.world_size) == (1, 3)


def test_lmms_eval_is_imported_lazily():
    code = (
        "import sys, vismem, vismem.evaluation, vismem.evaluation.lmms as lmms\n"
        "assert lmms.tasks_folder().is_dir()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('lmms_eval', 'torch')]"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, **QUIET}).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint", r"'checkpoint' is not a list of name=value"),
        ("nonsense=1", "unknown model argument 'nonsense'; vismem takes checkpoint, base, device, dtype"),
        ("invocation=sometimes", "unknown policy 'sometimes'; choose from learned, off"),
        ("invocation=random:2", "'random:2' is not a random policy"),
        ("batch_size=0", "batch_size must be a whole number, 1 or more, got 0"),
        ("batch_size=many", "batch_size must be a whole number, 1 or more, got 'many'"),
        ("max_new_tokens=0", "max_new_tokens must be a whole number, 1 or more"),
        ("seed=-1", "seed must be a whole number, 0 or more"),
        ("dtype=int8", "dtype='int8' is unknown; there are auto, float32"),
        ("trust_remote_code=maybe", "trust_remote_code must be true or false"),
        ("device=gpu", "unknown device 'gpu'"),
        ("checkpoint=/no/where", "no checkpoint /no/where"),
        ("base=/no/where", "no base /no/where"),
    ],
)
def test_wrong_model_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        simple_evaluate("vismem", arguments, tasks=["own_pocket"], batch_size=1, task_manager=object())
    assert "\n" not in str(caught.value)


def test_model_arguments_override_lmms_evals_options():
    """--model_args overrides lmms-eval's own options, quotes are removed, and `auto` becomes a number."""
    lm = VisMemChat.create_from_arg_string(
        'base=pocket,batch_size=3,max_new_tokens=9,invocation="short@0,long@2",device=cpu', {"batch_size": "1"}
    )
    assert (lm.batch_size, lm.max_new_tokens) == (3, 9)
    assert lm.policy.schedule == [(0, 0, "short"), (0, 2, "long")]
    assert not lm.is_simple and (lm.rank, lm.world_size) == (0, 1)
    lm = VisMemChat.create_from_arg_string({}, {"batch_size": "auto", "max_batch_size": 4})
    assert lm.batch_size == 4 and lm.vismem.name_or_path.endswith("base")
    lm.clean()  # lmms-eval's own, before judges start
    assert not hasattr(lm, "vismem")


# Requests.


def test_generation_keywords_are_converted(model):
    lm = VisMemChat(model, max_new_tokens=7)
    greedy = {"max_new_tokens": 7, "do_sample": False}
    assert lm.keywords({}) == greedy
    assert lm.keywords({"temperature": 0.2, "do_sample": False, "top_p": 0.9, "num_beams": 1}) == greedy
    assert lm.keywords({"temperature": 0, "do_sample": True}) == greedy
    assert lm.keywords({"max_gen_toks": 5, "until": ["\n\n"]}) == {**greedy, "max_new_tokens": 5}
    sampled = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert lm.keywords({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3}) == sampled
    assert lm.keywords({"do_sample": True})["temperature"] == 1.0
    assert lm.keywords({"until": "."}) == {**greedy, "stop_strings": ["."]}
    assert lm.keywords({"patch_size": 3, "top_k": None}) == greedy  # left out, with a warning
    with pytest.raises(ValueError, match="num_beams=1"):
        lm.keywords({"num_beams": 4})
    assert until({"until": None}) == [] and until({"until": ["a", "", "\n\n"]}) == ["a"]


def test_requests_with_different_keywords_in_one_batch(model, questions):
    """Each ends as its own task says, and answers keep the order of the requests."""
    row = questions["own_pocket"][0]
    whole, one = ask(model, shown(row), {"max_new_tokens": 24})
    (full,) = whole.generate_until([one])
    word = full.text.split(" ")[1]
    plans = [{"max_new_tokens": 24}, {"max_new_tokens": 2}, {"max_new_tokens": 24, "until": [f" {word}"]}]
    plans.append({"max_new_tokens": 8, "do_sample": True, "temperature": 3.0})
    lm, _ = ask(model, shown(row))
    found = lm.generate_until([ask(model, shown(row), plan)[1] for plan in plans])
    assert found[0].text == full.text and found[0].token_counts == full.token_counts
    assert found[1].token_counts.sampled_tokens == 2 and found[1].token_counts.finish == "length"
    assert full.text.startswith(found[1].text)
    assert found[2].text == full.text.split(f" {word}")[0] and found[2].token_counts.finish == "stop"
    assert found[3].token_counts.output_tokens <= 8 + 2


def test_sampling_depends_on_seed_and_sample_alone(model, questions):
    """Repeats of a sample differ; the same sample is sampled alike whatever runs beside it."""
    row, plan = questions["own_pocket"][0], {"max_new_tokens": 12, "do_sample": True, "temperature": 4.0}
    lm, one = ask(model, shown(row), plan, batch_size=4)
    together = [result.text for result in lm.generate_until([one] * 3)]
    assert len(set(together)) > 1
    assert ask(model, shown(row), plan, batch_size=1)[0].task_dict
    again, two = ask(model, shown(row), plan, batch_size=1)
    assert [result.text for result in again.generate_until([two] * 3)] == together
    other, three = ask(model, shown(row), plan, batch_size=1, seed=1)
    assert [result.text for result in other.generate_until([three] * 3)] != together


def test_padding_is_not_answered(model, questions):
    """Requests that lmms-eval adds so that all processes have equally many cost nothing."""
    lm, one = ask(model, shown(questions["own_pocket"][0]), {"max_new_tokens": 4})
    _, padding = ask(model, None)
    padding.metadata["__padding_only__"] = True
    found = lm.generate_until([one, padding])
    assert found[0].text and found[1].text == ""


def test_several_pictures_and_text_alone_are_answered(model, questions):
    pair = rows("pairs", 1)[0]
    assert len(pair.images) == 2
    lm, one = ask(model, shown(pair), {"max_new_tokens": 24})
    (direct,) = answer(model, [pair], ["exact"], max_new_tokens=24)
    assert lm.generate_until([one])[0].text == direct.reply
    lm, one = ask(model, [{"role": "user", "content": "Which colour?"}], {"max_new_tokens": 4})
    assert lm.generate_until([one])[0].token_counts.output_tokens > 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "made_up, sample 0: the task gave no messages"),
        (
            [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}],
            "sample 0: the task has a part of type 'video'",
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "url": Image.new("RGB", (9, 9))}, {"type": "image", "url": b"GIF"}],
                }
            ],
            "made_up, sample 0, image 2: image in bytes is not an image",
        ),
        ([{"role": "user", "content": [{"type": "image", "url": "no.png"}]}], "sample 0, image 1: no such image"),
    ],
)
def test_unreadable_samples_are_named(model, messages, message):
    lm, one = ask(model, messages)
    with pytest.raises(ValueError, match=message):
        lm.generate_until([one])


def test_one_bad_sample_does_not_affect_others(model):
    """Its answer is empty and its trace says why; its rounds end, those of others go on."""
    lm = VisMemChat(model, batch_size=2)
    lm.task_dict = {"made_up": {"test": [{}, {"url": "no.png"}, {"odd": 5}]}}

    def messages(doc, round_idx=None, **_):
        picture = [{"type": "image", "url": doc["url"]}] if "url" in doc else []
        asked = [{"role": "user", "content": doc.get("odd") or [*picture, {"type": "text", "text": "How many?"}]}]
        return asked if round_idx is None else (asked, round_idx > 1, [], None)

    def requests(kind):
        arguments = [("", messages, {"max_new_tokens": 3}, number, "made_up", "test") for number in range(3)]
        about = {"task": "made_up", "repeats": 1}
        return [Instance(kind, one, 0, {**about, "doc_id": number}) for number, one in enumerate(arguments)]

    good, bad, odd = lm.generate_until(requests("generate_until"))
    assert good.text and not good.token_counts.to_dict().get("error")
    assert bad.text == odd.text == "" and bad.token_counts.finish == "error" and odd.token_counts.error
    assert bad.token_counts.to_dict()["error"].startswith("made_up, sample 1, image 1: no such image")
    found = lm.generate_until_multi_round(requests("generate_until_multi_round"))
    assert [len(texts) for texts in found] == [2, 1, 1] and found[1] == [""]


def test_a_task_that_fails_on_a_sample_is_named(model):
    lm, one = ask(model, None)
    lm.task_dict = {"made_up": {"test": Dataset.from_list([{"a": 1}]).select([])}}
    with pytest.raises(ValueError, match="made_up, sample 0: cannot be read: IndexError"):
        lm.generate_until([one])


def test_a_short_invocation_without_image_is_named(model):
    lm, one = ask(model, [{"role": "user", "content": "Which colour?"}], invocation="short@0")
    with pytest.raises(ValueError, match=r"made_up, sample 0: .*image"):
        lm.generate_until([one])


def test_the_image_placeholder_is_removed_from_text():
    """Some tasks write "<image>" where their picture goes, which is the mark of some families."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Question: <image>\nHow many?"}]}]
    assert row_of("a", messages, "<image>").prompt[0]["content"][0]["text"] == "Question: \nHow many?"
    assert row_of("a", messages, "<|image_pad|>").prompt[0]["content"][0]["text"] == "Question: <image>\nHow many?"


def test_each_round_sees_the_earlier_ones(model, questions):
    """Each round sees what was answered before, until the task says stop; other requests go on."""
    row = questions["own_pocket"][0]
    seen = []

    def to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return shown(row)
        seen.append((round_idx, list(previous_output), previous_round_info))
        if round_idx > doc["rounds"]:
            return None, True, previous_output, None
        return shown(row), False, previous_output, {"round": round_idx}

    lm = VisMemChat(model, batch_size=2)
    lm.task_dict = {"made_up": {"test": [{"rounds": 0}, {"rounds": 2}]}}
    requests = [
        Instance(
            "generate_until_multi_round",
            ("", to_messages, {"max_new_tokens": 3}, doc_id, "made_up", "test"),
            0,
            {"task": "made_up", "doc_id": doc_id, "repeats": 1},
        )
        for doc_id in (0, 1)
    ]
    found = lm.generate_until_multi_round(requests)
    assert [len(texts) for texts in found] == [1, 3] and len({*found[1]}) == 1
    assert [(number, len(before), note) for number, before, note in seen] == [
        (1, 1, None),
        (1, 1, None),
        (2, 2, {"round": 1}),
        (3, 3, {"round": 2}),
    ]


def test_likelihoods_raise(model):
    lm, one = ask(model, None)
    with pytest.raises(NotImplementedError, match="made_up asks for log-likelihoods"):
        lm.loglikelihood([one])


def test_the_response_cache_is_used(folder, tmp_path, monkeypatch):
    """A second run of the same model arguments takes its answers from lmms-eval's cache; those have no trace."""
    found = []
    for _ in range(2):
        manager = TaskManager("ERROR", include_path=[str(folder)], include_defaults=False)
        settings = {"use_cache": str(tmp_path), "limit": 4, "bootstrap_iters": 0, "task_manager": manager}
        result = simple_evaluate("vismem", "base=pocket", tasks=["own_pocket"], batch_size=4, **settings)
        found.append(result["samples"]["own_pocket"])
        monkeypatch.setattr(VisMemChat, "_answer", lambda *_: pytest.fail("asked again"))
    first, second = found
    assert [sample["resps"] for sample in first] == [sample["resps"] for sample in second]
    assert all(sample["token_counts"][0]["output_tokens"] for sample in first)
    assert all(sample["token_counts"] == [None] for sample in second)


def test_a_model_stays_usable_after_a_task(model, folder):
    """lmms-eval drops the model from its wrapper after each run; the model itself stays usable."""
    assert task_records(model, "own_easy_vqa", limit=2, include_path=folder)
    assert torch.is_tensor(next(model.parameters()))
    assert task_records(model, "own_easy_vqa", limit=2, include_path=[folder])
