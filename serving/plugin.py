"""What vLLM calls in each of its processes: adds the load format `trsp_layer_map`.

And the config class of models without some single branches, which vLLM can run and not read.

An exception here would end every vLLM of this environment, also one that serves no layer map. So
where the format cannot be offered this is said and the format is left out: vLLM then refuses it by
name where it is asked for, and `trsp serve` explains before it starts anything.
"""

import logging

from trsp.serving.vllm_versions import installed_vllm, require_supported

LOAD_FORMAT = "trsp_layer_map"
PLUGIN_NAME = "trsp_layer_map"
PLUGIN_GROUP = "vllm.general_plugins"

_registered = False


def register() -> None:
    """Register the load format with vLLM, once in a process however often it is called."""
    global _registered
    if _registered:
        return
    # vLLM shows what its own loggers say; others have no handler there.
    logger = logging.getLogger("vllm.trsp")
    try:
        require_supported(installed_vllm()[1])
        from vllm.model_executor.model_loader import register_model_loader

        from trsp.serving.layer_map_loader import LayerMapLoader
        from trsp.serving.sublayer_config import register_sublayer_config

        register_model_loader(LOAD_FORMAT)(LayerMapLoader)
        register_sublayer_config()
    except Exception as error:
        # Whatever a vLLM of another build raises: most of its users load no layer map.
        logger.warning(
            "load format %s is not available: %s (%s)", LOAD_FORMAT, error, type(error).__name__
        )
        return
    _registered = True
