"""A browser without JavaScript: requests, with the cookies and headers of a browser."""

import re
from html import unescape
from http.cookies import SimpleCookie
from urllib.parse import urljoin, urlsplit

import requests

_HIDDEN = re.compile(r'name="csrf" value="([0-9a-f]+)"')
_MOST_REDIRECTS = 5
FORM = "application/x-www-form-urlencoded"


class Visitor:
    """Somebody with a browser at the page of a service.

    Cookies are kept by hand: `requests` does not send `Secure` ones to loopback, as browsers do.
    """

    def __init__(self, url: str, **headers: str) -> None:
        self.url = url
        self.headers = {"User-Agent": "Mozilla/5.0 (test)", **headers}
        self.cookies: dict[str, str] = {}

    def send(
        self,
        method: str,
        path: str,
        follow: bool = True,
        fields: dict[str, str] | None = None,
        **headers: str,
    ) -> requests.Response:
        place = urljoin(self.url, path)
        for _ in range(_MOST_REDIRECTS):
            cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            answer = requests.request(
                method,
                place,
                data=fields,
                headers=self.headers | headers | ({"Cookie": cookies} if cookies else {}),
                timeout=20,
                allow_redirects=False,
            )
            self._keep(answer)
            if not follow or answer.status_code != 303:
                return answer
            method, fields, place = "GET", None, urljoin(place, answer.headers["Location"])
            assert urlsplit(place).netloc == urlsplit(self.url).netloc, place
        raise AssertionError(f"{place}: redirected without end")

    @property
    def origin(self) -> str:
        """Return the Origin of pages that this browser shows."""
        scheme = self.headers.get("X-Forwarded-Proto", "http")
        return f"{scheme}://{urlsplit(self.url).netloc}"

    def get(self, path: str, follow: bool = True, **headers: str) -> requests.Response:
        return self.send("GET", path, follow, **headers)

    def post(self, path: str, follow: bool = True, **fields: str) -> requests.Response:
        own = {"Origin": self.origin, "Sec-Fetch-Site": "same-origin", "Content-Type": FORM}
        return self.send("POST", path, follow, fields, **own)

    def submit(
        self, path: str, on: str = "/", follow: bool = True, **fields: str
    ) -> requests.Response:
        """Send a form with the token that is in the page `on`."""
        return self.post(path, follow, csrf=self.csrf(on), **fields)

    def csrf(self, on: str = "/") -> str:
        found = _HIDDEN.search(self.get(on).text)
        assert found, f"no form in {on}"
        return found[1]

    @property
    def is_signed_in(self) -> bool:
        return self.get("/", follow=False).status_code == 200

    def begin(self, email: str, **fields: str) -> requests.Response:
        return self.post("/sign-in/email", email=email, **fields)

    def to_provider(self, **fields: str) -> str:
        """Begin to sign in with OpenID Connect; return where the browser goes."""
        answer = self.post("/sign-in/openid", follow=False, **fields)
        assert answer.status_code == 200, texts(answer)
        return answer.headers["Refresh"].removeprefix("0; url=")

    def answer(self, code: str) -> requests.Response:
        return self.post("/sign-in/code", code=code)

    def _keep(self, answer: requests.Response) -> None:
        for header in answer.raw.headers.getlist("Set-Cookie"):
            for name, morsel in SimpleCookie(header).items():
                if morsel["max-age"] == "0":
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value


def texts(answer: requests.Response) -> str:
    """Return a page's text, without tags."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", answer.text)).split())
