"""Zero-shot tasks: what is refused, what the figures are, and that nothing is written or asked for.

The known answers come from a Llama whose logits are a table: the embedding is one-hot, the layer
adds nothing, and the head is the table, so that a token's successor depends on that token alone.
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import trsp.bench.task_file as file_module
import trsp.bench.zero_shot as module
from trsp.bench.lm_eval_runner import Runner
from trsp.bench.task_file import read_task_file
from trsp.bench.zero_shot import load_tasks, zero_shot
from trsp.bench.zero_shot_cli import tasks as tasks_command
from trsp.bench.zero_shot_record import (
    Difference,
    Metric,
    TaskResult,
    paired_differences,
    read_zero_shot_record,
)
from trsp.pruner.console import ErrorsAsExitCodes
from trsp.pruner.errors import RunError, UserError

WORDS = ("<s>", "</s>", "a", "b", "c", "d", "e", "f")
ITEMS: tuple[dict[str, Any], ...] = (
    {"context": "a b", "choices": ["c", "d"], "label": 0},
    {"context": "c", "choices": ["d e", "f"], "label": 1},
    {"context": "d e", "choices": ["a b c", "b", "f a"], "label": 2},
    {"context": "f", "choices": ["f", "a"], "label": 0},
    {"context": "e d", "choices": ["c b a", "e"], "label": 1},
)
CHOICE: dict[str, Any] = {"context": "a", "choices": ["b", "c"], "label": 0}
ANSWER: dict[str, Any] = {"prompt": "a", "answer": "b"}


@pytest.fixture
def lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'trsp[eval]'")


def write_lines(path: Path, *documents: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in documents), "utf-8")
    return path


def figure(result: TaskResult, name: str) -> Metric:
    return next(metric for metric in result.metrics if metric.name == name)


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    # A line's end is a word of its own, so that an answer can end.
    vocabulary = {word: place for place, word in enumerate((*WORDS, "\n"))}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )


def table_model(logits: torch.Tensor) -> Any:
    """A Llama with logits[x] (V values) behind token x, whatever comes before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = logits.shape[0]
    hidden = size + size % 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=hidden,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        rms_norm_eps=1e-12,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.norm.weight.fill_(1)
        # One-hot rows have a root mean square of hidden^-0.5, which the norm divides by.
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        model.lm_head.weight[:, :size] = logits.T * hidden**-0.5
    return model


@pytest.fixture
def table() -> torch.Tensor:
    size = len(WORDS) + 1
    return 2 * torch.randn(size, size, generator=torch.Generator().manual_seed(5))


def by_hand(table: torch.Tensor, item: dict[str, Any]) -> list[float]:
    """Summed log-probability of each choice, from the table alone."""
    scores = torch.log_softmax(table.double(), -1)
    found = []
    for choice in item["choices"]:
        before, total = item["context"].split()[-1], 0.0
        for word in choice.split():
            total += float(scores[WORDS.index(before), WORDS.index(word)])
            before = word
        found.append(total)
    return found


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"context": \n', "line 1: is not JSON"),
    "no object": (b"[1]\n", "line 1: holds list, expected a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff", "answer": "b"}\n', "line 1: is not JSON: 'utf-8' codec"),
    "half a surrogate": (
        rb'{"prompt": "\ud800", "answer": "b"}',
        "unable to parse raw data as a unicode",
    ),
    "empty": (b"", "is empty"),
    "blank lines alone": (b"\n \n", "is empty"),
    "other fields": (b'{"question": "a", "gold": 1}', "line 1: expected {"),
    "a field too many": (json.dumps({**CHOICE, "id": 1}).encode(), "id: Extra inputs"),
    "a field too few": (b'{"choices": ["a", "b"], "label": 0}', "context: Field required"),
    "a repeated field": (b'{"prompt": "a", "prompt": "a", "answer": "b"}', "'prompt' is repeated"),
    "label too large": (json.dumps({**CHOICE, "label": 2}).encode(), "label 2: expected 0 to 1"),
    "label negative": (json.dumps({**CHOICE, "label": -1}).encode(), "label: Input should be"),
    "label a word": (json.dumps({**CHOICE, "label": "0"}).encode(), "label: Input should be"),
    "label true": (json.dumps({**CHOICE, "label": True}).encode(), "label: Input should be"),
    "one choice": (json.dumps({**CHOICE, "choices": ["b"]}).encode(), "at least 2 items"),
    "an empty choice": (json.dumps({**CHOICE, "choices": ["b", ""]}).encode(), "at least 1 char"),
    "a blank choice": (json.dumps({**CHOICE, "choices": ["b", " "]}).encode(), "choice 1 is blank"),
    "a spaced choice": (json.dumps({**CHOICE, "choices": [" b", "c"]}).encode(), "choice 0 is"),
    "equal choices": (json.dumps({**CHOICE, "choices": ["b", "b"]}).encode(), "are the same"),
    "a number as choice": (json.dumps({**CHOICE, "choices": ["b", 3]}).encode(), "choices.1: "),
    "a spaced context": (json.dumps({**CHOICE, "context": "a "}).encode(), "context is blank or"),
    "an empty answer": (json.dumps({**ANSWER, "answer": ""}).encode(), "answer: String should"),
    "an answer of lines": (json.dumps({**ANSWER, "answer": "b\nc"}).encode(), "more than one line"),
    "a blank prompt": (json.dumps({**ANSWER, "prompt": " "}).encode(), "prompt is blank"),
    "both forms": (
        f"{json.dumps(CHOICE)}\n\n{json.dumps(ANSWER)}\n".encode(),
        "line 3: choices and answers are mixed",
    ),
    "both forms in a line": (json.dumps({**CHOICE, **ANSWER}).encode(), "Extra inputs"),
    "nested without end": (b'{"choices": ' + b"[" * 10**5, "line 1: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_of_the_wrong_form_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, says = BAD_FILES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_task_file(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert says in text
    assert "\n" not in text


def test_a_missing_and_a_vast_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_task_file(tmp_path / "none.jsonl")
    path = write_lines(tmp_path / "vast.jsonl", CHOICE)
    monkeypatch.setattr(file_module, "MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(UserError, match="is larger than"):
        read_task_file(path)


def test_a_sound_file_is_read_with_its_hash(tmp_path: Path) -> None:
    import hashlib

    path = write_lines(tmp_path / "good.jsonl", *ITEMS)
    path.write_bytes(path.read_bytes() + b"\n")
    found = read_task_file(path)
    assert [item.model_dump() for item in found.items] == list(ITEMS)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_lm_eval_missing_is_said_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'trsp\[eval\]'"):
        load_tasks([], [write_lines(tmp_path / "good.jsonl", CHOICE)])


def test_nothing_named_and_a_name_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task is named"):
        load_tasks([])
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(write_lines(tmp_path / folder / "same.jsonl", CHOICE))
    with pytest.raises(UserError, match=r"'same.jsonl' is named twice"):
        load_tasks([], paths)


@pytest.mark.usefixtures("lm_eval")
def test_unknown_names_get_near_ones_and_missing_data_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    with pytest.raises(UserError, match="no task 'hellaswagg'; near ones are hellaswag"):
        load_tasks(["hellaswagg"])
    with pytest.raises(UserError, match="'ai2_arc' is a group"):
        load_tasks(["ai2_arc"])
    # Not the machine's cache, which may hold them.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for name in module.PAPER_TASKS:
        with pytest.raises(UserError, match=r"not in the local cache .*local task files") as caught:
            load_tasks([name])
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("lm_eval")
def test_another_failure_of_a_named_task_is_not_taken_for_a_missing_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a split")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(KeyError, match="a split"):
        load_tasks(["piqa"])


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_accuracy_is_that_of_log_probabilities_summed_by_hand(
    table: torch.Tensor, tmp_path: Path, batch_size: int
) -> None:
    path = write_lines(tmp_path / "items.jsonl", *ITEMS)
    result = zero_shot(
        table_model(table), word_tokenizer(), [], task_files=[path], batch_size=batch_size
    )["items.jsonl"]
    expected: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for item in ITEMS:
        sums = by_hand(table, item)
        norms = [total / len(choice) for total, choice in zip(sums, item["choices"], strict=True)]
        expected["acc"].append(int(sums.index(max(sums)) == item["label"]))
        expected["acc_norm"].append(int(norms.index(max(norms)) == item["label"]))
    # The case tells the two metrics, and neither is all right or all wrong.
    assert expected["acc"] != expected["acc_norm"]
    for name, hits in expected.items():
        assert 0 < sum(hits) < len(hits)
        found = figure(result, name)
        assert found.hits == "".join(map(str, hits))
        assert found.value == pytest.approx(sum(hits) / len(hits), abs=1e-12)
        share = sum(hits) / len(hits)
        # For hits and misses, the sample variance over n is p (1 - p) / (n - 1).
        assert found.stderr == pytest.approx(math.sqrt(share * (1 - share) / 4), abs=1e-12)
    assert (result.num_samples, result.num_documents, result.num_fewshot) == (5, 5, 0)
    assert result.file_sha256 == read_task_file(path).sha256


@pytest.mark.usefixtures("lm_eval")
def test_log_probabilities_reach_lm_eval_unrounded(
    table: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 two near choices would tie; what is scored is float32 of the logits."""
    seen: list[tuple[float, bool]] = []
    inner = Runner._loglikelihoods

    def spying(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.extend(found := inner(self, *arguments, **options))
        return found

    monkeypatch.setattr(Runner, "_loglikelihoods", spying)
    path = write_lines(tmp_path / "items.jsonl", *ITEMS)
    zero_shot(table_model(table), word_tokenizer(), [], task_files=[path])
    expected = [total for item in ITEMS for total in by_hand(table, item)]
    assert [total for total, _ in seen] == pytest.approx(expected, abs=1e-5)

    seen.clear()
    model = table_model(table).bfloat16()
    with torch.no_grad():
        rounded = model(torch.arange(len(table))[:, None]).logits[:, -1].double()
    zero_shot(model, word_tokenizer(), [], task_files=[path])
    expected = [total for item in ITEMS for total in by_hand(rounded, item)]
    # Rounded to bfloat16 they would be off by a hundredth.
    assert [total for total, _ in seen] == pytest.approx(expected, abs=1e-4)


def answering(*successors: str) -> torch.Tensor:
    """Logits of a model that writes `successors` in a circle, each behind the one before."""
    size = len(WORDS) + 1
    names = (*WORDS, "\n")
    table = torch.zeros(size, size)
    for before, after in itertools.pairwise(successors):
        table[names.index(before), names.index(after)] = 9.0
    return table


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_exact_match_is_of_the_line_and_prefix_match_of_its_beginning(
    tmp_path: Path, batch_size: int
) -> None:
    model = table_model(answering("a", "b", "c", "\n", "d", "e", "f", "e"))
    documents = [
        {"prompt": "d a", "answer": "b c"},  # the whole line
        {"prompt": "a", "answer": "b"},  # goes on with another word
        {"prompt": "b", "answer": "c d"},  # the line ends too early
        {"prompt": "d", "answer": "e f"},  # never ends its line
        {"prompt": "b a", "answer": "c"},  # wrong
    ]
    path = write_lines(tmp_path / "answers.jsonl", *documents)
    result = zero_shot(model, word_tokenizer(), [], task_files=[path], batch_size=batch_size)[
        "answers.jsonl"
    ]
    exact, prefix = figure(result, "exact_match"), figure(result, "prefix_match")
    assert exact.hits == "10000"
    assert prefix.hits == "11010"
    assert (exact.value, prefix.value) == (0.2, 0.6)
    assert exact.stderr == pytest.approx(statistics.stdev([1, 0, 0, 0, 0]) / math.sqrt(5))


@pytest.mark.usefixtures("lm_eval")
def test_a_longer_number_is_no_prefix_match() -> None:
    def prefix(line: str, answer: str) -> float:
        return module._score_answer({"answer": answer}, [line])["prefix_match"]

    assert prefix(" 42", "4") == 0
    assert prefix(" 4, of course", "4") == 1
    assert prefix("f(x)y", "f(x)") == 1
    assert prefix("", "4") == 0


@pytest.mark.usefixtures("lm_eval")
def test_limit_takes_the_first_and_one_sample_has_no_standard_error(
    table: torch.Tensor, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "items.jsonl", *ITEMS)
    model, tokenizer = table_model(table), word_tokenizer()
    whole = zero_shot(model, tokenizer, [], task_files=[path])["items.jsonl"]
    one = zero_shot(model, tokenizer, [], task_files=[path], limit=1)["items.jsonl"]
    assert (one.num_samples, one.num_documents) == (1, 5)
    assert figure(one, "acc").stderr is None
    whole_hits = figure(whole, "acc").hits
    assert whole_hits is not None
    assert figure(one, "acc").hits == whole_hits[:1]
    assert one.documents_sha256 != whole.documents_sha256
    with pytest.raises(UserError, match="different documents"):
        paired_differences({"items.jsonl": one}, {"items.jsonl": whole})


@pytest.mark.usefixtures("lm_eval")
def test_what_does_not_fit_is_counted_or_refused(table: torch.Tensor, tmp_path: Path) -> None:
    model, tokenizer = table_model(table), word_tokenizer()
    # 32 tokens of context and one of a choice: the last is predicted and not read.
    fits, long = (CHOICE | {"context": " ".join(["a"] * count)} for count in (32, 33))
    path = write_lines(tmp_path / "long.jsonl", fits, long, CHOICE)
    assert zero_shot(model, tokenizer, [], task_files=[path])["long.jsonl"].num_truncated == 2
    path = write_lines(tmp_path / "longer.jsonl", {**CHOICE, "choices": ["b", "c " * 40 + "c"]})
    with pytest.raises(UserError, match="is 41 tokens, expected 1 to 32"):
        zero_shot(model, tokenizer, [], task_files=[path])
    path = write_lines(tmp_path / "answer.jsonl", {**ANSWER, "answer": "c " * 40 + "c"})
    with pytest.raises(UserError, match="wants 45 new tokens, the model's context is 32"):
        zero_shot(model, tokenizer, [], task_files=[path])
    # Of 32 tokens an answer of one takes 1 + 4, and 27 are left.
    fits, long = (ANSWER | {"prompt": " ".join(["a"] * count)} for count in (27, 28))
    path = write_lines(tmp_path / "prompt.jsonl", fits, long)
    assert zero_shot(model, tokenizer, [], task_files=[path])["prompt.jsonl"].num_truncated == 1


@pytest.mark.usefixtures("lm_eval")
def test_logits_that_are_no_numbers_fail_the_run(table: torch.Tensor, tmp_path: Path) -> None:
    table[WORDS.index("a")] = math.nan
    path = write_lines(tmp_path / "items.jsonl", CHOICE)
    with pytest.raises(RunError, match="not a number"):
        zero_shot(table_model(table), word_tokenizer(), [], task_files=[path])


@pytest.mark.usefixtures("lm_eval")
def test_the_callers_things_are_left_as_they_were(table: torch.Tensor, tmp_path: Path) -> None:
    import logging
    import random

    import lm_eval.api.task
    import numpy as np

    model, tokenizer = table_model(table).train(), word_tokenizer()
    path = write_lines(tmp_path / "items.jsonl", *ITEMS)

    def states() -> list[str]:
        return [repr(one) for one in (random.getstate(), np.random.get_state(legacy=False))] + [
            repr(torch.get_rng_state().tolist())
        ]

    # Away from what an earlier run may have left, which seeding again would not change.
    random.random(), np.random.random(), torch.rand(1)
    before = states()
    bar, level = lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level
    seen: list[tuple[str, int, int]] = []
    zero_shot(model, tokenizer, [], task_files=[path], progress=lambda *one: seen.append(one))
    assert model.training
    assert tokenizer.pad_token_id is None
    assert states() == before
    assert (bar, level) == (lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level)
    assert seen[0] == ("items.jsonl", 0, 11)
    assert seen[-1] == ("items.jsonl", 11, 11)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.usefixtures("lm_eval")
def test_a_tokenizer_without_ends_of_text_is_refused(table: torch.Tensor, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    path = write_lines(tmp_path / "items.jsonl", CHOICE)
    with pytest.raises(UserError, match="neither a begin- nor an end-of-text"):
        zero_shot(table_model(table), tokenizer, [], task_files=[path])


def a_result(hits: str, **fields: Any) -> TaskResult:
    values = [int(hit) for hit in hits]
    metric = Metric(
        name="acc",
        filter="none",
        value=statistics.fmean(values),
        stderr=None,
        higher_is_better=True,
        hits=hits,
    )
    whole: dict[str, Any] = {
        "task": "t",
        "version": "1",
        "lm_eval": "0",
        "seed": 0,
        "num_samples": len(hits),
        "num_documents": len(hits),
        "num_truncated": 0,
        "documents_sha256": "same",
        "file": None,
        "file_sha256": None,
        "metrics": [metric],
    }
    return TaskResult(**(whole | fields))


def test_a_paired_difference_is_of_the_same_samples() -> None:
    # Three lost, one gained, of ten: mean -0.2, and by hand a sample variance of 3.6 / 9 = 0.4.
    (found,) = paired_differences({"t": a_result("0001111100")}, {"t": a_result("1110111100")})
    assert (found.lost, found.gained, found.num_samples) == (3, 1, 10)
    assert found.difference == pytest.approx(-0.2)
    assert found.stderr == pytest.approx(math.sqrt(0.4 / 10))
    assert found.beyond is False
    # Half of 40 lost, none gained, is far beyond; nothing lost is not.
    (found,) = paired_differences({"t": a_result("0" * 40)}, {"t": a_result("01" * 20)})
    assert found.beyond is True
    (found,) = paired_differences({"t": a_result("01" * 20)}, {"t": a_result("01" * 20)})
    assert (found.beyond, found.stderr, found.difference) == (False, 0, 0)
    with pytest.raises(UserError, match="different documents"):
        paired_differences({"t": a_result("0")}, {"t": a_result("0", documents_sha256="other")})
    with pytest.raises(UserError, match="on one model alone"):
        paired_differences({"t": a_result("0")}, {})


@pytest.mark.parametrize(
    ("lost", "gained", "same", "p", "beyond"),
    [
        (1, 0, 0, 1.0, False),
        (2, 0, 0, 0.5, False),  # all of a two-item file: its standard error is 0
        (5, 0, 995, 2 * 0.5**5, False),  # 2.24 standard errors, of items too few to be normal
        (6, 0, 994, 2 * 0.5**6, True),
        (0, 6, 0, 2 * 0.5**6, True),
        (9, 1, 90, 2 * 11 * 0.5**10, True),
        (8, 2, 90, 2 * 56 * 0.5**10, False),
    ],
)
def test_a_difference_is_beyond_chance_by_the_exact_test(
    lost: int, gained: int, same: int, p: float, beyond: bool
) -> None:
    mine, its = "0" * lost + "1" * gained, "1" * lost + "0" * gained
    (found,) = paired_differences(
        {"t": a_result(mine + "1" * same)}, {"t": a_result(its + "1" * same)}
    )
    assert (found.lost, found.gained) == (lost, gained)
    assert found.p == pytest.approx(p)
    assert found.beyond is beyond
    assert (found.stderr is None) == (lost + gained + same == 1)
    before = found.model_dump(exclude={"p"}) | {"beyond": None}
    assert Difference.model_validate(before).p is None, "a record from before the test is read"


Invoke = Callable[[Sequence[Any]], Any]


@pytest.fixture
def invoke() -> Invoke:
    """The command as bench/cli.py mounts it."""
    app = typer.Typer(cls=ErrorsAsExitCodes)
    app.command("tasks")(tasks_command)
    app.command("other")(lambda: None)
    return lambda words: CliRunner().invoke(app, ["tasks", *map(str, words)])


@pytest.fixture
def local_files(tmp_path: Path) -> list[Path]:
    choices = [
        {"context": f"the {word} layer", "choices": ["of a model", "reads it"], "label": place % 2}
        for place, word in enumerate(("next", "first", "last"))
    ]
    answers = [{"prompt": "the layer of a", "answer": "model"}]
    return [
        write_lines(tmp_path / "choices.jsonl", *choices),
        write_lines(tmp_path / "answers.jsonl", *answers),
    ]


def test_the_command_refuses_before_it_loads_anything(
    invoke: Invoke, tmp_path: Path, pico_llama: Path, local_files: list[Path]
) -> None:
    for words, says in (
        ([pico_llama, "--task", local_files[0], "--limit", "0"], "--limit 0: expected"),
        ([pico_llama, "--task", local_files[0], "--batch-size", "0"], "--batch-size 0: expected"),
        ([pico_llama, "--task", local_files[0], "--out", tmp_path], "is a folder"),
        ([pico_llama, "--task", local_files[0], "--out", local_files[1]], "no record of tasks"),
        ([pico_llama, "--task", tmp_path / "none.jsonl"], "cannot be read"),
        ([tmp_path / "none", "--task", local_files[0]], "none"),
        ([pico_llama], "no task is named"),
    ):
        done = invoke(words)
        assert done.exit_code == 2, done.output
        assert says in done.output
        assert done.output.startswith("error: ")


@pytest.mark.usefixtures("lm_eval", "one_thread")
def test_the_command_compares_two_models_and_keeps_a_record(
    invoke: Invoke, tmp_path: Path, pico_llama: Path, local_files: list[Path]
) -> None:
    words: list[Any] = [pico_llama, "--task", local_files[0], "--task", local_files[1]]
    words += ["--against", pico_llama, "--device", "cpu", "--out", tmp_path / "a" / "tasks.json"]
    done = invoke(words)
    assert done.exit_code == 0, done.output
    assert "no difference is beyond chance (exact test, 5 %)" in done.output
    record = read_zero_shot_record(tmp_path / "a" / "tasks.json")
    assert list(record.model.results) == ["choices.jsonl", "answers.jsonl"]
    assert record.against is not None
    assert record.against.results == record.model.results
    assert {one.metric: one.difference for one in record.differences} == dict.fromkeys(
        ("acc", "acc_norm", "exact_match", "prefix_match"), 0
    )
    assert record.model.num_hidden_layers == 6
    assert record.environment["command"]
    again = invoke([*words, "--json"])
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document["model"] == json.loads(record.model.model_dump_json())


OFFLINE = """
import socket, sys
from pathlib import Path

def refuse(*arguments, **options):
    raise SystemExit(f"asked the network: {arguments}")

socket.getaddrinfo = socket.create_connection = refuse
from trsp.bench.zero_shot import zero_shot
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint

checkpoint = open_checkpoint(sys.argv[1])
found = zero_shot(load_model(checkpoint), load_tokenizer(checkpoint), [], task_files=sys.argv[2:])
print(sorted(found))
"""


@pytest.mark.usefixtures("lm_eval")
def test_files_need_no_network_and_leave_nothing_behind(
    tmp_path: Path, pico_llama: Path, local_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / name for name in ("home", "work", "temporary")]
    for place in places:
        place.mkdir()
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(places[0]))
    monkeypatch.setenv("TMPDIR", str(places[2]))
    # transformers' bar for loading weights is not lm-eval's.
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Without it a look at the network would be refused by the hub's client and not be seen.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(pico_llama), *map(str, local_files)],
        cwd=places[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['answers.jsonl', 'choices.jsonl']"
    assert "it/s" not in done.stderr
    assert [str(file) for place in places for file in place.rglob("*")] == []
