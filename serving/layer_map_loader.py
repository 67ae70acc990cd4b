"""vLLM's load format `trsp_layer_map`: the kept layers of a dense checkpoint, renumbered.

The model is an overlay folder (`trsp serve --map` makes it), or, for experts, the dense folder with
`model_loader_extra_config={"layer_map": FILE}` and the `hf_overrides` of ServedLayers.hf_overrides.

What cannot happen in silence, and why:
- the plugin did not load: vLLM does not know the format and refuses to start.
- another format loads the overlay: it has no weights, so there is nothing to load. (`dummy` makes
  weights up; `trsp serve` refuses it, and vLLM says so.)
- the config is not the map's, as with hf_overrides that trim the number of layers alone: refused
  here before loading, as are a map for another checkpoint, adapters and draft models.
- vLLM gets its weights past this stream: then the stream was not read to its end, an error.
The dense folder with hf_overrides and WITHOUT this format is plain vLLM. Nothing of trsp runs, and
vLLM 0.32 refuses the weights of the layers that are left over (tested); others may not: use the
overlay.

Imported by `trsp.serving.plugin.register` alone: it needs vLLM.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from trsp.pruner.errors import RunError, UserError
from trsp.pruner.layer_map import read_layer_map
from trsp.serving.layer_map_overlay import is_overlay, read_overlay
from trsp.serving.served_layers import ServedLayers, open_served_layers
from trsp.serving.vllm_versions import require_loader_methods
from trsp.serving.weight_stream import needed_files

# Only loggers below "vllm" have a handler in vLLM's processes.
logger = init_logger("vllm.trsp")

_LAYER_MAP_KEY = "layer_map"
_INDEX_NAME = "model.safetensors.index.json"


class LayerMapLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's default loader over the stream of the layers that a map keeps.

    `model_loader_extra_config`: what the default loader takes, and `layer_map`, the path of a
    layer map, where the model is the dense folder.
    """

    def __init__(self, load_config: Any) -> None:
        require_loader_methods(DefaultModelLoader)
        extra = load_config.model_loader_extra_config
        if not isinstance(extra, dict):
            raise UserError(f"model_loader_extra_config is {type(extra).__name__}, expected a dict")
        self._layer_map_file = extra.get(_LAYER_MAP_KEY)
        rest = {name: value for name, value in extra.items() if name != _LAYER_MAP_KEY}
        # The default loader knows its own formats only; `hf` takes safetensors, and whatever
        # secondary weights of a model consist of.
        super().__init__(replace(load_config, load_format="hf", model_loader_extra_config=rest))
        self._served: tuple[str, ServedLayers] | None = None
        self._stream_ended = False

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        """Refuse what a layer map cannot serve, then load as vLLM does."""
        if vllm_config.lora_config is not None:
            raise UserError(
                "a layer map serves no LoRA adapters: they number the layers of another model; "
                "write the pruned model with trsp compact and train the adapter on that"
            )
        if model_config.runner_type == "draft" or vllm_config.speculative_config is not None:
            raise UserError(
                "a layer map serves no speculative decoding: the draft model would inherit the "
                "load format; write the pruned model with trsp compact and serve that"
            )
        self._open(model_config)
        return super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded: both folders are local. Refuses what cannot be loaded."""
        self._open(model_config)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Load the kept layers into `model`, and say so once they are in it."""
        served = self._open(model_config)
        if served.has_own_head and served.config.get("tie_word_embeddings") is not False:
            # The overlay's config unties for want of headers that vLLM could read; with this vLLM
            # ties again what turns out equal, as it does for the compacted checkpoint.
            model_config.word_embeddings_untied_by_checkpoint = True
        self._stream_ended = False
        super().load_weights(model, model_config)
        if not self._stream_ended:
            raise RunError("vLLM did not read its weights through the layer map; nothing is served")
        layer_map = served.layer_map
        logger.info(
            "trsp: kept layers %s of %d, from %s",
            list(layer_map.kept),
            layer_map.base_model.num_hidden_layers,
            served.checkpoint.path,
        )

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        """(name, tensor) of the pruned model; the model's secondary weights pass as they are.

        What cannot be served is refused here and not at the first tensor: vLLM's reload_weights
        calls this with another folder, and takes the model's weights apart before it reads.
        """
        return self._weights(self._open(model_config), model)

    def _weights(self, served: ServedLayers, model: Any) -> Iterator[tuple[str, Any]]:
        primary = self.Source(str(served.checkpoint.path), None, fall_back_to_pt=False)
        yield from served.renumbering.apply(self._get_weights_iterator(primary))
        self._stream_ended = True
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def _prepare_weights(
        self,
        model_name_or_path: str,
        subfolder: str | None,
        revision: str | None,
        fall_back_to_pt: bool,
        allow_patterns_overrides: list[str] | None,
    ) -> tuple[str, list[str], bool, str]:
        """Folder, files, whether they are safetensors, and the index' name."""
        served = None if self._served is None else self._served[1]
        special = subfolder is not None or allow_patterns_overrides is not None
        if served is None or special or model_name_or_path != str(served.checkpoint.path):
            found: tuple[str, list[str], bool, str] = super()._prepare_weights(
                model_name_or_path, subfolder, revision, fall_back_to_pt, allow_patterns_overrides
            )
            return found
        files = [str(file) for file in needed_files(served.checkpoint, served.renumbering)]
        return model_name_or_path, files, True, _INDEX_NAME

    def _open(self, model_config: Any) -> ServedLayers:
        """The map and checkpoint of a model, checked against its config; once for each model."""
        model = str(model_config.model)
        if self._served is None or self._served[0] != model:
            trust = bool(model_config.trust_remote_code)
            if self._layer_map_file is None:
                served = read_overlay(model, trust_remote_code=trust)
            elif is_overlay(model):
                raise UserError(
                    f"{model}: is an overlay folder with a layer map of its own; leave "
                    f"{_LAYER_MAP_KEY} out of model_loader_extra_config"
                )
            else:
                layer_map = read_layer_map(Path(self._layer_map_file))
                served = open_served_layers(model, layer_map, trust_remote_code=trust)
            self._served = (model, served)
        served = self._served[1]
        served.check_config(model_config.hf_config)
        return served
