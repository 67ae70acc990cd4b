"""What invalidates a measurement, found from what the client, the server and the engine said."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trsp.bench.serve_record import Cell, Load, Start, Workload

# A client that needs more of its one core than this cannot be trusted to be faster than the server.
MAX_CLIENT_CPU_SHARE = 0.9
# Arrivals that take this much longer than planned were not the load that was asked for.
MAX_ARRIVAL_STRETCH = 1.1

# Differences between two engines' configurations that say nothing about how they run, or that
# follow from the number of layers. Everything else makes the comparison worthless.
_NAMES = re.compile(
    r"(^|\.)(model|tokenizer|served_model_name|model_weights|hf_config_path|_name_or_path|"
    r"name_or_path|instance_id|engine_id|transformers_version|"
    r"data_parallel_master_port|_data_parallel_master_port_list(\.\d+)?|"
    r"(data_parallel_)?rpc_port|master_port|cache_dir|local_cache_dir|"
    r"_coord_store_port|_dp_master_port|_stateless_.*port.*)$"
)
_LAYERS = re.compile(
    r"(^|\.)(num_hidden_layers|n_layer|n_layers|num_layers|layer_types|layers_block_type|"
    r"mlp_layer_types|no_rope_layers|mlp_only_layers|max_window_layers|first_k_dense_replace|"
    r"end_layer|total_num_hidden_layers)(\.\d+)?$"
)
_ROOM = re.compile(
    r"(^|\.)(kv_cache_memory_bytes|num_gpu_blocks|num_cpu_blocks|kv_cache_max_concurrency|"
    r"kv_cache_size_tokens)$"
)


def cell_problems(
    document: Mapping[str, Any],
    load: Load,
    workload: Workload,
    *,
    cpu_share: float,
    prefix_cache_hits: int | None,
) -> list[str]:
    """Why one run of vLLM's serving client does not count; empty when it does.

    Args:
        document: vLLM's JSON with its per-request lists.
        prefix_cache_hits: tokens; None where the server does not tell.
    """
    problems = []
    completed, failed = int(document["completed"]), int(document["failed"])
    if failed or completed != load.num_requests:
        problems.append(f"{completed} of {load.num_requests} requests completed, {failed} failed")
    if any(length != workload.output_len for length in document["output_lens"]):
        problems.append(f"outputs are not all {workload.output_len} tokens long")
    if cpu_share > MAX_CLIENT_CPU_SHARE:
        problems.append(
            f"the client took {cpu_share:.0%} of a core: it may be slower than the server"
        )
    if prefix_cache_hits is None:
        problems.append("the server does not count what came from its prefix cache")
    elif prefix_cache_hits:
        problems.append(f"{prefix_cache_hits} tokens came from the prefix cache")
    if load.kind == "open" and load.request_rate and completed > 1:
        starts = document["start_times"]
        stretch = (max(starts) - min(starts)) * load.request_rate / load.num_requests
        if stretch > MAX_ARRIVAL_STRETCH:
            problems.append(
                f"requests left the client over {stretch:.2f} x the planned time: it is too slow "
                "for this rate"
            )
    return problems


def prompt_problems(cells: Sequence[Cell]) -> list[str]:
    """Loads whose prompts were not the same for every arm in every block."""
    seen: dict[str, set[str]] = {}
    for cell in cells:
        if cell.prompts_sha256 is not None:
            seen.setdefault(cell.load, set()).add(cell.prompts_sha256)
    return [
        f"load {load}: {len(hashes)} different sets of prompts were sent"
        for load, hashes in seen.items()
        if len(hashes) > 1
    ]


def config_problems(
    starts: Sequence[Start], dense: str, control: str
) -> tuple[list[str], list[str]]:
    """Compare every engine's configuration with the first dense one's.

    Returns:
        differences that invalidate, and those that follow from the layers; one line each.
    """
    problems: dict[str, None] = {}
    explained: dict[str, None] = {}
    for memory in dict.fromkeys(start.memory for start in starts):
        of_memory = [start for start in starts if start.memory == memory]
        reference = next((start for start in of_memory if start.arm == dense), None)
        if reference is None:
            continue
        for start in of_memory:
            same_model = start.arm in (dense, control)
            for name in sorted(reference.engine_config.keys() | start.engine_config.keys()):
                ours, theirs = reference.engine_config.get(name), start.engine_config.get(name)
                if ours == theirs or _NAMES.search(name):
                    continue
                line = f"{start.arm}, {memory}: {name} is {_short(theirs)}, dense {_short(ours)}"
                if not same_model and (_LAYERS.search(name) or _ROOM.search(name)):
                    explained[line] = None
                else:
                    problems[line] = None
            if memory == "equal-kv" and start.engine_config and start.num_kv_blocks is None:
                problems[f"{start.arm}: tells no size of its KV cache: equality unchecked"] = None
            if memory == "equal-kv" and start.num_kv_blocks != reference.num_kv_blocks:
                problems[
                    f"{start.arm}: {start.num_kv_blocks} KV blocks, dense "
                    f"{reference.num_kv_blocks}: not equal"
                ] = None
    return list(problems), list(explained)


def _short(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= 80 else text[:77] + "..."
