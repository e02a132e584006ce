"""Run a `hivewright` command on a host as a slot's worker runs: user, limits, GPU, isolation."""

import shlex

from deploys import paths, units
from deploys.paths import CACHE, CURRENT, LOGS, MODELS, STATE, USER, settings_file, state_dir
from deploys.services import GPU_UNIT, worker_unit

MODEL_TOKEN = "model.token"  # noqa: S105 - a file name


def folders_of_slot(number: int) -> tuple[str, ...]:
    """Return the properties with which a command sees a slot's state, its cache and the models."""
    own, cache = state_dir(number), CACHE / f"worker-{number}"
    return (
        f"CacheDirectory=hivewright/{cache.name}",
        f"BindPaths={own} {cache}",
        f"BindReadOnlyPaths=-{MODELS}",
        f"Environment=HOME={cache}",
    )


def as_slot(
    number: int,
    command: str,
    *properties: str,
    rest: str = "",
) -> str:
    """Return shell commands that run a `hivewright` command as a unit with the slot's properties.

    It is confined like a service (templates/service.j2), because it may talk to untrusted peers.
    `rest`: shell text after the command, such as options and redirections.
    """
    properties = (
        f"User={USER}",
        f"WorkingDirectory={CURRENT}",
        "NoNewPrivileges=yes",
        "PrivateTmp=yes",
        "PrivateUsers=yes",
        "ProtectSystem=strict",
        f"TemporaryFileSystem={STATE}:ro {CACHE}:ro {LOGS}:ro",
        f"IPAddressDeny={units.METADATA}",
        f"Wants={GPU_UNIT}",
        f"After={GPU_UNIT}",
        *properties,
    )
    run = shlex.join(
        [
            "systemd-run",
            "--quiet",
            "--pipe",
            "--wait",
            "--collect",
            *(f"--property={p}" for p in properties),
        ]
    )
    settings = settings_file(f"worker-{number}")
    program = f"{CURRENT}/environment/bin/python -B -m worker {command} --settings {settings}"
    if any(each.startswith("LoadCredential=") for each in properties):
        # Only the unit knows where systemd puts it.
        program = (
            f"/bin/sh -c 'exec {program} --token-file \"$CREDENTIALS_DIRECTORY/{MODEL_TOKEN}\"'"
        )
    # Includes settings of foreign drop-ins, such as the address of a proxy.
    drop_ins = f"{paths.UNITS}/{worker_unit(number)}.d/*.conf"
    share = f"grep -hsE '^(Environment|Memory[A-Za-z]+|CPUQuota)=.' {drop_ins}"
    return (
        f'{share} | {{ while read -r line; do set -- "$@" "--property=$line"; done; {run} "$@"'
        f" {program}{rest and f' {rest}'}; }}"
    )
