"""What is taken for a secret, by its name; what is shown of a command line; and where a file is warned of."""

from __future__ import annotations

import time

import pytest
from rich.pretty import pretty_repr

from reconciler.spec.cautions import cautions
from reconciler.spec.secrecy import Discreet, names_secret, redacted
from reconciler.spec.texts import SourceText


class Held(Discreet, frozen=True):
    discreet_about = frozenset({"env"})

    name: str
    env: dict[str, str]


def test_a_discreet_record_keeps_its_secrets_out_of_all_that_prints_it() -> None:
    held = Held("coding", {"HF_TOKEN": "canary"})
    assert repr(held) == str(held) == "Held(name='coding')"
    assert pretty_repr([held]) == "[Held(name='coding')]"


@pytest.mark.parametrize(
    "name",
    ["--api-key", "HF_TOKEN", "clientSecret", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY", "--admin-api-key", "X-Api-Key",
     "Authorization", "DB_PASSWORD", "apiKey", "APIKEY", "token", "--hf-token", "OPENAI_API_KEY_2", "openai.api.key",
     "credentials", "--basic-auth", "--db-pass", "MYSQL_PWD", "X-Amz-Signature", "--cookie"],
)  # fmt: skip
def test_a_name_that_ends_in_a_word_for_a_secret_names_one(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize(
    "name",
    ["--max-tokens", "--max-num-batched-tokens", "--tokenizer", "--tokenizer-mode", "--eos-token", "--eos-token-id",
     "--api-key-file", "--ssl-keyfile", "--sort-key", "--model", "MONKEY", "KEYBOARD", "HF_HOME", "", "-", "_1",
     "--no-auth", "--auth-type", "--design"],
)  # fmt: skip
def test_what_engines_call_tokens_is_none(name: str) -> None:
    assert not names_secret(name)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("serve m --api-key k1 k2 --port 80", "serve m --api-key *** *** --port 80"),
        ("--hf-token=abc --max-tokens 100", "--hf-token=*** --max-tokens 100"),
        ("env HF_TOKEN=abc vllm", "env HF_TOKEN=*** vllm"),
        ("--ssl-key /etc/k.pem --key-file /x", "--ssl-key /etc/k.pem --key-file /x"),
        ("http://u:p@h:80/x?token=abc&y=1", "http://***@h:80/x?token=***&y=1"),
        ("--trust-remote-code --tokenizer org/x", "--trust-remote-code --tokenizer org/x"),
        ("--token", "--token"),
    ],
)
def test_a_command_line_is_shown_without_its_secrets(words: str, shown: str) -> None:
    assert " ".join(redacted(words.split())) == shown


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ('{"api_key": "abc", "n": 3}', '{"api_key": "***", "n": 3}'),
        ("import x; token='abc'; y(1)", "import x; token='***'; y(1)"),
        ("x-api-key:abc", "x-api-key:***"),
        ("--header=X-Api-Key: abc", "--header=X-Api-Key: ***"),
        ("a=b:token=abc", "a=b:token=***"),
        ("--api-key=k1,k2;k3", "--api-key=***"),
        ("Authorization: ApiKey abc, def", "Authorization: ***"),
        ("curl -H 'Authorization: ApiKey abc' http://h", "curl -H 'Authorization: ***' http://h"),
        ('{"api_keys": ["a", "b"], "n": 3}', '{"api_keys": ***, "n": 3}'),
        ('{"password": "two words, and more", "n": 3}', '{"password": "***", "n": 3}'),
        (r'curl -d "{\"api_key\": \"abc\"}"', r'curl -d "{\"api_key\": \"***"}"'),
        ("PASSWORD='two words' run --port 1", "PASSWORD='***' run --port 1"),
        ("HF_TOKEN=a;b run --port 1", "HF_TOKEN=*** run --port 1"),
        ("postgres://u:p@ss@db/x", "postgres://***@db/x"),
        ("s3://b?X-Amz-Signature=abc&y=1", "s3://b?X-Amz-Signature=***&y=1"),
        ("hf_" + "a" * 34, "***"),
        ("login sk-proj-" + "a" * 40 + " now", "login *** now"),
        ("token=", "token="),
        ("token=''", "token=''"),
        ("--key: [a, b", "--key: ***"),
        ('{"n": 3, "max_tokens": 7}', '{"n": 3, "max_tokens": 7}'),
    ],
)
def test_a_secret_within_a_word_is_left_out(word: str, shown: str) -> None:
    assert redacted(["--x", word]) == ("--x", shown)


@pytest.mark.parametrize("part", ["x", "a.b-", "a=b,", "9", "A", "a "])
def test_a_word_of_any_length_is_looked_at_in_no_time(part: str) -> None:
    """A template may be of 100 KB; one look at each letter for each letter would take minutes."""
    word = part * (100_000 // len(part)) + "key=hunter2"
    began = time.process_time()
    (shown,) = redacted([word])
    assert time.process_time() - began < 5.0
    assert shown.startswith(part * 1000)


SETPOINTS = """\
version: 1
defaults:
  args: [--api-key, hunter2]
engines:
  mine: {executable: x, args: ["--token=hunter2"]}
endpoints:
  a:
    model: m
    port: 1
    args: ["--max-tokens", "100"]
    env:
      HF_TOKEN: hunter2
      HF_HOME: /data
  b:
    engine: custom
    command: [run, "-H", "Authorization: Bearer hunter2"]
"""


def test_each_secret_in_a_file_is_warned_of_at_its_place_and_never_repeated() -> None:
    found = cautions(SourceText("f.yaml", SETPOINTS))
    assert [(p.line, p.column) for p in found] == [(3, 21), (5, 32), (12, 7), (16, 26)]
    assert all("env_file" in (p.hint or "") for p in found)
    assert "hunter2" not in "".join(map(str, found))
    assert "HF_TOKEN looks like a secret" in found[2].message


def test_an_overlay_is_warned_of_too() -> None:
    text = (
        "version: 1\nset: {a: {args: [--password, x]}}\nworkload:\n  command: [job, --api-key, x]\n  env: {A_KEY: x}\n"
    )
    assert [p.line for p in cautions(SourceText("o.yaml", text))] == [2, 4, 5]


@pytest.mark.parametrize("text", ["a: [", "[]", "", "version: 1\nenv: {A_TOKEN: }\n", "command: 3\nargs: {token: x}\n"])
def test_what_holds_no_secret_or_cannot_be_read_is_warned_of_nowhere(text: str) -> None:
    assert cautions(SourceText("f.yaml", text)) == ()
