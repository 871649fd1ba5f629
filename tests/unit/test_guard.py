"""No forbidden address is dialled, however it is written and whatever the DNS says."""

import asyncio
import base64
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.delivery.guard import (
    METADATA,
    ForbiddenAddress,
    Guard,
    IPAddress,
    NoAddress,
    SystemLookup,
    is_metadata,
    refusal,
    special_purpose,
    vet_url,
)

PRIVATE = tuple(map(ip_network, ("10.0.0.0/8", "127.0.0.0/8", "fd00::/8", "169.254.0.0/16", "0.0.0.0/0", "::/0")))
LAN = (ip_network("10.0.0.0/8"),)

ipv4s = st.ip_addresses(v=4)
ipv6s = st.ip_addresses(v=6)


# --- addresses


@pytest.mark.parametrize(
    "text",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255", "127.0.0.1"),
        *("127.1.2.3", "169.254.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192"),
        *("192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.168.0.1", "192.175.48.1", "198.18.0.1"),
        *("198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
        "255.255.255.255",
        *("::", "::1", "::2", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "ff::1"),
        *("64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::808:808", "64:ff9b:2::1", "100::1", "100:0:0:1::1"),
        *("2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:10::1", "2001:20::1", "2001:30::1"),
        *(
            "2001:1ff::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "2620:4f:8000::1",
            "3fff::1",
            "3fff:fff::1",
        ),
        *("5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "febf::1", "fec0::1", "ff02::1", "4000::1", "e000::1"),
    ],
)
def test_a_special_address_is_recognised(text: str) -> None:
    ip = ip_address(text)

    assert special_purpose(ip)
    assert refusal("hooks.example.org", ip, ())


@pytest.mark.parametrize(
    "text",
    [
        *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
        *("128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.0.3.0"),
        *("192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255"),
        *("2001:200::1", "2003::1", "2600::1", "2606:4700:4700::1111", "2a00:1450::1", "3ffe:ffff::1", "3fff:1000::1"),
        *("::ffff:8.8.8.8", "64:ff9b::8.8.8.8"),
    ],
)
def test_a_public_address_next_to_a_special_range_is_not_refused(text: str) -> None:
    ip = ip_address(text)

    assert special_purpose(ip) is None
    assert refusal("hooks.example.org", ip, ()) is None


# Where the table is stricter than Python: ranges that the registries call globally reachable, yet that hold no
# web server, or lead elsewhere.
STRICTER_V4 = [
    IPv4Network(text)
    for text in (
        "192.0.0.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.175.48.0/24",
        "224.0.0.0/4",
    )
]
STRICTER_V6 = [
    IPv6Network(text)
    for text in (
        *("::/8", "64:ff9b:1::/48", "100:0:0:1::/64", "2001::/23", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
        *("5f00::/16", "fec0::/10", "ff00::/8"),
    )
]
UNICAST_V6 = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")


@given(ip=ipv4s)
@example(ip=IPv4Address("192.0.0.9"))
def test_for_ipv4_the_table_agrees_with_python_but_for_the_listed_ranges(ip: IPv4Address) -> None:
    special = special_purpose(ip) is not None

    if any(ip in network for network in STRICTER_V4):
        assert special
    else:
        assert special is not ip.is_global


@given(ip=ipv6s | ipv4s.map(lambda ip: IPv6Address((0xFFFF << 32) + int(ip))))
def test_for_ipv6_the_table_agrees_with_python_but_for_the_listed_ranges(ip: IPv6Address) -> None:
    special = special_purpose(ip) is not None

    if ip.ipv4_mapped is not None:
        assert special is (special_purpose(ip.ipv4_mapped) is not None)
    elif ip in NAT64:
        assert special is (special_purpose(IPv4Address(int(ip) & 0xFFFFFFFF)) is not None)
    elif any(ip in network for network in STRICTER_V6) or ip not in UNICAST_V6:
        assert special
    else:
        assert special is not ip.is_global


def embeddings(ip: IPv4Address) -> list[IPv6Address]:
    """Every way in which an IPv4 address can hide in an IPv6 one."""
    number = int(ip)
    high, low = number >> 16, number & 0xFFFF
    octets = ip.packed
    local = IPv6Address("64:ff9b:1::").packed[:6]
    return [
        IPv6Address((0xFFFF << 32) + number),
        IPv6Address(number),
        IPv6Address(int(IPv6Address("64:ff9b::")) + number),
        IPv6Address((0x2002 << 112) + (number << 80) + 1),
        IPv6Address((0x20010000 << 96) + (0x08080808 << 64) + (number ^ 0xFFFFFFFF)),
        IPv6Address((0x20010000 << 96) + (number << 64) + (0x08080808 ^ 0xFFFFFFFF)),
        IPv6Address(f"64:ff9b:1::{high:x}:{low:x}"),
        IPv6Address(local + octets[:2] + b"\0" + octets[2:] + b"\0" * 5),
        IPv6Address(local + b"\0" + octets[:1] + b"\0" + octets[1:] + b"\0" * 4),
        IPv6Address(local + b"\0\0\0" + octets + b"\0" * 3),
    ]


@given(ip=ipv4s.filter(lambda ip: not ip.is_global))
def test_a_private_ipv4_address_hides_in_no_ipv6_address(ip: IPv4Address) -> None:
    for disguised in embeddings(ip):
        assert special_purpose(disguised), disguised


@pytest.mark.parametrize("ip", sorted(METADATA, key=str), ids=str)
def test_metadata_services_are_never_dialled_even_inside_allowed_networks(ip: IPAddress) -> None:
    disguises = embeddings(ip) if isinstance(ip, IPv4Address) else []

    for address in [ip, *disguises]:
        assert is_metadata(address), address
        sentence = refusal("hooks.example.org", address, PRIVATE)
        assert sentence is not None
        assert "never dialled" in sentence
        assert "allowed_networks" not in sentence


def test_a_refusal_names_the_setting_that_would_allow_it_and_the_setting_does() -> None:
    sentence = refusal("crm.example.org", ip_address("10.1.2.3"), ())

    assert sentence == (
        "crm.example.org is at 10.1.2.3, a private network, not an address of the public Internet; "
        'to allow it: delivery.allowed_networks: ["10.1.2.3/32"]'
    )
    assert refusal("crm.example.org", ip_address("10.1.2.3"), (ip_network("10.1.2.3/32"),)) is None
    assert refusal("crm.example.org", ip_address("10.1.2.4"), (ip_network("10.1.2.3/32"),)) is not None
    v6 = refusal("crm.example.org", ip_address("fd12::1"), ())
    assert v6 is not None
    assert v6.endswith('delivery.allowed_networks: ["fd12::1/128"]')
    mapped = refusal("crm.example.org", ip_address("::ffff:10.1.2.3"), ())
    assert mapped == sentence


@given(ip=ipv4s | ipv6s)
def test_the_named_setting_allows_exactly_what_was_refused(ip: IPAddress) -> None:
    sentence = refusal("h", ip, (), plain=True)
    assert sentence is not None  # nothing is allowed for plain http

    if not is_metadata(ip):
        line = sentence.rpartition('["')[2].removesuffix('"]')
        assert refusal("h", ip, (ip_network(line),), plain=True) is None


def test_plain_http_goes_to_allowed_networks_only() -> None:
    public = ip_address("93.184.216.34")

    assert refusal("h", public, LAN) is None
    assert "plain http" in (refusal("h", public, LAN, plain=True) or "")
    assert refusal("h", ip_address("10.1.2.3"), LAN, plain=True) is None


# --- URLs


@pytest.mark.parametrize(
    ("text", "url", "host"),
    [
        ("https://hooks.example.org", "https://hooks.example.org/", "hooks.example.org"),
        ("HTTPS://Hooks.Example.ORG/A", "https://hooks.example.org/A", "hooks.example.org"),
        ("https://hooks.example.org./a", "https://hooks.example.org/a", "hooks.example.org"),
        ("https://hooks.example.org:443/a", "https://hooks.example.org/a", "hooks.example.org"),
        ("https://hooks.example.org:/a", "https://hooks.example.org/a", "hooks.example.org"),
        ("https://hooks.example.org:08443/a", "https://hooks.example.org:8443/a", "hooks.example.org"),
        ("https://hooks.example.org?x=1", "https://hooks.example.org/?x=1", "hooks.example.org"),
        ("https://h.example/a%2Fb%7E?sig=a%2Bb%2F%3D", "https://h.example/a%2Fb%7E?sig=a%2Bb%2F%3D", "h.example"),
        ("https://h.example/ä?ö=ü", "https://h.example/%C3%A4?%C3%B6=%C3%BC", "h.example"),
        ("https://h.example/a/../b", "https://h.example/a/../b", "h.example"),
        ("https://my_hooks.example/", "https://my_hooks.example/", "my_hooks.example"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        ("https://BÜCHER。example/", "https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        ("https://hooks\uff0eexample\uff61org/", "https://hooks.example.org/", "hooks.example.org"),
        ("https://ｈｏｏｋｓ.example/", "https://hooks.example/", "hooks.example"),
        ("https://8.8.8.8/", "https://8.8.8.8/", "8.8.8.8"),
        ("https://0x08080808/", "https://8.8.8.8/", "8.8.8.8"),
        ("https://[2606:4700:4700:0::1111]:8443/", "https://[2606:4700:4700::1111]:8443/", "[2606:4700:4700::1111]"),
    ],
)
def test_a_valid_url_is_normalised_and_its_path_is_kept(text: str, url: str, host: str) -> None:
    target = vet_url(text)

    assert str(target.url) == url
    assert target.host == host


LOCAL_SPELLINGS = [
    *(
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0X7F.0.0.1",
        "017700000001",
    ),
    *("0177.0.0.1", "0177.0x0.1", "127.000.000.001", "00000000177.1", "0", "0x", "0.0", "[::1]", "[::]"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]"),
    *("127。0。0。1", "127\uff0e0\uff0e0\uff0e1", "127\uff610\uff610\uff611", "１２７.0.0.1", "①②⑦.⓪.⓪.①", "𝟏𝟐𝟕.0.0.1"),
    *("[2002:7f00:1::]", "0x7f。1"),
]


@pytest.mark.parametrize("host", LOCAL_SPELLINGS)
@pytest.mark.parametrize("scheme", ["https", "http"])
def test_the_relays_own_host_is_refused_in_every_spelling(scheme: str, host: str) -> None:
    with pytest.raises(ValueError, match=r"to allow it: delivery.allowed_networks"):
        vet_url(f"{scheme}://{host}:8080/hook", LAN)


@given(ip=ipv4s, spelling=st.integers(min_value=0, max_value=5), dots=st.sampled_from(".。．｡"))
def test_any_spelling_of_an_address_is_checked_as_that_address(ip: IPv4Address, spelling: int, dots: str) -> None:
    a, b, c, d = ip.packed
    text = [
        str(ip),
        str(int(ip)),
        hex(int(ip)),
        f"0{int(ip):o}",
        f"{a:#x}.{b:#o}.{c}.{d}".replace("0o", "0"),
        f"{a}.{b}.{c << 8 | d}",
    ][spelling].replace(".", dots)

    expected = refusal(str(ip), ip, ())
    if expected is None:
        assert vet_url(f"https://{text}/").address == ip
    else:
        with pytest.raises(ValueError, match=r"delivery.allowed_networks|never dialled") as caught:
            vet_url(f"https://{text}/")
        assert str(caught.value) == expected


@given(ip=ipv6s)
def test_any_ipv6_literal_is_checked_as_that_address(ip: IPv6Address) -> None:
    expected = refusal(f"[{ip}]", ip, ())

    if expected is None:
        assert vet_url(f"https://[{ip.exploded}]/").address == ip
    else:
        with pytest.raises(ValueError, match=r"delivery.allowed_networks|never dialled"):
            vet_url(f"https://[{ip.exploded}]/")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must look like https://host/path"),
        ("hooks.example.org", "must look like https://host/path"),
        ("//hooks.example.org/", "must look like https://host/path"),
        ("https:/hooks.example.org/", "must look like https://host/path"),
        ("https:hooks.example.org", "must look like https://host/path"),
        ("https://hooks.example.org?x=1#top", "must not have a fragment"),
        ("ftp://hooks.example.org/", "not ftp"),
        ("file:///etc/passwd", "not file"),
        ("javascript://alert(1)", "not javascript"),
        ("http://hooks.example.org/", "plain http is only for"),
        ("https://", "no host"),
        ("https:///path", "no host"),
        ("https://:443/", "no host"),
        ("https://user@/", "no host"),
        ("https://[]/", "no host"),
        ("https://?x", "no host"),
        ("https://h.example:0/", "from 1 to 65535"),
        ("https://h.example:65536/", "from 1 to 65535"),
        ("https://h.example:99999999999/", "from 1 to 65535"),
        ("https://h.example:-1/", "from 1 to 65535"),
        ("https://h.example:+443/", "from 1 to 65535"),
        ("https://h.example:https/", "from 1 to 65535"),
        ("https://h.example:４４３/", "from 1 to 65535"),
        ("https://h.example:1:2/", "in brackets"),
        ("https://2001:db8::1/", "in brackets"),
        ("https://[::1/", "in brackets"),
        ("https://[::1]x/", "in brackets"),
        ("https://[fe80::1%25eth0]/", "must not have a zone"),
        ("https://[fe80::1%eth0]/", "must not have a zone"),
        ("https://[nonsense]/", "is not a valid IPv6 address"),
        ("https://[127.0.0.1]/", "is not a valid IPv6 address"),
        ("https://[v1.x]/", "is not a valid IPv6 address"),
        ("https://%31%32%37.0.0.1/", "must not be percent-encoded"),
        ("https://a@b@h.example/", "more than one @"),
        ("https://h.example\\@evil.example/", "backslashes"),
        ("https://h.example/ x", "must not contain spaces"),
        (" https://h.example/", "must not contain spaces"),
        ("https://h.example/\r\nX-Evil: 1", "line breaks"),
        ("https://h.ex\tample/", "must not contain spaces"),
        ("https://h.example/\x00", "control characters"),
        ("https://h.example/\u202egnp", "control characters"),
        ("https://h\u200b.example/", "control characters"),
        ("https://h.example/\ud800", "control characters"),
        ("https://1.2.3.4.5/", "ends in a number"),
        ("https://256.1.1.1/", "ends in a number"),
        ("https://09.1.1.1/", "ends in a number"),
        ("https://hooks.example.1/", "ends in a number"),
        ("https://0x100000000/", "ends in a number"),
        ("https://99999999999999999999999/", "ends in a number"),
        ("https://-h.example/", "is not a valid domain name"),
        ("https://h..example/", "is not a valid domain name"),
        ("https://.example/", "is not a valid domain name"),
        ("https://h.example../", "is not a valid domain name"),
        ("https://" + "a" * 64 + ".example/", "is not a valid domain name"),
        ("https://" + "a." * 130 + "example/", "is not a valid domain name"),
        ("https://h!.example/", "is not a valid domain name"),
        ("https://h*.example/", "is not a valid domain name"),
        ("https://a。。b/", "is not a valid domain name"),
        ("https://xn--☃.example/", "is not a valid international domain name"),
        ("https://-ü.example/", "is not a valid international domain name"),
        ("https://h.example/" + "x" * 10_000, "at most 2048"),
    ],
)
def test_an_invalid_url_gets_a_message_that_does_not_repeat_its_path(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        vet_url(text)

    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("userinfo", "credentials"),
    [
        ("ann:secret", "ann:secret"),
        ("ann", "ann:"),
        (":token", ":token"),
        ("a%40b:p%3Aq%2F", "a@b:p:q/"),
        ("ann:se:cret", "ann:se:cret"),
        ("änn:ß", "änn:ß"),
    ],
)
def test_credentials_in_a_url_become_a_header_and_are_shown_nowhere(userinfo: str, credentials: str) -> None:
    target = vet_url(f"https://{userinfo}@hooks.example.org:8443/a")

    assert target.authorization == "Basic " + base64.b64encode(credentials.encode()).decode()
    assert str(target.url) == "https://hooks.example.org:8443/a"
    assert target.authorization not in repr(target)
    assert "/a" not in repr(target)


def test_no_credentials_no_header() -> None:
    assert vet_url("https://hooks.example.org/").authorization is None
    assert vet_url("https://@hooks.example.org/").authorization is None


@given(text=st.text(max_size=80) | st.from_regex(r"https?://[^/]{0,40}(/.{0,20})?", fullmatch=True))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        target = vet_url(text, LAN)
    except ValueError:
        return
    again = vet_url(str(target.url), LAN)
    assert (again.url, again.host, again.address) == (target.url, target.host, target.address)
    assert str(target.url).isascii()


def test_plain_http_is_refused_at_once_where_no_network_allows_it() -> None:
    with pytest.raises(ValueError, match="use https"):
        vet_url("http://crm.internal/hook")

    assert vet_url("http://crm.internal/hook", LAN).plain
    assert vet_url("http://10.1.2.3/hook", LAN).address == ip_address("10.1.2.3")


# --- resolving


class Zone:
    """A DNS with scripted answers; the last one repeats."""

    def __init__(self, *answers: Sequence[str] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_one_forbidden_answer_among_many_refuses_the_name(place: int) -> None:
    """A name that is also at an internal address is not dialled at its public ones either."""
    answers = ["93.184.216.34", "93.184.216.35"]
    answers.insert(place, "10.1.2.3")
    guard = Guard((), Zone(answers))

    with pytest.raises(ForbiddenAddress, match=r'delivery.allowed_networks: \["10.1.2.3/32"\]'):
        await guard.addresses("hooks.example.org")


async def test_a_zone_behind_an_address_does_not_disguise_it() -> None:
    """A resolver writes `fd00:ec2::254%eth0`: it is the metadata service all the same."""
    guard = Guard(PRIVATE, Zone(["fd00:ec2::254%eth0"]))

    with pytest.raises(ForbiddenAddress, match="never dialled"):
        await guard.addresses("hooks.example.org")


async def test_the_resolver_answers_with_the_checked_addresses() -> None:
    guard = Guard((), Zone(["93.184.216.34", "2606:2800:220:1::1", "93.184.216.34"]))

    rows = await guard.resolver().resolve("hooks.example.org", 443)

    assert [(row["host"], row["port"], row["family"]) for row in rows] == [
        ("93.184.216.34", 443, socket.AF_INET),
        ("2606:2800:220:1::1", 443, socket.AF_INET6),
    ]


async def test_an_answer_that_changes_between_two_look_ups_is_checked_again() -> None:
    """DNS rebinding: first a public address, then an internal one."""
    now_s = 0.0
    zone = Zone(["93.184.216.34"], ["127.0.0.1"])
    guard = Guard((), zone, cache_s=10, clock=lambda: now_s)
    resolver = guard.resolver()

    first = await resolver.resolve("hooks.example.org", 443)
    still = await resolver.resolve("hooks.example.org", 443)
    now_s = 10.5

    assert [row["host"] for row in first + still] == ["93.184.216.34", "93.184.216.34"]
    assert len(zone.asked) == 1
    with pytest.raises(ForbiddenAddress):
        await resolver.resolve("hooks.example.org", 443)


async def test_concurrent_callers_share_one_look_up() -> None:
    zone = Zone(["93.184.216.34"])
    guard = Guard((), zone)

    answers = await asyncio.gather(*(guard.addresses("hooks.example.org") for _ in range(50)))

    assert len(zone.asked) == 1
    assert set(answers) == {(ip_address("93.184.216.34"),)}


async def test_a_failed_look_up_is_not_cached() -> None:
    guard = Guard((), Zone(socket.gaierror(socket.EAI_NONAME, "unknown"), ["93.184.216.34"]))

    with pytest.raises(NoAddress, match=r"the name hooks.example.org has no address"):
        await guard.addresses("hooks.example.org")
    assert await guard.addresses("hooks.example.org") == (ip_address("93.184.216.34"),)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([], "has no address"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), "cannot be resolved for now"),
        (socket.gaierror(socket.EAI_FAIL, "no"), "cannot be resolved"),
        (UnicodeError("label too long"), "cannot be resolved"),
    ],
)
async def test_a_name_without_an_address_gets_a_message(answer: Sequence[str] | Exception, sentence: str) -> None:
    with pytest.raises(NoAddress, match=sentence):
        await Guard((), Zone(answer)).addresses("hooks.example.org")


async def test_a_dns_that_never_answers_delays_nothing_beyond_the_deadline() -> None:
    never = asyncio.Event()
    asked = 0

    async def lookup(host: str) -> Sequence[str]:
        nonlocal asked
        asked += 1
        await never.wait()
        return ["93.184.216.34"]

    guard = Guard((), lookup, deadline_s=0.01)

    for _ in range(3):
        with pytest.raises(NoAddress, match=r"was not resolved within 0.01 s"):
            await guard.addresses("hooks.example.org")

    assert asked == 1
    await guard.close()
    with pytest.raises(NoAddress):
        await guard.addresses("hooks.example.org")
    await guard.close()


async def test_closing_cancels_a_look_up_that_has_a_waiter() -> None:
    asked = asyncio.Event()

    async def lookup(host: str) -> Sequence[str]:
        asked.set()
        await asyncio.Event().wait()
        return []

    guard = Guard((), lookup)
    waiting = asyncio.create_task(guard.addresses("hooks.example.org"))
    await asked.wait()
    await guard.close()

    with pytest.raises(NoAddress, match="was cancelled"):
        await waiting


async def test_the_cache_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.delivery.guard._MAX_CACHED", 3)
    zone = Zone(["93.184.216.34"])
    guard = Guard((), zone, clock=lambda: 0.0)

    for number in range(10):
        await guard.addresses(f"h{number}.example.org")
    await guard.addresses("h9.example.org")
    await guard.addresses("h0.example.org")

    assert len(zone.asked) == 11
    assert len(guard._cache) == 3


async def test_a_waiter_that_is_cancelled_does_not_cancel_the_others() -> None:
    go = asyncio.Event()

    async def lookup(host: str) -> Sequence[str]:
        await go.wait()
        return ["93.184.216.34"]

    guard = Guard((), lookup)
    impatient = asyncio.create_task(guard.addresses("hooks.example.org"))
    patient = asyncio.create_task(guard.addresses("hooks.example.org"))
    await asyncio.sleep(0)
    impatient.cancel()
    go.set()

    assert await patient == (ip_address("93.184.216.34"),)
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_no_socket_is_created_for_a_forbidden_address_even_a_literal_one() -> None:
    """The connector asks no resolver for literal addresses; the socket factory still sees them."""
    make = Guard().socket_factory()
    kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")

    with pytest.raises(ForbiddenAddress, match=r'\["127.0.0.1/32"\]'):
        make((socket.AF_INET, *kind, ("127.0.0.1", 80)))
    with pytest.raises(ForbiddenAddress, match="metadata"):
        make((socket.AF_INET6, *kind, ("fd00:ec2::254", 80, 0, 0)))
    with pytest.raises(ForbiddenAddress):
        make((socket.AF_INET6, *kind, ("fe80::1%lo", 80, 0, 1)))
    with make((socket.AF_INET, *kind, ("93.184.216.34", 443))) as made:
        assert made.family == socket.AF_INET


async def test_the_system_resolver_runs_in_a_daemon_thread() -> None:
    assert "127.0.0.1" in await SystemLookup()("localhost")
    with pytest.raises((OSError, UnicodeError)):
        await SystemLookup()("a" * 70)
