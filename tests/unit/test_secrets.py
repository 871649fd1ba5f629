"""Secrets decrypt only with their key, and only the owner can read secret files."""

import base64
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import secrets
from relay.errors import SettingsError, StoreError
from relay.secrets import SecretBox, generate_key, generate_token, load_or_create

OLD = "old-key-0123456789-0123456789-0123456789"
NEW = "new-key-0123456789-0123456789-0123456789"

GOLDEN_FINGERPRINT = "4c2785431bcd79c6"
GOLDEN_LINK_KEY = "33d76fc5db293e2bd4a400ce1b38804bf3dcf10c73c8b6204c08c0adb6964375"
GOLDEN_CIPHERTEXT = "v1.4c2785431bcd79c6.vwc-v3mch9WbyB8yUgrKgCABj2PwyNuu-z9GyMG7baeCCe5EDjrZgw=="


@given(text=st.text(), context=st.text(max_size=30))
def test_encrypted_text_decrypts(text: str, context: str) -> None:
    box = SecretBox([OLD])

    assert box.decrypt(box.encrypt(text, context=context), context=context) == text


def test_equal_texts_have_different_ciphertexts() -> None:
    """A reader of the store cannot see that two subscriptions share a secret."""
    box = SecretBox([OLD])

    assert box.encrypt("text") != box.encrypt("text")
    assert "text" not in base64.urlsafe_b64decode(box.encrypt("text").split(".")[2]).decode("latin-1")


def test_a_box_with_a_newer_key_decrypts_what_the_older_key_encrypted() -> None:
    """Rotation: put the new key first, re-encrypt, drop the old one."""
    written = SecretBox([OLD]).encrypt("text")
    both = SecretBox([NEW, OLD])
    rewritten = both.encrypt(both.decrypt(written))

    assert both.needs_reencrypt(written)
    assert not both.needs_reencrypt(rewritten)
    assert SecretBox([NEW]).decrypt(rewritten) == "text"


def test_a_missing_key_is_named_by_its_fingerprint() -> None:
    written = SecretBox([OLD]).encrypt("text")
    [fingerprint] = SecretBox([OLD]).fingerprints()

    with pytest.raises(SettingsError) as caught:
        SecretBox([NEW]).decrypt(written)
    assert str(caught.value) == (
        f"a stored secret was encrypted with key {fingerprint}, which is not in RELAY_SECRET_KEY; "
        "add the previous key back, after the new one and a comma"
    )


def test_a_moved_secret_cannot_be_decrypted() -> None:
    """Copying a ciphertext to another subscription does not give it the secret."""
    box = SecretBox([OLD])

    with pytest.raises(StoreError, match="is damaged, or was moved from another place"):
        box.decrypt(box.encrypt("text", context="subscription a"), context="subscription b")


@given(position=st.integers(0, 27), bit=st.integers(0, 7))
def test_a_flipped_bit_is_detected(position: int, bit: int) -> None:
    box = SecretBox([OLD])
    version, fingerprint, encoded = box.encrypt("text").split(".")
    payload = bytearray(base64.urlsafe_b64decode(encoded))
    payload[position] ^= 1 << bit

    with pytest.raises(StoreError):
        box.decrypt(f"{version}.{fingerprint}.{base64.urlsafe_b64encode(payload).decode()}")


@pytest.mark.parametrize("text", ["", "text", "v1", "v1.abc", "v1.abc.!!", "v1.abc.é", "v1.abc.AAAA", "v2.abc.AAAA"])
def test_text_in_another_format_is_rejected(text: str) -> None:
    box = SecretBox([OLD])

    with pytest.raises(StoreError, match="its format is not valid"):
        box.decrypt(text)
    with pytest.raises(StoreError, match="its format is not valid"):
        box.needs_reencrypt(text)


def test_signing_keys_are_stable_and_differ_by_purpose_and_key() -> None:
    """Links signed before a restart are valid after it."""
    box = SecretBox([NEW, OLD])
    links = box.signing_keys("links")

    assert links == SecretBox([NEW, OLD]).signing_keys("links")
    assert links[1:] == SecretBox([OLD]).signing_keys("links")
    assert len({*links, *box.signing_keys("cursors")}) == 4
    assert all(len(key) == 32 for key in links)


def test_derived_keys_never_change() -> None:
    """A golden vector: another derivation would make every stored secret and every link unreadable."""
    box = SecretBox([OLD])

    assert box.fingerprints() == (GOLDEN_FINGERPRINT,)
    assert box.signing_keys("links")[0].hex() == GOLDEN_LINK_KEY
    assert box.decrypt(GOLDEN_CIPHERTEXT, context="subscription:crm") == "whsec_golden"


def test_a_box_shows_fingerprints_only() -> None:
    assert OLD not in repr(SecretBox([OLD]))
    assert SecretBox([OLD]).fingerprints()[0] in repr(SecretBox([OLD]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "RELAY_SECRET_KEY is missing"),
        ([OLD, "confidential"], "a secret key is too short; it needs at least 32 characters"),
    ],
)
def test_missing_and_weak_keys_are_rejected(keys: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        SecretBox(keys)
    assert str(caught.value) == message


def test_generated_secrets_are_unique_and_strong() -> None:
    assert len({generate_key() for _ in range(50)}) == 50
    assert len({generate_token() for _ in range(50)}) == 50
    assert len(generate_key()) >= 32
    assert generate_token().startswith("relay_")


# --------------------------------------------------------------------------------------- the relay's own files


def test_an_embedded_relay_generates_its_secrets_once(tmp_path: Path) -> None:
    """The first start generates them, the second reuses them; only the owner may read them."""
    data_dir = tmp_path / "deep" / "relay-data"
    first, second = load_or_create(data_dir), load_or_create(data_dir)

    assert first == second
    assert len(first.keys[0]) >= 32
    assert {path.name for path in data_dir.iterdir()} == {"secret_key", "api_token"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in data_dir.iterdir()} == {0o600}
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700


def test_the_umask_does_not_open_the_files(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_or_create(tmp_path / "data")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "data" / "secret_key").stat().st_mode) == 0o600


def test_generated_secrets_are_not_in_the_repr(tmp_path: Path) -> None:
    own = load_or_create(tmp_path)

    assert own.keys[0] not in repr(own)
    assert own.token not in repr(own)


def test_the_key_file_may_hold_several_keys_newest_first(tmp_path: Path) -> None:
    load_or_create(tmp_path)
    (tmp_path / "secret_key").write_text(f"{NEW}\n\n{OLD}\n")

    assert load_or_create(tmp_path).keys == (NEW, OLD)


def test_two_concurrent_starts_get_the_same_secrets(tmp_path: Path) -> None:
    """The slower of two processes uses the secrets of the faster one."""
    loaded: list[secrets.OwnSecrets] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        loaded.append(load_or_create(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(loaded) == 8
    assert len(set(loaded)) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_start_leaves_no_partial_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is created atomically, even when the disk fills up while it is written."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(SettingsError, match="cannot be used: No space left on device"):
        load_or_create(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_file_accessible_to_others_is_rejected(tmp_path: Path, mode: int) -> None:
    load_or_create(tmp_path)
    path = tmp_path / "secret_key"
    path.chmod(mode)

    with pytest.raises(SettingsError) as caught:
        load_or_create(tmp_path)
    assert str(caught.value) == (
        f"{path} holds a secret and is accessible to other users (mode {mode:04o}); run chmod 600 {path}"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("secret_key", b"", "is empty; restore it, or delete it to generate a new one"),
        ("secret_key", b"confidential", "holds a secret that is too short; it needs at least 32 characters"),
        ("api_token", b"confidential", "holds a secret that is too short; it needs at least 16 characters"),
        ("api_token", b"a-token-of-some-length\n" * 2, "has more than one line; keep one API token"),
        ("secret_key", b"\xff", "is not ASCII text; restore it, or delete it to generate a new one"),
    ],
)
def test_a_damaged_file_is_rejected(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    load_or_create(tmp_path)
    (tmp_path / name).write_bytes(content)

    with pytest.raises(SettingsError) as caught:
        load_or_create(tmp_path)
    assert str(caught.value) == f"{tmp_path / name} {message}"


def test_a_directory_in_place_of_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "secret_key").mkdir()

    with pytest.raises(SettingsError, match="secret_key cannot be used: Is a directory"):
        load_or_create(tmp_path)


def test_a_device_in_place_of_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "secret_key").symlink_to("/dev/null")

    with pytest.raises(SettingsError, match="secret_key is not a regular file"):
        load_or_create(tmp_path)


def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(SettingsError, match=r"data_dir: .*file cannot be used: "):
        load_or_create(tmp_path / "file")
