"""Passes that are killed at random moments and gone on with: equal to the bit."""

from __future__ import annotations

import os

import pytest

from tests.reference.forks import in_process_of_its_own
from tests.stats.killing import PASSES, Trials, trials

each_pass = pytest.mark.parametrize("name", PASSES)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trials]:
    """What passes came to that were killed and gone on with."""
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    return in_process_of_its_own(trials, tmp_path_factory.mktemp("killed"), 0)


@each_pass
def test_a_bookmark_changes_nothing(killed: dict[str, Trials], name: str) -> None:
    plain, whole = killed[name].plain, killed[name].whole
    assert (plain.buffers, plain.told, plain.work) == (whole.buffers, whole.told, whole.work)


@each_pass
def test_what_was_killed_and_gone_on_with_is_equal_to_the_bit(
    killed: dict[str, Trials], name: str
) -> None:
    assert len(killed[name].killed) == 20
    for trial in killed[name].killed:
        assert trial.outcome.buffers == killed[name].whole.buffers, trial.moment
        assert trial.outcome.told == killed[name].whole.told, trial.moment


@each_pass
def test_what_was_done_is_not_done_again(killed: dict[str, Trials], name: str) -> None:
    bookmarked = [trial for trial in killed[name].killed if trial.bookmarked]
    assert len(bookmarked) >= 5
    for trial in bookmarked:
        assert trial.outcome.work < killed[name].whole.work, trial.moment


@each_pass
def test_nothing_is_left_of_the_bookmark_in_the_end(killed: dict[str, Trials], name: str) -> None:
    for trial in killed[name].killed:
        assert trial.outcome.left == []


def test_the_killed_passes_skip_and_stop_early(killed: dict[str, Trials]) -> None:
    """Else the tests above would not show that these go on as they began."""
    assert killed["population"].whole.told["skipped"] == 1
    assert (
        killed["pooled to a tolerance"].whole.told["batches"]
        < (killed["pooled"].whole.told["batches"])
    )
