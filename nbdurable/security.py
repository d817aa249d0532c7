"""Keys and tokens: who may talk to the coordinator, and which manifests are this project's own.

Signatures are HMAC-SHA256 (RFC 2104) over the manifest's text with the project's key; comparisons take constant time.
"""

from __future__ import annotations

import hmac
import os
import secrets
from hashlib import sha256
from pathlib import Path

from nbdurable.errors import BadSignature, Unauthorized
from nbdurable.models import SignedManifest
from nbdurable.settings import Home


def _secret(path: Path) -> str:
    """Read a secret, created (0600, durable, by exactly one process) where it is missing."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # fails where another process was first: its secret counts
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text(encoding="ascii").strip()


def load_key(home: Home) -> bytes:
    """Return the project's signing key, created at first use."""
    return bytes.fromhex(_secret(home.key))


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
