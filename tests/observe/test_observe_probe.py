"""One question to a real server: what each kind of answer means."""

from __future__ import annotations

import resource
import socket
import threading
import time
from contextlib import closing, suppress

import pytest
from http_box import HttpBox, reply
from msgspec.structs import replace

from reconciler.observe.probe import Connection, ProbeTarget, sum_metrics
from reconciler.observe.prober import probe_once
from reconciler.spec.profiles import PROFILES

VLLM = ("vllm:num_requests_running", "vllm:num_requests_waiting")
PAGE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {strange} name"} 2.0
vllm:num_requests_running{engine="1",model_name="x"} 1.0
vllm:num_requests_running_total{engine="0"} 900.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="x"} 4.0 1395066363000
"""


@pytest.fixture
def box():
    box = HttpBox().start()
    yield box
    box.stop()


def target(port, **changes):
    values = {
        "incarnation": "one", "port": port, "health_path": "/health", "busy_metrics": VLLM, "interval_s": 0.05,
        "timeout_s": 5.0, "failures": 3, "starting": False,
    }  # fmt: skip
    return ProbeTarget(**{**values, **changes})


def ask(probed, clock, owns=None):
    connection = Connection(probed, clock)
    try:
        return connection.ask(probed, owns)
    finally:
        connection.close()


def test_two_hundred_is_ready(box, clock):
    answer = ask(target(box.port), clock)
    assert answer.ready is True
    assert answer.detail == ""
    assert answer.busy is None


@pytest.mark.parametrize("status", [204, 301, 404, 500, 503])
def test_any_other_status_is_not_ready_and_named(box, clock, status):
    box.answers["/health"] = (status, b"")
    answer = ask(target(box.port), clock)
    assert answer.ready is False
    assert str(status) in answer.detail


def test_a_refused_connection_is_not_ready_and_says_so(clock):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening, as vLLM while it loads
        answer = ask(target(nobody.getsockname()[1]), clock)
    assert answer.ready is False
    assert "refused" in answer.detail


def test_a_server_that_hangs_is_not_ready_after_the_timeout(box, clock):
    box.answers["/health"] = box.hang
    began = time.monotonic()
    answer = ask(target(box.port, timeout_s=0.2), clock)
    assert answer.ready is False
    assert "within 0.2 s" in answer.detail
    assert time.monotonic() - began < 30, "it answers after a minute"


def begin_answer(handler, header, value):
    handler.send_response(200)
    handler.send_header(header, value)
    handler.end_headers()


def test_an_answer_that_never_ends_is_cut_off(box, clock):
    def drip(handler):
        begin_answer(handler, "Content-Length", "1000000")
        while not box.released.wait(0.02):
            handler.wfile.write(b".")
            handler.wfile.flush()

    box.answers["/health"] = drip
    answer = ask(target(box.port, timeout_s=0.3), clock)
    assert answer.ready is False
    assert "did not answer within" in answer.detail


@pytest.mark.parametrize("part", [b"y", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["a header", "asks for patience"])
def test_the_head_of_an_answer_that_never_ends_is_cut_off(box, clock, part):
    def drip(handler):
        handler.wfile.write(b"" if part.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\nX: ")
        while not box.released.wait(0.05):
            handler.wfile.write(part)
            handler.wfile.flush()

    box.answers["/health"] = drip
    answer = ask(target(box.port, timeout_s=0.5), clock)
    assert answer.ready is False
    assert "did not answer within" in answer.detail


def test_an_answer_that_ends_too_early_is_not_ready(box, clock):
    def stop_short(handler):
        begin_answer(handler, "Content-Length", "4")
        handler.wfile.write(b"ab")
        handler.close_connection = True

    box.answers["/health"] = stop_short
    answer = ask(target(box.port), clock)
    assert answer.ready is False
    assert "2 bytes before" in answer.detail


def test_an_answer_in_chunks_is_read_to_its_end_and_the_connection_kept(box, clock):
    def in_chunks(handler):
        begin_answer(handler, "Transfer-Encoding", "chunked")
        for part in (b"vllm:num_requests_running 3\n", b"vllm:num_requests_waiting 1\n", b""):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

    box.answers["/metrics"] = in_chunks
    connection = Connection(target(box.port), clock)
    assert [connection.ask(target(box.port, busy=True)).busy for _ in range(3)] == [4, 4, 4]
    assert box.connections == 1
    connection.close()


def test_of_a_path_only_what_no_request_may_hold_is_quoted(box, clock):
    box.answers = {"/a%20b?x=%7By%7D": (200, b""), "/gr%C3%BCn": (200, b"")}
    assert ask(target(box.port, health_path="/a%20b?x={y}"), clock).ready
    assert ask(target(box.port, health_path="/grün"), clock).ready


def test_what_is_not_http_is_not_ready(clock):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk():
            for _ in range(2):
                connection, _ = server.accept()
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.close()

        threading.Thread(target=talk, daemon=True).start()
        answer = ask(target(server.getsockname()[1]), clock)
    assert answer.ready is False
    assert answer.detail


def test_questions_share_one_connection(box, clock):
    connection = Connection(target(box.port), clock)
    for _ in range(20):
        assert connection.ask(target(box.port)).ready
    assert box.connections == 1
    connection.close()


def test_a_kept_connection_that_the_server_dropped_is_no_miss(box, clock):
    box.close_after_answer = True
    connection = Connection(target(box.port), clock)
    for _ in range(20):
        assert connection.ask(target(box.port)).ready
    connection.close()


def test_a_proxy_in_the_environment_is_not_asked(box, clock, monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert ask(target(box.port), clock).ready


def test_without_a_free_descriptor_the_question_could_not_be_put(box, clock):
    ask(target(box.port), clock)  # imports and first use are done
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        for _ in range(100):  # another thread may let go of one in between, as of the question above
            with suppress(OSError):
                while True:
                    taken.append(socket.socket())
            with closing(Connection(target(box.port), clock)) as connection:
                answer = connection.ask(target(box.port))
            if answer.ready is None:
                break
    finally:
        for descriptor in taken:
            descriptor.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert answer.ready is None  # it says nothing of the endpoint
    assert "EMFILE" in answer.detail


# ---------------------------------------------------------------- whose answer it is


def test_an_answer_of_another_process_on_the_port_is_not_readiness(box, clock):
    answer = ask(target(box.port), clock, owns=lambda _incarnation, _port: False)
    assert answer.ready is False
    assert "another process" in answer.detail


@pytest.mark.parametrize("verdict", [True, None])
def test_an_answer_of_its_own_or_of_nobody_knows_whom_is_readiness(box, clock, verdict):
    assert ask(target(box.port), clock, owns=lambda _incarnation, _port: verdict).ready


# ---------------------------------------------------------------- busy, asleep


def test_metrics_are_fetched_only_when_asked_for(box, clock):
    box.answers["/metrics"] = (200, PAGE)
    assert ask(target(box.port), clock).busy is None
    assert "/metrics" not in box.asked
    answer = ask(target(box.port, busy=True), clock)
    assert (answer.busy, answer.counted) == (7, True)


def test_a_metrics_page_that_does_not_come_counts_nothing(box, clock):
    box.answers["/metrics"] = box.hang
    answer = ask(target(box.port, busy=True, timeout_s=1.0), clock)
    assert answer.ready
    assert (answer.busy, answer.counted) == (None, False)


def test_an_engine_without_metrics_is_known_to_have_no_count(box, clock):
    answer = ask(target(box.port, busy=True, busy_metrics=()), clock)
    assert (answer.busy, answer.counted) == (None, True)
    assert "/metrics" not in box.asked


@pytest.mark.parametrize(
    ("page", "names", "expected"),
    [
        (PAGE, VLLM, 7),
        (b"llamacpp:requests_processing 0\nllamacpp:requests_deferred 0\n",
         ("llamacpp:requests_processing", "llamacpp:requests_deferred"), 0),
        (b"llamacpp:requests_processing 1\n", ("llamacpp:requests_processing", "llamacpp:requests_deferred"), None),
        (b"a 1\na NaN\n", ("a",), None),
        (b"a +Inf\n", ("a",), None),
        (b"a{x=\"y\"}\n", ("a",), None),
        (b"ab 1\n", ("a",), None),
        (b"", ("a",), None),
        (PAGE, (), None),
        (b"\xff\xfe\x00 broken \n{\n", ("a",), None),
    ],
)  # fmt: skip
def test_the_sum_is_unknown_unless_every_metric_is_there_with_a_number(page, names, expected):
    assert sum_metrics(page, names) == expected


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ((200, b'{"is_sleeping": true}'), True),
        ((200, b'{"is_sleeping": false}'), False),
        ((200, b'{"is_sleeping": 1}'), None),
        ((200, b"[]"), None),
        ((200, b"\xff"), None),
        ((404, b""), None),
    ],
)
def test_a_sleeper_is_asked_whether_it_sleeps(box, clock, page, expected):
    box.answers["/is_sleeping"] = page
    answer = ask(target(box.port, sleep_check=PROFILES["vllm"].sleep_check), clock)
    assert answer.ready  # health answers 200 while asleep
    assert answer.sleeping is expected


# ---------------------------------------------------------------- once, for commands


def test_asking_once_asks_all_at_the_same_time_and_ends_by_the_deadline(box, clock):
    box.answers["/slow"] = box.hang
    box.answers["/late"] = lambda handler: (time.sleep(0.2), reply(handler, 200, b""))
    hangs = {f"hangs-{i}": target(box.port, incarnation=f"hangs-{i}", health_path="/slow") for i in range(10)}
    targets = {name: replace(one, timeout_s=50.0) for name, one in hangs.items()}
    targets |= {f"late-{i}": target(box.port, incarnation=f"late-{i}", health_path="/late") for i in range(10)}
    began = time.monotonic()
    probes = probe_once(targets, deadline_s=3.0, clock=clock)
    assert 3.0 <= time.monotonic() - began < 30
    assert probes.keys() == targets.keys()
    assert {p.ready for i, p in probes.items() if i.startswith("late")} == {True}
    assert {(p.ready, p.misses) for i, p in probes.items() if i.startswith("hangs")} == {(False, 1)}


def test_asking_nobody_takes_no_time(clock):
    assert probe_once({}, deadline_s=60.0, clock=clock) == {}
