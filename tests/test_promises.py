"""What the guide promises of the cache, and the tests that check each promise."""

from __future__ import annotations

from pathlib import Path

PROMISES = {
    "Exactly the bytes that were verified are loaded": ("test_trust.test_what_is_loaded_is_what_was_verified",),
    "No other user can exchange a folder of the cache": (
        "test_trust.test_every_folder_above_is_checked",
        "test_trust.test_an_attacker_beside_a_loader",
        "test_override.test_a_folder_above_that_somebody_else_could_exchange",
    ),
    "Nothing is removed that the cache didn't make": (
        "test_removed.test_nothing_is_removed_from_a_folder_of_somebody_else",
        "test_removed.test_only_names_of_the_caches_own_are_removed",
        "test_removed.test_a_failure_is_forgotten_only_in_a_marked_cache",
    ),
    "An entry is used only for its own configuration": (
        "test_lookup.test_exchanged_notes_are_noticed",
        "test_store.test_an_entry_of_something_else_is_a_miss",
    ),
    "A flipped bit anywhere in an entry or a pack is noticed, or harmless": (
        "test_damaged.test_every_flipped_bit_is_noticed",
        "test_pack.test_every_flipped_bit_of_a_pack_is_noticed",
        "test_fuzz.test_garbage_is_used_or_refused_in_a_sentence",
    ),
    "A failure is remembered only if a compiler refused the source": (
        "test_faults.test_a_source_that_doesnt_compile",
        "test_faults.test_a_compiler_that_fails",
        "test_faults.test_what_is_a_verdict_on_the_source",
    ),
    "A progress line that can't be printed fails nothing": ("test_builder.test_a_progress_line_never_fails_a_build",),
    "What a process leaves when it dies, later ones remove": (
        "test_killed.test_what_killed_processes_leave_is_swept",
        "test_killed.test_a_process_that_is_killed_while_it_builds",
        "test_processes.test_temporary_stores_of_dead_processes_are_swept",
    ),
    "A fork, a signal, a closed stream or a missing HOME never causes a traceback": (
        "test_killed.test_a_process_that_is_killed_while_it_builds",
        "test_failure_modes.test_a_forked_child_builds",
        "test_killed.test_a_signal_during_a_build",
        "test_cli.test_streams_that_are_closed_or_full",
        "test_builder.test_a_user_without_a_name_and_a_home",
    ),
    "Entries of an earlier version are set aside, and a pack of another format is refused": (
        "test_damaged.test_entries_of_an_earlier_version_are_set_aside_with_one_warning",
        "test_pack.test_broken_packs_put_nothing_anywhere",
        "test_removed.test_a_cache_that_was_there_is_adopted_by_its_names",
    ),
}
GUIDE = Path(__file__).parent.parent / "GUIDE.md"


def test_the_guide_makes_these_promises_and_these_tests_are_there() -> None:
    text = " ".join(GUIDE.read_text(encoding="utf-8").split())
    assert [promise for promise in PROMISES if promise not in text] == []
    for test in (test for tests in PROMISES.values() for test in tests):
        module, _, name = test.partition(".")
        assert f"\ndef {name}(" in Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"), test
