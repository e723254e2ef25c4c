"""Keys, region and endpoint of a profile in the files of the AWS command line, which obstore does not read."""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from pathlib import Path

from featstore.errors import StorageError, unknown_name

_OWN_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_SETTINGS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
"""What a profile may say, and obstore's names for it."""
_MORE = ("sso_session", "sso_start_url", "role_arn", "credential_process", "login_session")


def profile_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What the files say where the environment does not, under obstore's names.

    Args:
        environment: the process's variables. ``AWS_PROFILE`` chooses the profile, ``default`` otherwise.

    Raises:
        BadRequestError: for a profile that is in none of the files.
        StorageError: for one that keys have to be fetched for (SSO, a role, a program), or a broken file.
    """
    if any(environment.get(name) for name in _OWN_CREDENTIALS):
        return {}
    name = environment.get("AWS_PROFILE") or "default"
    sections = _sections(environment)
    if name not in sections:
        if environment.get("AWS_PROFILE"):
            raise unknown_name("AWS profile", name, sections)
        return {}
    section = sections[name]
    if "aws_access_key_id" not in section and any(key in section for key in _MORE):
        raise StorageError(
            f"the keys of AWS profile {name!r} have to be fetched, which featstore leaves to AWS's own program",
            hint=f'eval "$(aws configure export-credentials --profile {name} --format env)"',
        )
    found = {ours: section[theirs] for theirs, ours in _SETTINGS.items() if theirs in section}
    if environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"):
        found.pop("region", None)
    if any(environment.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")):
        found.pop("endpoint", None)
    return found


def _sections(environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The profiles in both files, by name; the credentials file wins."""
    home = Path("~/.aws").expanduser()
    config = Path(environment.get("AWS_CONFIG_FILE") or home / "config")
    credentials = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials")
    found: dict[str, dict[str, str]] = {}
    for path in (config, credentials):
        parser = configparser.RawConfigParser(default_section="")
        try:
            parser.read(path.expanduser(), encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise StorageError(f"cannot read {str(path)!r}: {reason}", hint="correct that file") from None
        for section in parser.sections():
            name = section.removeprefix("profile ").strip() if path == config else section
            found.setdefault(name, {}).update(parser.items(section))
    return found
