"""Text of times, sizes and durations."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from kms_protocol import units

NOON = datetime(2027, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("at", "precision", "expected"),
    [
        (NOON, "seconds", "2027-01-31T12:00:00Z"),
        (NOON.astimezone(timezone(timedelta(hours=5, minutes=30))), "seconds", "2027-01-31T12:00:00Z"),
        (NOON.timestamp(), "milliseconds", "2027-01-31T12:00:00.000Z"),
        (NOON.replace(microsecond=7), "microseconds", "2027-01-31T12:00:00.000007Z"),
        (0, "seconds", "1970-01-01T00:00:00Z"),
    ],
)
def test_times_are_written_in_utc(at: datetime | float, precision: str, expected: str) -> None:
    assert units.time_text(at, precision) == expected


@pytest.mark.parametrize("text", ["2027-01-31T12:00:00Z", "2027-01-31T13:00:00+01:00"])
def test_times_are_read_with_their_offset(text: str) -> None:
    assert units.parse_time(text) == NOON
    assert units.time_or_none(text) == NOON


@pytest.mark.parametrize(
    ("text", "why"), [("2027-01-31T12:00:00", "needs an offset"), ("soon", "must be an RFC 3339 time")]
)
def test_other_texts_are_no_times(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        units.parse_time(text)
    assert units.time_or_none(text) is None


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 * units.GiB, "10.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_have_binary_units(size_bytes: int, expected: str) -> None:
    assert units.size_text(size_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 seconds"),
        (1.5, "1 second"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7199, "119 minutes"),
        (36 * 3600, "36 hours"),
        (47.9 * 3600, "47 hours"),
        (200 * 86_400, "200 days"),
    ],
)
def test_durations_are_in_their_largest_unit(seconds: float, expected: str) -> None:
    assert units.duration_text(seconds) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", timedelta(seconds=90)), ("30m", timedelta(minutes=30)), ("12h", timedelta(hours=12))],
)
def test_durations_are_read(text: str, expected: timedelta) -> None:
    assert units.parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "0s", "1", "1.5h", "-1h", "1w", "1h30m", "1234567s"])
def test_other_texts_are_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="takes a number and s, m, h or d"):
        units.parse_duration(text)
