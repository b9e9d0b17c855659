"""Pictures over HTTP, from hosts that may be asked and for addresses that lie on the public internet.

A page names the addresses, and a page may be hostile: one that names an address of this machine or of its network would read
what is served there. So a name is resolved once, all that it resolves to must be public, and the connection goes to that very
address: a name that resolves differently a moment later gains nothing. Every redirection is looked at in the same way.
"""

import fcntl
import hashlib
import http.client
import ipaddress
import json
import socket
import ssl
import time
import urllib.robotparser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from checkpoint import InputError
from curate.store import whole

AGENT = "duogen-curate"
REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Fetcher:
    """Fetches a picture once; what came is kept in a folder, so that a run that goes on finds the same bytes."""

    folder: str  # shared by all processes of a run
    pause: float = 1.0  # seconds between two requests to a host, over all processes
    timeout: float = 15.0  # seconds until a host must have said something
    longest: float = 60.0  # seconds for a whole picture
    most: int = 20_000_000  # bytes of a picture
    hops: int = 5  # redirections
    allowed: tuple[str, ...] = ()  # addresses (not names) that are asked although they are not public: a mirror in the house

    def get(self, address: str, referrer: str = "") -> bytes:
        """The bytes. InputError "kind: details" where there are none to be had; that is kept as well."""
        name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        path = Path(self.folder) / "fetched" / name[:2] / name
        if path.exists():
            head, _, data = path.read_bytes().partition(b"\n")
        else:
            try:
                head, data = b"", self._fetched(address, referrer)
            except InputError as e:
                head, data = str(e).encode("utf-8", "replace").replace(b"\n", b" "), b""
            with whole(path) as file:
                file.write(head + b"\n" + data)
        if head:
            raise InputError(head.decode("utf-8"))
        return data

    def manifest(self) -> dict:
        return {"folder": "", "agent": AGENT}

    def _fetched(self, address: str, referrer: str) -> bytes:
        for _ in range(self.hops + 1):
            url = parts_of(address)
            where = public(url.hostname, url.port or {"http": 80, "https": 443}[url.scheme], self.allowed)
            if not self._may(url, where):
                raise InputError("not fetched: robots.txt forbids it")
            with self._turn(url.hostname):
                status, headers, data = request(url, where, self.timeout, self.longest, self.most, referrer)
            if status in REDIRECTS and headers.get("location"):
                address = urljoin(address, headers["location"])
                continue
            if status != 200:
                raise InputError(f"not fetched: status {status}")
            return data
        raise InputError(f"not fetched: more than {self.hops} redirections")

    def _may(self, url: SplitResult, where: tuple[str, int]) -> bool:
        """Whether the host's robots.txt lets us. It is asked for once a run; one that cannot be had forbids nothing."""
        host = hashlib.sha256(f"{url.scheme}://{url.netloc}".encode()).hexdigest()[:24]
        path = Path(self.folder) / "hosts" / f"{host}.robots"
        if not path.exists():
            try:
                with self._turn(url.hostname):
                    robots = url._replace(path="/robots.txt", query="")
                    status, _, data = request(robots, where, self.timeout, self.timeout, 500_000, "")
            except InputError:
                status, data = 0, b""
            # A host that fails, or says that nobody may know, is not asked for more.
            text = data.decode("utf-8", "replace") if status == 200 else ""
            text = "User-agent: *\nDisallow: /\n" if status in (401, 403) or status >= 500 else text
            with whole(path) as file:
                file.write(text.encode())
        rules = urllib.robotparser.RobotFileParser()
        rules.parse(path.read_text(encoding="utf-8").splitlines())
        return rules.can_fetch(AGENT, url.geturl())

    @contextmanager
    def _turn(self, host: str) -> Iterator[None]:
        """One request at a time to a host, of all processes, and a pause after it."""
        path = Path(self.folder) / "hosts" / f"{hashlib.sha256(host.encode()).hexdigest()[:24]}.turn"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            last = file.read()
            wait = (json.loads(last) if last else 0.0) + self.pause - time.time()
            time.sleep(min(max(wait, 0.0), self.pause))
            try:
                yield
            finally:
                file.truncate(0)
                file.write(json.dumps(time.time()).encode())


def parts_of(address: str) -> SplitResult:
    """An address that may be asked for at all."""
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:
        raise InputError("address: malformed") from None
    if url.scheme not in ("http", "https"):
        raise InputError(f"address: {url.scheme or 'nothing'} is neither http nor https")
    if not url.hostname or url.username or port == 0:
        raise InputError("address: malformed")
    return url


def public(host: str, port: int, allowed: tuple[str, ...]) -> tuple[str, int]:
    """(IP address, port) to connect to. InputError where the host is unknown, or any of its addresses is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError("not fetched: unknown host") from None
    addresses = [each[4][0] for each in found]
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
        safe = address.is_global and not address.is_multicast and (inner is None or inner.is_global)
        if not safe and text not in allowed:
            raise InputError(f"private address: {host} is {address}" if host != text else f"private address: {host}")
    return addresses[0], port


def request(
    url: SplitResult, where: tuple[str, int], timeout: float, longest: float, most: int, referrer: str
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a GET. where: the address that was checked, which is the one that is connected to."""
    ends = time.monotonic() + longest
    connection = http.client.HTTPConnection(url.hostname, where[1], timeout=timeout)
    try:
        connection.sock = socket.create_connection(where, timeout)
        if url.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=url.hostname)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        headers = {"User-Agent": AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers | ({"Referer": referrer} if referrer else {}))
        response = connection.getresponse()
        data = bytearray()
        while response.status == 200 and (piece := response.read1(65536)):
            data += piece
            if len(data) > most:
                raise InputError(f"too many bytes: more than {most}")
            if time.monotonic() > ends:
                raise InputError(f"not fetched: took more than {longest:g} s")
        return response.status, {key.lower(): value for key, value in response.getheaders()}, bytes(data)
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise InputError(f"not fetched: {type(e).__name__}") from None
    finally:
        connection.close()
