"""How many groups a GroupNorm gets, and what of that is refused."""

from __future__ import annotations

import pytest

from normswap import build
from normswap.errors import OptionError
from normswap.norms.grouped import default_groups

PRIMES = (2, 3, 17, 31, 37, 61, 127)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        (1, 1),
        (8, 1),
        (16, 1),
        (24, 1),
        (32, 2),
        (48, 3),
        (64, 4),
        (72, 4),
        (96, 6),
        (128, 8),
        (512, 32),
        (768, 32),
        (2048, 32),
    ],
)
def test_the_default_leaves_sixteen_channels_in_a_group(channels: int, groups: int) -> None:
    assert default_groups(channels) == groups


@pytest.mark.parametrize("channels", PRIMES)
def test_a_prime_number_of_channels_makes_one_group(channels: int) -> None:
    assert default_groups(channels) == 1


def test_the_default_is_the_largest_that_the_rule_allows() -> None:
    for channels in range(1, 300):
        divisors = [groups for groups in range(1, 33) if channels % groups == 0]
        allowed = [groups for groups in divisors if channels >= 16 * groups]
        assert default_groups(channels) == max(allowed, default=1), channels


def test_a_built_norm_takes_the_default() -> None:
    assert build("gn", 72).num_groups == 4


def test_groups_can_be_given_by_their_number() -> None:
    assert build("gn", 12, num_groups=6).num_groups == 6


def test_groups_can_be_given_by_their_size() -> None:
    assert build("gn", 12, channels_per_group=6).num_groups == 2


@pytest.mark.parametrize("option", ["num_groups", "channels_per_group"])
@pytest.mark.parametrize("size", [0, -2, 5, 24, 2.0, "2"])
def test_what_does_not_divide_the_channels_is_refused(option: str, size: object) -> None:
    with pytest.raises(OptionError, match=f"{option}={size!r} does not divide its 12 channels"):
        build("gn", 12, **{option: size})


def test_a_refused_number_of_groups_names_those_that_would_do() -> None:
    with pytest.raises(OptionError, match=r"\[1, 2, 3, 4, 6, 12\]"):
        build("gn", 12, num_groups=5)


def test_number_and_size_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        build("gn", 12, num_groups=2, channels_per_group=6)
