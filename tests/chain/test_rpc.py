"""Several addresses of one chain: real anvil behind proxies that fail as told."""

import logging
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from account_service import faulty
from web3.types import RPCEndpoint

from worker import settings
from worker.chain.coordinator import Coordinator
from worker.chain.rpc import Rpc
from worker.errors import ChainError, ChainUnreachable

AWAY = "http://127.0.0.1:9"


def through(chain, *urls: str, timeout_seconds: float = 5.0) -> Coordinator:
    changes = {
        "rpc_url": urls,
        "contract": chain.deployment.contract,
        "timeout_seconds": timeout_seconds,
    }
    return Coordinator(settings.Chain().model_copy(update=changes))


def test_next_address_serves_when_the_first_fails_and_goes_on_serving(chain, caplog) -> None:
    is_away = False
    with faulty(chain.deployment.rpc_url, lambda _: "error" if is_away else None) as first:
        coordinator = through(chain, first.url, chain.deployment.rpc_url)
        assert coordinator.current_round() == 0
        is_away = True
        assert coordinator.current_round() == 0
        assert (
            f"rpc address changed from={first.url} to={chain.deployment.rpc_url}" in caplog.messages
        )
        num_seen = len(first.seen)
        is_away = False
        assert coordinator.current_round() == 0
        assert len(first.seen) == num_seen


def test_address_of_another_chain_is_named_at_the_check_and_not_used(chain, caplog) -> None:
    with faulty(chain.deployment.rpc_url, lambda _: "elsewhere") as other:
        coordinator = through(chain, other.url, chain.deployment.rpc_url)
        coordinator.check()
        assert coordinator.current_round() == 0
        assert {"eth_chainId" in seen for seen in other.seen} == {True}
    (said,) = [record for record in caplog.records if "not used" in record.message]
    assert said.levelno == logging.WARNING
    assert (
        f"chain id 1 answered by {other.url} (chain.rpc_url), expected 31337 (chain.id)"
        in said.message
    )


def test_address_that_comes_back_as_another_chain_is_not_used_again(chain) -> None:
    first_is, second_is = "", ""
    with (
        faulty(chain.deployment.rpc_url, lambda _: first_is) as first,
        faulty(chain.deployment.rpc_url, lambda _: second_is) as second,
    ):
        coordinator = through(chain, first.url, second.url)
        coordinator.check()
        first_is = "drop"
        assert coordinator.current_round() == 0
        first_is, second_is = "elsewhere", "drop"
        with pytest.raises(ChainUnreachable, match=f"chain id 1 answered by {first.url}"):
            coordinator.current_round()
        second_is = ""
        assert coordinator.current_round() == 0


def test_only_other_chains_stop_with_the_reason(chain) -> None:
    with (
        faulty(chain.deployment.rpc_url, lambda _: "elsewhere") as one,
        faulty(chain.deployment.rpc_url, lambda _: "elsewhere") as two,
        pytest.raises(
            ChainError, match=r"chain id 1 answered by .* expected 31337 \(chain.id\)"
        ) as caught,
    ):
        through(chain, one.url, two.url).check()
    assert not isinstance(caught.value, ChainUnreachable)


def test_all_away_names_every_address() -> None:
    rpc = Rpc([AWAY, "http://127.0.0.1:10"], "chain.rpc_url", 31337, 1.0)
    with pytest.raises(
        ChainUnreachable,
        match=r":9 \(chain.rpc_url\): no connection.*:10 \(chain.rpc_url\): no conn",
    ):
        rpc.make_request("eth_blockNumber", [])


def test_silent_address_costs_its_share_of_the_patience_only(chain) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        coordinator = through(chain, url, chain.deployment.rpc_url, timeout_seconds=1.0)
        started = time.monotonic()
        assert coordinator.current_round() == 0
        assert 0.4 < time.monotonic() - started < 4
        again = time.monotonic()
        assert coordinator.current_round() == 0
        assert time.monotonic() - again < 0.4


def test_answer_to_another_request_is_not_taken(chain) -> None:
    kinds = iter([None, None, "stale", None])
    with faulty(chain.deployment.rpc_url, lambda _: next(kinds, None)) as proxy:
        rpc = Rpc([proxy.url], "chain.rpc_url", 31337, 5.0)
        assert rpc.make_request("eth_getBalance", ["0x" + "11" * 20, "latest"])["result"] == "0x0"
        version = rpc.make_request("net_version", [])["result"]
        assert version == "31337"


def test_account_service_of_a_lost_first_address_still_answers(chain) -> None:
    rpc = Rpc([AWAY, chain.deployment.rpc_url], "chain.rpc_url", 31337, 5.0)
    assert rpc.choose() == chain.deployment.rpc_url
    rpc.failed(chain.deployment.rpc_url)
    assert rpc.choose() == chain.deployment.rpc_url


def test_answer_to_the_same_request_of_another_client_is_not_taken(chain) -> None:
    """A proxy in front of many nodes mixes up answers; all of them count their requests."""
    kinds = iter([None, None, None, "stale"])
    with faulty(chain.deployment.rpc_url, lambda _: next(kinds, None)) as proxy:
        one, other = (Rpc([proxy.url], "chain.rpc_url", None, 5.0) for _ in range(2))
        for rpc in (one, other):
            assert rpc.make_request("net_version", [])["result"] == "31337"
        assert one.make_request("eth_getBalance", ["0x" + "11" * 20, "latest"])["result"] == "0x0"
        assert other.make_request("net_version", [])["result"] == "31337"


@pytest.mark.usefixtures("usual_recursion_limit")
def test_an_answer_nested_without_end_is_no_answer_of_a_chain(chain, monkeypatch) -> None:
    coordinator = through(chain, chain.deployment.rpc_url)
    decode = Rpc.decode_rpc_response
    monkeypatch.setattr(
        Rpc, "decode_rpc_response", staticmethod(lambda raw: decode(b"[" * 100_000))
    )
    with pytest.raises(ChainError, match="the answer is not JSON-RPC"):
        coordinator.current_round()


@contextmanager
def pouring(piece: bytes, pause_seconds: float) -> Iterator[tuple[str, list[int]]]:
    """The URL of a server whose answers have no end, and how many bytes each of them came to."""
    poured: list[int] = []

    class Pouring(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            number = len(poured)
            poured.append(0)
            with suppress(OSError):  # whoever asked has gone
                while poured[number] < 1 << 30:
                    self.request.sendall(piece)
                    poured[number] += len(piece)
                    time.sleep(pause_seconds)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Pouring) as server:
        server.daemon_threads = True
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", poured
        server.shutdown()


def test_answer_without_end_is_not_taken_in() -> None:
    with pouring(b"0" * 65536, 0) as (url, poured):
        with pytest.raises(
            ChainError, match=f"{url}: an answer of more than 32 MiB; check that this is a chain's"
        ):
            Rpc([url], "", None, 60.0).make_request(RPCEndpoint("eth_blockNumber"), [])
        assert 0 < max(poured) < 64 << 20


def test_answer_that_drips_is_given_up_in_time() -> None:
    with pouring(b" ", 0.05) as (url, _):
        began = time.monotonic()
        with pytest.raises(ChainUnreachable, match="no answer within 2 s"):
            Rpc([url], "", None, 2.0).make_request(RPCEndpoint("eth_blockNumber"), [])
        assert time.monotonic() - began < 10
