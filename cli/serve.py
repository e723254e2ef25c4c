"""`featstore serve`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import DEFAULT_STORE, AnySeedOption, DebugOption, JsonOption, StoreOption


@console.handled
def serve(
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen at; 0.0.0.0 for the whole network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen at; 0: any that is free.")
    ] = 8321,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="FEATSTORE_TOKEN",
            metavar="TOKEN",
            help="What clients have to present. Better set in the environment: other users see command lines.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Share a local store over HTTP, read-only, until Ctrl-C.

    Colleagues give the URL that it prints as --store to `info`, `train-head`, `show` and `verify`. A
    browser shows what the store holds. Only this machine can connect unless --host says otherwise.

    **Example**: `featstore serve --store features.zarr --host 0.0.0.0 --port 8321`
    """
    # Here, as every other command can do without a server.
    from featstore.pipelines.serving import ServeConfig, share

    sharing = share(ServeConfig(store=store, host=host, port=port, token=token or None))

    def announce() -> None:
        if sharing.note:
            console.say(sharing.note)
        if sharing.exposed:
            console.say(("warning: ", "bold yellow"), "without --token everybody in the network can read this store")
        if as_json:
            console.print_json({"url": sharing.url, "store": store, "token": bool(token)})
        else:
            console.say("serving at ", (sharing.url, "bold"), " (Ctrl-C ends it)", to=console.out)
            if token:
                console.say("  export FEATSTORE_TOKEN=...  # the token", to=console.out)
            console.say(f"  featstore info --store {sharing.url}", to=console.out)
        sys.stdout.flush()

    try:
        sharing.run(announce)
    except KeyboardInterrupt:
        # How serving ends is no error and gets no hint; a shell still learns that it was interrupted.
        raise typer.Exit(console.INTERRUPTED) from None
    finally:
        console.say("stopped")
