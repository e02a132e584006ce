"""Ports in the tailnet: what a deploy begins and stops to show, and what it leaves alone."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys.inventory.schema import Deployment
from deploys.tailscale import serve_ports
from deploys.tailscale.serve_ports import NO_HTTPS, Plan, plan
from deploys.tailscale.tailnet import Endpoint, Tailnet, written

LOCAL = "http://127.0.0.1:{}".format


def deployment(
    https: dict[int, int] | None = None, http: dict[int, int] | None = None
) -> Deployment:
    return Deployment(tailscale=True, tailscale_serve=https or {}, tailscale_serve_http=http or {})


def tailnet(
    serves: dict[Endpoint, str] | None = None,
    ours: dict[Endpoint, str] | None = None,
    ports: dict[int, str] | None = None,
    has_https: bool = True,
) -> Tailnet:
    """Return a host's state; each endpoint that is served makes its port used for its scheme."""
    serves = serves or {}
    used = {port: scheme for scheme, port in serves} | (ports or {})
    return Tailnet(serves=serves, ours=ours or {}, ports=used, has_https=has_https)


def after(found: Tailnet, changes: Plan) -> Tailnet:
    """Return the state that a deploy leaves: what it shows, and its record of that."""
    serves = {at: target for at, target in found.serves.items() if at not in changes.off}
    serves |= changes.on
    ours = {**changes.kept, **changes.on}
    foreign = {p: use for p, use in found.ports.items() if use not in ("http", "https")}
    return tailnet(serves, ours, foreign, found.has_https)


@pytest.mark.parametrize(
    ("https", "http", "on"),
    [
        ({443: 3000}, {}, {("https", 443): LOCAL(3000)}),
        ({}, {80: 3000}, {("http", 80): LOCAL(3000)}),
        ({443: 3000}, {80: 3001}, {("https", 443): LOCAL(3000), ("http", 80): LOCAL(3001)}),
        ({}, {}, {}),
    ],
)
def test_ports_of_the_inventory_are_shown(
    https: dict[int, int], http: dict[int, int], on: dict[Endpoint, str]
) -> None:
    changes = plan(deployment(https, http), tailnet())
    assert (changes.on, changes.off, changes.problems) == (on, {}, ())
    assert changes.has_changes is bool(on)


def test_port_that_the_inventory_no_longer_has_is_taken_back_if_it_is_ours() -> None:
    at = ("https", 443)
    ours = tailnet({at: LOCAL(3000)}, {at: LOCAL(3000)})
    assert plan(deployment(), ours).off == {at: LOCAL(3000)}
    changed_since = tailnet({at: LOCAL(9)}, {at: LOCAL(3000)})
    assert plan(deployment(), changed_since).off == {}
    foreign = tailnet({at: LOCAL(3000)})
    assert not plan(deployment(), foreign).has_changes


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (tailnet(has_https=False), f"tailscale_serve: 443: {NO_HTTPS}"),
        (
            tailnet({("https", 443): LOCAL(9)}),
            (
                "tailscale_serve: 443: port 443 shows http://127.0.0.1:9 already, which no deploy"
                " has put there; `tailscale serve --https=443 --set-path=/ off` there, or another"
                " port"
            ),
        ),
        (
            tailnet({("http", 443): LOCAL(9)}),
            (
                "tailscale_serve: 443: port 443 is used for http already; `tailscale serve"
                " --http=443 off` there, or another port"
            ),
        ),
        (
            tailnet(ports={443: "127.0.0.1:22"}),
            (
                "tailscale_serve: 443: port 443 is a TCP forward to 127.0.0.1:22; `tailscale serve"
                " --tcp=443 off` there, or another port"
            ),
        ),
    ],
)
def test_port_that_can_not_be_shown_is_a_problem_with_its_way_out(
    found: Tailnet, problem: str
) -> None:
    changes = plan(deployment({443: 3000}), found)
    assert changes.problems == (problem,)
    assert (changes.on, changes.off) == ({}, {})


def test_port_changes_from_http_to_https_in_one_deploy() -> None:
    found = tailnet({("http", 443): LOCAL(3000)}, {("http", 443): LOCAL(3000)})
    changes = plan(deployment({443: 3000}), found)
    assert changes.off == {("http", 443): LOCAL(3000)}
    assert changes.on == {("https", 443): LOCAL(3000)}
    assert changes.problems == ()


_PORTS = st.sampled_from([80, 443, 8443])
_MAPS = st.dictionaries(_PORTS, st.integers(3000, 3002), max_size=3)
_SERVED = st.dictionaries(
    st.tuples(st.sampled_from(["http", "https"]), _PORTS), st.integers(3000, 3002).map(LOCAL)
).filter(lambda served: len({port for _, port in served}) == len(served))


@hypothesis_settings(max_examples=40, deadline=None, database=None)
@given(
    https=_MAPS,
    http=_MAPS,
    serves=_SERVED,
    data=st.data(),
    forwards=st.dictionaries(_PORTS, st.just("127.0.0.1:22"), max_size=1),
    has_https=st.booleans(),
)
def test_second_deploy_changes_nothing_and_what_is_foreign_stays(
    https: dict[int, int],
    http: dict[int, int],
    serves: dict[Endpoint, str],
    data: st.DataObject,
    forwards: dict[int, str],
    has_https: bool,
) -> None:
    http = {port: local for port, local in http.items() if port not in https}
    serves = {at: target for at, target in serves.items() if at[1] not in forwards}
    recorded = data.draw(st.sets(st.sampled_from(sorted(serves)))) if serves else set()
    ours = {at: data.draw(st.sampled_from([serves[at], LOCAL(1)])) for at in recorded}
    wanted = {("https", port): LOCAL(local) for port, local in https.items()}
    wanted |= {("http", port): LOCAL(local) for port, local in http.items()}
    found = tailnet(serves, ours, forwards, has_https)
    changes = plan(deployment(https, http), found)
    foreign = {at: target for at, target in serves.items() if ours.get(at) != target}
    left = after(found, changes)
    for at, target in foreign.items():
        assert left.serves[at] == target
    for at, target in wanted.items():
        named = any(line.split(": ")[1] == str(at[1]) for line in changes.problems)
        assert left.serves.get(at) == target or named
    assert set(left.serves) <= set(wanted) | set(foreign)
    again = plan(deployment(https, http), left)
    assert (again.on, again.off) == ({}, {})
    assert again.is_recorded
    assert again.problems == changes.problems


def stop(folder: Path, record: str | None, exit_code: int = 0) -> list[str]:
    """Run the commands of a host that is to show nothing; return what `tailscale` was told."""
    file, told = folder / "tailscale-serve", folder / "told"
    if record is not None:
        file.write_text(record)
    script = f'#!/bin/sh\necho "$@" >> {told}\nexit {exit_code}\n'
    (folder / "tailscale").write_text(script)
    (folder / "tailscale").chmod(0o755)
    subprocess.run(
        ["sh", "-c", serve_ports.STOP_SERVING.replace(str(serve_ports.SERVED), str(file))],
        check=True,
        timeout=20,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )
    return told.read_text().splitlines() if told.exists() else []


@pytest.mark.parametrize(
    ("endpoints", "commands"),
    [
        (None, []),
        ([], []),
        ([("https", 443)], ["serve --https=443 --set-path=/ off"]),
        (
            [("http", 80), ("https", 8443)],
            ["serve --http=80 --set-path=/ off", "serve --https=8443 --set-path=/ off"],
        ),
    ],
)
def test_host_that_is_uninstalled_stops_what_a_deploy_has_shown(
    endpoints: Any, commands: list[str], tmp_path: Path
) -> None:
    record = None
    if endpoints is not None:
        record = "".join(f"{written(at)} {LOCAL(3000)}\n" for at in endpoints)
    assert stop(tmp_path, record) == commands
    assert [
        serve_ports.off_command(at).removeprefix("tailscale ") for at in endpoints or ()
    ] == commands
