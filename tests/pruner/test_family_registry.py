"""The registry of families: what an entry may say, and that config classes hold nothing unknown."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trsp.bench.pico_families import PICO_CONFIGS
from trsp.pruner.family_registry import parse_registry, registry

LLAMA = 'model_types = ["llama"]\n'


def test_every_pico_model_and_every_multimodal_type_is_in_it() -> None:
    made = {build().model_type for build in PICO_CONFIGS.values()}
    assert made <= {*registry().families, *registry().multimodal}
    assert set(registry().multimodal) <= made


def test_transformers_knows_every_model_type() -> None:
    """But MiniCPM, which brings its own code."""
    types = {*registry().families, *registry().multimodal}
    assert types - set(CONFIG_MAPPING) == {"minicpm"}


def test_what_classes_fill_in_is_what_the_entries_say() -> None:
    said = [
        (model_type, name, value)
        for model_type, family in registry().families.items()
        for name, value in [
            *family.thresholds.items(),
            ("num_hidden_layers", family.default_num_layers.get(model_type)),
        ]
        if value is not None
    ]
    assert len(said) > 1
    for model_type, name, value in said:
        assert getattr(CONFIG_MAPPING[model_type](), name) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model_types = ["llama"]\nlayer_types = 3', "the field 'layer_types' is unknown"),
        (LLAMA + '[lists.layer_types]\nrule = "sometimes"', "the rule 'sometimes' is unknown"),
        (LLAMA + '[lists.layer_types]\nrule = "periodic"', "period"),
        (LLAMA + "[lists.layer_types]\nperiod = 2", "rule"),
        (LLAMA + 'refused = "too deep"\nsparse_step = true', "nothing else"),
        ("sparse_step = true", "model_types"),
        (LLAMA + "multimodal = 3", "multimodal is 3, expected dict"),
        (LLAMA + 'also_intervals = "ab"', "also_intervals is 'ab', expected list"),
        (LLAMA + 'sparse_step = "no"', "sparse_step is 'no', expected bool"),
        (LLAMA + 'feeds_first_layers = "a.b"', "there are none"),
        (LLAMA + "default_num_layers = { opt = 3 }", "'opt' is none of model_types"),
        (LLAMA + "thresholds = { first_k_dense_replace = '3' }", "no whole number"),
        (LLAMA + 'multimodal = { seer = "opt" }', "seer: opt is in no file"),
        ("model_types = [", "a.toml"),
    ],
)
def test_an_entry_that_is_not_as_it_must_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_registry({"a.toml": text})


def test_a_model_type_is_in_one_file() -> None:
    with pytest.raises(ValueError, match=r"b\.toml: llama is in two files"):
        parse_registry({"a.toml": LLAMA, "b.toml": LLAMA})
