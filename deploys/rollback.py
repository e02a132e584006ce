"""Rollback: each host keeps a copy of its state before the last deploy, and can restore it.

A rollback is not a deploy of the earlier commit: the inventory may have changed with the release,
and the earlier release may be unable to read today's settings. So a deploy first copies everything
that it replaces: settings, units, digests of the running services, and the current release.
Identities and state folders are not touched.
"""

import base64
import json
from collections.abc import Iterator

from pyinfra import host
from pyinfra.api import operation

from deploys import account_secrets, answers_view, locks, paths, units
from deploys.facts import PastDeploys, SystemdVersion
from deploys.inventory import secret_files
from deploys.inventory.host_plan import Planned
from deploys.inventory.secret_files import SLOT_SECRETS
from deploys.paths import (
    CONFIGURATION,
    CURRENT,
    DEPLOYED,
    PREVIOUS,
    RETIRED,
    ROLLED_BACK,
    STATE,
    WHOLE,
)
from deploys.services import ACCOUNT_UNIT, COORDINATOR_UNITS, DASHBOARD_UNIT, units_of
from worker.log import discreet, printable


def digest(plan: Planned) -> str:
    """Return the digest of everything that the plan determines and a rollback restores."""
    version, watchdog = host.get_fact(SystemdVersion), plan.host.deployment.watchdog_seconds
    names = units_of(plan.host.services, is_worker=bool(plan.host.slots))
    files: dict[str, str] = {}
    for file, settings in plan.host.settings_files().items():
        files[str(file)] = units.settings_text(settings)
    files |= {name: units.render(name, version, watchdog) for name in names}
    files |= {slot.unit: slot.unit_settings() for slot in plan.host.slots}
    for slot in plan.host.slots:
        files |= {
            str(slot.secret_file(key)): secret_files.token(key, here)
            for key, here in slot.secrets.items()
        }
    secrets = plan.host.account_secrets
    files |= {
        str(account_secrets.file_of(key)): secret_files.token(key, here)
        for key, here in secrets.items()
    }
    if text := account_secrets.drop_in_text(secrets):
        files[ACCOUNT_UNIT] = files.get(ACCOUNT_UNIT, "") + text
    if "dashboard" in plan.host.services:
        shown = plan.host.services["dashboard"].dashboard.node_dirs
        files[DASHBOARD_UNIT] += answers_view.drop_in_text(shown)
    return units.digest(plan.commit, *(part for pair in sorted(files.items()) for part in pair))


# The files in CONFIGURATION that a deploy writes for services; the fleet's token is not among them.
_NAMES = ("*.yaml", f"{account_secrets.PREFIX}*", *(f"*.{name}" for name in SLOT_SECRETS.values()))
_SETTINGS = "'(' " + " -o ".join(f"-name '{name}'" for name in _NAMES) + " ')'"


@operation()
def begin(digest: str) -> Iterator[str]:
    """Save the host's state before anything changes, unless it already matches the plan.

    After an interrupted deploy the state is not worth saving, so the earlier copy stays.
    """
    deployed = host.get_fact(PastDeploys).last
    if deployed in (None, digest):
        host.noop("there is nothing to keep")
        return
    new = f"{PREVIOUS}.new"
    yield (
        f"rm -rf {new} && mkdir -m 700 {new} {new}/settings {new}/units"
        f" && find {CONFIGURATION} -maxdepth 1 {_SETTINGS} -exec cp -p {{}} {new}/settings/ ';'"
        f" && (cd {paths.UNITS} && find . {units.OURS} -exec cp -p --parents {{}} {new}/units/ ';')"
        f" && cp -rp {DEPLOYED} {new}/deployed && readlink {CURRENT} > {new}/current"
        f" && rm -rf {PREVIOUS} && mv -T {new} {PREVIOUS} && rm {DEPLOYED}/{WHOLE}"
    )


@operation()
def finish(digest: str) -> Iterator[str]:
    """Record, as the last operation, that the host matches the plan."""
    if host.get_fact(PastDeploys).last == digest:
        host.noop("the host is whole")
        return
    yield f"echo {digest} > {DEPLOYED}/{WHOLE}"


@operation()
def go_back(reason: str = "its operator asked for it") -> Iterator[str]:
    """Restore the host's state before its last deploy; services that are unchanged keep running.

    The host stores the reason, which its services report.
    """
    yield locks.held(_GO_BACK.replace("RECORD\n", record_script(reason)))


_MAX_REASON = 500


def record_script(reason: str) -> str:
    """Return shell commands that note on the host which release it leaves, and why.

    `$old` is the copy that is restored. If an earlier rollback to this copy was interrupted, its
    note stays. The file's time is that of the rollback.
    """
    text = json.dumps(printable(discreet(reason))[:_MAX_REASON])
    coded = base64.b64encode(text.encode()).decode()
    return f"""if [ ! {ROLLED_BACK} -nt $old ]; then
  printf '{{"release": "%s", "reason": %s}}\\n' "$(basename "$(readlink {CURRENT})")" \\
    "$(echo {coded} | base64 -d)" > {ROLLED_BACK}.new
  chmod 644 {ROLLED_BACK}.new
  mv {ROLLED_BACK}.new {ROLLED_BACK}
fi
"""


# Units in the order of their dependencies; workers come last.
_ORDER = " ".join(COORDINATOR_UNITS)
_GO_BACK = f"""set -e
old={PREVIOUS}
fail() {{ echo "$1" >&2; exit 1; }}
[ -d $old ] || fail 'no earlier deploy is kept on this host; there is nothing to go back to'
release=$(cat $old/current)
[ -d "$release/environment/" ] || fail "$release is gone; deploy it again"
rm -f {DEPLOYED}/{WHOLE}
for digest in $(ls {DEPLOYED}); do
  [ ! -e $old/deployed/$digest ] || continue
  systemctl disable --now --quiet $digest
  rm -f {DEPLOYED}/$digest
done
find {CONFIGURATION} -maxdepth 1 {_SETTINGS} -delete
{units.REMOVE_OURS}
cp -p $old/settings/* {CONFIGURATION}/
cp -rp $old/units/. {paths.UNITS}/
RECORD
ln -sfn "$release" {CURRENT}.new
mv -T {CURRENT}.new {CURRENT}
touch {ROLLED_BACK}
for file in $old/settings/worker-*.yaml; do
  slot=$(basename "$file" .yaml)
  kept=$(find {RETIRED} -maxdepth 1 -type d -name "$slot-*" 2>/dev/null | sort | tail -n 1)
  [ -e {STATE}/$slot ] || [ -z "$kept" ] || mv -T "$kept" {STATE}/$slot
done
for file in $old/settings/*.yaml; do
  role=$(basename "$file" .yaml)
  case $role in worker-*) continue;; esac
  kept=$(find {RETIRED} -mindepth 2 -maxdepth 2 -type d -path "*/coordinator-*/$role" 2>/dev/null \\
    | sort | tail -n 1)
  [ -e {STATE}/$role ] || [ -z "$kept" ] || mv -T "$kept" {STATE}/$role
done
systemctl daemon-reload
failed=
for unit in {_ORDER} $(cd $old/deployed && ls | grep worker@ || true); do
  [ -e $old/deployed/$unit ] || continue
  if ! cmp -s $old/deployed/$unit {DEPLOYED}/$unit || ! systemctl is-active --quiet $unit; then
    rm -f {DEPLOYED}/$unit
    systemctl reset-failed $unit 2>/dev/null || true
    systemctl enable --quiet $unit
    systemctl restart $unit && cp -p $old/deployed/$unit {DEPLOYED}/$unit || failed="$failed $unit"
  fi
done
[ -z "$failed" ] || fail "these do not start again:$failed; journalctl says why"
cp -p $old/deployed/{WHOLE} {DEPLOYED}/{WHOLE}
"""
