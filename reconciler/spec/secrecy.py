"""What looks like a secret: names of options and variables, and the words of a command line that hold one.

Secrets belong in an `env_file`. Where a command line holds one nevertheless, everything that people or files are shown
of it goes through `redacted`. By name, so neither complete nor always right: a positional argument may be a password,
and what is hidden in vain costs a reader little.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "***"

_SECRET = frozenset({
    "token", "key", "keys", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "credential",
    "credentials", "authorization",
})  # fmt: skip
_HARMLESS = frozenset({
    # tokens of a tokenizer; a plural counts some, so `tokens` is not above
    "eos", "bos", "pad", "unk", "mask", "sep", "cls", "stop", "start", "end", "image", "video", "audio", "special",
    "per", "next", "last", "first",
    # keys of tables
    "sort", "partition", "primary", "public", "cache", "group", "map", "join", "shard", "metric",
})  # fmt: skip
"""In front of one of the above."""
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_INSIDE = re.compile(
    r"""(?P<name>[A-Za-z][\w.-]*)(?P<between>["']?\s*[:=]\s*["']?(?:(?:Bearer|Basic|Token)\s+)?)(?P<value>(?!//)[^\s"'&?,;}\]]+)"""
)
"""A name and its value within one word: `NAME=value`, a header, JSON, the query of an address."""
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_PATH = re.compile(r"\.{0,2}/|~")


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
    word = _USER_IN_ADDRESS.sub(HIDDEN, word)
    at, shown = 0, ""
    while found := _INSIDE.search(word, at):
        hides = names_secret(found["name"]) and not _PATH.match(found["value"])
        end = found.end() if hides else found.end("between")  # what looks like a value may be the next name
        shown += word[at : found.start("value")] + HIDDEN if hides else word[at:end]
        at = end
    return shown + word[at:]
