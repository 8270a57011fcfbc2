"""``avlm serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import gc
from typing import Annotated, Any

import typer

from avlm.cli.shared import ModelDir, Overrides, quiet
from avlm.errors import MissingExtraError


def serve(
    model: ModelDir,
    overrides: Overrides = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; default: this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes one that is free; default: 8000.")] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(envvar="AVLM_KEY", show_envvar=True, help="A key that clients must send; others see this line."),
    ] = None,
    allow: Annotated[list[str] | None, typer.Option(help="A host that media may be fetched from.")] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: its directory's name.")
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve the chat page.")] = False,
) -> None:
    """Serve a model to OpenAI's clients."""
    from avlm.config.io import assemble
    from avlm.config.serve import Serve

    given: dict[str, Any] = {"host": host, "port": port, "keys": key, "name": name, "ui": ui or None}
    if allow:
        given["fetch"] = {"hosts": allow}
    settings = assemble(Serve, {k: v for k, v in given.items() if v is not None}, overrides or [])
    try:
        from avlm.inference.serving.listening import check_address
    except ImportError as error:
        raise MissingExtraError(str(error.name), "serve", "avlm serve") from None
    check_address(settings)
    quiet()
    from avlm.inference.serving.app import create_app
    from avlm.inference.serving.listening import serve as run

    app = create_app(model, settings)
    called = app.state.service.name

    def say(url: str) -> None:
        print(f"{called} is served at {url}/v1" + (f", its page at {url}/" if settings.ui else ""), flush=True)

    gc.freeze()  # what is there by now stays, and a look through it would copy pages that workers share
    run(app, settings, say)
