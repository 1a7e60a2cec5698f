"""The JSON Schemas, and every shipped file against them and through the loader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from spec_texts import BASE, problems

from reconciler.spec.document import parse
from reconciler.spec.load import SourceText, load_setpoints, resolve_texts
from reconciler.spec.schema import Format, schema
from reconciler.spec.tree import plain

ROOT = Path(__file__).parents[2]
SETPOINTS = [ROOT / "setpoints/setpoints.yaml", *sorted(ROOT.glob("examples/**/setpoints.yaml"))]
OVERLAYS = sorted((*ROOT.glob("setpoints/overlays/*.yaml*"), *ROOT.glob("examples/**/overlays*/*.yaml*")))


@pytest.mark.parametrize("which", ["setpoints", "overlay"])
def test_the_committed_schema_is_the_generated_one(which: Format) -> None:
    committed = (ROOT / "setpoints" / f"{which}.schema.json").read_text()
    wanted = json.dumps(schema(which), indent=2, ensure_ascii=False) + "\n"
    assert committed == wanted, f"run: reconciler schema {which} > setpoints/{which}.schema.json"


@pytest.mark.parametrize("which", ["setpoints", "overlay"])
def test_every_key_of_the_schema_is_described(which: Format) -> None:
    generated = schema(which)
    jsonschema.Draft202012Validator.check_schema(generated)
    for part in (generated, *generated["$defs"].values()):
        assert part["description"]
        for name, field in part["properties"].items():
            assert field.get("description"), name


@pytest.mark.parametrize("path", [*SETPOINTS, *OVERLAYS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_names_a_schema_that_accepts_it(path: Path) -> None:
    text = path.read_text()
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found
    described = json.loads((path.parent / found[1]).read_text())
    jsonschema.validate(plain(parse(text, str(path))), described)


@pytest.mark.parametrize("path", SETPOINTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_is_accepted_together_with_its_overlays(path: Path) -> None:
    assert load_setpoints(path).problems == ()
    overlays = [
        SourceText(str(other).removesuffix(".example"), other.read_text())
        for other in OVERLAYS
        if path.parent in other.parents
    ]
    assert overlays
    spec = resolve_texts(SourceText(str(path), path.read_text()), overlays)
    assert spec.problems == ()
    assert len(spec.overlays) == len(overlays)


def test_the_shipped_set_points_hold_three_endpoints_with_capabilities_and_a_floor() -> None:
    spec = load_setpoints(SETPOINTS[0])
    assert len(spec.endpoints) == 3
    assert all(endpoint.capabilities and endpoint.engine == "vllm" for endpoint in spec.endpoints.values())
    assert any(spec.floors.values())


def test_shipped_files_mean_the_same_to_other_yaml_readers() -> None:
    for path in (*SETPOINTS, *OVERLAYS):
        text = path.read_text()
        ours: Any = plain(parse(text, str(path)))
        theirs = yaml.safe_load(text)
        assert ours == theirs, path


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ("    memory: 20GiB\n", True),
        ("    memory: 20\n", False),
        ("    memory: 0.4\n", True),
        ("    stop: {grace: 1d12h}\n", True),
        ("    stop: {grace: PT5M}\n", True),
        ("    stop: {grace: 30}\n", False),
        ("    priority: standing\n", True),
        ("    priority: 3\n", True),
        ("    priority: 1.5\n", False),
        ("    gpus: [3, GPU-0123abcd]\n", True),
        ("    gpus: []\n", False),
        ("    enginee: vllm\n", False),
        ("    state: on\n", False),
        ("    env: {A: 1}\n", False),
        ("    env:\n", True),
        ("    executable:\n", False),
        ("    command: run it\n", False),
        ("x-notes: {any: [thing]}\n", True),
    ],
)
def test_schema_and_loader_agree(change: str, accepted: bool) -> None:
    text = BASE.replace("    gpus: 1\n", "") + change
    checker = jsonschema.Draft202012Validator(schema("setpoints"))
    assert checker.is_valid(plain(parse(text, "f"))) == accepted
    assert (problems(text) == ()) == accepted


def test_importing_the_language_builds_no_model() -> None:
    code = (
        "import reconciler.spec.load, reconciler.spec.overlay_models as o, reconciler.spec.models as m;"
        "print(m.SetpointsModel.__pydantic_complete__, o.OverlayModel.__pydantic_complete__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]
