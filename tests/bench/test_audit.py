"""`trsp audit`: figures by hand, planted damage that a mean hides, a gate that shuts."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from trsp.bench.audit import AuditOptions, audit, frequency_bands, summarize
from trsp.bench.audit_cli import generation_lines
from trsp.bench.audit_record import (
    AuditRecord,
    Domain,
    Sums,
    read_audit_record,
)
from trsp.bench.cli import app
from trsp.bench.generation_checks import check_sums
from trsp.bench.greedy_agreement import Continuation, continue_prompts, spread_prompts
from trsp.bench.token_losses import TokenLosses, compare_tokens
from trsp.pruner.api import compact
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.evaluation import evaluate_perplexity
from trsp.pruner.layer_map import LayerMap
from trsp.pruner.run import base_model_of
from trsp.pruner.windows import cut_windows


@pytest.fixture(scope="module")
def shallow(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model without its fourth layer."""
    base = base_model_of(open_checkpoint(pico_llama))
    layer_map = LayerMap.from_keep(base, (0, 1, 2, 4, 5))
    return compact(pico_llama, layer_map, tmp_path_factory.mktemp("audit") / "shallow")


@pytest.fixture(scope="module")
def models(pico_llama: Path, shallow: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    dense, pruned = (load_model(open_checkpoint(folder)) for folder in (pico_llama, shallow))
    return dense, pruned


def options(dense: Path, pruned: Path, text: Path, **words: Any) -> AuditOptions:
    small = {"window": 32, "prompts": 3, "prompt_tokens": 8, "new_tokens": 6, "examples": 4}
    return AuditOptions(dense=dense, pruned=pruned, data={"held": [text]}, **{**small, **words})


@pytest.fixture(scope="module")
def record(pico_llama: Path, shallow: Path, held_out_file: Path) -> AuditRecord:
    return audit(options(pico_llama, shallow, held_out_file))


@pytest.mark.parametrize(
    "settings", [{}, {"add_bos": True}, {"stride": 8}, {"add_bos": True, "stride": 8}]
)
def test_the_mean_of_the_tokens_is_the_loss_of_the_text(
    settings: dict[str, Any],
    models: tuple[PreTrainedModel, PreTrainedModel],
    pico_llama: Path,
    held_out_file: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    windows = cut_windows(
        models[0], tokenizer, [held_out_file], window=32, batch_size=3, **settings
    )
    rows = compare_tokens(*models, windows)
    for model, losses in zip(models, (rows.dense, rows.pruned), strict=True):
        found = evaluate_perplexity(model, tokenizer, [held_out_file], window=32, **settings)
        assert len(losses) == found.protocol.num_tokens == windows.protocol.num_tokens
        assert losses.mean() == pytest.approx(found.loss, rel=1e-6)
    # Every row says where its token stands.
    places = rows.window * windows.stride + rows.offset - (windows.bos is not None)
    assert (windows.ids.numpy()[places] == rows.token).all()
    assert len(set(places.tolist())) == len(places)


def test_a_divergence_by_hand(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    tokens = torch.arange(5, 21).unsqueeze(0)
    with torch.no_grad():
        p, q = (model(input_ids=tokens).logits[0, :-1].double().softmax(-1) for model in models)

    class One:
        def __len__(self) -> int:
            return 1

        def batches(self) -> Any:
            labels = tokens.clone()
            labels[0, :8] = -100
            yield tokens, labels

    rows = compare_tokens(*models, One())  # type: ignore[arg-type]
    assert rows.token.tolist() == list(range(13, 21))
    by_hand = (p * (p / q).log()).sum(-1)[7:]
    assert rows.kl == pytest.approx(by_hand.numpy(), rel=5e-3)
    assert (rows.kl > 0).all()
    assert rows.dense_says.tolist() == p[7:].argmax(-1).tolist()
    assert rows.pruned == pytest.approx(-q[torch.arange(7, 15), tokens[0, 8:]].log().numpy(), 1e-5)


def rows_of(dense: list[float], pruned: list[float], **columns: list[int]) -> TokenLosses:
    count = len(dense)
    whole = {name: columns.get(name, [0] * count) for name in
             ("token", "window", "offset", "dense_says", "pruned_says")}  # fmt: skip
    return TokenLosses(
        **{name: np.array(values) for name, values in whole.items()},
        dense=np.array(dense), pruned=np.array(pruned), kl=np.full(count, 0.5),
    )  # fmt: skip


def test_figures_by_hand() -> None:
    rows = rows_of(
        [1.0] * 198 + [5.0, 6.0], [1.1] * 198 + [9.0, 2.0],
        token=[3] * 100 + [4] * 100, dense_says=[3] * 200, pruned_says=[3] * 150 + [9] * 50,
    )  # fmt: skip
    found = summarize(rows)
    assert found.num_tokens == 200
    assert found.dense == pytest.approx((198 + 11) / 200)
    assert found.increase == pytest.approx((198 * 0.1 + 4 - 4) / 200)
    # A hundredth of 200 tokens is two.
    assert found.worst_increase == pytest.approx((4 + 0.1) / 2)
    assert found.best_decrease == pytest.approx((-4 + 0.1) / 2)
    assert found.tail_dense == pytest.approx(5.5)
    assert found.tail_pruned == pytest.approx((9 + 2) / 2)
    assert found.increase_quantiles["50"] == pytest.approx(0.1)
    assert found.top1_agreement == 0.75
    assert found.top1_lost == 0
    assert found.kl == 0.5


def test_what_the_dense_model_never_had_cannot_be_lost() -> None:
    found = summarize(rows_of([1.0], [2.0], token=[3], dense_says=[4]))
    assert found.top1_lost is None


def test_tokens_are_grouped_by_how_often_they_occur() -> None:
    rows = rows_of([1.0] * 4, [1.0, 2.0, 3.0, 4.0], token=[7, 8, 9, 10])
    bands = frequency_bands(rows, Counter({7: 1, 8: 9, 9: 10, 10: 400}))
    told = [(band.least, band.most, band.losses.increase) for band in bands]
    assert told == [(1, 1, 0.0), (2, 9, 1.0), (10, 99, 2.0), (100, None, 3.0)]
    assert [band.least for band in frequency_bands(rows, dict.fromkeys((7, 8, 9, 10), 50))] == [10]


def test_a_loss_that_is_no_number_is_named(pico_llama: Path, held_out_file: Path) -> None:
    dense, broken = (load_model(open_checkpoint(pico_llama)) for _ in range(2))
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    windows = cut_windows(dense, tokenizer, [held_out_file], window=32)
    with pytest.raises(RunError, match="the pruned model's loss is not finite in window 0"):
        compare_tokens(dense, broken, windows)


def test_a_divergence_that_is_no_number_is_no_small_one(
    pico_llama: Path, held_out_file: Path
) -> None:
    """A row of the head at minus infinity leaves the losses finite and the divergence not."""

    models = [load_model(open_checkpoint(pico_llama)) for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    windows = cut_windows(models[0], tokenizer, [held_out_file], window=32)
    unused = next(n for n in range(288) if n not in set(windows.ids.tolist()))

    def without_it(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([unused]), -math.inf)

    for model in models:
        model.get_output_embeddings().register_forward_hook(without_it)
    with pytest.raises(RunError, match="the divergence is not finite in window 0"):
        compare_tokens(models[0], models[1], windows)


def test_what_does_not_fit_the_context_is_refused(pico_llama: Path, held_out_file: Path) -> None:
    with pytest.raises(UserError, match="need 129 positions, the model has 128"):
        audit(options(pico_llama, pico_llama, held_out_file, prompt_tokens=64, new_tokens=65))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        # The model takes 128 positions.
        ({"prompt_tokens": None, "new_tokens": None}, (64, 64, "64 of 128 tokens: the model's")),
        ({"prompt_tokens": 120, "new_tokens": None}, (120, 8, "8 of 128 tokens: the model's")),
        ({"prompt_tokens": None, "new_tokens": 5}, (64, 5, None)),
    ],
)
def test_defaults_are_made_to_fit_the_context_and_say_so(
    words: dict[str, Any], told: tuple[int, int, str | None], pico_llama: Path, held_out_file: Path
) -> None:
    asked = options(pico_llama, pico_llama, held_out_file, **{"prompts": 2, **words})
    (domain,) = audit(asked).domains
    greedy = domain.greedy
    assert greedy is not None
    assert (greedy.prompt_tokens, greedy.new_tokens) == told[:2]
    assert greedy.same_prefix == 1
    if told[2] is None:
        assert greedy.shortened is None
    else:
        assert (greedy.shortened or "").startswith(told[2])
        assert any("the model's context" in line for line in generation_lines(domain))


def test_a_default_that_no_context_can_make_fit(pico_llama: Path, held_out_file: Path) -> None:
    with pytest.raises(UserError, match="need 129 positions, the model has 128"):
        audit(options(pico_llama, pico_llama, held_out_file, prompt_tokens=128, new_tokens=None))


def test_two_dtypes_are_refused(pico_llama: Path, held_out_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pico_llama, other)
    load_model(open_checkpoint(pico_llama), dtype="bfloat16").save_pretrained(other)
    with pytest.raises(UserError, match=r"is torch\.bfloat16, the dense model torch\.float32"):
        audit(options(pico_llama, other, held_out_file))


@pytest.mark.parametrize("content", [None, "kl: 1\n"])
def test_a_record_replaces_nothing_else(
    content: str | None, pico_llama: Path, held_out_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    if content is None:
        out.mkdir()
    else:
        out.write_text(content)
    found = run(str(pico_llama), str(pico_llama), "--data", f"a={held_out_file}", "--out", str(out))
    assert found.exit_code == 2
    assert out.is_dir() or out.read_text() == content


def test_a_model_beside_itself_is_the_same(pico_llama: Path, held_out_file: Path) -> None:
    (domain,) = audit(options(pico_llama, pico_llama, held_out_file)).domains
    assert domain.losses.increase == domain.losses.worst_increase == domain.losses.kl == 0
    assert domain.losses.top1_agreement == 1
    assert domain.losses.top1_lost == 0
    assert domain.greedy is not None
    assert (domain.greedy.same_prefix, domain.greedy.identical) == (1, 1)
    assert domain.generation is not None
    copies, sums = domain.generation.copies, domain.generation.sums
    assert [(one.source, one.length) for one in copies] == [
        ("text", 8), ("text", 16), ("random", 8), ("random", 16),
    ]  # fmt: skip
    for one in (*copies, *sums):
        assert one.right.num_prompts == 3
        assert one.right.only_dense == one.right.only_pruned == 0
        assert one.right.p == 1
    assert all(one.right.cases + one.num_known == 3 * (one.length - one.given) for one in copies)


def test_sums_are_asked_once_for_all_domains(
    pico_llama: Path, held_out_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def check(*words: Any) -> list[Sums]:
        asked.append(words)
        return check_sums(*words)

    monkeypatch.setattr("trsp.bench.audit.check_sums", check)
    asked_of = options(pico_llama, pico_llama, held_out_file)
    both = replace(asked_of, data={"a": [held_out_file], "b": [held_out_file]})
    first, second = audit(both).domains
    assert len(asked) == 1
    assert first.generation is not None
    assert second.generation is not None
    assert first.generation.sums == second.generation.sums
    assert len(first.generation.sums) == 2


def test_the_record_of_a_pruned_model(record: AuditRecord, held_out_file: Path) -> None:
    assert (record.dense.num_hidden_layers, record.pruned.num_hidden_layers) == (6, 5)
    assert record.dense.weights_sha256 != record.pruned.weights_sha256
    assert record.passed is None
    (domain,) = record.domains
    assert domain.pruned_perplexity == pytest.approx(math.exp(domain.losses.pruned))
    assert domain.losses.increase != 0
    assert domain.losses.best_decrease < 0 < domain.losses.worst_increase
    assert sum(band.losses.num_tokens for band in domain.bands) == domain.losses.num_tokens
    increases = [example.pruned - example.dense for example in domain.examples]
    assert increases == sorted(increases, reverse=True)
    text = held_out_file.read_text()
    assert len(domain.examples) == 4
    assert all(example.before + example.token in text for example in domain.examples)
    assert domain.greedy is not None
    assert domain.greedy.num_prompts == 3
    prefixes = [worst.same_prefix for worst in domain.greedy.worst]
    assert prefixes == sorted(prefixes)
    assert all(worst.prompt in text for worst in domain.greedy.worst)


def test_damage_to_one_rare_word_is_found_where_the_mean_hides_it(
    pico_llama: Path, held_out_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(held_out_file.read_text() + " zzz " + held_out_file.read_text())
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    ids = tokenizer(text.read_text())["input_ids"]
    rare = next(token for token, count in Counter(ids).items() if count in (1, 3))
    damaged = load_model(open_checkpoint(pico_llama))
    with torch.no_grad():
        head = torch.nn.Linear(64, damaged.config.vocab_size, bias=False)
        head.weight.copy_(damaged.get_output_embeddings().weight)
        # Its logit falls by 8 where the last hidden state is the mean one.
        mean = damaged.base_model(torch.tensor([ids[:100]])).last_hidden_state[0].mean(0)
        head.weight[rare] -= 8 * mean / mean.square().sum()
    damaged.config.tie_word_embeddings = False
    damaged.set_output_embeddings(head)
    damaged.save_pretrained(tmp_path / "damaged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pico_llama / name, tmp_path / "damaged" / name)
    accept = tmp_path / "accept.yaml"
    accept.write_text("perplexity_ratio: 1.2\nrare_increase: 0.5\n")
    found = audit(options(pico_llama, tmp_path / "damaged", text, accept=accept, prompts=0))
    assert {outcome.criterion: outcome.passed for outcome in found.outcomes} == {
        "perplexity_ratio": True,
        "rare_increase": False,
    }
    assert found.passed is False
    assert found.domains[0].examples[0].token == tokenizer.decode([rare])


def test_prompts_are_spread_over_the_text() -> None:
    ids = torch.arange(100)
    assert [p.tolist() for p in spread_prompts(ids, count=3, length=2)] == [
        [0, 1], [49, 50], [98, 99],
    ]  # fmt: skip
    assert len(spread_prompts(ids, count=50, length=40)) == 2
    assert [len(p) for p in spread_prompts(ids, count=1, length=100)] == [100]


def test_a_continuation_until_it_parts() -> None:
    found = Continuation((1,), (5, 6, 7, 8), (5, 6, 9, 8))
    assert (found.same_prefix, found.same_places) == (2, 0.75)
    assert Continuation((1,), (5, 6), (5, 6)).same_prefix == 2


def test_an_end_of_text_ends_no_continuation(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    dense, pruned = models
    first = continue_prompts(dense, pruned, [torch.arange(5, 9)], new_tokens=8)[0]
    dense.generation_config.eos_token_id = first.dense[0]
    again = continue_prompts(dense, pruned, [torch.arange(5, 9)], new_tokens=8)[0]
    assert again == first
    assert len(first.dense) == len(first.pruned) == 8


def test_another_tokenizer_is_refused(
    pico_llama: Path, shallow: Path, held_out_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(shallow, other)
    path = other / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = document["model"]["merges"][:-1]
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="other: its tokenizer is not that of"):
        audit(options(pico_llama, other, held_out_file))


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["audit", *words])


@pytest.mark.parametrize(("limit", "code"), [("100", 0), ("0.5", 1)])
def test_the_gate(
    limit: str, code: int, pico_llama: Path, shallow: Path, held_out_file: Path, tmp_path: Path
) -> None:
    accept, out = tmp_path / "accept.yaml", tmp_path / "audit.json"
    accept.write_text(f"perplexity_ratio: {limit}\n")
    found = run(
        str(pico_llama), str(shallow), "--data", f"held={held_out_file}", "--accept", str(accept),
        "--out", str(out), "--window", "32", "--prompts", "2", "--new-tokens", "4",
    )  # fmt: skip
    assert found.exit_code == code, found.output
    assert ("NOT accepted" in found.output) is bool(code)
    record = read_audit_record(out)
    assert record.passed is not bool(code)
    assert record.criteria == {"perplexity_ratio": float(limit), "domains": {}}
    assert record.criteria_sha256 is not None


def test_audits_of_before_the_texts_were_judged_are_read() -> None:
    records = sorted((Path(__file__).resolve().parents[2] / "bench/records").glob("audit-*.json"))
    assert len(records) >= 2
    for path in records:
        assert read_audit_record(path).warnings == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to audit on"),
        (["--data", "text.txt"], "expected NAME=PATH"),
        (["--data", "=text.txt"], "expected NAME=PATH"),
        (["--data", "a=nowhere.txt"], "nowhere.txt"),
        (["--data", "a=text.txt", "--prompts", "-1"], "--prompts -1: expected at least 0"),
        (["--data", "a=text.txt", "--new-tokens", "0"], "--new-tokens 0: expected at least 1"),
        (["--data", "a=text.txt", "--accept", "no.yaml"], "no.yaml: cannot be read"),
    ],
)
def test_what_is_asked_wrongly(
    words: list[str], told: str, pico_llama: Path, shallow: Path
) -> None:
    found = run(str(pico_llama), str(shallow), *words)
    assert found.exit_code == 2
    assert isinstance(found.exception, UserError | SystemExit)
    assert told in f"{found.exception} {found.output}"


def test_a_record_is_read_back(record: AuditRecord, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(record.model_dump_json())
    assert read_audit_record(path) == record
    path.write_text(json.dumps({**record.model_dump(mode="json"), "kind": "serve"}))
    with pytest.raises(UserError, match=r"audit.json: kind"):
        read_audit_record(path)


def test_a_record_from_before_the_checks_of_generation_is_read(
    record: AuditRecord, tmp_path: Path
) -> None:
    document = record.model_dump(mode="json")
    for domain in document["domains"]:
        del domain["generation"], domain["greedy"]["shortened"]
    outcome = {"criterion": "kl", "domain": "held", "limit": 1.0, "value": None, "passed": False}
    document |= {"outcomes": [outcome], "passed": False}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    old = read_audit_record(path)
    assert old.outcomes[0].reason is None
    assert old.domains[0].generation is None
    assert generation_lines(old.domains[0]) == []
    assert old.domains[0].losses == record.domains[0].losses


def test_the_gate_says_what_could_not_be_measured(
    pico_llama: Path, shallow: Path, held_out_file: Path, tmp_path: Path
) -> None:
    accept = tmp_path / "accept.yaml"
    accept.write_text("arithmetic_kept: 0\nloops_increase: 1\n")
    found = run(
        str(pico_llama), str(shallow), "--data", f"held={held_out_file}", "--accept", str(accept),
        "--window", "32", "--prompts", "2", "--new-tokens", "4",
    )  # fmt: skip
    assert found.exit_code == 1, found.output
    told = " ".join(found.output.split())
    assert "arithmetic_kept not measured, limit 0; the dense model adds 0 of 2 where 5" in told
    assert "loops_increase not measured, limit 1; the dense model goes on without" in told
    assert "sums of 1-digit numbers: the dense model cannot do it: 0 of 2 right" in told


def test_a_domain_needs_its_figures(record: AuditRecord) -> None:
    whole = record.domains[0].model_dump()
    assert Domain.model_validate(whole) == record.domains[0]


def test_prompts_that_go_together_are_continued_as_alone(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    prompts = [torch.arange(5, 9), torch.arange(20, 27), torch.arange(40, 44), torch.arange(9, 13)]
    found = continue_prompts(*models, prompts, new_tokens=8)
    assert [one.prompt for one in found] == [tuple(prompt.tolist()) for prompt in prompts]
    alone = [continue_prompts(*models, [prompt], new_tokens=8)[0] for prompt in prompts]
    assert found == alone
    many = continue_prompts(*models, [torch.arange(n, n + 4) for n in range(20)], new_tokens=3)
    assert [one.prompt[0] for one in many] == [*range(20)]
