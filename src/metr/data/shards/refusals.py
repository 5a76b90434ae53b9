"""Why a store does not answer, as far as no further attempt would change it: endpoints, credentials, rights."""

import os
import socket
import time
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from metr.errors import StoreError

# Seconds that an endpoint may take to accept a connection, and attempts.
_CONNECTS_WITHIN = 5.0
_ATTEMPTS, _PAUSE = 2, 0.5
_S3, _GOOGLE = frozenset({"s3", "s3a"}), frozenset({"gs", "gcs"})

# How the libraries of stores call errors of credentials that are missing or cannot be used; they need not be installed.
_CREDENTIALS = frozenset(
    {
        *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"),
        *("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError"),
    }
)
_DENIED = frozenset({"401", "403"})
_OTHERS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotImplementedError)


def is_denied(error: BaseException) -> bool:
    """Whether a store says that this may not be read: as `PermissionError`, or with HTTP's 401 or 403."""
    if isinstance(error, PermissionError):
        return True
    status = getattr(error, "code", None) or getattr(error, "status", None)
    # s3fs keeps botocore's answer, and has no error of its own for 401
    answer = getattr(error.__cause__, "response", None)
    if isinstance(answer, Mapping):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # gcsfs tells 403 as an OSError of this beginning
    return str(status) in _DENIED or (isinstance(error, OSError) and str(error).startswith("Forbidden"))


def is_final(error: BaseException) -> bool:
    """Whether no further attempt would change an error."""
    # a ValueError itself comes of settings; those of answers that are cut off are of classes below it
    final = isinstance(error, _OTHERS) or type(error) is ValueError
    return final or is_denied(error) or type(error).__name__ in _CREDENTIALS


def what_to_try(error: BaseException, scheme: str) -> str | None:
    """What helps against an error of rights, credentials or settings; None of another error."""
    if is_denied(error) or type(error).__name__ in _CREDENTIALS:
        return _credentials(scheme)
    return f"check {_endpoint_settings(scheme)}" if type(error) is ValueError else None


def bucket_of(address: str) -> str | None:
    """The bucket of an address in a store that has buckets; None of others."""
    scheme, _, rest = address.partition("://")
    return rest.partition("/")[0] if scheme.lower() in _S3 | _GOOGLE else None


def check_endpoint(address: str, files: Any) -> None:
    """Checks that something listens at the endpoint of a store, before its library asks again and again.

    Args:
        address: The address that is wanted, for the message.
        files: Its file system. Endpoints that are reached through a proxy are not checked.

    Raises:
        StoreError: nothing does.
    """
    scheme = address.partition("://")[0].lower()
    endpoint = _endpoint(files, scheme)
    if endpoint is None:
        return
    hint = f"check {_endpoint_settings(scheme)}, and the network; then run the same command again"
    kind, host, port = _parts(endpoint)
    if host is None or port is None:
        raise StoreError(f"no endpoint: {endpoint!r} is no address such as http://host:9000", where=address, hint=hint)
    if kind in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            socket.create_connection((host, port), timeout=_CONNECTS_WITHIN).close()
        except OSError as error:
            if attempt == _ATTEMPTS:
                told = error.strerror or str(error) or type(error).__name__
                raise StoreError(f"nothing answers at {endpoint}: {told}", where=address, hint=hint) from None
            time.sleep(_PAUSE)
        else:
            return


def _parts(endpoint: str) -> tuple[str, str | None, int | None]:
    """The scheme, the host and the port of an endpoint; None of what it lacks."""
    try:
        parts = urlsplit(endpoint)
        return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:  # of the port
        return "", None, None


def _endpoint(files: Any, scheme: str) -> str | None:
    """The endpoint that a file system was told to ask, or that it asks by itself; None where that is not known."""
    found: Any = None
    if scheme in _S3:
        found = getattr(files, "endpoint_url", None) or getattr(files, "client_kwargs", {}).get("endpoint_url")
        if not found and os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
            found = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    elif scheme in _GOOGLE:
        found = getattr(files, "_location", None)
    return found or None


def _endpoint_settings(scheme: str) -> str:
    if scheme in _S3:
        return "the endpoint (AWS_ENDPOINT_URL, FSSPEC_S3_ENDPOINT_URL)"
    if scheme in _GOOGLE:
        return "the endpoint (STORAGE_EMULATOR_HOST, FSSPEC_GS_ENDPOINT_URL)"
    return "the address"


def _credentials(scheme: str) -> str:
    if scheme in _S3:
        return (
            "give credentials that may list and read there: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
            "for a public bucket FSSPEC_S3_ANON=true"
        )
    if scheme in _GOOGLE:
        return (
            "give credentials that may list and read there: GOOGLE_APPLICATION_CREDENTIALS=key.json, or gcloud auth "
            "application-default login; for a public bucket FSSPEC_GS_TOKEN=anon"
        )
    return "check the rights to read it, and the credentials"
