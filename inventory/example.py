"""An example inventory: copy this file and put your hosts in.

    .venv/bin/pyinfra -y inventory/NAME.py deploy.py

Run it from the checkout, as often as you like: hosts that match the inventory are not changed.
`pyinfra --dry inventory/NAME.py deploy.py` only prints the changes.

A host is a name and a dict of keys; a group is a list of hosts. docs/configuration.md explains
every key; a value in a comment is the default, unless the comment says otherwise. The nearest value
takes precedence: host, then group, then `all`. An unknown key, a wrong type or a host without a
slot stops the run before it connects to any host, with all mistakes of all hosts. Define only lists
of hosts here: pyinfra takes every list of strings for a group.
"""

# The coordinator: chain, contract, keeper, bootnode, account service, dashboard, judge. One per
# inventory; none if you join somebody else's swarm (then set chain_account_url below). It needs no
# GPU and hardly any CPU.
coordinators = [
    (
        "hub",
        {
            # The address of the host, if it differs from its name. ssh_user, ssh_port, ssh_key and
            # pyinfra's other keys go here too.
            "ssh_hostname": "192.0.2.10",
            # The address at which workers reach it: the account service listens here (port 3000:
            # account_port), and the bootnode announces it (port 38331: bootnode_port). Use a LAN or
            # VPN address.
            "account_host": "192.0.2.10",
            # The dashboard listens on the host itself, port 3001: `ssh -L 3001:localhost:3001 hub`,
            # or tailscale_serve. To show it to everybody who can reach an address of the host:
            # "dashboard_host": "192.0.2.10",
            # A round ends when all workers have reported, or after this many seconds.
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
            # One worker for each GPU, or one on a host without GPUs.
            "slots": "auto",
        },
    ),
    (
        "gpu-2",
        {
            "ssh_hostname": "192.0.2.22",
            # Three workers; a count, such as 3, is the same without differences. Each worker has
            # its own GPU and sees no other, and its own identity, state folder, port (swarm_port,
            # swarm_port + 1 ...) and service: hivewright-worker@0, hivewright-worker@1 ... A dict
            # contains the settings in which a worker differs, and these:
            "slots": [
                {},
                # `gpu`: its number in nvidia-smi; slots with the same number share the GPU.
                {"gpu": 1, "slot_memory_gb": 48.0},
                # `identity`: a local file, the swarm.pem of a worker that moves here. Without it
                # the host makes the slot's key, once, when the slot is enrolled.
                {"gpu": 1},
            ],
            # Limits of each worker of this host: memory in 10^9 bytes, and cores.
            "slot_memory_gb": 64.0,
            "slot_cpus": 8.0,
        },
    ),
    (
        "cpu-1",
        {
            "ssh_hostname": "192.0.2.23",
            # Become root with sudo. Without it, ssh_user must be root.
            "ssh_user": "admin",
            "_sudo": True,
            # A local file with the password, if sudo asks for one:
            # "_sudo_password_file": "secrets/example/cpu-1.password",
            "slots": 1,
            # A setting of the worker, for this host only.
            "model_threads": 8,
            # The package index that this host takes torch from. By default the host's GPUs and
            # driver decide, or pip's configuration on the host, if it names an index or wheels.
            # "pip": always pip's configuration.
            "torch_index": "https://download.pytorch.org/whl/cpu",
        },
    ),
]

# Data of all hosts.
all = (
    ["hub", "gpu-1", "gpu-2", "cpu-1"],
    {
        # --- The release ---
        # A git URL or folder that the hosts can fetch from (default: `origin` of this checkout),
        # and a branch, tag or commit in it, which is looked up once, here.
        "release_repository": "https://git.example.org/hivewright.git",
        "release_ref": "main",
        # For hosts without internet: "wheelhouse" fetches the release and its packages here, and
        # ships what a host lacks over ssh.
        # "release_source": "repository",
        # A local folder, relative to the checkout, for secrets: the first run makes the enrolment
        # token there. Keep it, and keep it out of git (`secrets/` is ignored).
        "secrets_dir": "secrets/example",
        # A worker without progress for this many seconds is restarted.
        "watchdog_seconds": 900,
        # Take a host's lock even if another deploy has it. Only for the command line of one run:
        # `--data break_lock=true`.
        # "break_lock": False,
        #
        # --- ssh ---
        # Connect only to hosts with a known key (not the default, which accepts a new host's key):
        # "ssh_strict_host_key_checking": "yes",
        # "ssh_known_hosts_file": "secrets/example/known_hosts",
        #
        # --- WireGuard between the hosts (docs/operations/connect.md) ---
        # Connect all hosts that set this, with keys that they make themselves.
        # "wireguard": False,
        # Network of the mesh's own addresses; the same on all hosts. A host's address is derived
        # from its name, unless the host sets wireguard_address.
        # "wireguard_subnet": "10.86.0.0/16",
        # "wireguard_address": None,
        # The UDP port, and the name or address at which others reach the host (default:
        # ssh_hostname, or its name); "none": the host is behind a router and connects to others.
        # "wireguard_port": 51820,
        # "wireguard_endpoint": None,
        # Forward traffic between other hosts. With hubs every other host connects to one of them
        # only; without, all connect to all.
        # "wireguard_hub": False,
        #
        # --- Tailscale (docs/operations/connect.md) ---
        # Install Tailscale and log the host in, with an auth key or an OAuth client's secret from a
        # local file; without one by URLs that you open within tailscale_login_seconds.
        # "tailscale": False,
        # "tailscale_auth_key_file": None,
        # "tailscale_login_seconds": 600,
        # Tags requested at login (an OAuth client needs one, such as "tag:hivewright"), and the
        # name in the tailnet (default: the host's own).
        # "tailscale_tags": [],
        # "tailscale_hostname": None,
        # A control server of your own (headscale).
        # "tailscale_login_server": None,
        # Tailscale's own ssh server, and routes that other nodes advertise: True, False, or None,
        # which does not change the host.
        # "tailscale_ssh": None,
        # "tailscale_accept_routes": None,
        # Ports that the host serves in the tailnet: HTTPS port -> port on the host, such as
        # {443: 3000} for the login page; and the same without HTTPS, for tailnets without
        # certificates.
        # "tailscale_serve": {},
        # "tailscale_serve_http": {},
        #
        # --- Figures, trackers and alerts (docs/operations/monitoring.md) ---
        # Every process serves its figures for Prometheus: slot N at this port + N, a coordinator's
        # services at the ports below it. The endpoints have no password: name an address of a
        # private network, host by host, or 0.0.0.0 behind a firewall. The deploy writes the list
        # of endpoints, and monitoring/ has alert rules and a Grafana dashboard.
        # "metrics_port": None,
        # "metrics_host": "127.0.0.1",
        # Trackers of each round's figures, besides rounds.jsonl: "logs/..." in a slot's folder.
        # "tracking_trackio": False,
        # "tracking_tensorboard": False,
        # "off", "offline" (for `wandb sync`), or "online", with a local file that has the key. The
        # deploy puts it into a file of root's on the host, and each slot gets a copy.
        # "tracking_wandb": "off",
        # "tracking_wandb_key_file": "secrets/example/wandb.key",
        # Lines of the logs as JSON, for a collector of logs: "json".
        # "log_format": "text",
        #
        # --- Settings of every role on every host ---
        # The model that the swarm trains. "auto": each machine chooses one by its memory, once;
        # `hivewright check` prints what fits.
        "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
        # For a gated or private model: a local file with a Hugging Face token that may read it. A
        # host has it only during the download; no worker sees it.
        # "model_token_file": "secrets/example/model.token",
        # Workers find the account service at account_host above. To join another swarm, name its
        # account service (or swarm_bootnodes, if it has none). A worker with none of these is
        # refused, unless swarm_enabled is False.
        # "chain_account_url": "http://192.0.2.99:3000",
    },
)
