"""Several servers of one model: which one gets the next request.

Requests go to the servers in turn. A server that fails rests, longer after each failure in a row, and then gets one
request as a trial; the others keep answering. Which server answers decides nothing but the time it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FIRST_REST = 0.5  # seconds
LONGEST_REST = 30.0


@dataclass
class PooledServer:
    """One server.

    Attributes:
        url: Its address.
        failures: How often it has failed since its last answer.
        rests_until: The time before which it gets no request.
    """

    url: str
    failures: int = 0
    rests_until: float = 0.0

    def rest(self, now: float) -> None:
        """Let it rest for as long as its failures require."""
        self.rests_until = now + min(LONGEST_REST, FIRST_REST * 2 ** (self.failures - 1))


@dataclass(frozen=True)
class Turn:
    """A request's turn at a server.

    Attributes:
        server: The server.
        failures: Its failures when the turn began, so that many requests that fail together count as one failure.
    """

    server: PooledServer
    failures: int


class ServerPool:
    """The servers, in the order in which they get requests.

    Args:
        urls: Their addresses.

    Examples:
        >>> pool = ServerPool(["http://a", "http://b"])
        >>> pool.failed(pool.next(now=0.0), now=0.0)
        >>> [turn.server.url for turn in (pool.next(now=0.1), pool.next(now=0.2), pool.next(now=0.6))]
        ['http://b', 'http://b', 'http://a']
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.servers = [PooledServer(url) for url in urls]

    @property
    def fewest_failures(self) -> int:
        """The failures in a row of the server that has the fewest."""
        return min(server.failures for server in self.servers)

    def next(self, now: float) -> Turn | None:
        """A turn at the next server that does not rest; None where all do."""
        server = next((server for server in self.servers if server.rests_until <= now), None)
        if server is None:
            return None
        self.servers.remove(server)
        self.servers.append(server)
        if server.failures:
            server.rest(now)  # this request is the trial; others go elsewhere until it is answered
        return Turn(server, server.failures)

    def failed(self, turn: Turn, now: float) -> None:
        """Record that a request got no answer."""
        if turn.server.failures == turn.failures:
            turn.server.failures += 1
            turn.server.rest(now)

    def answered(self, turn: Turn) -> None:
        """Record that a request was answered."""
        turn.server.failures, turn.server.rests_until = 0, 0.0
