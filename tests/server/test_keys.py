"""The key file, as a user writes it."""

import hashlib
from pathlib import Path

import pytest

from qwen_vllm.server.keys import KeyFileError, KeyRing

SECRET = "0123456789abcdef-secret"


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys.toml"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_a_key_has_its_name_and_limits_and_may_be_stored_as_its_hash(tmp_path: Path) -> None:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    limits = (
        'requests_per_minute = 60\ntokens_per_day = 1_000_000\nrequests_at_once = 4\npriority = 2\nmodels = ["m"]\n'
    )
    ring = KeyRing(key_file(tmp_path, f'[alice]\nkey = "sha256:{digest}"\n{limits}\n["张三"]\nkey = "{SECRET}2"\n'))
    alice = ring.find(SECRET.encode())
    assert alice and alice.name == "alice" and alice.priority == 2 and alice.models == ["m"] and not alice.admin
    assert alice.limits() == {"requests_per_minute": 60, "tokens_per_day": 1_000_000, "requests_at_once": 4}
    assert ring.find(f"{SECRET}2".encode()).name == "张三"
    assert ring.find(digest.encode()) is ring.find(f"sha256:{digest}".encode()) is ring.find(b"") is None
    assert SECRET not in repr(ring.by_name()) + repr(vars(ring))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'[a]\nkey = "{SECRET}', "no TOML"),
        ("", "no key"),
        (f'key = "{SECRET}"', "[key]: a key is a table"),
        (f'[a]\nkey = "{SECRET}"\n[b]\nkey = "{SECRET}"', "[b] and [a] have the same key"),
        (f'[a]\nkey = "{SECRET}"\nrequests_per_hour = 5', "[a]: there is no requests_per_hour, only key, admin"),
        (f'[a]\nkey = "{SECRET}"\nname = "b"', "[a]: there is no name"),
        (f'[a]\nkey = "{SECRET}"\nrequests_per_minute = 0', "[a]: requests_per_minute:"),
        (f'[a]\nkey = "{SECRET}"\ntokens_per_day = "5"', "[a]: tokens_per_day:"),
        ("[a]\nadmin = true", "[a]: key: a text of at least 16 characters"),
        ('[a]\nkey = "short"', "at least 16 characters"),
        (f'[a]\nkey = "sha256:{SECRET}"', "64 hexadecimal digits"),
        (f'["a\\nb"]\nkey = "{SECRET}"', "no line break"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_without_a_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(KeyFileError) as error:
        KeyRing(key_file(tmp_path, text))
    assert said in str(error.value) and SECRET not in str(error.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644])
def test_a_file_that_every_user_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(KeyFileError, match="chmod o="):
        KeyRing(key_file(tmp_path, f'[a]\nkey = "{SECRET}"', mode))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        KeyRing(tmp_path / "keys.toml")
