"""The onelaunch command."""

from __future__ import annotations

import warnings

import click

from .faults import EXIT_CODES
from .verbs import Verbs

# torch warns when it is imported without numpy, which nothing but `onelaunch replay` needs.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def _version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    # Imported here for start-up time: no verb needs it.
    from .version import lines

    for line in lines():
        click.echo(line)
    ctx.exit()


@click.group(
    cls=Verbs, epilog=EXIT_CODES, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Print the version, and those of the toolchain.",
)
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    help="Show where an error comes from; accepted anywhere on the command line.",
)
def app() -> None:
    """Generate, build, inspect and replay kernels that refresh N backends' attention metadata in one launch.

    \b
    Examples:
      onelaunch list
      onelaunch show nsa-decode-3
      onelaunch build nsa-decode-3 --arch 90a

    \b
    Completion in bash (zsh and fish likewise):
      eval "$(_ONELAUNCH_COMPLETE=bash_source onelaunch)"
    """


if __name__ == "__main__":
    app(prog_name="onelaunch")
