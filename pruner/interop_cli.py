"""The commands that exchange things with other tools: `trsp map`, `trsp adapter`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError
from trsp.pruner.layer_lists import to_llama_cpp, to_mergekit_slices
from trsp.pruner.layer_map import LayerMap, LayerMapError, read_layer_map

Map = Annotated[Path, typer.Argument(metavar="MAP", help="layer map")]
Prefix = Annotated[int | None, typer.Option(help="only the map's first N removals")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]


def export_map(
    layer_map: Annotated[
        Path, typer.Argument(metavar="MAP", help="layer map; or another tool's file, with --model")
    ],
    form: Annotated[str, typer.Option("--format", help="json, mergekit or llama-cpp")] = "json",
    prefix: Prefix = None,
    model: Annotated[
        Path | None,
        typer.Option(help="checkpoint that a file of mergekit, PruneMe, SLEB, EvoPress is about"),
    ] = None,
    listed: Annotated[
        str | None, typer.Option("--list", help="with --model: a plain list says keep or drop")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; stdout")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="allow the model's own code")
    ] = False,
) -> None:
    """Print a layer map, or its first N removals, for this or another tool; or import a list."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out}: expected the name of a file in a folder that exists")
    if model is None:
        if listed is not None or trust_remote_code:
            raise UserError("--list and --trust-remote-code need --model: the list is for it")
        try:
            chosen = read_layer_map(layer_map)
        except LayerMapError as error:
            raise UserError(f"{error}; another tool's file is read with --model") from error
    else:
        chosen = _import_list(layer_map, model, listed, trust_remote_code)
    if prefix is not None:
        chosen = chosen.prefix(prefix)
    writers = {
        "json": lambda: chosen.to_json(),
        "mergekit": lambda: to_mergekit_slices(chosen),
        "llama-cpp": lambda: to_llama_cpp(chosen),
    }
    if form not in writers:
        raise UserError(f"--format {form!r} is unknown; choose from {', '.join(writers)}")
    text = writers[form]().rstrip("\n")
    if out is None:
        typer.echo(text)
    else:
        atomic_write(out, text + "\n")


def _import_list(path: Path, model: Path, listed: str | None, trusted: bool) -> LayerMap:
    """Read another tool's list for `model`, and say on stderr how it was understood."""
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.keep_lists import read_keep_list
    from trsp.pruner.run import base_model_of

    chosen_list: Literal["keep", "drop"] | None
    match listed:
        case None | "keep" | "drop":
            chosen_list = listed
        case _:
            raise UserError(f"--list {listed!r} is unknown; choose keep or drop")
    checkpoint = open_checkpoint(model, trust_remote_code=trusted)
    layer_map = read_keep_list(path, base_model_of(checkpoint), listed=chosen_list)
    typer.echo(f"read as {layer_map.method['name']}", err=True)
    for name, layers in (("kept", layer_map.kept), ("dropped", layer_map.dropped)):
        typer.echo(f"{name:<8} {', '.join(map(str, layers)) or 'none'}", err=True)
    if "model" in layer_map.method:
        typer.echo(f"made for {layer_map.method['model']}, used for {model}", err=True)
    if dtype := layer_map.method.get("out_dtype") or layer_map.method.get("dtype"):
        typer.echo(f"its dtype {dtype} is not applied: weights keep theirs", err=True)
    return layer_map


def adapter(
    folder: Annotated[Path, typer.Argument(metavar="ADAPTER", help="LoRA adapter of PEFT")],
    layer_map: Map,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    prefix: Prefix = None,
    base_model: Annotated[
        str | None, typer.Option(help="new base_model_name_or_path; as it is")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Renumber a LoRA adapter of the dense model for the pruned one."""
    from trsp.pruner.adapters import renumber_adapter

    chosen = read_layer_map(layer_map)
    if prefix is not None:
        chosen = chosen.prefix(prefix)
    renumber_adapter(folder, chosen, out, base_model=base_model, overwrite=overwrite)
    typer.echo(f"{out}: for the {len(chosen.kept)} layers of the pruned model")
