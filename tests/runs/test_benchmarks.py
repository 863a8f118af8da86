"""Benchmarks of lm-evaluation-harness: what is asked of a model, and the scores, found again from its logits.

All but the first need tests/requirements_hf.txt.
"""

import importlib.metadata
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.hf_models import save_random
from helpers.refusals import refused
from helpers.tiny_runs import REPOSITORY, WORDS, content, environment

import default_moe
from default_moe.config import Config, MeshConfig
from default_moe.runs import benchmarks

hf = pytest.mark.hf
LONGEST = 32
SEPARATOR = 256


def test_what_is_missing_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("--tasks needs lm-evaluation-harness, which is not installed: pip install 'lm_eval>=0.4.13', or pip"):
        benchmarks.run(tmp_path, None, ["paper"], lambda config: config)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a model of random weights in `run`, and tasks of each kind in `tasks`."""
    here = tmp_path_factory.mktemp("benchmarks")
    config = Config.from_mapping(
        {
            "model": {"d_model": 32, "num_layers": 1, "num_heads": 4, "num_dense_layers": 0},
            "moe": {"num_experts": 8, "top_k": 2, "expert_dim": 12},
            "train": {"batch_size": 8, "sequence_length": LONGEST, "logits_per_chunk": 257 * 20},
        }
    )
    save_random(config, here / "run")
    (here / "tasks").mkdir()
    rng = random.Random(0)
    documents = [
        {
            "question": " ".join(rng.choices(WORDS, k=rng.randint(0, 12))),
            "choices": rng.sample([*"abc", *WORDS], 4),
            "answer": rng.randrange(4),
        }
        for _ in range(20)
    ]
    (here / "tasks" / "documents.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in documents))
    metrics = {
        "choice": ["acc", "acc_norm"],
        "word": ["perplexity", "acc"],
        "text": ["word_perplexity", "bits_per_byte"],
        "generation": ["exact_match"],
    }
    kinds = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"},
        "word": {"output_type": "loglikelihood", "doc_to_target": " {{choices[answer]}}"},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question * 3}}"},
        "generation": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}:",
            "doc_to_target": "a",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        },
    }
    for name, kind in kinds.items():
        write_task(here / "tasks", name, metric_list=[{"metric": metric} for metric in metrics[name]], **kind)
    pair = {"group": "pair", "task": ["choice", "word"], "aggregate_metric_list": [{"metric": "acc"}]}
    (here / "tasks" / "pair.yaml").write_text(yaml.safe_dump(pair))
    return here, documents


def write_task(folder, task, **settings):
    common = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(common | settings))


@pytest.fixture(scope="module")
def model(here):
    return default_moe.load(here[0] / "run")


def log_probs(model, tokens):
    """Of every token after each of `tokens`, at most LONGEST: float64 [length, V], without any of ours but `logits`."""
    assert 0 < len(tokens) <= LONGEST
    logits = model.logits([*tokens, *[0] * (LONGEST - len(tokens))])[: len(tokens)].astype(np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))


def scored(model, before, tokens):
    """Log-probability of tokens after others, and whether each is the likeliest."""
    found = log_probs(model, [*before, *tokens][-(LONGEST + 1) : -1])[-len(tokens) :]
    return sum(row[token] for row, token in zip(found, tokens, strict=True)), found.argmax(axis=-1).tolist() == tokens


def asked(*arguments):
    return SimpleNamespace(args=arguments, task_name="a task")


def after(model, context, continuation):
    kept = context.rstrip(" ")  # spaces count for what follows
    return scored(model, list(kept.encode()) or [SEPARATOR], list((context[len(kept) :] + continuation).encode()))


def rolling(model, text):
    tokens = [SEPARATOR, *text.encode()]
    total = 0.0
    for start in range(1, len(tokens), LONGEST):
        end = min(start + LONGEST, len(tokens))
        total += scored(model, tokens[max(0, end - 1 - LONGEST) : start], tokens[start:end])[0]
    return total


def continued(model, text, number, stop):
    tokens, added = list(text.encode())[-(LONGEST - number) :] or [SEPARATOR], []
    while len(added) < number:
        added.append(int(log_probs(model, [*tokens, *added])[-1].argmax()))
    if SEPARATOR in added:
        added = added[: added.index(SEPARATOR)]
    return bytes(added).decode("utf-8", "replace").split(stop)[0]


@hf
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, expert=2)], ids=["one device", "eight devices"])
def test_requests_are_answered_as_the_logits_say(here, model, mesh):
    from default_moe.runs.benchmark_model import BenchmarkModel

    lm = BenchmarkModel(default_moe.load(here[0] / "run", mesh=mesh))
    rng = random.Random(1)
    pairs = [("", "a"), ("", "two red birds"), ("the ", "cat"), ("   ", "x"), ("a cold river " * 9, "near a stone")]
    pairs += [("one of these", letter) for letter in "abcd"]  # read once
    pairs += [("x", "y" * LONGEST), ("x" * 40, "y" * (LONGEST - 1)), ("caf\u00e9 ", "\u20ac")]
    pairs += [(" ".join(rng.choices(WORDS, k=rng.randint(1, 9))), f" {rng.choice(WORDS)}") for _ in range(60)]
    # One that is what greedy decoding gives.
    greedy = int(log_probs(model, list(b"sat"))[-1].argmax())
    pairs += [("sat", chr(greedy))] if greedy < 128 else []
    answers = lm.loglikelihood([asked(*pair) for pair in pairs])
    expected = [after(model, *pair) for pair in pairs]
    np.testing.assert_allclose([a for a, _ in answers], [e for e, _ in expected], rtol=1e-4, atol=1e-4)
    assert [a for _, a in answers] == [e for _, e in expected]

    if mesh:
        return
    starts = ["", "a", "the cat sat", "on two red birds fly", "over old stones near a cold river"]
    whole = [continued(model, text, 6, "\n") for text in starts]
    assert len(set(whole)) > 2
    assert lm.generate_until([asked(text, {"until": ["\n"], "max_gen_toks": 6}) for text in starts]) == whole
    stop = max(whole, key=len)[2]
    requests = [asked(text, {"until": stop, "max_gen_toks": 6}) for text in starts]
    drawn = asked("b", {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0})
    first, second, *answers, third = lm.generate_until([drawn, drawn, *requests, drawn])
    assert len({first, second, third}) == 3
    assert answers == [continued(model, text, 6, stop) for text in starts] != whole

    texts = ["", "a", "the cat", "x" * (LONGEST - 1), "x" * LONGEST, "old stones near " * 7]
    expected = [rolling(model, text) for text in texts]
    np.testing.assert_allclose(lm.loglikelihood_rolling([asked(text) for text in texts]), expected, rtol=1e-4)


@hf
def test_lengths_are_few_and_hold_every_sequence(model):
    from default_moe.runs.benchmark_model import _lengths

    assert _lengths(32, 1) == [24, 32] and _lengths(7, 1) == [7]
    assert _lengths(100, 1) == [24, 32, 48, 64, 96, 100]
    assert _lengths(1024, 128) == [128, 256, 384, 512, 768, 1024]


def run_tasks(here, names, **options):
    assert benchmarks.run(here / "run", None, names, lambda c: c, include_path=here / "tasks", **options) == 0
    return json.loads((here / "run" / "eval" / "tasks_step_3.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def report(here):
    return run_tasks(here[0], ["choice", "word", "text", "generation"])


@hf
def test_scores_are_those_of_the_logits(here, model, report):
    _, documents = here
    right, right_by_length, words, texts, hits = [], [], [], [], []
    for document in documents:
        choices, answer = document["choices"], document["answer"]
        scores = [after(model, document["question"], f" {choice}")[0] for choice in choices]
        right.append(int(np.argmax(scores)) == answer)
        lengths = [len(choice) for choice in choices]
        right_by_length.append(int(np.argmax(np.divide(scores, lengths))) == answer)
        words.append(after(model, document["question"], f" {choices[answer]}"))
        texts.append((rolling(model, document["question"] * 3), document["question"] * 3))
        hits.append(continued(model, f"{document['question']}:", 5, "\n") == "a")
    found = {name: {k.split(",")[0]: v for k, v in of.items()} for name, of in report["results"].items()}
    assert found["choice"]["acc"] == pytest.approx(np.mean(right))
    assert found["choice"]["acc_norm"] == pytest.approx(np.mean(right_by_length))
    assert 0 < np.mean(right) < 1
    assert found["word"]["perplexity"] == pytest.approx(math.exp(-np.mean([score for score, _ in words])), rel=1e-3)
    assert found["word"]["acc"] == pytest.approx(np.mean([greedy for _, greedy in words]))
    total, size = sum(score for score, _ in texts), sum(len(text) for _, text in texts)
    assert found["text"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    num_words = sum(len(re.split(r"\s+", text)) for _, text in texts)
    assert found["text"]["word_perplexity"] == pytest.approx(math.exp(-total / num_words), rel=1e-3)
    assert found["generation"]["exact_match"] == pytest.approx(np.mean(hits))


@hf
def test_the_report_tells_how_it_was_made(here, report):
    assert report["step"] == 3 and report["settings"]["train"]["sequence_length"] == LONGEST
    assert report["machine"]["versions"]["jax"] == importlib.metadata.version("jax")
    assert report["lm_eval_version"] == importlib.metadata.version("lm_eval")
    assert report["n-samples"]["choice"] == {"original": 20, "effective": 20}


@hf
def test_a_group_of_tasks_with_few_questions_and_examples_before_them(here, report, capsys):
    again = run_tasks(here[0], ["pair"], limit=3, num_fewshot=2)
    assert again["n-samples"] == {task: {"original": 20, "effective": 3} for task in ("choice", "word")}
    assert again["n-shot"]["choice"] == 2 and report["n-shot"]["choice"] == 0
    mean = np.mean([again["results"][task]["acc,none"] for task in ("choice", "word")])
    assert again["groups"]["pair"]["acc,none"] == pytest.approx(mean)
    printed = capsys.readouterr().out
    assert re.search(r"\nloglikelihood in (\d+) batches\n(.*\n)*step \1/\1  tokens/s [\d,]+", printed)
    assert re.search(r"\n\| *Tasks *\|", printed) and re.search(r"\n\| *Groups *\|", printed)
    assert printed.endswith(f"written to {here[0] / 'run' / 'eval' / 'tasks_step_3.json'}\n")


@hf
def test_the_exported_model_scores_the_same_there(here, report, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from default_moe.convert.exporting import export_model

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    export_model(here[0] / "run", tmp_path / "out", None, "float32")
    theirs = HFLM(str(tmp_path / "out"), trust_remote_code=True, device="cpu", dtype="float32", batch_size=4)
    assert theirs.max_length == LONGEST
    manager = TaskManager(include_path=here[0] / "tasks", include_defaults=False)
    found = simple_evaluate(
        theirs, tasks=list(report["results"]), task_manager=manager, log_samples=False, bootstrap_iters=10
    )
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                assert report["results"][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (task, name)
    assert found["results"].keys() == report["results"].keys()


@hf
def test_the_papers_tasks_are_there():
    import lm_eval

    names = "arc hellaswag lambada logiqa mathqa mmlu openbookqa piqa pubmedqa sciq siqa super_glue winogrande"
    folders = [Path(lm_eval.__file__).parent / "tasks" / name for name in names.split()]
    texts = [file.read_text() for folder in folders for file in folder.rglob("*.yaml")]
    named = {name for text in texts for name in re.findall(r"^(?:task|group): (\w+)$", text, re.M)}
    assert len(set(benchmarks.PAPER)) == 14 and set(benchmarks.PAPER) <= named


BAD = {
    "no task of that name": ("choise", {}, "names 'choise', but there is no such task; did you mean 'choice'?"),
    "no file": ("bad", {"dataset_kwargs": {"data_files": "none.jsonl"}}, "task 'bad' cannot be opened: FileNotFound"),
    "no split": ("bad", {"test_split": "train"}, "task 'bad' cannot be opened: "),
    "a task twice": ("choice,group", {"group": "group", "task": ["choice"]}, "found in both 'choice' and 'group'"),
    "too much to generate": (
        "bad",
        {"output_type": "generate_until", "doc_to_target": "a", "generation_kwargs": {"max_gen_toks": 32}},
        "the task 'bad' generates 32 tokens .*train.sequence_length = 32",
    ),
    "generated another way": (
        "bad",
        {"output_type": "generate_until", "doc_to_target": "a", "generation_kwargs": {"max_gen_toks": 3, "beams": 2}},
        "sets generation_kwargs that are not known here: beams",
    ),
    "nothing to score": (
        "bad",
        {"output_type": "loglikelihood", "doc_to_target": "", "target_delimiter": ""},
        "how likely '' is, which adds no token",
    ),
}


@hf
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_line(here, tmp_path, monkeypatch, name):
    import functools

    import lm_eval.tasks

    # Without lm_eval's own thousands of tasks, which take long to be read.
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: few(**{**given, "include_defaults": False}))
    asked, settings, words = BAD[name]
    for file in ("choice.yaml", "documents.jsonl"):
        (tmp_path / file).write_text((here[0] / "tasks" / file).read_text())
    if "group" in settings:
        (tmp_path / "group.yaml").write_text(yaml.safe_dump(settings))
    else:
        write_task(tmp_path, "bad", **{"output_type": "loglikelihood", "doc_to_target": "a", **settings})
    with refused(words):
        benchmarks.run(here[0] / "run", None, asked.split(","), lambda config: config, include_path=tmp_path)


def start(here, *flags):
    words = ["eval.py", f"--workdir={here / 'run'}", f"--include_path={here / 'tasks'}", *flags]
    env = {**environment(), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-u", *words], cwd=REPOSITORY, env=env, text=True, **pipes)


@hf
def test_a_data_set_that_is_not_here_is_named(here):
    write_task(here[0] / "tasks", "far", dataset_path="nobody/far_away", dataset_kwargs={})
    with start(here[0], "--tasks=far") as process:
        _, errors = process.communicate(timeout=300)
    last = errors.splitlines()[-1]
    assert process.returncode == 2, errors
    assert last.startswith(
        "error: the task 'far' needs the data set nobody/far_away of huggingface.co, which cannot be"
    )
    assert "HF_HUB_OFFLINE=1" in last and "Traceback" not in errors


@hf
@pytest.mark.parametrize("line", ["opening the tasks", "loglikelihood in"])
def test_ctrl_c_ends_it_with_one_line_and_writes_nothing(here, line):
    before = content(here[0])
    with start(here[0], "--tasks=choice,word") as process:
        assert any(printed.startswith(line) for printed in iter(process.stdout.readline, ""))
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert errors.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in errors
    assert content(here[0]) == before
