"""Keys and tokens: who may talk to the coordinator, which manifests are a store's own, and whether it is trusted.

A store is trusted if this user made its key or accepted it, see `trust.py`: its key alone says only that its parts
belong together. Signatures are HMAC-SHA256 (RFC 2104) over the manifest's text with that key; comparisons take constant
time.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import shlex
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from nbdurable import trust
from nbdurable.errors import BadSignature, StoreDamaged, Unauthorized, Untrusted
from nbdurable.models import SignedManifest
from nbdurable.settings import Home


def _secret(path: Path, before: Callable[[str], object] = lambda _: None) -> str:
    """Read a secret, created (0600, durable, by exactly one process) where it is missing.

    `before` gets a new one before anybody can read it.
    """
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secret := secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            before(secret)
            os.link(draft, path)  # fails where another process was first: its secret counts
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text(encoding="ascii").strip()


def read_key(home: Home) -> bytes:
    """Return a store's signing key, trusted or not: nothing that it verifies may be unpickled or executed.

    Raises Untrusted where there is none, or none that can be read, and StoreDamaged.
    """
    try:
        key = bytes.fromhex(home.key.read_text(encoding="ascii"))
    except FileNotFoundError:
        raise _untrusted(home, "it has no key") from None
    except OSError as error:
        raise _untrusted(home, f"its key can't be read ({error.strerror})") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise StoreDamaged(
            f"{home.key} is damaged: it is no key",
            todo="put it back from a backup; without it no checkpoint of this store can be restored",
        )
    return key


def fingerprint(key: bytes) -> str:
    """Return the public name of a key."""
    return sha256(b"nbdurable key " + key).hexdigest()[: trust.FINGERPRINT_DIGITS]


def load_key(home: Home) -> bytes:
    """Return the signing key of a store that this user trusts.

    A store that begins with this call gets its key here, and is trusted from then on. Raises Untrusted, and StoreError
    where that can't be noted.
    """
    if _is_new(home):
        _make_key(home)
    if (refusal := standing(home)) is not None:
        raise refusal
    return read_key(home)


def standing(home: Home) -> Untrusted | None:
    """Return why a store is not trusted, None where it is, or has not begun; nothing is created."""
    if _is_new(home):
        return None
    try:
        name = fingerprint(read_key(home))
    except Untrusted as refusal:
        return refusal
    if trust.is_trusted(name):
        return None
    return _untrusted(home, f"you have neither made nor accepted its key {name}")


def accept(home: Home) -> str:
    """Trust a store from now on, and return its fingerprint; one without a key gets one."""
    _make_key(home)
    name = fingerprint(read_key(home))
    trust.add(name, home.root)
    return name


def _make_key(home: Home) -> None:
    """Make a store's key where it has none; trusted before it is there, so that no process finds it untrusted."""
    _secret(home.key, before=lambda new: trust.add(fingerprint(bytes.fromhex(new)), home.root))


def _is_new(home: Home) -> bool:
    """Tell whether nothing has begun in a store, so that whatever comes into it is this user's.

    The key comes first, before anything that could be restored or executed: what lies there without one is not ours.
    Nor is a folder of another user's, who may put there what he likes.
    """
    began = any(path.exists() for path in (home.store, home.journal, home.backups))
    if began or home.key.exists():
        return False
    return not home.root.exists() or not hasattr(os, "getuid") or home.root.stat().st_uid == os.getuid()


def _untrusted(home: Home, why: str) -> Untrusted:
    return Untrusted(
        f"the store {home.root} is not trusted: {why}. What it holds could run code of whoever made it",
        todo=f"`nbdurable trust {shlex.quote(str(home.root))}` shows what it is, and asks you. Once is enough, also "
        "where it came to another user or machine, or is older than this check. Until then it is only looked at: "
        "`nbdurable ls`, `show`, `diff`, `stats`",
    )


def load_token(home: Home) -> str:
    """Return the token that clients show to the coordinator, created at first use."""
    return _secret(home.token)


def check_token(expected: str, header: str | None) -> None:
    """Compare an `Authorization: Bearer …` header with the token; raises Unauthorized."""
    given = (header or "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), expected.encode()):
        raise Unauthorized(
            "the coordinator does not accept the token of this client",
            todo="clients read the token from the project's `.nbdurable/token`: is it of another project, or was the "
            "file replaced while the coordinator ran? `nbdurable down`, and try again",
        )


def callback_secret(key: bytes, run_id: str, wait_key: str) -> str:
    """Return the secret with which a wait's callback URL ends: made from the project's key, and kept nowhere."""
    made = hmac.new(key, f"callback {run_id} {wait_key}".encode(), sha256).digest()
    return base64.urlsafe_b64encode(made).decode().rstrip("=")


def digest_of(secret: str) -> str:
    """Return what may be stored of a secret."""
    return sha256(secret.encode()).hexdigest()


def sign(text: str, key: bytes) -> SignedManifest:
    """Sign a manifest's text with the project's key."""
    return SignedManifest(text=text, signature=hmac.new(key, text.encode(), sha256).hexdigest())


def verify(signed: SignedManifest, key: bytes, *, of: str) -> str:
    """Return a manifest's text once its signature holds; raises BadSignature, naming the checkpoint `of`."""
    if not hmac.compare_digest(sign(signed.text, key).signature, signed.signature):
        raise BadSignature(
            f"the signature of {of} does not match this project's key: it was altered, or made elsewhere",
            todo="nothing was loaded from it. Run the step again (`%durable rerun NAME`)",
        )
    return signed.text
