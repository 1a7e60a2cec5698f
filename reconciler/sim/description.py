"""What `--simulate` is given, read into a `SimNode`: `4x80GiB`, `8xH100`, or a YAML file.

gpus:                     # required
  - {name: RTX4090, count: 6}
  - {name: Odd Card, memory: 20GiB, reserved: 300MiB, numa: 1}
  - {name: H100, count: 2, nvlink: 1}
time_scale: 0.05          # default 1.0: a 40 s load takes 40 s
release_delay: 300ms      # real time, not scaled
driver_version: "580.95.05"
seed: node                # other seed, other UUIDs
models:                   # where the name alone tells too little
  Qwen/Qwen3-1.7B: {load: 45s, weights: 3.4GiB}
faults:                   # what breaks in the simulated engines: `engine.fate.KINDS`
  - {fault: out_of_memory, endpoint: coding, start: 3}
  - {fault: hang, model: Qwen/Qwen3-1.7B, requests: 5}
  - {fault: dies, after: 40s, chance: 0.2}

Only `gpus` is needed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from reconciler.errors import Problem, SpecError, UsageError
from reconciler.sim.engine.fate import KINDS, LASTING, TIMED
from reconciler.sim.node import (
    DEFAULT_DRIVER_VERSION,
    DEFAULT_RELEASE_DELAY_S,
    EngineFault,
    ModelFigures,
    SimGpu,
    SimNode,
)
from reconciler.units import GIB, format_size, parse_duration, parse_size

SHORT_FORM_TIME_SCALE = 0.02
"""`--simulate 4x80GiB` is for trying things out: a 40 s model load takes under a second."""
MAX_GPUS = 256

KNOWN_GPUS = {
    "B200": ("NVIDIA B200", 180), "GB200": ("NVIDIA GB200", 186), "H200": ("NVIDIA H200", 141),
    "H100": ("NVIDIA H100 80GB HBM3", 80), "H20": ("NVIDIA H20", 96), "A100": ("NVIDIA A100-SXM4-80GB", 80),
    "A100-40": ("NVIDIA A100-SXM4-40GB", 40), "L40S": ("NVIDIA L40S", 48), "L40": ("NVIDIA L40", 48),
    "A40": ("NVIDIA A40", 48), "A10": ("NVIDIA A10", 24), "L4": ("NVIDIA L4", 24), "T4": ("Tesla T4", 16),
    "V100": ("Tesla V100-SXM2-32GB", 32), "A6000": ("NVIDIA RTX A6000", 48),
    "PRO6000": ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96),
    "RTX5090": ("NVIDIA GeForce RTX 5090", 32), "RTX4090": ("NVIDIA GeForce RTX 4090", 24),
    "RTX3090": ("NVIDIA GeForce RTX 3090", 24), "RTX4080": ("NVIDIA GeForce RTX 4080", 16),
}  # fmt: skip
"""Well-known GPUs: the name NVML gives, and GiB of memory (the figure on the box, a little above the usable one)."""

_SHORT = re.compile(r"(\d+)\s*[xX]\s*(\S.*)")
_HELP = "write 4x80GiB, 8xH100, or the path of a YAML file that describes a node"
_T = TypeVar("_T")


def parse_node(text: str) -> SimNode:
    """The node that `--simulate TEXT` asks for.

    Raises:
        UsageError: `text` is no short form and names no file, or counts or sizes in it make no sense.
        SpecError: the file it names is wrong; every problem in it is listed.
    """
    short = _SHORT.fullmatch(text.strip())
    # a file that happens to be called 4x80GiB is reached as ./4x80GiB
    if short is None:
        path = Path(text).expanduser()
        if path.suffix in {".yaml", ".yml"} or path.is_file():
            return read_node(path)
        raise UsageError(f"{text!r} does not describe a node", hint=_HELP)
    count = int(short[1])
    if not 1 <= count <= MAX_GPUS:
        raise UsageError(f"{text!r}: a node has 1 to {MAX_GPUS} GPUs", hint=_HELP)
    gpu = known_gpu(short[2])
    if gpu is None:
        try:
            size = parse_size(short[2])
        except ValueError as error:
            raise UsageError(f"{text!r}: {error}", hint=_suggest(short[2])) from error
        if size < GIB:
            raise UsageError(f"{text!r}: a GPU has at least 1GiB", hint=_HELP)
        gpu = SimGpu(f"Simulated {format_size(size)} GPU", size)
    return SimNode((gpu,) * count, time_scale=SHORT_FORM_TIME_SCALE)


def known_gpu(name: str) -> SimGpu | None:
    """A well-known GPU by its short name, in any case, with or without `RTX`; None when it is not in the table."""
    plain = re.sub(r"[\s_]", "", name).upper().removeprefix("NVIDIA").removeprefix("GEFORCE")
    found = KNOWN_GPUS.get(plain) or KNOWN_GPUS.get("RTX" + plain)
    return SimGpu(found[0], found[1] * GIB) if found else None


def read_node(path: Path) -> SimNode:
    """The node described by a YAML file.

    Raises:
        UsageError: it cannot be read.
        SpecError: what it says is wrong; every problem is listed.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"{path}: cannot be read: {reason}", hint=_HELP) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise SpecError((Problem(str(path), *where, f"not YAML: {error.problem}"),)) from error
    return _Reader(str(path)).node(root)


class _Reader:
    """Walks the composed YAML so that every problem has a line; collects them all before it gives up."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def node(self, root: yaml.Node | None) -> SimNode:
        top = self.fields(root, ("gpus", "time_scale", "release_delay", "driver_version", "seed", "models", "faults"))
        gpus: list[SimGpu] = []
        for entry in self.items(top.get("gpus"), "gpus: [{name: H100, count: 8}]"):
            gpus.extend(self.gpu(entry))
        if not self.problems and not 1 <= len(gpus) <= MAX_GPUS:
            self.note(
                top.get("gpus", root),
                f"a node has 1 to {MAX_GPUS} GPUs, this one {len(gpus)}",
                "gpus: [{name: H100, count: 8}]",
            )
        scale = self.value(top.get("time_scale"), _positive, 1.0)
        delay = self.value(top.get("release_delay"), parse_duration, DEFAULT_RELEASE_DELAY_S)
        driver = self.value(top.get("driver_version"), str, DEFAULT_DRIVER_VERSION)
        seed = self.value(top.get("seed"), str, "node")
        models = {name: self.model(entry) for name, entry in self.pairs(top.get("models"))}
        faults = tuple(
            self.fault(entry) for entry in self.items(top.get("faults"), "faults: [{fault: hang, start: 2}]")
        )
        if self.problems:
            raise SpecError(tuple(sorted(self.problems)))
        return SimNode(tuple(gpus), scale, delay, driver, seed, models, faults)

    def gpu(self, entry: yaml.Node) -> list[SimGpu]:
        named = self.fields(entry, ("name", "memory", "count", "numa", "nvlink", "reserved"))
        name = self.value(named.get("name"), str, "")
        known = known_gpu(name) if name else None
        memory = self.value(named.get("memory"), parse_size, known.memory_bytes if known else 0)
        if not memory and "memory" not in named:
            self.note(entry, f"the memory of GPU {name!r} is not known", _suggest(name) + "; or give `memory: 24GiB`")
        reserved = self.value(named.get("reserved"), parse_size, 0)
        if memory and reserved >= memory:
            self.note(entry, "more memory is reserved than there is", None)
        numa = self.value(named.get("numa"), _whole, None)
        island = self.value(named.get("nvlink"), _whole, 0)
        count = self.value(named.get("count"), _whole, 1)
        full_name = known.name if known else name or f"Simulated {format_size(memory)} GPU"
        return [SimGpu(full_name, memory, reserved, numa, island)] * min(count or 0, MAX_GPUS + 1)

    def model(self, entry: yaml.Node) -> ModelFigures:
        named = self.fields(entry, ("load", "weights"))
        return ModelFigures(
            self.value(named.get("load"), parse_duration, None), self.value(named.get("weights"), parse_size, None)
        )

    def fault(self, entry: yaml.Node) -> EngineFault:
        named = self.fields(entry, ("fault", "endpoint", "model", "start", "chance", "after", "requests", "for"))
        kind = self.value(named.get("fault"), _kind, "")
        if "fault" not in named:
            self.note(entry, "which fault?", "faults: " + ", ".join(KINDS))
        starts = named.get("start")
        listed = starts.value if isinstance(starts, yaml.SequenceNode) else [starts] if starts is not None else []
        lasts_s = self.value(named.get("for"), parse_duration, 0.0)
        if kind and (kind in LASTING) != (lasts_s > 0):
            told = "lasts some time" if kind in LASTING else "has no length"
            self.note(entry, f"{kind} {told}", "`for: 30s` belongs to " + ", ".join(sorted(LASTING)))
        if kind and kind not in TIMED and named.keys() & {"after", "requests"}:
            self.note(
                entry, f"{kind} has a time of its own", "`after` and `requests` belong to " + ", ".join(sorted(TIMED))
            )
        return EngineFault(
            kind,
            self.value(named.get("endpoint"), str, None),
            self.value(named.get("model"), str, None),
            tuple(self.value(start, _ordinal, 1) for start in listed),
            self.value(named.get("chance"), _chance, 1.0),
            self.value(named.get("after"), parse_duration, 0.0),
            self.value(named.get("requests"), _ordinal, 0),
            lasts_s,
        )

    def fields(self, entry: yaml.Node | None, allowed: tuple[str, ...]) -> dict[str, yaml.Node]:
        found: dict[str, yaml.Node] = {}
        for key, value in self.pairs(entry):
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, 1)
                self.note(
                    value,
                    f"unknown key {key!r}",
                    f"did you mean {near[0]!r}?" if near else "keys: " + ", ".join(allowed),
                )
            elif key in found:
                self.note(value, f"{key!r} is given twice", None)
            else:
                found[key] = value
        return found

    def pairs(self, entry: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
        if isinstance(entry, yaml.MappingNode):
            for key, value in entry.value:
                yield str(key.value), value
        elif entry is not None:
            self.note(entry, "a mapping (`key: value`) belongs here", None)

    def items(self, entry: yaml.Node | None, example: str) -> list[yaml.Node]:
        if isinstance(entry, yaml.SequenceNode):
            return list(entry.value)
        if entry is not None:
            self.note(entry, "a list belongs here", example)
        return []

    def value(self, entry: yaml.Node | None, read: Callable[[str], Any], default: _T) -> _T:
        """`read` of a scalar, or `default` when it is absent or wrong (then it is noted)."""
        if entry is None:
            return default
        try:
            if not isinstance(entry, yaml.ScalarNode):
                _refuse("one value belongs here")
            result: _T = read(entry.value)
        except ValueError as error:
            self.note(entry, str(error), None)
            return default
        return result

    def note(self, entry: yaml.Node | None, message: str, hint: str | None) -> None:
        mark = entry.start_mark if entry is not None else None
        where = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        self.problems.append(Problem(self.file, *where, message, hint))


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _positive(text: str) -> float:
    value = float(text) if re.fullmatch(r"\d*\.?\d+", text) else 0.0
    return value if value > 0 else _refuse(f"{text!r} is not a number above 0")


def _whole(text: str) -> int:
    return int(text) if re.fullmatch(r"\d{1,4}", text) else _refuse(f"{text!r} is not a whole number")


def _ordinal(text: str) -> int:
    return int(text) if re.fullmatch(r"[1-9]\d{0,8}", text) else _refuse(f"{text!r} is not a whole number above 0")


def _chance(text: str) -> float:
    value = float(text) if re.fullmatch(r"\d*\.?\d+", text) else 2.0
    return value if value <= 1 else _refuse(f"{text!r} is not a number from 0 to 1")


def _kind(text: str) -> str:
    near = difflib.get_close_matches(text, KINDS, 1)
    known = f"did you mean {near[0]!r}?" if near else "faults: " + ", ".join(KINDS)
    return text if text in KINDS else _refuse(f"no fault is called {text!r}; {known}")


def _suggest(name: str) -> str:
    near = difflib.get_close_matches(name.upper(), KNOWN_GPUS, 1)
    return f"did you mean {near[0]}?" if near else "known GPUs: " + ", ".join(KNOWN_GPUS)
