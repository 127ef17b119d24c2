"""onelaunch diff: the differences between two kernels."""

from __future__ import annotations

from pathlib import Path

import click
from onelaunch.inspect.diff import COMPARED, difference
from onelaunch.inspect.kernels import Subject

from .arguments import arch_option, html_option, preset_names, target_option
from .output import write_whole
from .show import kernel


@click.command()
@click.argument("one", metavar="A", shell_complete=preset_names)
@click.argument("other", metavar="B", shell_complete=preset_names)
@click.option("--what", type=click.Choice(COMPARED), default="cuda", help="What to compare.")
@target_option
@arch_option
@click.option(
    "-U", "--unified", "context", type=click.IntRange(min=0), default=3, help="Equal lines around a difference."
)
@html_option
def diff(
    one: str, other: str, what: str, target: str | None, arch: str | None, context: int, html: Path | None
) -> None:
    """Print how two kernels differ.

    Keys, symbols and addresses, which always differ, are ignored.

    A and B are each a CONFIG as in `onelaunch show`, or key=value,… as in --set.

    Exit codes are those of diff: 0 for no difference, 1 for some, 2 if they can't be compared.

    \b
    Examples:
      onelaunch diff nsa-decode-3 nsa-decode-3-page16
      onelaunch diff nsa-decode-3 num_backends=3,unroll=4 --what sass
      onelaunch diff nsa-decode-1 nsa-decode-7 --what resources
      onelaunch diff nsa-decode-3 nsa-decode-3-page16 --html diff.html
    """

    def subject(text: str) -> Subject:
        # A setting has an equals sign, which no preset and no key has.
        is_settings = "=" in text and not Path(text).exists()
        return kernel(None if is_settings else text, text if is_settings else None, target, arch)

    first, second = subject(one), subject(other)
    found = difference(first, second, what, context)
    if html is not None:
        # Imported here for start-up time: it loads the templates' engine.
        from onelaunch.inspect.page import diff_page

        write_whole(html, diff_page(first, second, what, context))
    if not found:
        click.echo(f"no difference in {what}")
        return
    if html is None:
        click.echo(found, nl=False)
    raise click.exceptions.Exit(1)
