"""Encrypt secrets at rest and derive signing keys, both from the operator's keys; generate those if there are none.

HKDF derives one key per purpose from each operator key, so that a signing key never encrypts. Ciphertexts carry the
fingerprint of their key: with `RELAY_SECRET_KEY=new,old`, both can be decrypted and `new` encrypts.
"""

import base64
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from relay.errors import SettingsError, StoreError

# HKDF derives keys but does not slow a guess down (RFC 5869, 4): the key itself must be hard to guess.
KEY_MIN_CHARS: Final = 32
TOKEN_MIN_CHARS: Final = 16
TOKEN_PREFIX: Final = "relay_"  # noqa: S105 - a prefix by which scanners recognise a leaked token
KEY_FILE: Final = "secret_key"
TOKEN_FILE: Final = "api_token"  # noqa: S105 - a file name

_VERSION = "v1"
# What AES-GCM is specified for (NIST SP 800-38D). Random ones are safe for 2^32 texts of one key.
_NONCE_BYTES = 12


def generate_key() -> str:
    return secrets.token_urlsafe(48)


def generate_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


class SecretBox:
    """Encrypts with the newest of the operator's keys, decrypts with any of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise SettingsError("RELAY_SECRET_KEY is missing")
        if any(len(key) < KEY_MIN_CHARS for key in keys):
            raise SettingsError(f"a secret key is too short; it needs at least {KEY_MIN_CHARS} characters")
        self._keys = tuple(key.encode() for key in keys)
        self._fingerprints = tuple(_derive(key, "fingerprint", size_bytes=8).hex() for key in self._keys)
        self._ciphers = {
            fingerprint: AESGCM(_derive(key, "encrypt"))
            for fingerprint, key in zip(self._fingerprints, self._keys, strict=True)
        }

    def __repr__(self) -> str:
        return f"SecretBox({', '.join(self._fingerprints)})"

    def fingerprints(self) -> tuple[str, ...]:
        """Return an identifier of each key, newest first; equal identifiers mean equal keys."""
        return self._fingerprints

    def signing_keys(self, purpose: str) -> list[bytes]:
        """Derive the 32-byte keys for one purpose, newest first: sign with the first, accept any of them."""
        return [_derive(key, f"sign:{purpose}") for key in self._keys]

    def encrypt(self, text: str, *, context: str = "") -> str:
        """Encrypt with the newest key. `context` binds the ciphertext to its place: decrypting needs the same one."""
        newest = self._fingerprints[0]
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._ciphers[newest].encrypt(nonce, text.encode(), _associated(newest, context))
        return f"{_VERSION}.{newest}.{base64.urlsafe_b64encode(nonce + sealed).decode()}"

    def decrypt(self, sealed: str, *, context: str = "") -> str:
        """Decrypt what `encrypt` wrote in the same context.

        Raises SettingsError for an unknown key, StoreError when the ciphertext was damaged or moved.
        """
        fingerprint, payload = _split(sealed)
        cipher = self._ciphers.get(fingerprint)
        if cipher is None:
            raise SettingsError(
                f"a stored secret was encrypted with key {fingerprint}, which is not in RELAY_SECRET_KEY; "
                "add the previous key back, after the new one and a comma"
            )
        try:
            text = cipher.decrypt(payload[:_NONCE_BYTES], payload[_NONCE_BYTES:], _associated(fingerprint, context))
        except InvalidTag:
            raise StoreError("a stored secret is damaged, or was moved from another place") from None
        return text.decode()

    def needs_reencrypt(self, sealed: str) -> bool:
        return _split(sealed)[0] != self._fingerprints[0]


def _derive(key: bytes, purpose: str, *, size_bytes: int = 32) -> bytes:
    return HKDF(algorithm=SHA256(), length=size_bytes, salt=None, info=f"call-relay:{purpose}".encode()).derive(key)


def _associated(fingerprint: str, context: str) -> bytes:
    return f"{_VERSION}.{fingerprint}.{context}".encode()


def _split(sealed: str) -> tuple[str, bytes]:
    version, _, rest = sealed.partition(".")
    fingerprint, _, encoded = rest.partition(".")
    try:
        payload = base64.b64decode(encoded.encode("ascii"), altchars=b"-_", validate=True)
    except ValueError:
        payload = b""
    if version != _VERSION or len(payload) <= _NONCE_BYTES:
        raise StoreError("a stored secret is damaged: its format is not valid")
    return fingerprint, payload


@dataclass(frozen=True, slots=True)
class OwnSecrets:
    """The generated secrets of a relay without operator keys: its keys, newest first, and its API token."""

    keys: tuple[str, ...] = field(repr=False)
    token: str = field(repr=False)


def load_or_create(data_dir: Path) -> OwnSecrets:
    """Read the generated key and API token in `data_dir`; generate what is missing, readable by the owner alone.

    The key file may hold several keys, one per line, newest first. Two processes that start at once get the same
    secrets. Raises SettingsError for files that others may read, and for files that cannot be read or written.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        key_lines = _read_or_create(data_dir / KEY_FILE, generate_key())
        token_lines = _read_or_create(data_dir / TOKEN_FILE, generate_token())
    except OSError as error:
        where = error.filename or data_dir
        raise SettingsError(f"data_dir: {where} cannot be used: {error.strerror or type(error).__name__}") from error
    _check_lines(data_dir / KEY_FILE, key_lines, KEY_MIN_CHARS)
    _check_lines(data_dir / TOKEN_FILE, token_lines, TOKEN_MIN_CHARS)
    if len(token_lines) > 1:
        raise SettingsError(f"{data_dir / TOKEN_FILE} has more than one line; keep one API token")
    return OwnSecrets(keys=tuple(key_lines), token=token_lines[0])


def _read_or_create(path: Path, fresh: str) -> list[str]:
    try:
        return _read_private(path)
    except FileNotFoundError:
        _create_private(path, fresh)
        return _read_private(path)


def _create_private(path: Path, text: str) -> None:
    """Create a file atomically; if another process was faster, its file is kept."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        _sync_directory(path.parent)
    finally:
        draft.unlink()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_private(path: Path) -> list[str]:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise SettingsError(f"{path} is not a regular file")
        if status.st_mode & 0o077:
            raise SettingsError(
                f"{path} holds a secret and is accessible to other users (mode {stat.S_IMODE(status.st_mode):04o}); "
                f"run chmod 600 {path}"
            )
        content = file.read(64 * 1024)
    try:
        return [line.strip() for line in content.decode("ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not ASCII text; restore it, or delete it to generate a new one") from None


def _check_lines(path: Path, lines: list[str], min_chars: int) -> None:
    if not lines:
        raise SettingsError(f"{path} is empty; restore it, or delete it to generate a new one")
    if any(len(line) < min_chars for line in lines):
        raise SettingsError(f"{path} holds a secret that is too short; it needs at least {min_chars} characters")
