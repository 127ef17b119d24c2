"""REFERENCE.md agrees with docstrings, help texts and tables."""

from __future__ import annotations

import manual
import onelaunch


def test_the_reference_is_up_to_date() -> None:
    assert manual.PATH.read_text(encoding="utf-8") == manual.page(), "run: make generate"


def test_it_has_every_public_name_command_setting_and_variable() -> None:
    text = manual.page()
    for name in onelaunch.__all__:
        assert f"onelaunch.{name}\n" in text or f"`{name}`" in text, name
    for words in manual.walk(manual.app, ()):
        assert f"\n### onelaunch {' '.join(words)}\n" in text or not words
    for name in (*manual.VARIABLES, *onelaunch.KernelConfig(page_size=16, next_n=2).to_dict()):
        assert f"`{name}`" in text, name
