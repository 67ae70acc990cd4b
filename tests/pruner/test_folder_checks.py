"""Config classes that do not keep what config.json says are found without running a model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trsp.pruner import folder_checks
from trsp.pruner.checkpoint import Checkpoint, open_checkpoint
from trsp.pruner.folder_checks import CheckFailed, CheckSkipped
from trsp.pruner.layer_map import BaseModel, ConfigChange, LayerMap
from trsp.pruner.progress import silent


class DriftingConfig(LlamaConfig):
    """Reads another value than it wrote, each time."""

    model_type = "drifting"

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)  # type: ignore[no-untyped-call]
        self.rms_norm_eps *= 2


class StubbornConfig(Qwen2Config):
    """Has its own idea of which layers have a window."""

    model_type = "stubborn"

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)  # type: ignore[no-untyped-call]
        self.layer_types = ["full_attention"] * self.num_hidden_layers


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    for kind in (DriftingConfig, StubbornConfig):
        AutoConfig.register(kind.model_type, kind)
    yield
    for kind in (DriftingConfig, StubbornConfig):
        del CONFIG_MAPPING._extra_content[kind.model_type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        vocab_size=32,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(folder: Path) -> Iterator[Checkpoint]:
    path = folder / "config.json"
    before = path.read_text()
    yield open_checkpoint(folder)
    path.write_text(before)


def with_config(checkpoint: Checkpoint, **fields: Any) -> Checkpoint:
    config = {**checkpoint.config, **fields}
    (checkpoint.path / "config.json").write_text(json.dumps(config))
    return replace(checkpoint, config=config)


def layer_map(*changes: ConfigChange) -> LayerMap:
    return LayerMap.from_drop(BaseModel("base", 3, "f" * 64), [1], config_changes=changes)


def test_a_config_that_is_kept_passes(checkpoint: Checkpoint) -> None:
    finding = folder_checks.config(checkpoint, layer_map(), trust_remote_code=False)
    assert finding.detail.startswith("LlamaConfig")


def test_a_class_that_reads_other_than_it_writes_fails(checkpoint: Checkpoint) -> None:
    drifting = with_config(checkpoint, model_type="drifting")
    with pytest.raises(CheckFailed, match=r"does not survive a save .* rms_norm_eps changes"):
        folder_checks.config(drifting, layer_map(), trust_remote_code=False)


def test_a_class_that_overrules_a_changed_field_fails(checkpoint: Checkpoint) -> None:
    types = ["sliding_attention", "full_attention"]
    stubborn = with_config(checkpoint, model_type="stubborn", layer_types=types)
    change = ConfigChange("layer_types", ["full_attention", *types], types)
    with pytest.raises(CheckFailed, match="StubbornConfig makes"):
        folder_checks.config(stubborn, layer_map(change), trust_remote_code=False)
    # The same class may read a field as it likes that nobody changed.
    folder_checks.config(stubborn, layer_map(), trust_remote_code=False)


def test_a_list_as_long_as_the_base_was_deep_fails(checkpoint: Checkpoint) -> None:
    stale = with_config(checkpoint, some_layer_scales=[1.0, 2.0, 3.0])
    with pytest.raises(CheckFailed, match="some_layer_scales has 3 entries for 2 layers"):
        folder_checks.config(stale, layer_map(), trust_remote_code=False)
    folder_checks.config(stale, None, trust_remote_code=False)


def test_a_change_that_did_not_happen_fails(checkpoint: Checkpoint) -> None:
    change = ConfigChange("num_hidden_layers", 3, 4)
    with pytest.raises(CheckFailed, match=r"num_hidden_layers is 2, layer_map.json records 4"):
        folder_checks.layer_map(checkpoint, layer_map(change))


def test_a_recorded_value_that_the_reference_never_had_fails(checkpoint: Checkpoint) -> None:
    base = BaseModel("base", 2, checkpoint.fingerprint)
    change = ConfigChange("head_dim", 99, None)
    layers = LayerMap.from_drop(base, [], config_changes=[change])
    with pytest.raises(CheckFailed, match=r"records that head_dim was 99, and .* has 8"):
        folder_checks.base_model(checkpoint, layers, checkpoint)


def test_without_manifest_or_tokenizer_the_checks_are_skipped(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckSkipped, match="manifest"):
        folder_checks.manifest(checkpoint.path, silent)
    with pytest.raises(CheckSkipped, match="no tokenizer files"):
        folder_checks.tokenizer(checkpoint, None, trust_remote_code=False)
