"""`trsp serve`: vLLM's OpenAI server for a checkpoint, or for a layer map over it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from trsp.pruner.errors import UserError

if TYPE_CHECKING:
    from trsp.serving.served_layers import ServedLayers
    from trsp.serving.server_command import ServerCommand

# What is not ours is vLLM's.
_ALL_TO_VLLM = {"ignore_unknown_options": True, "allow_extra_args": True}


def mount(app: typer.Typer) -> None:
    """Add the command to the `trsp` application."""
    app.command(context_settings=_ALL_TO_VLLM)(serve)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="checkpoint or overlay folder; comes first")],
    layer_map: Annotated[
        Path | None, typer.Option("--map", help="layer map: serve the layers it keeps")
    ] = None,
    prefix: Annotated[
        int | None, typer.Option(help="use only the first N removals of the layer map")
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="keep the overlay here; vLLM then finds its compile cache again"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the command line")] = False,
) -> None:
    """Serve with vLLM; every other option goes to vLLM. Binds 127.0.0.1 unless --host is given."""
    flags = list(context.args)
    if model.startswith("-"):
        raise UserError(f"trsp serve {model} ...: the model comes first, then the options")
    if layer_map is None:
        for name, value in (("--prefix", prefix), ("--overlay", overlay)):
            if value is not None:
                raise UserError(f"{name} means nothing without --map; name the layer map")
        _serve_folder(model, flags, dry_run)
    else:
        _serve_map(Path(model), layer_map, prefix, overlay, flags, dry_run)


def _serve_folder(model: str, flags: list[str], dry_run: bool) -> None:
    """Serve a checkpoint as it is, or an overlay that was kept."""
    from trsp.serving.layer_map_overlay import is_overlay, read_overlay
    from trsp.serving.server_command import server_command
    from trsp.serving.server_flags import expand_config_file, flag_names

    name, with_map = model, False
    if Path(model).is_dir():
        name = Path(model).resolve().name
        with_map = is_overlay(model)
    elif model.startswith(("/", "./", "../", "~")):
        raise UserError(
            f"{model}: is not a folder; give that of a checkpoint, or a name on the hub"
        )
    command = server_command(model, flags, name=name, with_map=with_map)
    if with_map:
        trust = "--trust-remote-code" in flag_names(expand_config_file(flags))
        served = read_overlay(model, trust_remote_code=trust)
        _tell(served)
    _run(command, dry_run)


def _serve_map(
    model: Path,
    layer_map: Path,
    prefix: int | None,
    overlay: Path | None,
    flags: list[str],
    dry_run: bool,
) -> None:
    """Make the overlay of a layer map, serve it, and remove it where it was temporary."""
    import tempfile

    from trsp.pruner.layer_map import read_layer_map
    from trsp.serving.layer_map_overlay import is_overlay, publish_overlay
    from trsp.serving.served_layers import open_served_layers
    from trsp.serving.server_command import server_command
    from trsp.serving.server_flags import expand_config_file, flag_names

    name = model.resolve().name
    # Flags and vLLM are checked before anything is opened or written.
    server_command(model, flags, name=name, with_map=True)
    choice = read_layer_map(layer_map)
    if prefix is not None:
        choice = choice.prefix(prefix)
    trust = "--trust-remote-code" in flag_names(expand_config_file(flags))
    if is_overlay(model):
        raise UserError(f"{model}: is an overlay already; serve it without --map")
    served = open_served_layers(model, choice, trust_remote_code=trust)
    _tell(served)
    if overlay is not None:
        folder = overlay.absolute()
        if not _is_there(folder, served) and not dry_run:
            publish_overlay(served, folder)
        _run(server_command(folder, flags, name=name, with_map=True), dry_run)
    if dry_run:
        _run(server_command("TEMPORARY_OVERLAY", flags, name=name, with_map=True), dry_run)
    with tempfile.TemporaryDirectory(prefix="trsp-serve-") as parent:
        folder = Path(parent) / name
        publish_overlay(served, folder)
        _run(server_command(folder, flags, name=name, with_map=True), dry_run)


def _is_there(folder: Path, served: "ServedLayers") -> bool:
    """Whether the overlay was kept from before: of these layers and this checkpoint, or refused."""
    from trsp.serving.layer_map_overlay import is_overlay, read_overlay

    if not is_overlay(folder):
        if folder.exists():
            raise UserError(f"{folder}: exists and is no overlay; choose another folder")
        return False
    base = served.checkpoint
    found = read_overlay(folder, trust_remote_code=base.trust_remote_code)
    if found.checkpoint.path.resolve() != base.path.resolve() or found.config != served.config:
        raise UserError(
            f"{folder}: is an overlay of {found.checkpoint.path} with layers "
            f"{list(found.layer_map.kept)}; name another folder, or remove this one"
        )
    return True


def _tell(served: "ServedLayers") -> None:
    kept = served.layer_map.kept
    typer.echo(
        f"layers {', '.join(map(str, kept))} of {served.checkpoint.num_hidden_layers} "
        f"from {served.checkpoint.path}",
        err=True,
    )


def _run(command: "ServerCommand", dry_run: bool) -> NoReturn:
    """Print or run the command; ends with the server's exit code."""
    from trsp.serving.server_process import run_server

    if dry_run:
        typer.echo(str(command))
        raise typer.Exit(0)
    raise typer.Exit(run_server(command))
