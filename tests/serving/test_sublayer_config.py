"""The config class of models without single branches: attributes, JSON, copies; what it refuses."""

import copy
import json
import pickle
from typing import Any

import pytest

from trsp.pruner.errors import UserError
from trsp.pruner.sublayer_checkpoint import SUBLAYER_MODEL_TYPE
from trsp.serving.sublayer_config import SublayerConfig, register_sublayer_config


def block(*, attention: bool = False, ffn: bool = False) -> dict[str, Any]:
    return {
        "attention": {"no_op": attention, "n_heads_in_group": 2},
        "ffn": {"no_op": ffn, "intermediate_size": 48, "hidden_act": "silu"},
    }


def config_of(blocks: Any) -> SublayerConfig:
    return SublayerConfig(num_hidden_layers=2, block_configs=blocks)


def test_blocks_are_read_by_attribute_and_come_back_as_json() -> None:
    blocks = [block(attention=True), block(ffn=True)]
    config = config_of(blocks)
    for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert [item.attention.no_op for item in same.block_configs] == [True, False]
        assert [item.ffn.no_op for item in same.block_configs] == [False, True]
        # DeciLM asks for fields that only some models have.
        assert not hasattr(same.block_configs[0].ffn, "ffn_mult")
    assert json.loads(config.to_json_string())["block_configs"] == blocks


def test_transformers_finds_the_class_by_model_type(tmp_path: Any) -> None:
    from transformers import AutoConfig

    register_sublayer_config()
    register_sublayer_config()
    config_of([block(), block(ffn=True)]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SublayerConfig
    assert config.model_type == SUBLAYER_MODEL_TYPE
    assert config.block_configs[1].ffn.no_op is True


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([block()], "not a list of 2 blocks"),
        ({"0": block()}, "not a list of 2 blocks"),
        ([block(), 3], r"block_configs\[1\].attention.no_op is not true or false"),
        ([block(), {"attention": {"no_op": True}}], r"block_configs\[1\].ffn.no_op"),
        ([block(), {**block(), "ffn": {"no_op": "yes"}}], r"block_configs\[1\].ffn.no_op"),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(blocks)
