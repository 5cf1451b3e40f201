"""Who may ask: bearer tokens as digests, with a role and a tenant each."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Self

from pydantic import Field, TypeAdapter, ValidationError

from counterweight.pipeline.jobs.record import Tenant
from counterweight.workers.config import Config, first_problem
from counterweight.workers.errors import RequestError

MAX_TOKEN = 512
"""Characters of a token that is looked at."""


class Role(Enum):
    """What a token may do; each may do what those before it may. rank: how much that is."""

    MONITOR = ("monitor", 0)
    """Reads the metrics, of all tenants, and nothing else."""
    VIEWER = ("viewer", 1)
    """Sees what belongs to its tenant."""
    SUBMITTER = ("submitter", 2)
    """Submits and cancels for its tenant."""
    ADMIN = ("admin", 3)
    """All of it, for all tenants."""

    rank: int

    def __new__(cls, word: str, rank: int) -> Self:
        member = object.__new__(cls)
        member._value_ = word
        member.rank = rank
        return member


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is. name: of the token, for people."""

    name: str
    role: Role
    tenant: str

    def sees(self, tenant: str) -> bool:
        """Whether what belongs to a tenant is there for it."""
        return self.role is Role.ADMIN or tenant == self.tenant

    def counts(self, tenant: str) -> bool:
        """Whether a tenant's jobs are among those that metrics count for it."""
        return self.role is Role.MONITOR or self.sees(tenant)


class TokenEntry(Config):
    """A token as it is configured. sha256: of the token's UTF-8 bytes, in hex; the token itself is nowhere."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][-_.A-Za-z0-9]{0,62}$")]
    role: Role
    tenant: Tenant = "default"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_ENTRIES = TypeAdapter(tuple[TokenEntry, ...])


@dataclass(frozen=True, slots=True)
class Tokens:
    """All that are known."""

    entries: tuple[TokenEntry, ...]

    @classmethod
    def parse(cls, text: str | bytes, place: str) -> Self:
        """From JSON: `[{"name": "ci", "role": "submitter", "tenant": "research", "sha256": "..."}]`. place: where it stands,
        for errors, which quote no value. RequestError."""
        try:
            entries = _ENTRIES.validate_json(text)
        except ValidationError as error:
            raise RequestError(f"{place}: {first_problem(error)}: expected a list of tokens") from error
        for field, values in (("name", [e.name for e in entries]), ("sha256", [e.sha256 for e in entries])):
            if len(set(values)) < len(values):
                raise RequestError(f"{place}: two tokens of the same {field}")
        if not entries:
            raise RequestError(f"{place}: no token: expected one at least")
        return cls(entries)

    def find(self, token: str) -> Principal | None:
        """Whose token it is. Every entry is compared, in constant time, so that time tells nothing about any of them."""
        if len(token) > MAX_TOKEN:
            return None
        presented = hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
        found: TokenEntry | None = None
        for entry in self.entries:
            if hmac.compare_digest(presented, entry.sha256):
                found = entry
        return None if found is None else Principal(found.name, found.role, found.tenant)
