"""Settings of an account service where people have accounts."""

from pathlib import Path

from worker import settings

PASSPHRASE = "correct horse battery staple"
ENROLMENT_TOKEN = "let me in"
HOST = "host@example.org"


def hosted(chain: settings.Settings, folder: Path, **changes: object) -> settings.Settings:
    """Return settings of a service for the chain of `chain`, with its state in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    passphrase_file, token_file = folder / "passphrase", folder / "enrolment.token"
    passphrase_file.write_text(PASSPHRASE + "\n")
    token_file.write_text(ENROLMENT_TOKEN + "\n")
    section = {
        "port": 0,
        "state_dir": str(folder),
        "passphrase_file": str(passphrase_file),
        "enrolment_token_file": str(token_file),
        "operators": [HOST],
        **changes,
    }
    raw = {**chain.model_dump(mode="json", exclude_unset=True), "account": section}
    raw["chain"] = {**raw["chain"], "poll_seconds": 0.2, "timeout_seconds": 5.0}
    return settings.parse(raw, "test")
