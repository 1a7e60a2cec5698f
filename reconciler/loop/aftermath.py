"""What follows an end: records are put away, and what is left in shared memory is removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from reconciler.journal.archive import archive
from reconciler.loop.parts import Parts
from reconciler.plan.actions import Event
from reconciler.plan.departures import kept_for
from reconciler.plan.observed import Incarnation, Observed
from reconciler.spec.spec import Spec


class Aftermath:
    """Follows the ended incarnations of one state directory."""

    def __init__(self, parts: Parts, report: Callable[[Sequence[Event]], None]) -> None:
        self._parts = parts
        self._report = report
        self.unmoved: set[str] = set()
        """Ended incarnations whose records could not be put away."""
        self._gone: set[str] = set()
        """Incarnations whose records were put away since shared memory was last cleared."""

    def fresh(self, ended: Iterable[Incarnation]) -> set[str]:
        """Those of whose end this is the first tick."""
        return {incarnation.id for incarnation in ended} - self.unmoved

    def put_away(self, spec: Spec, ended: Sequence[Incarnation]) -> None:
        """Put the records of these away, of those as well that could not be put away before."""
        self._gone |= self.fresh(ended)
        self.unmoved = {incarnation.id for incarnation in ended if not self._put_away(spec, incarnation)}

    def _put_away(self, spec: Spec, ended: Incarnation) -> bool:
        """Whether its records could be put away; if not, as on a disk that is read-only by now, it is told once.

        They do no harm where they are: it counts as ended.
        """
        try:
            archive(self._parts.state, ended.id, keep=kept_for(spec, ended.subject))
        except OSError as error:
            if ended.id not in self.unmoved:
                self._report([Event("records.kept", ended.subject.name, f"cannot be put away: {error}", "cleanup")])
            return False
        return True

    async def clear(self, observed: Observed) -> None:
        """See what lives in shared memory, and remove what ended ones left there."""
        ended, self._gone = frozenset(self._gone), set()
        if self._parts.leftovers is not None:
            await self._parts.leftovers.follow(observed)
            self._report(await self._parts.leftovers.clear(ended))
