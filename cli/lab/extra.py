"""What only the laboratory needs, and `pip install 'onelaunch[bench]'` brings."""

from __future__ import annotations

import importlib.util

from onelaunch.errors import ConfigError


def need(package: str, what: str, otherwise: str = "") -> None:
    """Checks that a package of the extra is installed.

    Args:
        what: the option or verb that needs it.
        otherwise: another way out, for the message.

    Raises:
        ConfigError: it isn't.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{what} needs {package}, which isn't installed. Install it with: pip install "
            f"'onelaunch[bench]'{otherwise}."
        )
