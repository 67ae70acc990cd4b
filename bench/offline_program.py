"""vLLM's offline benchmarks in a process: `python -P -m trsp.bench.offline_program KIND OUT ARGS`.

KIND is latency or throughput, ARGS the command line of `vllm bench KIND`; vLLM writes its JSON to
OUT, and beside it the engine's configuration goes to OUT.engine.json.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("latency", "throughput")


def main() -> None:
    """Run vLLM's benchmark with its engine watched."""
    kind, out, *arguments = sys.argv[1:]
    if kind not in KINDS:
        raise SystemExit(f"unknown benchmark {kind!r}: choose from {', '.join(KINDS)}")
    import numpy
    import pydantic
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make: Any = LLM.from_engine_args

    def watched(*words: Any, **named: Any) -> Any:
        engine = make(*words, **named)
        config = pydantic.TypeAdapter(VllmConfig).dump_python(
            engine.llm_engine.vllm_config, mode="json", fallback=str
        )
        Path(f"{out}.engine.json").write_text(json.dumps(config), encoding="utf-8")
        return engine

    LLM.from_engine_args = staticmethod(watched)
    benchmark = importlib.import_module(f"vllm.benchmarks.{kind}")
    parser = FlexibleArgumentParser()
    benchmark.add_cli_args(parser)
    parsed = parser.parse_args([*arguments, "--output-json", out])
    # vLLM's latency benchmark draws its prompts from the global state and does not seed it.
    numpy.random.seed(parsed.seed or 0)
    benchmark.main(parsed)


if __name__ == "__main__":
    main()
