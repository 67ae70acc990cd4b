"""vLLM's offline benchmarks in a process: `python -P -m trsp.bench.offline_program KIND OUT ARGS`.

KIND is latency or throughput, ARGS the command line of `vllm bench KIND`; vLLM writes its JSON to
OUT. Beside it OUT.engine.json gets the engine's configuration and what each call of `generate`
was given and gave, warm-ups among them; the log gets a line as each call begins.
"""

import hashlib
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
    config: dict[str, Any] = {}
    calls: list[Any] = []

    def watched(*words: Any, **named: Any) -> Any:
        engine = make(*words, **named)
        config.update(
            pydantic.TypeAdapter(VllmConfig).dump_python(
                engine.llm_engine.vllm_config, mode="json", fallback=str
            )
        )
        generate = engine.generate

        def watched_generate(*words: Any, **named: Any) -> Any:
            print(call_line(len(calls)), file=sys.stderr, flush=True)
            # What was generated is looked at when all is done: this call may be timed.
            calls.append(generate(*words, **named))
            return calls[-1]

        engine.generate = watched_generate
        return engine

    LLM.from_engine_args = staticmethod(watched)
    benchmark = importlib.import_module(f"vllm.benchmarks.{kind}")
    parser = FlexibleArgumentParser()
    benchmark.add_cli_args(parser)
    parsed = parser.parse_args([*arguments, "--output-json", out])
    # vLLM's latency benchmark draws its prompts from the global state and does not seed it.
    numpy.random.seed(parsed.seed or 0)
    benchmark.main(parsed)
    document = {"vllm_config": config, "calls": [_summary(outputs) for outputs in calls]}
    Path(f"{out}.engine.json").write_text(json.dumps(document), encoding="utf-8")


def call_line(number: int) -> str:
    """What the log says as a call of `generate` begins, 0 first."""
    return f"trsp: generate call {number}"


def _summary(outputs: Any) -> dict[str, Any]:
    """Token ids of the prompts as one hash, and how many tokens went in and came out."""
    prompts = [list(output.prompt_token_ids) for output in outputs]
    return {
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "prompt_lens": [len(prompt) for prompt in prompts],
        "output_lens": [len(output.outputs[0].token_ids) for output in outputs],
    }


if __name__ == "__main__":
    main()
