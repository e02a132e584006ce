"""Read files of the services' user as root, though any entry of its folders may be a link or pipe.

The folders' parents belong to root, so only entries can be links.
"""

# Only the end of a longer file is read; the files that are read here are far shorter.
MAX_BYTES = 1 << 20
_DD = f"dd iflag=nofollow,nonblock,fullblock,skip_bytes bs={MAX_BYTES} count=1 status=none"

# Shell functions. own_file FILE: the end of it, as printable ASCII and line breaks, which is what
# JSON is written in; nothing if FILE is a link, and without waiting if it is a pipe. what_is FILE:
# kind and size; fails without a FILE.
FUNCTIONS = (
    f'own_file() {{ size=$(stat --format=%s "$1" 2>/dev/null) && {_DD} if="$1"'
    f" skip=$((size > {MAX_BYTES} ? size - {MAX_BYTES} : 0)) 2>/dev/null | LC_ALL=C tr -cd"
    " '\\12\\40-\\176'; };"
    " what_is() { LC_ALL=C stat --format='%F,%s' \"$1\" 2>/dev/null; };"
)


def why_not_read(what: str) -> str | None:
    """Return what is wrong with a file, given the output of `what_is`; None: it can be read."""
    kind, _, size = what.partition(",")
    if kind not in ("regular file", "regular empty file"):
        return (
            f"is a {kind}; expected a file of the service's own: stop the service, and find out"
            " which program put it there"
        )
    if int(size) > MAX_BYTES:
        return (
            f"has {size} bytes; expected {MAX_BYTES} at most: stop the service, and find out"
            " which program wrote it"
        )
    return None
