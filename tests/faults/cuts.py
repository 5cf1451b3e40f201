"""Networks that are cut and heal, between a job and its storage and between its nodes, each at a moment that a seed chooses.

Hosts are network namespaces, which only root may make.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from unittest import mock

from tests.faults.processes import ONE, TWO, Command, drawn, struck
from tests.faults.site import BUCKET, Drill, Site
from tests.faults.strikes import cut
from tests.faults.warm import warm
from tests.networks import Network, moto_on, network
from tests.nodes import HEAD, nodes
from tests.pipeline.tiny import Start
from tests.servers import S3Server

STORAGE = 3
"""The host of the storage; the others are nodes."""


class CutDrills:
    """kinds: name -> drill. server: on host `STORAGE` of `hosts`. start: of commands on the host `HEAD`."""

    def __init__(self, site: Site, hosts: Network, server: S3Server, start: Start) -> None:
        self._site, self._hosts, self._server, self._start = site, hosts, server, start
        self.kinds: dict[str, Drill] = {"storage cut off": self._storage, "node cut off": self._node}

    def _storage(self, draw: Random) -> str:
        """For shorter or longer than it is waited for."""
        variant = drawn(self._site, draw)  # by a storage that this thread reaches
        waits = {"COUNTERWEIGHT_OUTAGE_SECONDS": draw.choice(("2", "600"))}
        environment = mock.patch.dict(os.environ, self._server.environment() | waits)
        with environment, self._hosts.inside(HEAD):
            output = f"s3://{BUCKET}/{uuid.uuid4().hex}"
            command = Command(ONE, pause=0.3, start=self._start)
            return struck(self._site, variant, output, command, cut(self._hosts, (STORAGE,)), draw)

    def _node(self, draw: Random) -> str:
        """One of two with a worker each; the driver is on a third."""
        variant = drawn(self._site, draw)
        environment = mock.patch.dict(os.environ, {"RAY_AUTH_MODE": "disabled"})
        with environment, self._site.directory() as output, nodes(self._hosts) as cluster:
            for number in (HEAD, 1, 2):
                cluster.start(number)
            command = Command((*TWO, "--address", cluster.head), pause=1.0)
            with self._hosts.inside(HEAD):
                return struck(self._site, variant, output, command, cut(self._hosts, (1, 2)), draw)


@contextmanager
def cut_drills(site: Site) -> Iterator[CutDrills]:
    """With their hosts."""
    with network(STORAGE + 1) as hosts, moto_on(hosts, STORAGE, BUCKET) as server, ExitStack() as stack:
        with hosts.inside(HEAD):
            start = stack.enter_context(warm())
        yield CutDrills(site, hosts, server, start)
