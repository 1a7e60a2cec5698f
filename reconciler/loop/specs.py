"""Which spec is in force: the files as they are now, or the last good version of what cannot be accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reconciler.errors import Problem, SpecError
from reconciler.plan.ledger import LIVE, Ledger
from reconciler.spec.load import SourceText, Texts, merge_live_edit, read_texts, resolve_texts
from reconciler.spec.spec import OverlaySpec, Spec


class SpecInForce(Struct, frozen=True):
    """The spec that decisions follow, and how it relates to the files."""

    spec: Spec
    problems: tuple[Problem, ...]
    """Everything wrong with the files as they are now; empty when the files are what is in force."""
    texts: Mapping[str, str]
    """Path → text of every accepted file: what a later daemon falls back on."""

    @property
    def current(self) -> bool:
        """The files are what is in force."""
        return not self.problems


Stamps = tuple[tuple[str, int | None], ...]
"""Path and time of change (ns) of every env_file; None: it is not there."""


def _stamps(spec: Spec) -> Stamps:
    """What tells that the content of an env_file may have changed, which the texts alone do not show."""
    paths = {e.env_file for e in spec.endpoints.values()}
    for overlay in spec.overlays.values():
        paths |= {e.env_file for e in overlay.endpoints.values()}
        paths |= {overlay.workload.env_file} if overlay.workload else set()
    stamps: list[tuple[str, int | None]] = []
    for path in sorted(p for p in paths if p is not None):
        try:
            stamps.append((path, Path(path).stat().st_mtime_ns))
        except OSError:
            stamps.append((path, None))
    return tuple(stamps)


class SpecKeeper:
    """Reads the files when asked, and never lets a bad edit, a vanished file or an emptied baseline take effect."""

    def __init__(self, path: Path, remembered: Mapping[str, str], *, transform: Callable[[Spec], Spec] | None) -> None:
        self.path = path
        self._remembered = dict(remembered)
        """Texts accepted by an earlier daemon."""
        self._transform = transform
        self._in_force: SpecInForce | None = None
        self._last_read: Texts | None = None
        self._rejected: tuple[Texts, tuple[Problem, ...]] | None = None
        """Files that cannot be accepted, and why."""
        self._env_files: Stamps = ()
        self._folder: Path | None = None
        self._held: dict[str, tuple[OverlaySpec, str]] = {}
        """Live overlays as they were when they began, and their text; edits of placement wait for their end."""

    @property
    def in_force(self) -> SpecInForce:
        """The last answer of `load`."""
        assert self._in_force is not None  # noqa: S101 - `load` is called before anything else
        return self._in_force

    def overlays_folder(self) -> Path | None:
        """The folder that overlays are dropped into, as the files name it now."""
        return self._folder

    def load(self, ledger: Ledger) -> SpecInForce:
        """Look at the files again.

        1. set points that cannot be read or accepted, or that lost their whole baseline → the last good ones stay
        2. the overlays' folder vanished                                                 → the last good overlays stay
        3. an overlay file that cannot be accepted                                       → its last good version stays
        4. a live overlay was edited in its placement or command                         → that part waits for its end

        Raises:
            SpecError: the files are wrong and there is no last good version.
        """
        texts: Texts | None = None
        try:
            texts = read_texts(self.path)
            unchanged = texts == self._last_read and self._in_force is not None
            if unchanged and self._env_files == _stamps(self.in_force.spec):
                return self._hold_live(ledger)
            if self._rejected is not None and self._rejected[0] == texts:
                raise SpecError(self._rejected[1])  # noqa: TRY301 - as if they had been read once more
            accepted, problems = self._accept(texts)
            self._last_read, self._folder, self._rejected = texts, texts.overlays_folder, None
            self._env_files = _stamps(accepted[0])
        except SpecError as error:  # 1
            self._last_read, problems = None, error.problems
            # an env_file is read with them, and may be mended alone
            may_mend = any("env_file" in problem.message for problem in problems)
            self._rejected = None if texts is None or may_mend else (texts, problems)
            if self._in_force is not None and self._env_files == _stamps(self.in_force.spec):
                spec = self.in_force.spec  # the same object at every look, as below
                spec = replace(spec, problems=()) if spec.problems else spec
                self._in_force = replace(self.in_force, spec=spec, problems=problems)
                return self._hold_live(ledger)
            fallback = self._fallback()
            if fallback is None:
                raise
            accepted = fallback
            self._env_files = _stamps(accepted[0])
        self._in_force = SpecInForce(self._shaped(accepted[0]), problems, accepted[1])
        return self._hold_live(ledger)

    def _accept(self, texts: Texts) -> tuple[tuple[Spec, dict[str, str]], tuple[Problem, ...]]:
        known = self._known_texts()
        problems: list[Problem] = []
        overlays = texts.overlays
        if overlays is None:  # 2
            overlays = tuple(SourceText(p, t) for p, t in sorted(known.items()) if p != texts.setpoints.path)
            if overlays and not texts.problems:
                hint = "create it again (empty, to cancel them); the last good overlays stay in force"
                problems.append(Problem(str(texts.overlays_folder), 0, 0, "the overlays folder is gone", hint))
        spec = resolve_texts(texts.setpoints, overlays)
        self._refuse_emptied(spec, texts.setpoints.path)
        rejected = (*spec.problems, *texts.problems)
        bad = {p.file for p in rejected}
        if bad:  # 3
            problems.extend(rejected)
            good = [o for o in overlays if o.path not in bad]
            overlays = (*good, *(SourceText(p, known[p]) for p in sorted(bad & known.keys())))
            spec = replace(resolve_texts(texts.setpoints, overlays), problems=rejected)
        accepted = {texts.setpoints.path: texts.setpoints.text, **{o.path: o.text for o in overlays}}
        return (spec, accepted), tuple(problems)

    def _refuse_emptied(self, spec: Spec, path: str) -> None:
        if spec.endpoints:
            return
        if self._in_force.spec.endpoints if self._in_force else self._remembered_endpoints():
            hint = "set `state: stopped` on each, or run `reconciler down`; the last good set points stay in force"
            raise SpecError((Problem(path, 1, 1, "no endpoints are left where there were some", hint),))

    def _remembered_endpoints(self) -> Mapping[str, object]:
        fallback = self._fallback()
        return fallback[0].endpoints if fallback else {}

    def _known_texts(self) -> Mapping[str, str]:
        return self._in_force.texts if self._in_force else self._remembered

    def _fallback(self) -> tuple[Spec, dict[str, str]] | None:
        """The last good version: of this daemon, else of an earlier one."""
        known = dict(self._known_texts())
        spec = self._resolve_known(known)
        return None if spec is None else (spec, known)

    def _resolve_known(self, known: Mapping[str, str]) -> Spec | None:
        setpoints = known.get(str(self.path))
        if setpoints is None:
            return None
        overlays = tuple(SourceText(p, t) for p, t in sorted(known.items()) if p != str(self.path))
        try:
            return resolve_texts(SourceText(str(self.path), setpoints), overlays)
        except SpecError:
            return None

    def _shaped(self, spec: Spec) -> Spec:
        return self._transform(spec) if self._transform else spec

    def _hold_live(self, ledger: Ledger) -> SpecInForce:
        """Let a live overlay keep the placement and command it went live with (4).

        The text it went live with stays among the accepted ones, so that a later daemon holds it as well.
        """
        in_force = self.in_force
        overlays, texts = dict(in_force.spec.overlays), dict(in_force.texts)
        if self._remembered:
            if any(record.state in LIVE for record in ledger.overlays.values()):
                self._held = self._held_before(ledger)
            self._remembered = {}
        for name, overlay in in_force.spec.overlays.items():
            record, held = ledger.overlays.get(name), self._held.get(name)
            if record is None or record.state not in LIVE:
                self._held.pop(name, None)
            elif overlay.placement_hash == record.placement_hash:
                self._held[name] = overlay, in_force.texts[overlay.source.file]
            elif held is not None and held[0].placement_hash == record.placement_hash and overlay.on_edit == "wait":
                overlays[name] = replace(merge_live_edit(held[0], overlay), change_pending=True)
                texts[overlay.source.file] = held[1]
        for name in set(self._held) - set(overlays):
            del self._held[name]
        if overlays == in_force.spec.overlays:
            return in_force  # the same object at every look: what follows from it need not be worked out anew
        return replace(in_force, spec=replace(in_force.spec, overlays=overlays), texts=texts)

    def _held_before(self, ledger: Ledger) -> dict[str, tuple[OverlaySpec, str]]:
        """What an earlier daemon's live overlays went live with."""
        same = self._remembered == self.in_force.texts
        known = self.in_force.spec if same else self._resolve_known(self._remembered)
        if known is None:
            return {}
        return {
            name: (overlay, self._remembered[overlay.source.file])
            for name, overlay in known.overlays.items()
            if name in ledger.overlays and ledger.overlays[name].placement_hash == overlay.placement_hash
        }
