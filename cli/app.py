"""The `featstore` command: one module a group of commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from featstore.cli import (
    bench,
    browse,
    caption,
    catalog,
    console,
    convert_ddpm,
    demo,
    exchange,
    experiment,
    extract,
    gate,
    heads,
    log,
    pictures,
    report,
    reproduce,
    serve,
    store,
    train_lora,
    transfer,
)

COMMANDS = (
    demo.demo,
    catalog.datasets,
    catalog.datasets_fetch,
    catalog.models,
    convert_ddpm.convert_ddpm,
    caption.caption,
    extract.extract,
    gate.gate,
    store.info,
    store.verify,
    log.log,
    transfer.push,
    transfer.pull,
    transfer.rm,
    exchange.import_npy,
    exchange.export,
    heads.train_head,
    heads.evaluate,
    heads.predict,
    reproduce.reproduce,
    experiment.experiment,
    train_lora.train_lora,
    pictures.show,
    report.report,
    browse.browse,
    serve.serve,
    bench.bench,
)

TWO_WORDS: dict[object, str] = {catalog.datasets_fetch: "datasets fetch"}
"""Commands that stand beside another one, whose argument their second word would otherwise be."""


def command_name(command: Callable[..., None]) -> str:
    """What is typed for a command after ``featstore``."""
    return TWO_WORDS.get(command) or command.__name__.replace("_", "-")


class Group(TyperGroup):
    """Commands whose misuse is reported like every other bad request: one line, a hint, exit status 2."""

    @override
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (both := " ".join(args[:2])) in self.commands:
            args = [both, *args[2:]]
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and leave with its exit status."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            status = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except console.USAGE_ERROR as error:
            status = _misused(error, words)
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)


def _misused(error: Any, words: Sequence[str]) -> int:
    """Report a command line that does not parse."""
    context, message = error.ctx, " ".join(error.format_message().split())
    if type(error).__name__ == "NoArgsIsHelpError":  # no command: the help was printed in place of a message
        return int(error.exit_code)
    name = context.command_path if context is not None else "featstore"
    hint = f"`{name} --help` lists what there is"
    console.report_error("UsageError", message.removesuffix("."), hint, as_json="--json" in words)
    return int(error.exit_code)


app = typer.Typer(
    name="featstore",
    cls=Group,
    help="Diffusion features: extract once, train forever.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `featstore demo`; then `featstore extract --help`.",
)
for command in COMMANDS:
    app.command(name=command_name(command))(command)


def _version(value: bool) -> None:
    if value:
        from featstore import __version__

        typer.echo(f"featstore {__version__}")
        raise typer.Exit


@app.callback()
def callback(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Diffusion features: extract once, train forever."""
