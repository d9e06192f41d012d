"""The command line: `bwsk-fx inspect`, `bwsk-fx calm` and `bwsk-fx train`."""

from __future__ import annotations

from typing import Annotated

import typer

from bwsk_fx.calm_command import calm
from bwsk_fx.inspect_command import inspect
from bwsk_fx.train_command import train

# Everything heavy (torch, transformers, rich tables) is imported inside the commands, so that --help is quick.

app = typer.Typer(
    name="bwsk-fx",
    help="See what every operator of a model preserves or erases, and train with activations rebuilt, not stored.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `bwsk-fx` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bwsk-fx {version('bwsk-fx')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command()(inspect)
app.command()(calm)
app.command()(train)


if __name__ == "__main__":
    main()
