"""The judge, with endpoints that work and endpoints that fail."""

import json
import re
import socket
import threading
import tracemalloc
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanoglimpse.cli.ask import EXAMPLES
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.__main__ import main
from nanoglimpse.evaluate.judge import KEY, Judge, grade, read_score
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.world import BRIEF_SUFFIX
from tests.helpers.commands import exit_code


def result(question="q1", reply="The number is 7.", arm="dense", **more):
    row = {"question": question, "arm": arm, "method": arm, "ratio": None, "brief": False}
    row |= {"group": "scene", "asked": "Which number?", "wanted": "It is 7.", "reply": reply}
    row |= {"contains": True, "visual": 10, "kept": 10, "recall": None, "flops": {}, "ms": {}}
    return row | more


class Endpoint:
    """A local chat server; `behave` maps number and body of a request to status and response."""

    def __init__(self, behave):
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                status, answer = behave(len(outer.requests), body)
                if status is None:  # hangs up
                    self.close_connection = True
                    return
                data = answer.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Raw:
    """A server on a socket of 127.0.0.1: `serve` gets a connection whose request has been read."""

    def __init__(self, serve):
        self.requests = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection:
            self.requests.append(connection.recv(65536))
            with suppress(OSError):
                self.serve(connection)

    def close(self):
        self.socket.close()


@pytest.fixture
def raw():
    opened = []

    def start(serve):
        opened.append(Raw(serve))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def endpoint():
    opened = []

    def start(behave):
        opened.append(Endpoint(behave))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def says(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def judge_of(endpoint, **options):
    return Judge(endpoint.url, "grader", wait=0.001, **options)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("score: 0.8", 0.8),
        ("It is right.\nScore: 1", 1.0),
        ("**Score:** 0.7", 0.7),
        ("**score**: 0.25", 0.25),
        ("score: 3", 1.0),
        ("score: -1", 0.0),
        ("score: 0.2, or rather score: 0.4", None),
        ("0.8", None),
        ("", None),
    ],
)
def test_score_of_a_verdict(reply, score):
    assert read_score(reply) == score


def test_request_and_record_of_a_verdict(endpoint, monkeypatch):
    server = endpoint(lambda number, body: says("Close enough. Score: 0.9"))
    monkeypatch.setenv(KEY, "secret")
    row = result(asked="Which number?" + BRIEF_SUFFIX)
    verdict = judge_of(server).verdict(row)
    assert verdict == {
        "verdict": "grader at 0",
        "arm": "dense",
        "question": "q1",
        "score": 0.9,
        "understood": True,
        "said": "Close enough. Score: 0.9",
    }
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "grader"
    assert body["temperature"] == 0
    assert "top_p" not in body
    system, user = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"] == (
        "question: Which number?\nreference: It is 7.\nanswer to grade: The number is 7."
    )


def test_the_papers_sampling(endpoint, monkeypatch):
    server = endpoint(lambda number, body: says("score: 1"))
    monkeypatch.delenv(KEY, raising=False)
    judge = judge_of(server, temperature=0.7)
    assert judge.verdict(result())["verdict"] == "grader at 0.7"
    ((_, headers, body),) = server.requests
    assert (body["temperature"], body["top_p"]) == (0.7, 0.8)
    assert "Authorization" not in headers


def test_a_verdict_without_a_score_counts_as_0(endpoint):
    server = endpoint(lambda number, body: says("I would rather not."))
    verdict = judge_of(server).verdict(result())
    assert (verdict["score"], verdict["understood"]) == (0.0, False)
    assert verdict["said"] == "I would rather not."


@pytest.mark.parametrize(
    "failure",
    [(500, "oops"), (429, "slow down"), (None, ""), (200, "not json"), (200, '{"choices": []}')],
    ids=["500", "429", "hangs up", "no json", "no choice"],
)
def test_failures_are_retried(endpoint, failure):
    server = endpoint(lambda number, body: failure if number < 3 else says("score: 0.5"))
    assert judge_of(server).verdict(result())["score"] == 0.5
    assert len(server.requests) == 3


def test_an_endpoint_that_stays_broken(endpoint):
    server = endpoint(lambda number, body: (503, "down"))
    with pytest.raises(NanoglimpseError, match="no verdict in 3 tries: 503"):
        judge_of(server, retries=2).verdict(result())
    assert len(server.requests) == 3


def test_a_refusal_is_not_retried(endpoint):
    server = endpoint(lambda number, body: (401, "who are you"))
    with pytest.raises(NanoglimpseError, match="refuses the request: 401"):
        judge_of(server).verdict(result())
    assert len(server.requests) == 1


def test_waits_double(endpoint, monkeypatch):
    server = endpoint(lambda number, body: (500, "oops"))
    waits = []
    monkeypatch.setattr("nanoglimpse.evaluate.judge.time.sleep", waits.append)
    with pytest.raises(NanoglimpseError):
        Judge(server.url, "grader", retries=3).verdict(result())
    assert waits == [1, 2, 4]


def test_grading_resumes(endpoint, tmp_path):
    path = tmp_path / "results.jsonl"
    results = ResultsFile.resume(path, {"model": "tiny"})
    results.add([result(f"q{n}") for n in range(6)])

    def until_the_fourth(number, body):
        return says("score: 1") if number < 4 else (400, "enough")

    server = endpoint(until_the_fourth)
    with pytest.raises(NanoglimpseError, match="refuses the request: 400"):
        grade(results, judge_of(server), 1, lambda done, total: None)
    kept = ResultsFile.read(path)
    assert [question for _, question in kept.verdicts] == ["q0", "q1", "q2"]
    assert len(server.requests) == 4
    other = endpoint(lambda number, body: says("score: 0.5"))
    seen = []
    grade(kept, judge_of(other), 3, lambda done, total: seen.append((done, total)))
    assert len(other.requests) == 3
    assert seen == [(4, 6), (5, 6), (6, 6)]
    scores = [verdict["score"] for verdict in ResultsFile.read(path).verdicts.values()]
    assert scores == [1, 1, 1, 0.5, 0.5, 0.5]
    with pytest.raises(UsageError, match=r"was graded by grader at 0, not grader at 0\.7"):
        grade(kept, judge_of(other, temperature=0.7), 1, lambda done, total: None)


def test_the_command(endpoint, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    results = ResultsFile.resume(path, {"model": "tiny", "data": {}})
    results.add([result("q0"), result("q1", "No idea.")])

    def by_answer(number, body):
        return says("score: 0" if "No idea" in body["messages"][1]["content"] else "score: 1")

    server = endpoint(by_answer)
    options = ["--judge-url", server.url, "--judge-model", "grader", "--quiet"]
    assert main(["judge", str(path), *options]) == 0
    capsys.readouterr()
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 answers graded by grader at 0; 0 verdicts held no score" in printed
    assert "Score: judge." in printed
    assert "| dense | 0.500 | 0.500 |" in printed


@pytest.mark.slow
def test_a_run_that_is_graded(endpoint, tmp_path, capsys):
    server = endpoint(lambda number, body: says("score: 0.75"))
    out = tmp_path / "results.jsonl"
    # Two questions from each of three domains.
    data = ["--data", str(EXAMPLES / "questions.jsonl"), "--count", "2", "--methods", "nothing"]
    options = ["--judge-url", server.url, "--judge-model", "grader", "--device", "cpu", "--quiet"]
    assert main([*data, *options, "--out", str(out)]) == 0
    results = ResultsFile.read(out)
    assert [verdict["score"] for verdict in results.verdicts.values()] == [0.75] * 6
    asked = [body["messages"][1]["content"] for _, _, body in server.requests]
    for row in results.rows:  # requests are concurrent, so that their order varies
        assert any(row["asked"] in text and row["reply"] in text for text in asked)
    assert main([*data, *options, "--out", str(out)]) == 0
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--judge-url is required"),
        (["--judge-url", "http://localhost:1/v1"], "needs --judge-model"),
        (["--judge-url", "localhost", "--judge-model", "x"], "must be an address like"),
        (["--judge-url", "http://a", "--judge-model", "x", "--judge-workers", "0"], "at least 1"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    ResultsFile.resume(path, {})
    assert exit_code(main, ["judge", path, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


SECRET = "sk-very-secret-1234"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(raw, status, monkeypatch):
    """Neither the key nor the question goes to another host, and its reply does not count."""
    monkeypatch.setenv(KEY, SECRET)
    other = raw(lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n"))
    head = f"HTTP/1.1 {status} Moved\r\nLocation: {other.url}/x?token={SECRET}\r\n\r\n"
    server = raw(lambda connection: connection.sendall(head.encode()))
    with pytest.raises(NanoglimpseError, match=f"{status}, a redirect to {other.url}") as raised:
        Judge(server.url, "grader", wait=0).verdict(result())
    assert SECRET not in str(raised.value)
    assert len(server.requests) == 1
    assert other.requests == []


def test_a_reply_is_bounded_in_bytes(raw):
    """Also one that states no length, and one that is in chunks."""
    head = b"HTTP/1.1 200 OK\r\n"
    many = b" " * 2**20

    def without_end(connection):
        connection.sendall(head + b"\r\n")
        for _ in range(64):
            connection.sendall(many)

    def chunks(connection):
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(64):
            connection.sendall(b"100000\r\n" + many + b"\r\n")

    for serve in (without_end, chunks):
        server = raw(serve)
        tracemalloc.start()
        with pytest.raises(NanoglimpseError, match="a reply of more than 1048576 bytes"):
            Judge(server.url, "grader", wait=0, retries=0).verdict(result())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**23


@pytest.mark.slow
@pytest.mark.parametrize("where", ["status", "headers", "body"])
def test_a_reply_is_bounded_in_time_as_a_whole(raw, where):
    """A byte now and then keeps every single read within its own timeout."""
    sent = {"status": b"", "headers": b"HTTP/1.1 200 OK\r\nX: ", "body": b"HTTP/1.1 200 OK\r\n\r\n"}
    left = threading.Event()

    def drip(connection):
        connection.sendall(sent[where])
        while not left.wait(0.05):
            connection.sendall(b" ")

    server = raw(drip)
    done = []

    def ask():
        try:
            Judge(server.url, "grader", wait=0, retries=0, timeout=0.5).verdict(result())
        except NanoglimpseError as error:
            done.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(30)
    left.set()
    assert len(done) == 1
    assert "no whole reply in 0.5 s" in done[0]


@pytest.mark.parametrize(
    "reply",
    [
        "[" * 500_000,
        '{"choices":' * 50_000,
        '{"choices": [{"message": {"content": 7}}]}',
        '{"choices": {"0": 1}}',
        "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"),
        "null",
        "1" * 10_000,
        "",
    ],
    ids=["deep", "deep objects", "number", "object", "bytes", "null", "digits", "empty"],
)
def test_a_reply_that_is_no_chat_completion_is_an_error_of_the_family(endpoint, reply):
    server = endpoint(lambda number, body: (200, reply))
    with pytest.raises(NanoglimpseError, match="is not a chat completion"):
        judge_of(server, retries=0).verdict(result())


def test_no_key_and_no_password_in_any_message(raw, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    told = raw(lambda c: c.sendall(f"HTTP/1.1 401 No {SECRET} \x1b[2J here\r\n\r\n".encode()))
    with pytest.raises(NanoglimpseError, match=r"401 No \*\*\*") as raised:
        Judge(told.url, "grader", wait=0).verdict(result())
    assert SECRET not in str(raised.value)
    with_login = told.url.replace("//", "//me:pass%40word@")
    with pytest.raises(NanoglimpseError, match=r"at http://\*\*\*@127") as raised:
        Judge(with_login, "grader", wait=0).verdict(result())
    assert "pass" not in str(raised.value)
    # The login goes to the endpoint, in place of the key.
    asked = [request.decode() for request in told.requests]
    assert [re.search("Authorization: (.*)\r", one)[1] for one in asked] == [
        f"Bearer {SECRET}",
        "Basic bWU6cGFzc0B3b3Jk",
    ]
    assert re.search("Host: (.*)\r", asked[1])[1] == re.search("Host: (.*)\r", asked[0])[1]


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"{SECRET} x", f"{SECRET}é"])
def test_a_key_that_fits_no_header_is_named_but_not_shown(key, monkeypatch):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UsageError, match=r"the key in \$OPENAI_API_KEY") as raised:
        Judge("http://localhost:1/v1", "grader")
    assert "sk-" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://me:secret@[::1",
        "http://me:secret@host:port/v1",
        "http://host:99999/v1",
        "http://host:0",
        "http://a b/v1",
        "http://höst/v1",
        "http:///v1",
        "http://:80/v1",
        "http://host/v1?key=secret",
        "http://host/v1#x",
        "http://host/\r\nX: x",
        "ftp://me:secret@host/v1",
        "file:///etc/passwd",
        "",
        "x" * 300,
    ],
)
def test_an_address_that_is_none_is_one_line(url, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    ResultsFile.resume(path, {})
    options = [f"--judge-url={url}", "--judge-model", "x"]
    assert exit_code(main, ["judge", path, *options]) == 2
    error = capsys.readouterr().err
    assert "--judge-url" in error
    assert error.count("\n") == 1
    assert "secret" not in error
