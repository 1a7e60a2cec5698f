"""What looks like a secret: names of options and variables, and the words of a command line that hold one.

Secrets belong in an `env_file`. Where a command line holds one nevertheless, everything that people or files are shown
of it goes through `redacted`. By name, or by the form that well-known issuers give their tokens, so neither complete
nor always right: a positional argument may be a password, and what is hidden in vain costs a reader little.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from msgspec import Struct

HIDDEN = "***"

_SECRET = frozenset({
    "token", "key", "keys", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "credential",
    "credentials", "authorization", "auth", "pass", "passcode", "pw", "pwd", "cookie", "signature", "sig", "jwt",
    "bearer",
})  # fmt: skip
_HARMLESS = frozenset({
    # tokens of a tokenizer; a plural counts some, so `tokens` is not above
    "eos", "bos", "pad", "unk", "mask", "sep", "cls", "stop", "start", "end", "image", "video", "audio", "special",
    "per", "next", "last", "first",
    # keys of tables
    "sort", "partition", "primary", "public", "cache", "group", "map", "join", "shard", "metric",
    # switches
    "no", "enable", "disable", "require",
})  # fmt: skip
"""In front of one of the above."""
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_INSIDE = re.compile(
    r"""(?<![\w.-])(?:(?![A-Za-z])[\w.-])*(?P<name>[A-Za-z][\w.-]*+)"""
    r"""\\?["']?\s*(?P<mark>[:=])\s*\\?(?P<quote>["']?)(?:(?:Bearer|Basic|Token)\s+)?(?!//)(?=\S)"""
)
"""A name and what stands before its value within one word: `NAME=value`, a header, JSON, the query of an address.

What could be a name is looked at once, from its first letter to its end: a word may be a template of 100 KB.
What comes before its first letter is no possessive group: Python 3.11.2 loses the first letter of what follows one.
"""
_SEPARATOR = re.compile(r"""[\s"'&?,;}\]]""")
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s]+(?=@)")
_ISSUED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|xox[abeprs]-[\w-]{10,}|nvapi-[\w-]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*)"
)
"""Tokens of Hugging Face, OpenAI, GitHub, GitLab, Slack and NVIDIA, and signed claims (RFC 7519)."""
_PATH = re.compile(r"\.{0,2}/|~")


class Discreet(Struct, frozen=True):
    """A record some of whose fields may hold secrets: they stay out of its `repr`, and so out of messages and logs.

    And out of what rich prints of one: structs tell it all their fields, whatever their `repr` says.
    """

    discreet_about: ClassVar[frozenset[str]]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.__struct_fields__ if name not in self.discreet_about]


def names_secret(name: str) -> bool:
    """Whether what has this name is likely a secret: `--api-key`, `HF_TOKEN`, `clientSecret`; not `--max-tokens`."""
    parts = [part.lower() for part in _PARTS.findall(name.rstrip("_-0123456789"))]
    return bool(parts) and parts[-1] in _SECRET and not (len(parts) > 1 and parts[-2] in _HARMLESS)


def redacted(words: Sequence[str]) -> tuple[str, ...]:
    """A command line with `HIDDEN` in the place of each secret in it; paths (of files that hold one) stay."""
    shown: list[str] = []
    hiding = False
    for word in words:
        option = word.startswith("-")
        if option or not hiding:
            shown.append(_redacted_within(word))
            hiding = option and "=" not in word and names_secret(word)
        else:  # every value up to the next option: engines take several keys
            shown.append(word if _PATH.match(word) else HIDDEN)
    return tuple(shown)


def _redacted_within(word: str) -> str:
    word = _ISSUED.sub(HIDDEN, _USER_IN_ADDRESS.sub(HIDDEN, word))
    at, shown = 0, ""
    while found := _INSIDE.search(word, at):
        start = end = found.end()  # what looks like a value may be the next name
        if names_secret(found["name"]) and not _PATH.match(word, start):
            end = _end_of_value(word, found)
        shown += word[at:start] + (HIDDEN if end > start else "")
        at = end
    return shown + word[at:]


def _end_of_value(word: str, found: re.Match[str]) -> int:
    """Where the value ends that begins behind `found`.

    1. In quotes: with them. 2. A list: with it. 3. The whole word is that name and its value: with the word; or at its
    first blank, as it may be a line of a shell. 4. A header within a word: at the next quote. 5. Else at what
    separates such words.
    """
    start, leads = found.end(), not word[: found.start("name")].strip("-")
    header = found["mark"] == ":" and word[start - 1].isspace()
    if found["quote"]:  # 1
        stop = re.compile(re.escape(found["quote"]))
    elif word[start] == "[":  # 2
        stop = re.compile(r"(?<=\])")
    elif leads:  # 3
        stop = re.compile(r"$" if header else r"\s")
    elif header:  # 4
        stop = re.compile(r"[\"']")
    else:  # 5
        stop = _SEPARATOR
    ended = stop.search(word, start)
    return ended.start() if ended else len(word)
