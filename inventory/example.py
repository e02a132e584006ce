"""An inventory: copy this file, put your hosts in, and run

    .venv/bin/pyinfra -y inventory/NAME.py deploy.py

from the checkout. Run it again whenever you like: what is as it should be is left alone. `pyinfra
--dry inventory/NAME.py deploy.py` only says what would change.

A host is a name and a dict of keys; a group is a list of hosts. What a key may be, and its default,
is in docs/configuration.md for settings (`trainer_learning_rate`), and here for everything else. A
key that is nearest to the host wins: host, then group, then `all`. A wrong key, a wrong type or a
host without a slot stops the run, with all mistakes of all hosts, before any host is connected to.
Keep to lists of hosts here: every list of strings is a group.
"""

# The host that carries the swarm: chain, contract, keeper, bootnode, account service, dashboard.
# One per inventory; none if you join a swarm that somebody else hosts (then set chain_account_url
# below). It needs no GPU, next to no CPU.
coordinators = [
    (
        "hub",
        {
            # Where pyinfra finds it, if not under its name; ssh_user, ssh_port, ssh_key ... go the
            # same way.
            "ssh_hostname": "192.0.2.10",
            # The address at which the workers reach it. The account service listens here (port
            # 3000: account_port), the bootnode is announced with it (port 38331: bootnode_port). A
            # LAN or VPN address is a good choice.
            "account_host": "192.0.2.10",
            # The dashboard answers on the host itself, port 3001: `ssh -L 3001:localhost:3001 hub`,
            # or tailscale_serve (docs/operations/connect.md). Here it listens at an address of the
            # host's too; whoever reaches that may look. "dashboard_host": "192.0.2.10", A round
            # ends when all have reported, or after this many seconds.
            "keeper_round_seconds": 600.0,
        },
    ),
]

# The hosts that train.
workers = [
    (
        "gpu-1",
        {
            "ssh_hostname": "192.0.2.21",
            # One worker for each GPU, or one on a host without.
            "slots": "auto",
        },
    ),
    (
        "gpu-2",
        {
            "ssh_hostname": "192.0.2.22",
            # Three workers. A count, such as 3, says it in short: each gets a GPU of its own and
            # sees no other. A dict has the settings in which its slot differs. Each slot gets its
            # own identity, state folder, port (swarm_port, swarm_port + 1 ...) and service:
            # hivewright-worker@0, hivewright-worker@1 ...
            "slots": [
                {},
                # `gpu`: its number in nvidia-smi; slots that name the same one share it.
                {"gpu": 1, "slot_memory_gb": 48.0},
                # `identity` names a file on this side: the swarm.pem of a worker that moves here.
                # Without it the slot's key is made on the host, once, when it is enrolled.
                {"gpu": 1},
            ],
            # What each worker of this host may use at most, where its slot says nothing else.
            "slot_memory_gb": 64.0,
            "slot_cpus": 8.0,
        },
    ),
    (
        "cpu-1",
        {
            "ssh_hostname": "192.0.2.23",
            # pyinfra's own: become root with sudo. Without it, ssh_user must be root.
            "ssh_user": "admin",
            "_sudo": True,
            # Where sudo asks for that user's password: a file on this side that has it.
            # "_sudo_password_file": "secrets/example/cpu-1.password",
            "slots": 1,
            # A setting of the worker, for this host only.
            "model_threads": 8,
            # Which build of torch this host gets: an index of PyTorch's wheels. Left out, the
            # host's GPUs and driver decide, or pip's own configuration on the host, if it names an
            # index or wheels. "pip": that, in any case.
            "torch_index": "https://download.pytorch.org/whl/cpu",
        },
    ),
]

# For all of them.
all = (
    ["hub", "gpu-1", "gpu-2", "cpu-1"],
    {
        # What is installed: a branch, tag or commit, looked up once, here, of a repository that the
        # hosts can fetch from. Without release_repository it is the `origin` of this checkout.
        "release_repository": "https://git.example.org/hivewright.git",
        "release_ref": "main",
        # Folder on this side, relative to the checkout, for what must not be in an inventory: the
        # enrolment token is made there by the first run. Keep it, and keep it out of git
        # (`secrets/` is ignored).
        "secrets_dir": "secrets/example",
        # A worker without progress for this many seconds is restarted.
        "watchdog_seconds": 900,
        # Hosts without internet: this side fetches the release and its packages, and ships what a
        # host lacks over ssh. "release_source": "wheelhouse", Connect the hosts by WireGuard, with
        # keys that they make themselves; more in docs/operations/connect.md. "wireguard": True, Put
        # the hosts into a tailnet: with a key from a file on this side, or, without, by URLs that
        # you open. How it can be told more (tags, headscale, ports that are shown there) is in
        # docs/operations/connect.md. "tailscale": True, "tailscale_auth_key_file":
        # "secrets/example/tailscale.key", Only hosts whose key is known are spoken to. The default
        # is to accept, and remember, a new host's key. "ssh_strict_host_key_checking": "yes",
        # "ssh_known_hosts_file": "secrets/example/known_hosts", Settings for every role on every
        # host, for instance the model that the swarm trains. "auto" leaves the choice to each
        # machine, by its memory, once: `hivewright check` shows what fits.
        "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
        # For a gated or private model: a file on this side with a Hugging Face token that may read
        # it. A host has it only while it fetches the model; no worker ever sees it.
        # "model_token_file": "secrets/example/model.token", Workers find the account service by
        # account_host above. In somebody else's swarm, name it (or swarm_bootnodes, if it has
        # none); without any of these they are refused, unless swarm_enabled is False:
        # "chain_account_url": "http://192.0.2.99:3000",
    },
)
