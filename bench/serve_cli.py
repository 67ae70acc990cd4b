"""`trsp bench serve`: parse, validate, call one function, show its record."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trsp.pruner.errors import UserError


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="DENSE PRUNED... [-- VLLM FLAGS]", help="checkpoint folders"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for everything")] = Path("trsp-serve"),
    record: Annotated[Path | None, typer.Option(help="record; OUT/record.json")] = None,
    backend: Annotated[
        str, typer.Option(help="serve, latency, throughput or transformers")
    ] = "serve",
    shape: Annotated[str | None, typer.Option(help="known shape with random weights")] = None,
    remove: Annotated[list[int] | None, typer.Option(help="layers less; repeatable")] = None,
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="of the weights; the config's")] = None,
    num_blocks: Annotated[int, typer.Option(help="of A B B A")] = 5,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(help="closed loop or batch; repeatable; 1 4 16, transformers 64"),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="open loop, share of the dense capacity; repeatable; .3 .5 .7 .9"),
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="closed loop only")] = False,
    num_requests: Annotated[
        int | None, typer.Option(help="for each load; max(10 x concurrency, 200)")
    ] = None,
    input_len: Annotated[int | None, typer.Option(help="tokens; 256, transformers 64")] = None,
    output_len: Annotated[int, typer.Option(help="tokens")] = 128,
    ttft_slo: Annotated[float, typer.Option(help="ms, for goodput")] = 2000.0,
    tpot_slo: Annotated[float, typer.Option(help="ms, for goodput")] = 100.0,
    memory: Annotated[
        list[str] | None, typer.Option(help="equal-kv, equal-memory; repeatable; both")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="weights + KV cache at equal memory; 0.9 of the GPU - 6")
    ] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="KV cache at equal KV")] = None,
    servers: Annotated[str, typer.Option(help="auto, resident or restart")] = "auto",
    port: Annotated[int | None, typer.Option(help="of the server; a free one")] = None,
    seed: Annotated[int, typer.Option(help="of prompts and arrivals")] = 0,
    prompt_tokens: Annotated[int, typer.Option(help="of --backend transformers")] = 2048,
    num_iters: Annotated[int, typer.Option(help="of --backend latency")] = 30,
    health_timeout: Annotated[float, typer.Option(help="seconds until a server answers")] = 1800.0,
    cell_timeout: Annotated[float, typer.Option(help="seconds for a measurement")] = 3600.0,
    resume: Annotated[bool, typer.Option("--resume", help="go on where it stopped")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Serve a dense model and pruned ones and measure them side by side, in A B B A blocks.

    Flags after -- go to vLLM, the same for every model.
    """
    from trsp.bench.serve import describe, run_serve
    from trsp.bench.serve_design import ServeOptions
    from trsp.bench.serve_show import show_serve

    folders, flags = _split(models or [])
    options = ServeOptions(
        out=out,
        record=record,
        backend=_one_of("--backend", backend, "serve", "latency", "throughput", "transformers"),
        dense=folders[0] if folders else None,
        pruned=tuple(folders[1:]),
        shape=shape,
        remove=tuple(remove or ()),
        load_format="dummy" if shape is not None else load_format,
        dtype=dtype,
        num_blocks=num_blocks,
        concurrencies=tuple(concurrency or ((64,) if backend == "transformers" else (1, 4, 16))),
        shares=_shares(backend, rate, no_open),
        num_requests=num_requests,
        input_len=(64 if backend == "transformers" else 256) if input_len is None else input_len,
        output_len=output_len,
        ttft_slo_ms=ttft_slo,
        tpot_slo_ms=tpot_slo,
        memories=tuple(
            _one_of("--memory", name, "equal-kv", "equal-memory")
            for name in dict.fromkeys(memory or ("equal-kv", "equal-memory"))
        ),
        memory_gib=memory_gib,
        kv_tokens=kv_tokens,
        residency=servers,
        port=port,
        seed=seed,
        num_iterations=num_iters,
        prompt_tokens=prompt_tokens,
        health_timeout_seconds=health_timeout,
        cell_timeout_seconds=cell_timeout,
        flags=tuple(flags),
        resume=resume,
    )
    if dry_run:
        for line in describe(options):
            typer.echo(line)
        return
    result = run_serve(options, tell=lambda line: typer.echo(line, err=True))
    show_serve(result, as_json=as_json)
    if result.invalid or any(cell.invalid for cell in result.cells):
        raise typer.Exit(1)


def _split(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The models' folders, and vLLM's flags: everything from the first flag on.

    An unknown flag before -- never comes here: it may be a mistyped option of ours.
    """
    first = next((n for n, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    return [Path(text) for text in arguments[:first]], arguments[first:]


def _shares(backend: str, rate: list[float] | None, no_open: bool) -> tuple[float, ...]:
    if no_open or backend != "serve":
        if rate:
            raise UserError("--rate is an open loop: it needs --backend serve, without --no-open")
        return ()
    return tuple(rate or (0.3, 0.5, 0.7, 0.9))


def _one_of(name: str, value: str, *choices: str) -> Any:
    if value not in choices:
        raise UserError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")
    return value
