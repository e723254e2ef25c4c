"""What a failed request of obstore means, in one line, and whether asking again may help.

obstore has a few classes of errors and says the rest in the text of a generic one: the status that the server
answered, or how the connection failed. A text that nothing here knows counts as a passing trouble.
"""

from __future__ import annotations

import dataclasses
import enum
import re

from obstore.exceptions import (
    AlreadyExistsError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)


class Trouble(enum.Enum):
    """What to do about a failed request."""

    ABSENT = enum.auto()
    """There is no such object."""
    EXISTS = enum.auto()
    """A create-only put found an object."""
    REPLACED = enum.auto()
    """The object is not the one that the request asked for (If-Match)."""
    TOO_SHORT = enum.auto()
    """The object ends before what was asked for."""
    PASSING = enum.auto()
    """Asking again may help: the server is overloaded or restarts, the connection broke."""
    UNREACHABLE = enum.auto()
    """Nobody answers at that address."""
    UNSUPPORTED = enum.auto()
    """The server does not know how to do that."""
    REFUSED = enum.auto()
    """Asking again does not help."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cause:
    """Why a request failed."""

    trouble: Trouble
    """What to do about it."""
    text: str
    """One line, without the key."""
    hint: str | None = None
    """The remedy, where there is a better one than trying again later."""


class CutOffError(Exception):
    """An answer whose body is shorter than it should be, though the connection ended as usual."""


CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "AWS_SKIP_SIGNATURE=true reads a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT; "
    "GOOGLE_SKIP_SIGNATURE=true reads a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; "
    "AZURE_SKIP_SIGNATURE=true reads a public container",
    "http": "set FEATSTORE_TOKEN to the server's token",
}
"""What to do where there are no credentials, or not the right ones, by scheme."""
CONDITIONAL_HINT = (
    "leases and new runs need create-only puts (`If-None-Match: *`); use a server that has them, "
    "or extract into a local store and `featstore push` it"
)

_STATUS = re.compile(r"status code: (\d{3}) ?([A-Za-z -]*)")
_CODE = re.compile(r"<Code>(\w{1,80})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,200})</Message>")
_REGION = re.compile(r"expecting '([a-z0-9-]+)'|<Region>([a-z0-9-]+)</Region>")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 522, 524, 529})
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_METADATA_SERVICES = (
    "/latest/api/token",
    "/latest/meta-data",
    "computeMetadata/",
    "/metadata/identity",
    "metadata.google",
)
_NO_CREDENTIALS = ("Missing AccessKeyId", "Missing SecretAccessKey", "MissingAccessKey", "Account must be specified")
_BROKEN = {
    "IncompleteMessage": "the connection was dropped",
    "ConnectionReset": "the connection was dropped",
    "kind: Timeout": "it timed out",
    "IncompleteBody": "the answer was cut off",
    "kind: Interrupted": "the answer was cut off",
}


def diagnose(error: Exception, scheme: str, root: str) -> Cause:
    """Why a request failed.

    Args:
        error: what obstore raised, or `CutOffError`.
        scheme: of the store, a key of `CREDENTIALS` or ``memory``.
        root: the bucket, container or server, for the message.
    """
    text = " ".join(str(error).split())
    match = _STATUS.search(text)
    status = int(match[1]) if match else 0
    answer = _answer(match, text) if match else ""
    if isinstance(error, CutOffError):
        return Cause(Trouble.PASSING, f"the answer was cut off: {error}")
    if any(place in text for place in _METADATA_SERVICES) and status not in _PASSING:
        return Cause(Trouble.REFUSED, "there are no credentials", CREDENTIALS.get(scheme))
    if any(code in text for code in _NO_BUCKET):
        return Cause(Trouble.REFUSED, f"there is no bucket {root!r}", "create it, or correct the name in --store")
    if isinstance(error, FileNotFoundError) or status == 404:
        return Cause(Trouble.ABSENT, answer or "there is no such object")
    if isinstance(error, AlreadyExistsError):
        # S3 answers 409 while another put of the same key is under way: then nobody has won yet.
        undecided = status == 409 and scheme == "s3"
        return Cause(Trouble.PASSING if undecided else Trouble.EXISTS, answer or "it exists")
    if isinstance(error, PreconditionError):
        return Cause(Trouble.REPLACED, "it was replaced")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or status in (401, 403):
        return Cause(Trouble.REFUSED, answer or "access is denied", _access_hint(scheme, text))
    if status:
        return _status_cause(status, answer, text)
    return _connection_cause(error, text, scheme, root)


def has_no_range(error: Exception) -> bool:
    """Whether the answer was the whole object though a range was asked for."""
    return "non-partial response" in str(error)


def _answer(match: re.Match[str], text: str) -> str:
    """What the server answered, in one line of printable characters."""
    code, message = _CODE.search(text), _MESSAGE.search(text)
    said = ": ".join(part[1] for part in (code, message) if part)
    line = f"the server answered {match[1]} {match[2].strip()}".rstrip() + (f" ({said})" if said else "")
    return "".join(char for char in line if char.isprintable())


def _access_hint(scheme: str, text: str) -> str | None:
    if "RequestTimeTooSkewed" in text:
        return "correct this machine's clock"
    if scheme == "s3":
        return (
            f"{CREDENTIALS['s3']}; the bucket's policy must grant s3:ListBucket, s3:GetObject and, for writing, "
            "s3:PutObject and s3:DeleteObject"
        )
    return CREDENTIALS.get(scheme)


def _status_cause(status: int, answer: str, text: str) -> Cause:
    if status in _PASSING or status == 409:
        return Cause(Trouble.PASSING, answer)
    if status == 416:
        return Cause(Trouble.TOO_SHORT, "it ends before what it should hold")
    if status in (301, 307, 400) and (region := _REGION.search(text)):
        return Cause(Trouble.REFUSED, answer, f"set AWS_REGION={region[1] or region[2]}")
    if status == 501:
        return Cause(Trouble.UNSUPPORTED, answer)
    return Cause(Trouble.REFUSED, answer)


def _connection_cause(error: Exception, text: str, scheme: str, root: str) -> Cause:
    if isinstance(error, NotSupportedError) or has_no_range(error):
        return Cause(
            Trouble.REFUSED,
            "the server does not answer requests for ranges of bytes",
            "share the store with `featstore serve`, or any server that knows range requests",
        )
    if "redirect without LOCATION" in text:
        return Cause(Trouble.REFUSED, "the bucket is in another region", "set AWS_REGION to the bucket's region")
    if any(words in text for words in _NO_CREDENTIALS):
        return Cause(Trouble.REFUSED, "there are no credentials", CREDENTIALS.get(scheme))
    # A connection that comes to nothing within its time is a timeout to obstore, like a server that is silent.
    if any(sign in text for sign in ("kind: Connect", "kind: Builder", "ConnectError(")):
        if "certificate" in text.lower():
            hint = "name the file of its authority's certificate in AWS_CA_BUNDLE" if scheme == "s3" else None
            return Cause(Trouble.REFUSED, f"the certificate of {root} is not trusted", hint)
        if "dns error" in text:
            return Cause(Trouble.UNREACHABLE, f"the host of {root} is not known", _address_hint(scheme))
        if "ConnectionRefused" in text:
            return Cause(Trouble.UNREACHABLE, "the connection was refused", _address_hint(scheme))
        return Cause(Trouble.UNREACHABLE, "no connection can be made", _address_hint(scheme))
    for sign, words in _BROKEN.items():
        if sign in text:
            return Cause(Trouble.PASSING, words)
    line = text.partition(" Debug source:")[0][:300]
    return Cause(Trouble.PASSING, "".join(char for char in line if char.isprintable()))


def _address_hint(scheme: str) -> str:
    if scheme == "s3":
        return "check the network, and AWS_ENDPOINT_URL and AWS_REGION if they are set"
    return "check the address and the network"
