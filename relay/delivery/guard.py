"""Prevent server-side request forgery: no forbidden address is dialled, whatever a URL or the DNS says.

There are three checks. `vet_url` checks an address written in a URL, in any spelling.
`Guard.addresses` resolves a name once, within a deadline, and refuses it when any of its addresses is forbidden; the
connector dials exactly those addresses, with no look-up in between. `Guard.socket_factory` checks every address again
when a socket for it is created.

Forbidden is what the IANA special-purpose registries list, and for IPv6 whatever lies outside global unicast, unless
`delivery.allowed_networks` contains it. Addresses of cloud metadata services are forbidden even then. Plain http is
allowed to allowed networks only.
https://www.iana.org/assignments/iana-ipv4-special-registry/
https://www.iana.org/assignments/iana-ipv6-special-registry/
"""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Final

from aiohttp.abc import AbstractResolver, ResolveResult

from relay import metrics
from relay.domain.url import IPAddress, ParsedUrl, parse_url

IPNetwork = IPv4Network | IPv6Network
# Resolves a name to addresses; raises OSError when it has none.
Lookup = Callable[[str], Awaitable[Sequence[str]]]

# Below the connect timeout, so that a slow DNS is reported as what it is.
LOOKUP_DEADLINE_S: Final = 2.0
# Spares a burst to one host its look-ups; a name that moves is followed within seconds.
CACHE_S: Final = 10.0
_MAX_CACHED: Final = 10_000
_MAX_LOOKUPS: Final = 64


# --- addresses -------------------------------------------------------------------------------------------------------

_SPECIAL_V4: Final = tuple(
    (IPv4Network(network), name)
    for network, name in (
        ("0.0.0.0/8", "“this network”"),
        ("10.0.0.0/8", "a private network"),
        ("100.64.0.0/10", "the shared space of carriers (CGNAT)"),
        ("127.0.0.0/8", "the relay's own host"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "a private network"),
        ("192.0.0.0/24", "for IETF protocols"),
        ("192.0.2.0/24", "for documentation"),
        ("192.31.196.0/24", "for AS112"),
        ("192.52.193.0/24", "for AMT"),
        ("192.88.99.0/24", "for 6to4 relays"),
        ("192.168.0.0/16", "a private network"),
        ("192.175.48.0/24", "for AS112"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_SPECIAL_V6: Final = tuple(
    (IPv6Network(network), name)
    for network, name in (
        ("::1/128", "the relay's own host"),
        ("::/128", "the unspecified address"),
        ("::/8", "reserved, with IPv4 addresses embedded"),
        ("64:ff9b:1::/48", "a local translation to IPv4 (NAT64)"),
        ("100::/64", "for discarding"),
        ("100:0:0:1::/64", "a dummy prefix"),
        ("2001::/32", "a Teredo tunnel"),
        ("2001:2::/48", "for benchmarks"),
        ("2001:10::/28", "for ORCHID"),
        ("2001:20::/28", "for ORCHID"),
        ("2001::/23", "for IETF protocols"),
        ("2001:db8::/32", "for documentation"),
        ("2002::/16", "a 6to4 tunnel"),
        ("2620:4f:8000::/48", "for AS112"),
        ("3fff::/20", "for documentation"),
        ("5f00::/16", "for segment routing (SRv6)"),
        ("fc00::/7", "a private network"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL: Final = IPv6Network("64:ff9b:1::/48")
_COMPATIBLE: Final = IPv6Network("::/96")

METADATA: Final = frozenset(
    ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, GCP, Oracle, DigitalOcean, Hetzner, OpenStack
        "169.254.170.2",  # AWS: credentials of ECS tasks
        "169.254.170.23",  # AWS: credentials of EKS pods
        "169.254.0.23",  # Tencent
        "169.254.42.42",  # Scaleway
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure: the host's own channel, though the address is a public one
        "192.0.0.192",  # Oracle Classic
        "fd00:ec2::254",  # AWS
        "fd00:ec2::23",  # AWS: credentials of EKS pods
        "fd20:ce::254",  # GCP
        "fd00:42::42",  # Scaleway
        "fd00:c1::a9fe:a9fe",  # Oracle
    )
)


@lru_cache(maxsize=8192)
def special_purpose(ip: IPAddress) -> str | None:
    """Return the special purpose of an address, or None for one of the public Internet."""
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            return special_purpose(ip.ipv4_mapped)
        if ip in _NAT64:
            # A translator dials the IPv4 address in the last 32 bits, so that is the one to check (RFC 6052, 2.1).
            return special_purpose(IPv4Address(int(ip) & 0xFFFFFFFF))
        for network, name in _SPECIAL_V6:  # in its order: narrow networks stand before the wide ones around them
            if ip in network:
                return name
        return None if ip in _GLOBAL_UNICAST else "reserved"
    for network_v4, name in _SPECIAL_V4:
        if ip in network_v4:
            return name
    return None


def is_metadata(ip: IPAddress) -> bool:
    return ip in METADATA or any(inner in METADATA for inner in _embedded(ip))


def _embedded(ip: IPAddress) -> list[IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address may stand for (RFC 4291, 6052, 3056, 4380)."""
    if isinstance(ip, IPv4Address):
        return []
    bits = int(ip)
    low = IPv4Address(bits & 0xFFFFFFFF)
    if ip.ipv4_mapped is not None or ip in _NAT64 or ip in _COMPATIBLE:
        return [low]
    if ip.sixtofour is not None:
        return [ip.sixtofour]
    if ip.teredo is not None:
        return list(ip.teredo)
    if ip in _NAT64_LOCAL:
        # A network may translate under /48, /56, /64 or /96; RFC 6052 §2.2 skips bits 64 to 71.
        after_48 = (bits >> 64 & 0xFFFF) << 16 | bits >> 40 & 0xFFFF
        after_56 = (bits >> 64 & 0xFF) << 24 | bits >> 32 & 0xFFFFFF
        return [low, IPv4Address(after_48), IPv4Address(after_56), IPv4Address(bits >> 24 & 0xFFFFFFFF)]
    return []


def refusal(host: str, ip: IPAddress, allowed_networks: Sequence[IPNetwork], *, plain: bool = False) -> str | None:
    """Return why `host` may not be dialled at `ip`, with the setting that would allow it, or None when it may be.

    `plain` means without TLS.
    """
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    where = f"{host} is" if host == _in_url(ip) else f"{host} is at {ip},"
    if is_metadata(ip):
        return f"{where} an address of a cloud's metadata service; it is never dialled"
    if any(ip in network for network in allowed_networks if network.version == ip.version):
        return None
    setting = f'delivery.allowed_networks: ["{ip}/{ip.max_prefixlen}"]'
    special = special_purpose(ip)
    if special is not None:
        return f"{where} {special}, not an address of the public Internet; to allow it: {setting}"
    if plain:
        return f"{where} outside delivery.allowed_networks, as plain http must not be; use https, or set {setting}"
    return None


def _in_url(ip: IPAddress) -> str:
    return f"[{ip}]" if isinstance(ip, IPv6Address) else str(ip)


# --- URLs ------------------------------------------------------------------------------------------------------------


def vet_url(text: str, allowed_networks: Sequence[IPNetwork] = ()) -> ParsedUrl:
    target = parse_url(text)
    if target.address is not None:
        reason = refusal(target.host, target.address, allowed_networks, plain=target.plain)
        if reason is not None:
            raise ValueError(reason)
    if target.plain and not allowed_networks:
        raise ValueError(f"{target.host}: plain http is only for addresses inside delivery.allowed_networks; use https")
    return target


# --- dialling --------------------------------------------------------------------------------------------------------


class ForbiddenAddress(OSError):
    """The guard refuses an address; the text is for the person who configured the URL."""


class NoAddress(OSError):
    """A name has no address, or was not resolved in time."""


class Guard:
    """Resolves names and checks addresses for the connectors of `Sender`.

    `ports` limits an allowed network to some ports. `lookup` runs at most once at a time per name, and its answer is
    cached for `cache_s`; a cached address is checked again for every connection.
    """

    def __init__(
        self,
        allowed_networks: Sequence[IPNetwork] = (),
        lookup: Lookup | None = None,
        *,
        ports: Mapping[IPNetwork, Sequence[int]] | None = None,
        deadline_s: float = LOOKUP_DEADLINE_S,
        cache_s: float = CACHE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.allowed_networks = tuple(allowed_networks)
        self._ports = dict(ports or {})
        self._lookup = lookup or SystemLookup()
        self._deadline_s = deadline_s
        self._cache_s = cache_s
        self._clock = clock
        self._cache: dict[str, tuple[float, tuple[IPAddress, ...]]] = {}
        self._running: dict[str, asyncio.Task[tuple[IPAddress, ...]]] = {}

    def vet_url(self, text: str) -> ParsedUrl:
        return vet_url(text, self._allowed(parse_url(text).url.port))

    async def addresses(self, host: str, port: int | None = None, *, plain: bool = False) -> tuple[IPAddress, ...]:
        """Resolve a host to addresses that may all be dialled; raises ForbiddenAddress or NoAddress."""
        addresses = await self._resolve(host)
        for ip in addresses:
            self.check(host, ip, port, plain=plain)
        return addresses

    async def is_inside(self, target: ParsedUrl) -> bool:
        """Whether a target that was dialled has an address that is not one of the public Internet."""
        addresses = (target.address,) if target.address is not None else await self._resolve(target.host)
        return any(special_purpose(ip) is not None for ip in addresses)

    def _allowed(self, port: int | None) -> Sequence[IPNetwork]:
        return [
            network
            for network in self.allowed_networks
            if network not in self._ports or (port is not None and port in self._ports[network])
        ]

    def check(self, host: str, ip: IPAddress, port: int | None = None, *, plain: bool = False) -> None:
        reason = refusal(host, ip, self._allowed(port), plain=plain)
        if reason is not None:
            raise ForbiddenAddress(reason)

    def resolver(self, *, plain: bool = False) -> AbstractResolver:
        return _VettedResolver(self, plain=plain)

    def socket_factory(self, *, plain: bool = False) -> Callable[[Any], socket.socket]:
        """Return a socket factory for a connector; it creates no socket for an address that may not be dialled."""

        def vetted_socket(addr_info: tuple[Any, ...]) -> socket.socket:
            family, kind, protocol, _, address = addr_info
            # aiohttp asks no resolver for a literal address, so this is the only check that sees every one.
            ip = _parse(address[0])
            self.check(_in_url(ip), ip, address[1], plain=plain)
            metrics.CONNECTIONS.inc()
            return socket.socket(family, kind, protocol)

        return vetted_socket

    def clear_cache(self) -> None:
        """Forget resolved addresses, so that the next connection resolves its name again."""
        self._cache.clear()

    async def close(self) -> None:
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _resolve(self, host: str) -> tuple[IPAddress, ...]:
        cached = self._cache.get(host)
        if cached is not None and cached[0] > self._clock():
            return cached[1]
        task = self._running.get(host)
        if task is None:
            task = asyncio.create_task(self._look_up(host))
            self._running[host] = task
            task.add_done_callback(lambda done: self._forget(host, done))
        # `wait` rather than `wait_for`: a waiter that leaves or times out must not cancel the others' look-up.
        finished, _ = await asyncio.wait((task,), timeout=self._deadline_s)
        if not finished:
            raise NoAddress(f"the name {host} was not resolved within {self._deadline_s:g} s")
        if task.cancelled():
            raise NoAddress(f"the look-up of {host} was cancelled")
        return task.result()

    async def _look_up(self, host: str) -> tuple[IPAddress, ...]:
        try:
            answers = await self._lookup(host)
        except (OSError, UnicodeError) as error:
            raise NoAddress(_resolver_message(host, error)) from error
        addresses = tuple(dict.fromkeys(_parse(answer) for answer in answers))
        if not addresses:
            raise NoAddress(f"the name {host} has no address")
        now = self._clock()
        if len(self._cache) >= _MAX_CACHED:
            self._cache = {name: entry for name, entry in self._cache.items() if entry[0] > now}
            while len(self._cache) >= _MAX_CACHED:
                del self._cache[next(iter(self._cache))]
        self._cache[host] = (now + self._cache_s, addresses)
        return addresses

    def _forget(self, host: str, task: asyncio.Task[tuple[IPAddress, ...]]) -> None:
        del self._running[host]
        if not task.cancelled():
            task.exception()  # mark it retrieved: every waiter may have timed out


class SystemLookup:
    """Resolves with the system's resolver, each look-up in a daemon thread of its own.

    In a shared pool, a few names whose servers never answer would hold up all other look-ups, and the process's exit.
    """

    def __init__(self, *, limit: int = _MAX_LOOKUPS) -> None:
        self._slots = asyncio.Semaphore(limit)

    async def __call__(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        async with self._slots:
            answer: asyncio.Future[Sequence[str]] = loop.create_future()
            threading.Thread(target=_getaddrinfo, args=(host, loop, answer), name="lookup", daemon=True).start()
            return await answer


def _getaddrinfo(host: str, loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Sequence[str]]") -> None:
    addresses: Sequence[str] = ()
    failure: Exception | None = None
    try:
        # Without AI_ADDRCONFIG, which would hide an IPv6 address from the check.
        rows = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = [str(row[4][0]) for row in rows]
    except (OSError, UnicodeError) as error:
        failure = error

    def resolve() -> None:
        if answer.done():
            return
        if failure is not None:
            answer.set_exception(failure)
        else:
            answer.set_result(addresses)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:
        return  # the loop was closed in the meantime


class _VettedResolver(AbstractResolver):
    def __init__(self, guard: Guard, *, plain: bool) -> None:
        self._guard = guard
        self._plain = plain

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=str(ip),
                port=port,
                family=socket.AF_INET6 if ip.version == 6 else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for ip in await self._guard.addresses(host, port, plain=self._plain)
        ]

    async def close(self) -> None:
        """Nothing to close: the guard belongs to the sender."""


def _parse(text: str) -> IPAddress:
    return ip_address(text.partition("%")[0])


def hidden_reason(host: str) -> str:
    """Say for a tenant that a name cannot be dialled, whether it exists or not: the relay must not be an oracle for the
    names and addresses of the operator's network."""
    return f"the name {host} has no address that may be used"


def _resolver_message(host: str, error: Exception) -> str:
    if isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None)):
        return f"the name {host} has no address"
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return f"the name {host} cannot be resolved for now"
    return f"the name {host} cannot be resolved"
