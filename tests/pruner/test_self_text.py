"""`--data self`: what the model writes follows its distribution, is kept, and serves every command.

The statistics have fixed seeds; their limits are those of a chance of 1e-4 to fail a right draw.
"""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from trsp.bench import compare_calibration
from trsp.bench.cli import app
from trsp.bench.compare import run_compare
from trsp.bench.compare_bench import CompareOptions
from trsp.bench.compare_methods import parse_method
from trsp.pruner import api, run, self_text
from trsp.pruner.calibration import sequence_length
from trsp.pruner.checkpoint import load_tokenizer, open_checkpoint
from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.layer_map import read_layer_map
from trsp.pruner.recipe import Recipe
from trsp.pruner.self_text import (
    SelfTextKey,
    is_self,
    read_self_text,
    sample_self_text,
    write_self_text,
)
from trsp.pruner.text_checks import MAX_BITS_PER_BYTE, domain_warnings
from trsp.pruner.token_ids import hash_ids

EOS, BOS, PAD = 0, 1, 2
NUM_WORDS = 9
VOCABULARY = 3 + NUM_WORDS
SETTINGS = (
    "calibration.num_sequences=8", "calibration.sequence_length=32",
    "selection.first_round_steps=6", "selection.round_steps=3", "selection.batch_size=2",
    "selection.num_candidates=2", "selection.verification_sequences=4",
    "transfer.steps=6", "transfer.batch_size=2", "evaluation.window=64",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def key_of(num_sequences: int, length: int, seed: int = 0) -> SelfTextKey:
    return SelfTextKey("weights", "tokenizer", num_sequences, length, seed)


def make_tokenizer(*, starts: bool = False, **names: str) -> PreTrainedTokenizerFast:
    """Nine words behind <eos>, <bos> and <pad>; `starts`: its texts begin with bos."""
    words = {f"w{number}": number + 3 for number in range(NUM_WORDS)}
    vocabulary = {"<eos>": EOS, "<bos>": BOS, "<pad>": PAD, **words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **names)


class Chain:
    """A model whose next token depends on the last alone, by a table of logits [V, rows]."""

    def __init__(self, table: Tensor, *, keeps_cache: bool = True) -> None:
        self.table, self.keeps_cache = table, keeps_cache
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = LlamaConfig(
            vocab_size=table.shape[1], num_hidden_layers=1, hidden_size=8, num_attention_heads=1
        )

    def __call__(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        assert use_cache
        assert input_ids.shape[1] == 1, "with a cache only the last token goes in"
        cache = (past_key_values or 0) + 1
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits, past_key_values=cache if self.keeps_cache else None)


def chain(table: Tensor, **options: Any) -> PreTrainedModel:
    model: Any = Chain(table, **options)
    return model  # type: ignore[no-any-return]


def cycle() -> Tensor:
    """After a word comes the next word, after the last word eos, after all others the first."""
    table = torch.full((VOCABULARY, VOCABULARY), -torch.inf)
    for token in range(VOCABULARY):
        following = 3 if token < 3 else token + 1
        table[token, EOS if following == VOCABULARY else following] = 0
    return table


def test_a_seed_decides_every_token(pico_llama: Path, model: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(open_checkpoint(pico_llama))
    drawn = [sample_self_text(model, tokenizer, key_of(6, 24, seed)) for seed in (3, 3, 4)]
    first, again, other = drawn
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.input_ids.shape == (6, 24)
    assert first.input_ids.dtype == torch.int64
    assert first.sha256 == hash_ids(first.input_ids)
    assert (first.source, first.seed) == (("self",), 3)
    assert len(first.input_ids[:, 1:8].unique(dim=0)) == 6, "sequences differ"
    fewer = sample_self_text(model, tokenizer, key_of(2, 24, 3))
    assert torch.equal(fewer.input_ids, first.input_ids[:2])


def test_batches_change_nothing(
    pico_llama: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(open_checkpoint(pico_llama))
    ticks: list[tuple[str, int, int]] = []
    whole = sample_self_text(
        model, tokenizer, key_of(5, 16), progress=lambda *tick: ticks.append(tick)
    )
    assert ticks[-1] == ("sampling text", 80, 80)
    assert [tick[1] for tick in ticks] == sorted(tick[1] for tick in ticks)
    # Two sequences of this cache: 6 layers, keys and values of 64 in float32.
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 2 * 16 * 6 * 2 * 64 * 4)
    assert self_text._batch_size(model, 16) == 2
    assert torch.equal(sample_self_text(model, tokenizer, key_of(5, 16)).input_ids, whole.input_ids)


def test_tokens_follow_the_model() -> None:
    """Where each token stands in the model's own ranking, without a cache, is uniform."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=3, hidden_size=32, intermediate_size=64,
        num_attention_heads=2, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = sample_self_text(model, make_tokenizer(eos_token="<eos>"), key_of(32, 128)).input_ids
    with torch.no_grad():
        chances = model(ids).logits[:, :-1].double().softmax(dim=-1)
    entropy = -(chances * chances.log()).sum(dim=-1).mean()
    assert 0.8 < entropy < 2.2, "neither certain nor without an opinion"
    ranked, order = chances.sort(dim=-1, descending=True)
    place = (order == ids[:, 1:, None]).int().argmax(dim=-1, keepdim=True)
    ends = ranked.cumsum(dim=-1).gather(-1, place)
    spread = torch.rand(ends.shape, generator=torch.Generator().manual_seed(5))
    values = (ends - spread * ranked.gather(-1, place)).flatten()
    counts = torch.histc(values.float(), bins=20, min=0, max=1)
    expected = len(values) / 20
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < chi2.isf(1e-4, 19)


def test_a_known_distribution_comes_out() -> None:
    chances = torch.tensor([0, 0, 0, 0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02, 0])
    model = chain(chances.log().expand(VOCABULARY, -1))
    ids = sample_self_text(model, make_tokenizer(eos_token="<eos>"), key_of(50, 101)).input_ids
    counts = ids[:, 1:].flatten().bincount(minlength=VOCABULARY)
    assert counts[chances == 0].sum() == 0
    expected = 5000 * chances[3:11]
    statistic = float(((counts[3:11] - expected) ** 2 / expected).sum())
    assert statistic < chi2.isf(1e-4, 7)


def test_the_ends_of_the_chances_draw_nothing_impossible() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [0, 1, 10, 11]] = -torch.inf
    tokenizer = make_tokenizer(eos_token="<eos>")
    drawer = self_text._Drawer(chain(cycle()), tokenizer)
    for chance, token in ((0.0, 2), (0.124, 2), (0.126, 3), (1 - 2.0**-53, 9)):
        chances = torch.tensor([chance], dtype=torch.float64)
        assert drawer.draw(logits, chances).tolist() == [token]


def test_a_certain_model_writes_what_it_is_certain_of() -> None:
    tokenizer = make_tokenizer(eos_token="<eos>")
    ids = sample_self_text(chain(cycle()), tokenizer, key_of(2, 14)).input_ids
    assert ids.tolist() == [[EOS, *range(3, VOCABULARY), EOS, 3, 4, 5]] * 2


def test_rows_that_pad_the_embedding_are_never_drawn() -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY + 5)
    table[:, VOCABULARY:] = 50.0
    tokenizer = make_tokenizer(eos_token="<eos>")
    ids = sample_self_text(chain(table), tokenizer, key_of(20, 50)).input_ids
    counts = ids[:, 1:].flatten().bincount()
    assert len(counts) == VOCABULARY
    assert counts.max() < 2 * counts.min(), "the ids of the tokenizer share the chance evenly"
    short = chain(torch.zeros(VOCABULARY, VOCABULARY - 1))
    with pytest.raises(UserError, match="the tokenizer is another model's"):
        sample_self_text(short, tokenizer, key_of(2, 8))


def test_documents_begin_with_bos_where_texts_do_also_behind_eos() -> None:
    tokenizer = make_tokenizer(starts=True, bos_token="<bos>", eos_token="<eos>")
    drawn = sample_self_text(chain(cycle()), tokenizer, key_of(1, 14))
    assert drawn.input_ids.tolist() == [[BOS, *range(3, VOCABULARY), EOS, BOS, 3, 4]]
    assert drawn.add_bos


def test_the_bos_that_texts_do_without_is_not_used() -> None:
    tokenizer = make_tokenizer(bos_token="<bos>", eos_token="<eos>")
    drawn = sample_self_text(chain(cycle()), tokenizer, key_of(1, 4))
    assert drawn.input_ids.tolist() == [[EOS, 3, 4, 5]]
    assert not drawn.add_bos
    without_eos = sample_self_text(chain(cycle()), make_tokenizer(bos_token="<bos>"), key_of(1, 4))
    assert without_eos.input_ids.tolist() == [[BOS, 3, 4, 5]]
    assert without_eos.add_bos


def test_one_token_for_begin_and_end_stands_once_between_documents() -> None:
    tokenizer = make_tokenizer(starts=True, bos_token="<bos>", eos_token="<bos>")
    table = cycle()
    table[VOCABULARY - 1] = -torch.inf
    table[VOCABULARY - 1, BOS] = 0
    drawn = sample_self_text(chain(table), tokenizer, key_of(1, 12))
    assert drawn.input_ids.tolist() == [[BOS, *range(3, VOCABULARY), BOS, 3]]
    assert drawn.add_bos


def test_without_bos_and_eos_any_ordinary_token_begins() -> None:
    drawn = sample_self_text(chain(cycle()), make_tokenizer(), key_of(200, 2))
    # <eos> and <bos> are words like others here; <pad> is special all the same.
    assert set(drawn.input_ids[:, 0].tolist()) == set(range(VOCABULARY)) - {PAD}
    assert not drawn.add_bos


def test_a_model_that_cannot_write_is_refused() -> None:
    tokenizer = make_tokenizer(eos_token="<eos>")
    with pytest.raises(UserError, match="keeps no cache"):
        sample_self_text(chain(cycle(), keeps_cache=False), tokenizer, key_of(1, 4))
    broken = torch.full((VOCABULARY, VOCABULARY), torch.nan)
    with pytest.raises(RunError, match="not finite"):
        sample_self_text(chain(broken), tokenizer, key_of(1, 4))


def test_self_stands_alone() -> None:
    assert is_self(["self"])
    assert not is_self(["./self"])
    assert not is_self([])
    assert not is_self(["a.txt", "b.txt"])
    for data in (["self", "a.txt"], ["a.txt", "self"], ["self", "self"]):
        with pytest.raises(UserError, match=r"self .* stands alone"):
            is_self(data)


def test_what_was_drawn_is_kept_whole(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(starts=True, bos_token="<bos>", eos_token="<eos>")
    key, path = key_of(3, 9, seed=7), tmp_path / "text.safetensors"
    assert read_self_text(path, key) is None
    drawn = sample_self_text(chain(torch.zeros(VOCABULARY, VOCABULARY)), tokenizer, key)
    write_self_text(path, drawn, key)
    kept = read_self_text(path, key)
    assert kept is not None
    assert torch.equal(kept.input_ids, drawn.input_ids)
    assert kept.as_record() == drawn.as_record()
    with pytest.raises(UserError, match="another seed"):
        read_self_text(path, key_of(3, 9, seed=8))
    with pytest.raises(UserError, match="another num_sequences"):
        read_self_text(path, key_of(4, 9, seed=7))
    content = path.read_bytes()
    for damaged in (content[:20], content[:-8], content[:-8] + b"\1" * 8, b""):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="damaged"):
            read_self_text(path, key)


def test_own_text_is_never_called_unknown() -> None:
    much = MAX_BITS_PER_BYTE + 5
    assert len(domain_warnings(much)) == 1
    assert domain_warnings(much, own_text=True) == []
    assert "different kinds" in domain_warnings(1.0, 5.0, own_text=True)[0]


def test_the_context_limits_a_sequence(pico_llama: Path) -> None:
    checkpoint = open_checkpoint(pico_llama)
    assert sequence_length(checkpoint) == sequence_length(checkpoint, 128) == 128
    with pytest.raises(UserError, match="longer than the model's context, 128 tokens"):
        sequence_length(checkpoint, 129)
    del checkpoint.config["max_position_embeddings"]
    assert sequence_length(checkpoint, 129) == 129
    with pytest.raises(UserError, match="states no context length"):
        sequence_length(checkpoint)


@pytest.fixture
def words(held_out_file: Path) -> dict[str, Any]:
    return {
        "data": ["self"],
        "eval_data": [held_out_file],
        "layers": 2,
        "settings": SETTINGS,
        "vllm": "off",
    }


def no_more_sampling(*words: Any, **named: Any) -> Any:
    raise AssertionError("the text was drawn a second time")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_run_without_any_text_resumes_on_the_text_it_wrote(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    report = api.prune(pico_llama, whole, **words)
    assert report["calibration"]["source"] == ["self"]
    assert report["calibration"]["num_sequences"] == 8
    assert report["costs"]["self text"]["seconds"] > 0
    assert not [text for text in report["warnings"] if "hardly knows" in text]
    assert report["texts"]["bits_per_byte"]["calibration"] > MAX_BITS_PER_BYTE, "as it would warn"
    assert report["texts"]["overlap"]["share"] < 0.1
    layer_map = read_layer_map(whole / "layer_map.json")
    assert layer_map.calibration == report["calibration"]

    def stop(task: str, completed: int, total: int) -> None:
        if (task, completed) == ("transfer", 3):
            os.kill(os.getpid(), signal.SIGINT)

    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        api.prune(pico_llama, parts, progress=stop, **words)
    monkeypatch.setattr(run, "sample_self_text", no_more_sampling)
    others = {**words, "settings": (*SETTINGS, "calibration.num_sequences=9")}
    with pytest.raises(UserError, match="another num_sequences"):
        api.prune(pico_llama, parts, resume=True, **others)
    resumed = api.prune(pico_llama, parts, resume=True, **words)
    assert resumed["calibration"] == report["calibration"]
    assert resumed["costs"]["self text"]["seconds"] > 0
    assert weights(parts) == weights(whole)


def test_a_folder_in_use_is_found_before_the_model_writes(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "sample_self_text", no_more_sampling)
    for name in ("out.run", "plan.json.run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds an earlier run"):
        api.prune(pico_llama, tmp_path / "out", **words)
    with pytest.raises(UserError, match="holds an earlier run"):
        api.plan(pico_llama, tmp_path / "plan.json", data=["self"], layers=2)


def test_the_other_commands_take_the_word(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = api.plan(
        pico_llama, tmp_path / "plan.json", data=["self"], layers=2, settings=SETTINGS[:-3]
    )
    assert planned.calibration is not None
    assert planned.calibration["source"] == ["self"]
    for module in (run, self_text):
        monkeypatch.setattr(module, "sample_self_text", no_more_sampling)
    settings = (*SETTINGS, "calibration.num_sequences=16")
    lines = api.describe(
        pico_llama, out=tmp_path / "out", data=["self"], layers=2, auto=True, settings=settings
    )
    assert "text       16 sequences of 32 tokens, which the model writes" in lines
    assert any(line.startswith("search     4 of 16 sequences are held out;") for line in lines)
    monkeypatch.chdir(tmp_path)
    assert api.describe(pico_llama, out="self", data=["self"], settings=SETTINGS)
    for data, problem in (
        (["self", "a.txt"], "stands alone"),
        (["./self"], "does not exist"),
    ):
        with pytest.raises(UserError, match=problem):
            api.describe(pico_llama, out="out", data=data, settings=SETTINGS)
    with pytest.raises(UserError, match="longer than the model's context"):
        api.prune(pico_llama, "out", data=["self"], settings=["calibration.sequence_length=129"])
    with pytest.raises(UserError, match="does not exist"):
        api.prune(pico_llama, "out", data=["self"], eval_data=["no.txt"], settings=SETTINGS)


def test_a_search_holds_out_part_of_the_written_text(pico_llama: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "calibration.num_sequences=16", "auto.max_transfers=1")
    report = api.prune(
        pico_llama, tmp_path / "out", data=["self"], layers=1, auto=True, settings=settings,
        vllm="off",
    )  # fmt: skip
    assert report["calibration"]["source"] == ["self"]
    assert report["calibration"]["num_sequences"] == 12


def test_a_comparison_writes_its_text_once(
    pico_llama: Path, tmp_path: Path, held_out_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = {"data": ("self",), "num_sequences": 8, "sequence_length": 16}
    recipe = {
        "device": "cpu",
        "calibration": calibration,
        "selection": {"first_round_steps": 2, "round_steps": 1, "verification_sequences": 4},
        "transfer": {"steps": 2, "batch_size": 2},
    }
    asked = CompareOptions(
        model=pico_llama,
        recipe=Recipe.model_validate(recipe),
        eval_data={"near": [held_out_file]},
        num_removed=(1,),
        seeds=(0, 1),
        methods=tuple(map(parse_method, ("block_influence", "block_influence+finetune"))),
        folder=tmp_path / "out",
        window=32,
    )
    record = list(run_compare(asked))[-1]
    assert record.complete
    assert [text["source"] for text in record.calibrations.values()] == [["self"], ["self"]]
    assert record.calibrations["0"]["sha256"] != record.calibrations["1"]["sha256"]
    monkeypatch.setattr(compare_calibration, "sample_self_text", no_more_sampling)
    assert list(run_compare(asked))[-1].cells == record.cells
    command = ["compare", str(pico_llama), "--out", str(tmp_path / "other"), "--data", "self"]
    command += ["--eval-data", f"near={held_out_file}"]
    mixed = CliRunner().invoke(app, [*command, "--data", str(held_out_file)])
    assert (mixed.exit_code, "stands alone" in mixed.output) == (2, True)
    long = CliRunner().invoke(
        app, [*command, "--resume", "--set", "calibration.sequence_length=999"]
    )
    assert (long.exit_code, "longer than the model's context" in long.output) == (2, True)
