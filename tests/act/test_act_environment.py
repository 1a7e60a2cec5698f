"""What a leader's environment is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.act.environment import child_environment, read_env_file
from reconciler.errors import ActError


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "HF_HOME", "NCCL_DEBUG", "VLLM_USE_V1", "https_proxy"]
)
def test_what_is_needed_to_run_is_inherited(name: str) -> None:
    assert child_environment({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "VLLM_API_KEY",
        "SSH_AUTH_SOCK", "LD_PRELOAD", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "RECONCILER_INCARNATION", "NOTIFY_SOCKET",
        "XDG_SECRET_X",
    ],
)  # fmt: skip
def test_tokens_and_accidents_of_the_daemons_start_are_not_inherited(name: str) -> None:
    assert child_environment({name: "x"}) == {}


def test_the_file_wins_over_the_inherited_and_the_set_point_over_the_file() -> None:
    parent = {"PATH": "parent", "HOME": "parent", "LANG": "parent"}
    child = child_environment(parent, env_file={"PATH": "file", "HOME": "file"}, env={"PATH": "spec"})
    assert child == {"PATH": "spec", "HOME": "file", "LANG": "parent"}


def test_a_token_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("# for the hub\nexport HF_TOKEN='a=b # c'\n\nPLAIN=x y\n")
    assert read_env_file(str(file)) == {"HF_TOKEN": "a=b # c", "PLAIN": "x y"}


@pytest.mark.parametrize("text", ["hunter2\n", "1X=hunter2\n", "A=1\n=hunter2\n"])
def test_a_malformed_file_is_told_without_its_values(tmp_path: Path, text: str) -> None:
    file = tmp_path / "secrets.env"
    file.write_text(text)
    with pytest.raises(ActError) as caught:
        read_env_file(str(file))
    assert str(file) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("A=1\n")
    file.chmod(0o666)
    with pytest.raises(ActError, match="everybody"):
        read_env_file(str(file))


def test_a_missing_file_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ActError, match="No such file"):
        read_env_file(str(tmp_path / "secrets.env"))
