"""How we talk to S3: the client's settings, and what its errors mean.

Endpoint, region and credentials come from the standard AWS environment alone (variables, profile, instance
role), so that every tool in a deployment speaks to the same place.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    FlexibleChecksumError,
    InvalidEndpointConfigurationError,
    InvalidRegionError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from urllib3.exceptions import HTTPError

from counterweight.workers.errors import (
    CounterweightError,
    IntegrityError,
    ObjectNotFoundError,
    RequestError,
    StorageError,
)
from counterweight.workers.storage.credentials import Renewal
from counterweight.workers.storage.outages import Patience

MIB = 1 << 20

# What can go wrong below the S3 protocol: botocore's own errors, and what escapes it while a body is read.
TRANSPORT_ERRORS = (BotoCoreError, HTTPError, OSError)

_MISCONFIGURED = (
    ConfigParseError,
    InvalidEndpointConfigurationError,
    InvalidRegionError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

_REFUSED_CODES = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "InvalidAccessKeyId",
        "InvalidBucketName",
        "InvalidToken",
        "KeyTooLongError",
        "MethodNotAllowed",
        "NoSuchBucket",
        "NotImplemented",
        "PermanentRedirect",
        "SignatureDoesNotMatch",
        "403",  # the answer to HEAD has no body, and so no code
    }
)


PATIENCE = "COUNTERWEIGHT_OUTAGE_SECONDS"
"""Environment variable: how long a server that is away is waited for."""


def _outage_seconds() -> float:
    """As the environment says, ten minutes without a word of it. RequestError for no number."""
    text = os.environ.get(PATIENCE, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise RequestError(f"{PATIENCE}: {text!r}: expected seconds")
    return seconds


class S3Settings(BaseModel):
    """How patient and how large our requests are. The defaults suit AWS and a server in the same building."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    connect_timeout: PositiveFloat = Field(default=5, description="seconds to open a connection")
    read_timeout: PositiveFloat = Field(
        default=30, description="seconds without a byte before a request counts as stalled (boto3's own: 60)"
    )
    total_max_attempts: PositiveInt = Field(default=5, description="tries of one request, with back-off and jitter")
    connections: PositiveInt = Field(default=32, description="pooled connections; threads beyond it open their own")
    part_size: int = Field(
        default=16 * MIB,
        ge=5 * MIB,
        description="bytes in a part of a multipart upload; S3 allows 10,000 parts, so 16 MiB reach 156 GiB",
    )
    parts_in_flight: PositiveInt = Field(
        default=4,
        description="parts of one writer uploading at once; it holds at most one part more than this",
    )
    copy_part_size: int = Field(
        default=256 * MIB,
        ge=5 * MIB,
        le=5 << 30,
        description="bytes a server copies in one request; larger objects take several. Small enough to "
        "end within read_timeout on a slow server, where the 5 GiB that S3 allows would not",
    )
    outage_seconds: NonNegativeFloat = Field(
        default_factory=_outage_seconds,
        description="how long a request waits for a server that is away, behind its tries",
    )
    page_size: int = Field(default=1000, ge=1, le=1000, description="keys in one page of a listing")


class Connection:
    """A client made when it is first needed, and shared by stores and threads (boto3's clients are
    thread-safe)."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._client: Any = None

    def client(self) -> Any:
        """The boto3 client; raises as `make_client` does."""
        with self._lock:
            if self._client is None:
                self._client = make_client(self.settings)
            return self._client


def make_client(settings: S3Settings) -> Any:
    """A boto3 S3 client from the standard AWS environment. Raises `RequestError` for a malformed endpoint,
    and botocore's errors for the rest."""
    core = botocore.session.Session()
    # boto3 reads AWS_DEFAULT_REGION and the profile; the other SDKs and Kubernetes set AWS_REGION.
    region = core.get_config_variable("region") or os.environ.get("AWS_REGION")
    session = boto3.session.Session(botocore_session=core, region_name=region)
    # Addressing is boto3's choice, and a good one: what the profile says; else by path wherever an endpoint
    # is configured, which every server understands, and by host at AWS.
    config = Config(
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        retries={"mode": "standard", "total_max_attempts": settings.total_max_attempts},
        max_pool_connections=settings.connections,
    )
    try:
        client = session.client("s3", config=config)
    except ValueError as error:
        raise RequestError(f"S3 endpoint of the environment: {error}") from error
    # Behind boto3's own: the first handler that asks for another try has its way.
    client.meta.events.register_last("needs-retry.s3", Patience(settings.outage_seconds))
    client.meta.events.register_last("needs-retry.s3", Renewal(core.get_credentials()))
    return client


def status_of(error: ClientError) -> int:
    """The HTTP status of an answer that is an error; 0 where the error came without one."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """S3's own name of an error, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def s3_errors(operation: str, uri: str) -> Iterator[None]:
    """Turns every error of boto3 in the block into the class that says what to do about it, with one line
    of text."""
    try:
        yield
    except CounterweightError:
        raise
    except (ClientError, Boto3Error, *TRANSPORT_ERRORS) as error:
        raise translated(operation, uri, error) from error


def translated(operation: str, uri: str, error: Exception) -> RequestError | StorageError:
    """What `s3_errors` raises for an error of boto3, botocore, urllib3 or the socket."""
    if not isinstance(error, ClientError):
        text = f"{operation} {uri}: {type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, FlexibleChecksumError):
            return IntegrityError(text)
        return RequestError(text) if isinstance(error, _MISCONFIGURED) else StorageError(text)
    code, status = code_of(error), status_of(error)
    if code in ("NoSuchKey", "404"):
        return ObjectNotFoundError(f"{operation} {uri}: no such object")
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())
    text = f"{operation} {uri}: " + " ".join(part for part in (str(status), code, message) if part)
    return RequestError(text) if code in _REFUSED_CODES or status == 501 else StorageError(text)
