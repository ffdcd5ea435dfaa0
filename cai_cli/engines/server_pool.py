"""Several servers of one model: which one gets the next request.

Requests go to the servers in turn. A server that fails rests, longer after each failure in a row, and then gets one
request as a trial; the others keep answering. A server that refuses requests because there are too many rests for as
long as it asks. Which server answers decides nothing but the time it takes.
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
        limits: How often in a row it has refused requests because there were too many.
        limited_until: The time before which it gets no request because of that; no answer ends it early.
    """

    url: str
    failures: int = 0
    rests_until: float = 0.0
    limits: int = 0
    limited_until: float = 0.0

    def rest(self, now: float) -> None:
        """Let it rest for as long as its failures require."""
        self.rests_until = now + _rest(self.failures)

    def limit(self, now: float, wait: float | None) -> None:
        """Let it rest because it takes no more requests for now.

        Args:
            now: The time. Requests that are refused while it rests count as one.
            wait: The seconds for which it asked; None where it did not say.
        """
        if now >= self.limited_until:
            self.limits += 1
        self.limited_until = max(self.limited_until, now + (_rest(self.limits) if wait is None else wait))


def _rest(times: int) -> float:
    return float(min(LONGEST_REST, FIRST_REST * 2 ** (times - 1)))


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
        server = next((server for server in self.servers if max(server.rests_until, server.limited_until) <= now), None)
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
        turn.server.failures, turn.server.rests_until, turn.server.limits = 0, 0.0, 0
