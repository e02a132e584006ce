"""Sections about the chain and the services around it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from worker.runtime.state_dir import StateDir
from worker.settings.value_types import (
    Address,
    Host,
    Multiaddr,
    Network,
    Port,
    Positive,
    Seconds,
    Section,
    Url,
    Urls,
)


class Chain(Section):
    """The chain: any EVM JSON-RPC with our coordinator contract, or with one that has its ABI."""

    rpc_url: Urls | None = None
    """One JSON-RPC address, or a list of them: the next one is used if one fails. None: the account
    service (`account_url`/rpc). Without that either there is no chain: the node counts its rounds
    itself and earns nothing."""
    id: Positive = 31337
    """Chain id that `rpc_url` must have. An address with another one is not used."""
    contract: Address | None = None
    """Address of the swarm coordinator contract. None: as in `deployment_file`, or else from the
    account service."""
    deployment_file: Path | None = None
    """File that `hivewright chain deploy` wrote: JSON with rpc_url, chain_id and contract. For
    roles on the chain's host."""
    contract_block: Annotated[int, Field(ge=0)] | None = None
    """Block in which the contract was created; its log is read from there. None: as in
    `deployment_file`, or else searched on the chain, which needs a node with the state of that
    time."""
    account_url: Url | None = None
    """Address of the account service, which signs and sends for this node."""
    account_api: Literal["hivewright", "rl-swarm"] = "hivewright"
    """Kind of the service at `account_url`. `rl-swarm`: a login server of RL Swarm, where
    a person has signed in; `org_id`, `rpc_url` and `contract` are needed too."""
    account_token_file: Path | None = None
    """File with this node's token for the account service. None: `account.token` in the state
    folder."""
    enrolment_token_file: Path | None = None
    """File with the fleet's enrolment token, read once by `hivewright enrol`."""
    org_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Name of an account at the account service (`orgId` of the login API). None: the account that
    the node's token belongs to; at the account service, `hivewright` for the operator's account."""
    timeout_seconds: Seconds = 10.0
    """Longest time for one answer of the chain or the account service, in seconds."""
    poll_seconds: Seconds = 2.0
    """Seconds between two readings of the round while waiting for the next one."""
    max_gas_price_gwei: Annotated[float, Field(gt=0)] | None = None
    """Highest gas price of a transaction, in 10^9 wei. A price that a node refuses as too low is
    raised up to this. None: up to five times the price that the chain asks for."""
    wallet_dir: Path | None = None
    """Folder of this node's own wallet, for a node without an account service: `wallet.json`, an
    encrypted keystore that `hivewright enrol` makes, and the journal of its transactions."""
    wallet_password_file: Path | None = None
    """File with the wallet's password, such as a systemd credential: /run/credentials/UNIT/NAME."""
    submit_every_rounds: Positive | None = 1
    """Send rewards to the chain when this many rounds wait; until then they are in the ledger.
    None: only by `submit_every_minutes`."""
    submit_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Send rewards when the oldest has waited this long, in minutes. None: only by
    `submit_every_rounds`."""

    @property
    def operator_org_id(self) -> str:
        """Return the name of the operator's account."""
        return self.org_id or "hivewright"

    @property
    def rpc_urls(self) -> tuple[str, ...]:
        """Return the addresses in `rpc_url`; empty if it is not set."""
        return (self.rpc_url,) if isinstance(self.rpc_url, str) else self.rpc_url or ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.submit_every_rounds is None and self.submit_every_minutes is None:
            raise ValueError(
                "submit_every_rounds and submit_every_minutes are both None: nothing would ever be"
                " sent"
            )
        if self.wallet_dir is not None:
            self._check_wallet()
        if self.account_api == "rl-swarm":
            self._check_login_server()
        return self

    def _check_login_server(self) -> None:
        for name in ("account_url", "org_id", "rpc_url", "contract"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"account_api is rl-swarm and {name} is not set; expected it, because a login"
                    " server of RL Swarm does not tell it"
                )

    def _check_wallet(self) -> None:
        if self.account_url is not None:
            raise ValueError(
                "account_url and wallet_dir are both set; expected only one of them, the signer"
            )
        if self.wallet_password_file is None:
            raise ValueError(
                "wallet_dir is set and wallet_password_file is not; expected a file with its"
                " password"
            )
        if self.rpc_url is None and self.deployment_file is None:
            raise ValueError(
                "wallet_dir is set, rpc_url and deployment_file are not; expected the chain of the"
                " wallet in one of them"
            )


def chain_of_node(chain: Chain, state_dir: Path) -> Chain:
    """Return `chain` with the token's path, which is in `state_dir` unless the settings set it."""
    if chain.account_url is None or chain.account_token_file is not None:
        return chain
    return chain.model_copy(update={"account_token_file": StateDir(state_dir).account_token})


class Anvil(Section):
    """The embedded chain (`hivewright chain up`)."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 8545
    """TCP port of its JSON-RPC."""
    state_file: Path = Path("/var/lib/hivewright/chain/state.json")
    """File of the chain's state."""
    block_seconds: Annotated[int, Field(ge=3)] = 3600
    """Seconds between two blocks without transactions. With transactions a block is made at
    once."""
    history_blocks: Annotated[int, Field(ge=64)] = 4096
    """Number of the newest blocks of which receipts, logs and call data are kept; the contract's
    state is kept forever. Audits need those of `audit.rounds`, at most two blocks for each node in
    each round."""
    binary: Path | None = None
    """The anvil program. None: the one that `make` or the deploy installed."""


class Account(Section):
    """The account service: the keys and transactions of the fleet's account, and of people's."""

    host: Host = "127.0.0.1"
    """Address to listen on, in addition to 127.0.0.1."""
    port: Port = 3000
    """TCP port."""
    state_dir: Path = Path("/var/lib/hivewright/account")
    """Folder of the operator's key, the token secret, the journals of transactions, and the
    database of accounts."""
    names: tuple[Host, ...] = ()
    """Domain names under which browsers may reach it, besides its addresses and the host's own
    name."""
    enrolment_token_file: Path | None = None
    """File with the token that new nodes must send once. None: enrolment is closed."""
    passphrase_file: Path | None = None
    """File with the passphrase that encrypts people's keys, such as a systemd credential. None:
    people have no accounts here, and there is no sign-in page."""
    public_url: Url | None = None
    """Address of the sign-in page for people, such as https://swarm.example.org. None: the one that
    a browser used. Passkeys, and providers of `oidc_issuer`, need an address that stays."""
    dashboard_url: Url | None = None
    """Address of the dashboard, to which the pages link. None: no link. A deploy sets it if the
    inventory tells the address."""
    operators: tuple[str, ...] = ()
    """E-mail addresses of people who sign in to the operator's account and see all others."""
    sign_up: Literal["open", "invitation"] = "open"
    """People who get an account: everyone who proves an e-mail address, or those with an
    invitation."""
    max_nodes: Positive = 10
    """Nodes that a new account may link. The host can change it for each account."""
    trusted_networks: tuple[Network, ...] = ("100.64.0.0/10", "fd7a:115c:a1e0::/48")
    """Networks that encrypt, such as a VPN: people in them may sign in without HTTPS. Default: the
    addresses of Tailscale."""
    tailscale_login: bool = False
    """Sign people in by the headers of `tailscale serve`, which are believed only on connections
    that root of this machine makes, as tailscaled does. A deploy sets it with `tailscale_serve`."""
    smtp_host: Host | None = None
    """Mail server for sign-in codes. None: the host prints them (`hivewright account code`)."""
    smtp_port: Port = 587
    """TCP port of the mail server."""
    smtp_security: Literal["starttls", "tls", "none"] = "starttls"
    """Encryption of the connection to the mail server."""
    smtp_user: str | None = None
    """Name to log in with at the mail server. None: without a login."""
    smtp_password_file: Path | None = None
    """File with the password of `smtp_user`."""
    smtp_from: str = "hivewright@localhost"
    """Sender's address of the mails."""
    oidc_issuer: Url | None = None
    """OpenID Connect provider, such as https://accounts.google.com. None: no such sign-in."""
    oidc_name: str = "OpenID"
    """Name of the provider on the sign-in page, such as Google."""
    oidc_client_id: str | None = None
    """Client id that the provider gave for `public_url`/sign-in/openid/callback."""
    oidc_client_secret_file: Path | None = None
    """File with the client secret. None: a public client, by PKCE alone."""
    behind_proxy: bool = False
    """Expect requests from this machine to come through a proxy that names its client in
    X-Forwarded-For, as `tailscale serve` does. Wrong tokens are then counted for that client. A
    deploy sets it with `tailscale_serve`."""
    rpc_proxy: bool = True
    """Serve JSON-RPC at /rpc to callers with a node's token, and to people who are signed in at the
    page: reads of the contract, and signed transactions to it. For nodes without a route to the
    chain."""

    @model_validator(mode="after")
    def _check_ways_in(self) -> Self:
        if self.oidc_issuer is not None and self.oidc_client_id is None:
            raise ValueError(
                "oidc_issuer is set and oidc_client_id is not; expected the client id that the"
                " provider gave"
            )
        if self.smtp_user is not None and self.smtp_password_file is None:
            raise ValueError(
                "smtp_user is set and smtp_password_file is not; expected a file with its password"
            )
        return self


class Dashboard(Section):
    """The web page about the swarm. It reads the chain every `chain.poll_seconds`."""

    host: Host = "127.0.0.1"
    """Address to listen on, in addition to 127.0.0.1. Only the signed-in owner sees secrets on the
    page."""
    port: Port = 3001
    """TCP port."""
    state_dir: Path = Path("/var/lib/hivewright/dashboard")
    """Folder of the history, of the owner's token, and of the file `address`, the page's URL."""
    names: tuple[Host, ...] = ()
    """Domain names under which browsers may reach it, besides its addresses and the host's own
    name."""
    accounts_url: Url | None = None
    """Address of the sign-in page, to which the page links. None: no link. A deploy sets it if the
    inventory tells the address."""
    audit_file: Path | None = None
    """Report of an audit, such as the keeper's `audit/audit.json`, whose verdicts are shown. None:
    no verdicts."""
    show_fleet: bool = False
    """Show hosts and slots, with state, reward, warnings and GPU from their metrics, to everybody
    who can open the page. False: only to the owner, who signs in with the token in `state_dir`."""
    targets_file: Path | None = None
    """Targets of Prometheus that name the metrics' endpoints. A deploy sets it."""
    node_dirs: tuple[Path, ...] = ()
    """State folders of nodes on this machine, of whose answers the owner sees a sample. The
    dashboard must be allowed to read them. A deploy names the slots on the dashboard's host, and
    shows it their answers only."""
    count_unaudited: bool = True
    """Rank peers by all rewards on the contract (unaudited ones are marked). False: only by rewards
    that the report in `audit_file` confirms. Audits draw a sample: raise `audit.sample` for
    that."""

    @model_validator(mode="after")
    def _check_counted(self) -> Self:
        if not self.count_unaudited and self.audit_file is None:
            raise ValueError(
                "count_unaudited is false and audit_file is not set; expected the report of an"
                " audit"
            )
        return self

    @model_validator(mode="after")
    def _check_fleet(self) -> Self:
        if self.show_fleet and self.targets_file is None:
            raise ValueError("show_fleet is true and targets_file is not set; expected a file")
        return self


class Market(Section):
    """The prediction market, in which nodes bet on the answers to a judge's questions."""

    enabled: bool | None = None
    """Take part. None: if the swarm has a market, which the node logs at its start. For `hivewright
    chain deploy`: create the market's contract; None: on the embedded chain."""
    contract: Address | None = None
    """Address of the market's contract. None: as in `chain.deployment_file`, or else from the
    account service."""
    judge_url: Url | None = None
    """Address of the judge. None: from the account service, which gives to nodes what it has
    here."""
    policy: Literal["even", "kelly"] = "even"
    """Amount of a bet. even: the balance, divided by the game's remaining rounds, on the choice
    that the model finds most likely; kelly: `kelly_fraction` of the bet that lets the balance grow
    fastest if the model's probabilities are right and nobody bets later, and none without that."""
    kelly_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of Kelly's bet to make, because models are overconfident."""
    seconds_per_round: Seconds = 10.0
    """Longest time by which the market may delay a training round, in seconds."""
    poll_seconds: Seconds = 5.0
    """Seconds between two readings of the judge's clue."""
    record_file: Path | None = None
    """File with a line for each clue, bet and result. None: `logs/prg_record.txt` in the state
    folder. A deploy sets it to `prg_record.txt` in the service's log folder."""


class Judge(Section):
    """The process that runs the market's games, and asks evaluation questions (`hivewright judge`).

    Its tasks are those of the `environment` section.
    """

    host: Host = "127.0.0.1"
    """Address to listen on, in addition to 127.0.0.1."""
    port: Port = 3002
    """TCP port."""
    state_dir: Path = Path("/var/lib/hivewright/judge")
    """Folder of the game in progress, its transactions, the last 1,000 games, and the digests of
    problems that were asked."""
    names: tuple[Host, ...] = ()
    """Domain names under which browsers may reach it, besides its addresses and the host's own
    name."""
    key_file: Path = Path("/var/lib/hivewright/keeper/judge.key")
    """The judge's key, which `hivewright chain deploy` makes in `keeper.state_dir`."""
    rounds: Annotated[int, Field(ge=1, le=64)] = 3
    """Rounds of a game, with a clue each."""
    round_seconds: Seconds = 120.0
    """Duration of a round of a game, in seconds."""
    pause_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Pause between two games, in seconds."""
    choices: Annotated[int, Field(ge=2, le=64)] = 4
    """Choices of a game."""
    problems_file: Path | None = None
    """File with problems in place of tasks, one JSON object per line: `clues` (a text for each
    round), `choices` (texts) and `answer` (index of the right choice, 0 the first). Each is asked
    once, as its answer is public then. None: tasks of the environment, of which each round shows
    more."""
    max_games: Positive | None = None
    """Number of games to run. None: run forever."""


class Keeper(Section):
    """The process that advances the swarm's rounds and publishes its bootnodes."""

    state_dir: Path = Path("/var/lib/hivewright/keeper")
    """Folder of the contract owner's key (owner.key), deployment.json, status.json, and the list of
    published bootnodes."""
    round_seconds: Seconds = 600.0
    """End a round after this time, in seconds, even if peers have not reported."""
    min_round_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Shortest duration of a round, in seconds."""
    ready_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """End a round when this share (rounded up) of the peers that reported in one of the two rounds
    before it has reported. New peers do not delay it; peers that are gone do so for two rounds, up
    to `round_seconds`."""
    min_peers: Positive = 1
    """No round ends before this many peers are registered, nor by `ready_fraction` before this many
    have reported."""
    publish_bootnodes: tuple[Multiaddr, ...] = ()
    """Bootnode addresses to publish on the chain. The keeper withdraws those that it published and
    that are no longer in this list; bootnodes that others added stay."""
    bootnode_file: Path | None = None
    """File with the address of a bootnode on the same host (`multiaddr` in its state folder), to be
    published too."""
    poll_seconds: Seconds = 1.0
    """Seconds between two readings of the chain."""


class Audit(Section):
    """Audits of submitted rewards (`hivewright audit`, and the keeper)."""

    state_dir: Path | None = None
    """Folder of audit.json, the evidence of contradictions, and the auditor's own key. None:
    `audit` in `keeper.state_dir`."""
    every_rounds: Annotated[int, Field(ge=0)] = 10
    """Rounds between two audits by the keeper, in a separate process. 0: no audits. It can judge
    only the task families in `environment.families`, so set them to the swarm's; a deploy adds
    those of its workers."""
    rounds: Positive = 16
    """Number of the newest rounds to audit. Peers keep `swarm.audit_rounds`."""
    sample: Positive = 32
    """Most rewards, drawn at random, to recompute in one audit."""
    timeout_seconds: Seconds = 120.0
    """Longest time for an audit to find and ask peers, in seconds."""
