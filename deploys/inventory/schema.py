"""The keys of host data that are not settings of a role: what is installed, and how."""

import re
from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from worker import settings

Text = Annotated[str, Field(min_length=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
# Limits beyond which systemd, or a machine, can't use the values.
SlotMemory = Annotated[float, Field(ge=0.1, le=1e6, allow_inf_nan=False)]
SlotCpus = Annotated[float, Field(ge=0.01, le=1e4, allow_inf_nan=False)]
MAX_SECONDS = 30 * 24 * 3600
AUTO: Literal["auto"] = "auto"
MAX_SLOTS = 256
# Larger numbers have no use in an inventory, and Python prints none of more than 4300 digits.
_MAX_BITS = 1024
SLOTS_MAY_BE = "auto, a count of at least 1, or a list with a dict of settings for each"
# Type of an error whose message contains the value already.
WHOLE_MESSAGE = "whole_message"
# The keys in which each slot of a host differs from it. "auto": one slot for each GPU.
Slots = Literal["auto"] | tuple[Mapping[str, Any], ...]
# `torch_index`: as pip on the host is configured.
PIP = "pip"


def parse_slots(value: object) -> Slots | None:
    """Parse the inventory's `slots`: auto, a count, or a list with the keys of each.

    Raises ValueError.
    """
    if value is None or value == AUTO:
        return AUTO if value else None
    num_slots = len(value) if isinstance(value, list | tuple) else value
    if isinstance(num_slots, int) and num_slots > MAX_SLOTS:
        raise _wrong_slots(f"got {num_slots}; expected at most {MAX_SLOTS} on one host")
    if isinstance(value, list | tuple) and value:
        if wrong := [slot for slot in value if not isinstance(slot, dict)]:
            raise _wrong_slots(f"got {', '.join(map(repr, wrong))}; expected {SLOTS_MAY_BE}")
        return tuple(value)
    if type(value) is int and value > 0:
        return ({},) * value
    raise _wrong_slots(f"got {value!r}; expected {SLOTS_MAY_BE}")


def is_too_large(value: object) -> bool:
    """Return whether a value is a number that no message can contain."""
    return isinstance(value, int) and value.bit_length() > _MAX_BITS


def _wrong_slots(message: str) -> PydanticCustomError:
    return PydanticCustomError(WHOLE_MESSAGE, "{message}", {"message": message})


def pick(
    data: Mapping[str, Any],
    names: Container[str],
) -> dict[str, Any]:
    """Return the items of `data` with these names."""
    return {name: value for name, value in data.items() if name in names}


def problems_of(error: ValidationError) -> list[str]:
    """Return a message for each mistake that pydantic has found."""
    return [
        f"{'/'.join(map(str, problem['loc']))}: {_message(problem)}" for problem in error.errors()
    ]


def _message(problem: ErrorDetails) -> str:
    if problem["type"] == WHOLE_MESSAGE:
        return problem["msg"]
    expected = re.sub("^(Input should be|Value error,) ", "", problem["msg"])
    if form := re.fullmatch(r"String should match pattern '(.*)'", problem["msg"]):
        expected = settings.form(form[1])
    else:
        expected = settings.plainly(expected)
    return f"got {problem['input']!r}; expected {expected}"


class Deployment(BaseModel):
    """The keys of host data that are not settings of a role: what is installed, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    slots: Annotated[Slots | None, BeforeValidator(parse_slots)] = None
    """Workers on this host: `auto`, a count, or a list with one dict for each worker.

    `auto` is one per GPU, or one on a host without GPUs. With a count each worker has its own GPU,
    if the host has any. A dict contains the settings in which the worker differs.
    """
    slot_memory_gb: SlotMemory | None = None
    """Memory (in 10^9 bytes) that each worker may use at most. None: all."""
    slot_cpus: SlotCpus | None = None
    """Cores that each worker may use at most, such as 3.5. None: all."""
    release_repository: Text | None = None
    """Git URL or folder that hosts can fetch from. None: `origin` of the operator's checkout."""
    release_ref: Text = "main"
    """Branch, tag or commit that is deployed."""
    release_source: Literal["repository", "wheelhouse"] = "repository"
    """How the release reaches the host.

    `repository`: the host fetches it and its packages itself. `wheelhouse`: the operator's side
    does, and ships missing files over ssh; the host needs no internet.
    """
    torch_index: Annotated[str, Field(pattern=rf"^({PIP}|(https?|file)://\S+)$")] | None = None
    """Package index to take torch from, such as https://download.pytorch.org/whl/cpu.

    None: the build that fits the host's GPUs and driver, unless pip on the host has an index or
    wheels of its own. `pip`: as pip is configured on the host or, with a wheelhouse, on the
    operator's side.
    """
    secrets_dir: Text = "secrets"
    """Folder on the operator's side, relative to the checkout, for secrets of the fleet."""
    break_lock: bool = False
    """Take a host's lock even if another run has it. For one run: `--data break_lock=true`."""
    watchdog_seconds: int = Field(default=900, gt=0, le=MAX_SECONDS)
    """A worker without progress for this long is restarted. Must exceed its slowest step."""
    wireguard: bool = False
    """Connect the host to all others that set this, by WireGuard. False: remove it from them."""
    wireguard_subnet: str = "10.86.0.0/16"
    """Network of the mesh's own addresses; the same on all hosts."""
    wireguard_address: str | None = None
    """The host's address in the mesh. None: derived from its name."""
    wireguard_port: Port = 51820
    """UDP port."""
    wireguard_endpoint: str | None = None
    """Name or address at which the others reach the host. None: its ssh_hostname, or name.

    `none`: nobody reaches it; it is behind a router and connects to the others.
    """
    wireguard_hub: bool = False
    """Forward traffic between hosts of the mesh.

    If there are hubs, every other host connects to one of them only; without, all connect to all.
    """
    tailscale: bool = False
    """Install Tailscale and log the host in. False: an existing Tailscale is not changed."""
    tailscale_auth_key_file: str | None = None
    """Local file with an auth key or an OAuth client's secret. None: a person opens a login URL."""
    tailscale_tags: list[Annotated[str, Field(pattern=r"^tag:[A-Za-z][A-Za-z0-9-]*$")]] = []
    """Tags requested at login. An OAuth client needs one."""
    tailscale_hostname: (
        Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] | None
    ) = None
    """Name in the tailnet. None: the host's own."""
    tailscale_ssh: bool | None = None
    """Let the tailnet's policy decide who may log in over ssh, by Tailscale's own ssh server.

    None: not changed.
    """
    tailscale_accept_routes: bool | None = None
    """Use subnet routes that other nodes advertise. None: not changed."""
    tailscale_login_server: Url | None = None
    """A control server of your own (headscale). None: Tailscale's."""
    tailscale_login_seconds: int = Field(default=600, gt=0, le=MAX_SECONDS)
    """How long a run waits for the people who open the login URLs."""
    tailscale_serve: dict[Port, Port] = {}
    """HTTPS port in the tailnet -> port on this host that it serves, such as {443: 3000}.

    The tailnet must have HTTPS certificates.
    """
    tailscale_serve_http: dict[Port, Port] = {}
    """Like tailscale_serve, without encryption of its own.

    For tailnets without HTTPS certificates, such as those of a control server of your own.
    """

    @property
    def overrides(self) -> tuple[Mapping[str, Any], ...]:
        """The keys in which each slot differs; for `auto`, those of the first slot."""
        slots = self.slots or ()
        return ({},) if isinstance(slots, str) else slots
