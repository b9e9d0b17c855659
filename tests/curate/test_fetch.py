"""Pictures over HTTP: what a hostile page cannot make this machine do, and what a polite visitor does."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")
from checkpoint import InputError
from curate import fetch
from curate.fetch import Fetcher, parts_of, public


class Handler(BaseHTTPRequestHandler):
    robots = "User-agent: *\nDisallow: /secret\n"

    def do_GET(self):
        self.server.asked.append((time.monotonic(), self.path))
        port = self.server.server_address[1]
        answers = {
            "/robots.txt": (200, {}, self.robots.encode()),
            "/a.png": (200, {}, b"picture"),
            "/secret/a.png": (200, {}, b"secret"),
            "/hop": (302, {"Location": f"http://127.0.0.1:{port}/a.png"}, b""),
            "/loop": (302, {"Location": "/loop"}, b""),
            "/inside": (302, {"Location": f"http://127.0.0.2:{port}/a.png"}, b""),
            "/metadata": (301, {"Location": "http://169.254.169.254/latest/meta-data/"}, b""),
            "/file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/large": (200, {}, b"x" * 5000),
        }
        status, headers, body = answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(10**12 if self.path == "/lies" else len(body)))
        self.end_headers()
        if self.path == "/slow":
            time.sleep(3)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("0.0.0.0", 0), Handler) as http:
        http.asked = []
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield http
        http.shutdown()


def paths(server) -> list[str]:
    return [path for _, path in server.asked]


@pytest.fixture
def fetcher(tmp_path) -> Fetcher:
    return Fetcher(str(tmp_path), pause=0.0, timeout=1.0, longest=2.0, most=1000, allowed=("127.0.0.1",))


def refused(fetcher: Fetcher, address: str) -> str:
    with pytest.raises(InputError) as e:
        fetcher.get(address)
    return str(e.value)


def test_a_picture_is_fetched_once(server, fetcher):
    address = f"http://127.0.0.1:{server.server_address[1]}"
    assert fetcher.get(f"{address}/a.png") == b"picture" == fetcher.get(f"{address}/hop")
    assert fetcher.get(f"{address}/a.png") == b"picture"
    assert paths(server) == ["/robots.txt", "/a.png", "/hop", "/a.png"]
    assert refused(fetcher, f"{address}/gone") == refused(fetcher, f"{address}/gone") == "not fetched: status 404"
    assert paths(server).count("/gone") == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/inside", "private address: 127.0.0.2"),
        ("/metadata", "private address: 169.254.169.254"),
        ("/file", "address: file is neither http nor https"),
        ("/loop", "not fetched: more than 5 redirections"),
        ("/secret/a.png", "not fetched: robots.txt forbids it"),
        ("/large", "too many bytes: more than 1000"),
        ("/slow", "not fetched: "),
    ],
)
def test_a_redirection_to_a_private_address_is_not_followed(server, fetcher, path, reason):
    assert refused(fetcher, f"http://127.0.0.1:{server.server_address[1]}{path}").startswith(reason)
    assert "/a.png" not in paths(server) and "/secret/a.png" not in paths(server)


PRIVATE = """
    127.0.0.1 localhost 10.0.0.1 192.168.1.1 172.16.0.1 169.254.169.254 0.0.0.0 [::1] [fe80::1] [fc00::1] [::ffff:127.0.0.1]
    [2002:7f00:1::] 224.0.0.1 255.255.255.255 2130706433 0x7f000001 017700000001 127.1
"""


@pytest.mark.parametrize("host", PRIVATE.split())
def test_private_hosts_are_refused_however_they_are_written(server, tmp_path, host):
    reason = refused(Fetcher(str(tmp_path), pause=0.0), f"http://{host}:{server.server_address[1]}/a.png")
    assert reason.startswith(("private address", "not fetched: unknown host"))
    assert not server.asked


def test_a_name_that_resolves_to_both_kinds_is_refused(tmp_path, monkeypatch):
    def both(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("93.184.216.34", "127.0.0.1")]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", both)
    assert refused(Fetcher(str(tmp_path)), "http://evil.org/a.png") == "private address: evil.org is 127.0.0.1"


def test_a_name_that_changes_its_mind_is_asked_once(server, fetcher, monkeypatch):
    """DNS rebinding: public at the check, private at the connection; the connection goes to what was checked."""
    port = server.server_address[1]
    asked, connected = [], []

    def rebinding(host, port, **_):
        asked.append(host)
        ip = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))]

    def connect(where, timeout):
        connected.append(where)
        raise ConnectionRefusedError

    monkeypatch.setattr(fetch.socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(fetch.socket, "create_connection", connect)
    assert refused(fetcher, f"http://evil.org:{port}/a.png") == "not fetched: ConnectionRefusedError"
    assert asked == ["evil.org"] and set(connected) == {("93.184.216.34", port)}


@pytest.mark.parametrize(
    "address", "ftp://a.org/x file:///etc/passwd http:// http://u:p@a.org/ http://a.org:99999/ //a".split()
)
def test_what_is_no_address_is_not_asked(address):
    with pytest.raises(InputError, match="address: "):
        parts_of(address)


def test_a_public_address_may_be_asked(monkeypatch):
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda h, p, **_: [(2, 1, 6, "", ("93.184.216.34", p))])
    assert public("example.org", 443, ()) == ("93.184.216.34", 443)


def test_a_host_is_given_time_between_requests(server, fetcher, tmp_path):
    """Whoever asks: here four threads with a fetcher each, as processes have them."""
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threads = []
    for k in range(4):
        own = Fetcher(fetcher.folder, pause=0.15, allowed=("127.0.0.1",))
        threads.append(threading.Thread(target=lambda own=own, k=k: pytest.raises(InputError, own.get, f"{address}/gone{k}")))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(at for at, _ in server.asked)
    assert len(times) >= 5
    assert all(later - earlier > 0.1 for earlier, later in zip(times, times[1:], strict=False))
