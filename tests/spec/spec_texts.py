"""Texts that tests of the set-point language begin with."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from reconciler.errors import Problem, SpecError
from reconciler.spec.load import SourceText, resolve
from reconciler.spec.spec import OverlaySpec, Spec

HEAD = "version: 1\n"
FILE = "/etc/box/setpoints.yaml"
BASE = """\
version: 1
node: {gpus: [0, 1, 2, 3]}
priorities: {standing: 900}
endpoints:
  thinking:
    model: org/big
    capabilities: [reasoning, chat]
    gpus: [0, 1]
    port: 8080
    priority: standing
    args: [--max-model-len, "4096"]
  coding:
    model: org/code
    capabilities: [code]
    gpus: 1
    port: 8081
"""


def read(
    text: str, overlays: Mapping[str, str] | None = None, env_files: Mapping[str, bytes] | None = None, file: str = FILE
) -> Spec:
    """The spec of these texts; no file is touched."""

    def read_env_file(path: str) -> bytes:
        if path in (env_files or {}):
            return dict(env_files or {})[path]
        raise OSError(errno.ENOENT, "No such file or directory")

    sources = [SourceText(f"/etc/box/overlays/{name}", body) for name, body in (overlays or {}).items()]
    return resolve(SourceText(file, text), sources, hostname="box", read_env_file=read_env_file)


def problems(text: str, overlays: Mapping[str, str] | None = None) -> tuple[Problem, ...]:
    """Everything wrong with these texts."""
    try:
        return read(text, overlays).problems
    except SpecError as error:
        return error.problems


def overlay(body: str, base: str = BASE, env_files: Mapping[str, bytes] | None = None) -> OverlaySpec:
    """The one overlay `job`, which must be accepted."""
    spec = read(base, {"job.yaml": body}, env_files)
    assert not spec.problems, "\n".join(map(str, spec.problems))
    return spec.overlays["job"]
