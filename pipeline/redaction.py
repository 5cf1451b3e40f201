"""Takes credentials out of texts that others will read: events, logs, causes of failed jobs."""

from __future__ import annotations

import re

_SECRETS = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE), r"\1***@"),
    (
        re.compile(
            r"([?&](?:[\w-]*(?:token|signature|secret|password|credential|key|keyid|sig))=)[^&\s'\"]+", re.IGNORECASE
        ),
        r"\1***",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "***"),
)


def redacted(text: str) -> str:
    """The text without the credentials that URIs and messages of libraries may hold."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
