"""Send sign-in codes by e-mail, over SMTP."""

import re
import smtplib
import ssl
from email.message import EmailMessage

from worker.account.request_bodies import Refused
from worker.errors import WorkerError
from worker.log import discreet
from worker.runtime.files import LINE, read_secret
from worker.settings import Account as Section

_EMAIL = re.compile(r"[a-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[a-z0-9-]{1,63}([.][a-z0-9-]{1,63})*")
_MAX_EMAIL = 200
_SECONDS = 15.0


class MailRefused(WorkerError):
    """The mail server did not accept the message."""


def normalized(email: str) -> str:
    """Return an e-mail address in normal form. Raises Refused for an invalid one."""
    address = email.strip().lower()
    if len(address) > _MAX_EMAIL or not _EMAIL.fullmatch(address):
        raise Refused(400, "EmailInvalid", "expected an e-mail address such as ada@example.org")
    return address


class Mailer:
    """Sends codes by the mail server of the settings."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._password: str | None = None
        if section.smtp_password_file is not None:
            self._password = read_secret(
                section.smtp_password_file,
                "one line with the mail server's password",
                "account.smtp_password_file",
                LINE,
            )

    def send_code(
        self,
        email: str,
        code: str,
    ) -> None:
        """Send a code. Raises MailRefused.

        The mail never contains an address from the request, which an attacker could choose.
        """
        public_url = self._section.public_url
        place = "" if public_url is None else f" at {public_url}"
        message = EmailMessage()
        message["Subject"] = "Your sign-in code"
        message["From"] = self._section.smtp_from
        message["To"] = email
        message.set_content(
            f"{code}\n\nThis is the code to sign in to hivewright{place}. It is valid for 15"
            " minutes, in the browser\nthat asked for it, and nowhere else. Did you not ask for it?"
            " Then ignore this message.\n"
        )
        try:
            self._send(message)
        except (OSError, smtplib.SMTPException) as error:
            raise MailRefused(
                f"{self._section.smtp_host}:{self._section.smtp_port} (account.smtp_host):"
                f" {type(error).__name__}: {discreet(str(error))[:200]}; expected a mail server"
                " that takes mail from us"
            ) from None

    def _send(self, message: EmailMessage) -> None:
        section = self._section
        host = section.smtp_host or ""
        context = ssl.create_default_context()
        if section.smtp_security == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(
                host, section.smtp_port, timeout=_SECONDS, context=context
            )
        else:
            server = smtplib.SMTP(host, section.smtp_port, timeout=_SECONDS)
        with server:
            if section.smtp_security == "starttls":
                server.starttls(context=context)
            if section.smtp_user is not None:
                server.login(section.smtp_user, self._password or "")
            server.send_message(message)
