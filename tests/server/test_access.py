"""Test who may use the server: API keys, origins of web pages, HTTPS, a prefix behind a proxy."""

from __future__ import annotations

import asyncio
import hmac
import re
import shutil
import ssl
import subprocess
from contextlib import ExitStack

import anthropic
import httpx
import openai
import pytest

from cupaged import serve
from cupaged.engine.server import api_keys
from cupaged.engine.server.access import Access, check_certificate
from cupaged.engine.server.middleware import guarded

from .beside import connect, head
from .conftest import MODEL, Running

KEYS = ("first-key", "s3cond/key+=~")
ORIGIN = "https://app.example.com"
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 1}
COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"


@pytest.fixture(scope="module")
def locked(llama_dir):
    access = Access(api_keys=KEYS, allowed_origins=(ORIGIN,), root_path="/llm")
    with Running(llama_dir, access=access) as running:
        yield running


# -- keys --------------------------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "headers", [bearer, lambda key: {"authorization": f"bearer  {key}"}, lambda key: {"x-api-key": key}]
)
def test_a_key_opens_in_either_header(locked, key, headers):
    response = httpx.post(locked.url + COMPLETIONS, json=BODY, headers=headers(key))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"Authorization": "Bearer"},
        bearer(KEYS[0][:-1]),
        bearer(KEYS[0] + "y"),
        bearer(KEYS[0].upper()),
        bearer(" ".join(KEYS)),
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": KEYS[0]},
        {"x-api-key": ""},
        {"x-api-key": "first-k\u00e9y".encode()},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Cookie": f"api_key={KEYS[0]}"},
    ],
)
@pytest.mark.parametrize(
    "path", [COMPLETIONS, "/v1/models", "/tokenize", "/openapi.json", "/nowhere", "/health/"]
)
def test_without_a_valid_key_there_is_nothing_but_an_error(locked, headers, path):
    method = "GET" if path in ("/v1/models", "/openapi.json", "/nowhere", "/health/") else "POST"
    response = httpx.request(method, locked.url + path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "invalid_api_key",
        None,
    )
    assert "Authorization: Bearer" in error["message"]
    assert not any(key in response.text for key in KEYS)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/llm/v1/messages"])
def test_anthropics_clients_get_their_own_format(locked, path):
    error = httpx.post(locked.url + path, json={}).json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "authentication_error"
    client = anthropic.Anthropic(base_url=locked.url, api_key="wrong", max_retries=0)
    with client, pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "x"}])
    assert caught.value.response.headers["request-id"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            (method, path)
            for path in ("/", "/health", "/ping", "/metrics", "/version")
            for method in ("GET", "HEAD")
        ),
        ("POST", "/ping"),
        ("GET", "/llm/health"),
    ],
)
def test_monitors_and_the_page_need_no_key(locked, method, path):
    assert httpx.request(method, locked.url + path).status_code == 200


def test_every_file_that_the_page_loads_needs_no_key(locked):
    for name in re.findall(r'(?:src|href)="([^":,]+)"', httpx.get(locked.url).text):
        assert httpx.get(f"{locked.url}/{name}").status_code == 200
    assert httpx.get(f"{locked.url}/page/none").status_code == 404


def test_the_sdk_has_its_key(locked):
    base = f"{locked.url}/v1"
    for key in KEYS:
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
            assert client.completions.create(**BODY).usage.completion_tokens == 1
            assert client.models.list().data[0].id == MODEL
    client = openai.OpenAI(base_url=base, api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError) as caught:
        client.completions.create(**BODY)
    assert caught.value.code == "invalid_api_key"


def test_a_request_without_a_key_is_not_received(locked):
    """It is answered before its body comes, however large that would be."""
    with connect(locked, head(COMPLETIONS, "Content-Length: 1000000")) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_all_keys_are_compared_in_constant_time(monkeypatch):
    """A comparison takes the same time wherever the keys differ, and no valid key ends it early."""
    compared, compare_digest = [], hmac.compare_digest

    def compare(one, other):
        compared.append((one, other))
        return compare_digest(one, other)

    monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
    keys = api_keys.ApiKeys(None, ("a", "bb", "ccc"))
    for given in ("a", "bb", "ccc", "d", "a" * 999):
        compared.clear()
        assert keys._is_valid(given) == (given in ("a", "bb", "ccc"))
        assert len(compared) == 3
        assert {len(digest) for pair in compared for digest in pair} == {32}


@pytest.mark.parametrize("key", ["", "two words", "k\u00e9y", "line\nend", "tab\t"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(capsys, key):
    assert serve.main(["--model", "./none", "--port", "0", f"--api-key={key}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: api_key must")
    assert not key or key not in error


def test_keys_come_from_the_options_or_else_from_the_environment(monkeypatch):
    def keys(*arguments: str) -> tuple[str, ...]:
        return serve.access_of(serve.parser().parse_args(arguments)).api_keys

    monkeypatch.delenv("CUPAGED_API_KEY", raising=False)
    assert keys() == ()
    assert keys("--api-key", "a", "--api-key", "b") == ("a", "b")
    monkeypatch.setenv("CUPAGED_API_KEY", "c")
    assert keys() == ("c",)
    assert keys("--api-key", "a") == ("a",)
    monkeypatch.setenv("CUPAGED_API_KEY", "")
    assert keys() == ()


# -- origins -----------------------------------------------------------------------------------------


def preflight(url: str, origin: str) -> httpx.Response:
    """Ask what a browser asks before a page of another origin sends a request."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(url + COMPLETIONS, headers=headers)


def test_a_page_of_an_allowed_origin_gets_through(locked):
    """Without a key beforehand, as browsers send none then; with the errors, so that it can show them."""
    asked = preflight(locked.url, ORIGIN)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in asked.headers["access-control-allow-methods"]
    allowed = asked.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in ("authorization", "content-type", "x-stainless-lang"))
    for key, status in ((KEYS[0], 200), ("wrong", 401)):
        headers = {"Origin": ORIGIN, **bearer(key)}
        response = httpx.post(locked.url + COMPLETIONS, json=BODY, headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in response.headers["access-control-expose-headers"].lower()
    assert httpx.post(
        locked.url + COMPLETIONS, json={}, headers={"Origin": ORIGIN, **bearer(KEYS[0])}
    ).headers["access-control-allow-origin"], "an error of the application"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://app.example.com", "null", f"{ORIGIN}.evil.example"]
)
def test_a_page_of_another_origin_does_not(locked, origin):
    assert preflight(locked.url, origin).status_code == 400
    response = httpx.post(locked.url + COMPLETIONS, json=BODY, headers={"Origin": origin, **bearer(KEYS[0])})
    assert "access-control-allow-origin" not in response.headers


def test_no_origin_is_allowed_by_default(server):
    asked = preflight(server.url, ORIGIN)
    assert asked.status_code == 204
    response = httpx.post(server.url + COMPLETIONS, json=BODY, headers={"Origin": ORIGIN})
    assert not [name for name in (*asked.headers, *response.headers) if name.startswith("access-control")]


def ask(access: Access, *, path: str = "/x", headers: dict[str, str] | None = None, method: str = "GET"):
    """Ask an application that says what reaches it."""

    async def app(scope, receive, send):
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        said = f"{scope.get('root_path', '')}|{scope['path']}|{scope['state']['unique_id']}"
        await send({"type": "http.response.body", "body": said.encode()})

    async def get():
        transport = httpx.ASGITransport(app=guarded(app, access))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(get())


def test_all_origins_can_be_allowed():
    response = ask(Access(allowed_origins=("*",)), headers={"Origin": "https://any.example"})
    assert response.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    "origin", ["example.com", "https://example.com/", "https://Example.com", "https://a b", "https://u@h", ""]
)
def test_an_origin_that_browsers_never_send_is_refused(origin):
    with pytest.raises(ValueError, match=f"allowed_origins must be .*{re.escape(origin)}"):
        Access(allowed_origins=(origin,))


def test_the_host_is_checked_before_keys_and_origins():
    access = Access(frozenset({"localhost"}), (ORIGIN,), ("key",))
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example", "Origin": ORIGIN, **bearer("key")}):
        assert ask(access, headers=headers).status_code == 403
    assert ask(access, headers=bearer("key")).status_code == 200
    assert ask(access).status_code == 401


# -- a prefix ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reaches"),
    [
        ("/v1/models", "/v1/models"),
        ("/llm/v1/models", "/v1/models"),
        ("/llm/", "/"),
        ("/llmx/v1", "/llmx/v1"),
        ("/llm/llm/v1", "/llm/v1"),
    ],
)
def test_the_prefix_may_have_been_removed_or_not(path, reaches):
    assert ask(Access(root_path="/llm"), path=path).text.split("|")[:2] == ["/llm", reaches]


def test_the_prefix_alone_leads_to_the_page(locked):
    response = httpx.get(f"{locked.url}/llm")
    assert (response.status_code, response.headers["location"]) == (307, "/llm/")
    assert httpx.get(f"{locked.url}/llm/").text == httpx.get(locked.url).text


def test_the_openapi_document_names_the_prefix(locked):
    for path in ("/openapi.json", "/llm/openapi.json"):
        document = httpx.get(locked.url + path, headers=bearer(KEYS[0])).json()
        assert document["servers"] == [{"url": "/llm"}]


@pytest.mark.parametrize(("given", "prefix"), [("", ""), ("/", ""), ("/llm", "/llm"), ("/a/b/", "/a/b")])
def test_a_slash_at_the_end_of_the_prefix_is_left_out(given, prefix):
    assert serve.access_of(serve.parser().parse_args([f"--root-path={given}"])).root_path == prefix


@pytest.mark.parametrize("prefix", ["llm", "/a b", "//llm", "https://example.com/llm", "/a?b"])
def test_a_prefix_that_is_no_path(capsys, prefix):
    assert serve.main(["--model", "./none", "--port", "0", f"--root-path={prefix}"]) == 1
    assert capsys.readouterr().err.startswith("error: root_path must")


# -- HTTPS -------------------------------------------------------------------------------------------

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="no openssl to make a certificate with"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The folder of a self-signed certificate for localhost with its key, also with a password."""
    folder = tmp_path_factory.mktemp("certificate")
    elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    for arguments in (
        ["req", "-x509", "-nodes", *elliptic, *names, "-days", "2", "-keyout", "key.pem", "-out", "cert.pem"],
        ["pkey", "-in", "key.pem", "-aes128", "-passout", "pass:secret", "-out", "locked.pem"],
        ["genpkey", "-algorithm", "ed25519", "-out", "other.pem"],
    ):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return folder


@needs_openssl
def test_https(llama_dir, certificate):
    files = (certificate / "cert.pem", certificate / "key.pem")
    trusted = ssl.create_default_context(cafile=str(files[0]))
    with ExitStack() as stack:
        server = stack.enter_context(Running(llama_dir, life={"tls": files}))
        url = server.url.replace("http:", "https:")
        http = stack.enter_context(httpx.Client(verify=trusted))
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http))
        fields = {
            "model": MODEL,
            "prompt": "x",
            "max_tokens": 20,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        whole = client.completions.create(**fields)
        text = "".join(chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True))
        assert text == whole.choices[0].text
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", verify=ssl.create_default_context(cafile=None))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health")
        assert http.get(f"{url}/health").status_code == 200


@needs_openssl
def test_files_of_a_certificate(certificate):
    def files(*arguments: str):
        return serve._tls(serve.parser().parse_args(arguments))

    cert, key, both = (str(certificate / name) for name in ("cert.pem", "key.pem", "both.pem"))
    assert files() is None
    assert files("--ssl-certfile", cert, "--ssl-keyfile", key) == (
        certificate / "cert.pem",
        certificate / "key.pem",
    )
    assert files("--ssl-certfile", both) == (certificate / "both.pem",) * 2
    with pytest.raises(ValueError, match="no ssl_certfile"):
        files("--ssl-keyfile", key)
    for wrong, message in (
        ("none.pem", "ssl_keyfile .*none.pem' cannot be read: No such file"),
        ("other.pem", "must be a certificate and its private key"),
        ("cert.pem", "must be a certificate and its private key"),
        ("locked.pem", "without a password"),
    ):
        with pytest.raises(ValueError, match=message):
            check_certificate(certificate / "cert.pem", certificate / wrong)
    with pytest.raises(ValueError, match=r"ssl_certfile .* cannot be read"):
        check_certificate(certificate / "none.pem", certificate / "key.pem")


def test_the_greeting_shows_what_the_server_needs():
    assert serve._address("127.0.0.1", 80, "https") == "https://localhost:80"
    assert "Authorization: Bearer YOUR_API_KEY" in serve._greeting("https://x", "tiny", chat=True, key=True)
    assert "Authorization" not in serve._greeting("https://x", "tiny", chat=True)
