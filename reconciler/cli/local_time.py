"""The time zone of this box, for what people read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo


class _LocalTime(tzinfo):
    """What the clocks on the wall here show, each moment with its own offset.

    `datetime.now().astimezone().tzinfo` has the offset of now alone: of a window after clocks are set it tells the
    wrong hour.
    """

    def fromutc(self, dt: datetime) -> datetime:
        return datetime.fromtimestamp(dt.replace(tzinfo=UTC).timestamp()).replace(tzinfo=self)  # noqa: DTZ006 - local

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        return None if dt is None else dt.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, _: datetime | None) -> timedelta | None:
        return None

    def tzname(self, dt: datetime | None) -> str | None:
        return None if dt is None else dt.replace(tzinfo=None).astimezone().tzname()


LOCAL = _LocalTime()
