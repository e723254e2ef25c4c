"""`featstore browse`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_STORE,
    AnySeedOption,
    DataRootOption,
    DebugOption,
    JsonOption,
    StoreOption,
)


@console.handled
def browse(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen at; 0.0.0.0 for the whole network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen at; 0: any that is free.")
    ] = 8322,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="D",
            help="Where the images themselves are, e.g. folder:PATH; known data sets are found by their name.",
        ),
    ] = None,
    data_root: DataRootOption = None,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Look at a store in the web browser until Ctrl-C: images beside their features, and matches of a point.

    Pick a data set, techniques, a timestep, a layer and two images; click a point in one to see its nearest
    match in the other. Needs `pip install 'featstore[browse]'`. Only this machine can connect unless --host
    says otherwise.

    **Example**: `featstore browse --store features.zarr --port 8322`
    """
    # Here, as every other command can do without a server.
    from featstore.pipelines.browse import BrowseConfig
    from featstore.pipelines.browse import browse as open_store

    app = open_store(BrowseConfig(store=store, host=host, port=port, dataset=dataset, data_root=data_root))

    def announce() -> None:
        if app.exposed:
            console.say(("warning: ", "bold yellow"), "everybody in the network can look at this store")
        if as_json:
            console.print_json({"url": app.url, "store": store})
        else:
            console.say("open ", (app.url, "bold"), " in a web browser (Ctrl-C ends it)", to=console.out)
        sys.stdout.flush()

    try:
        app.run(announce)
    except KeyboardInterrupt:
        # How it ends is no error and gets no hint; a shell still learns that it was interrupted.
        raise typer.Exit(console.INTERRUPTED) from None
    finally:
        console.say("stopped")
