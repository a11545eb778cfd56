"""Secrets as they may rest where they should not, and the places where a service leaves anything."""

import json
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus

Secrets = Mapping[str, bytes]


def forms(word: str | bytes) -> Iterator[bytes]:
    """A secret as it may rest: plain, escaped, in hex, and in base64 at each of the three alignments."""
    raw = word.encode() if isinstance(word, str) else word
    yield from (raw, raw.hex().encode(), raw.hex().upper().encode())
    for shift in range(3):
        for encode in (b64encode, urlsafe_b64encode):
            based = encode(b"\0" * shift + raw).rstrip(b"=")
            yield based[4:-2] if shift else based[:-2]
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return
    yield text.encode("utf-16-le")
    for ascii_only in (True, False):
        yield json.dumps(text, ensure_ascii=ascii_only)[1:-1].encode()
    yield repr(text)[1:-1].encode()
    yield repr(raw)[2:-1].encode()
    yield from (quote(text, safe="").encode(), quote_plus(text).encode())


class Search:
    """Looks for secrets in whatever rests somewhere; each hit is told by name and place."""

    def __init__(self, secrets: Secrets) -> None:
        self._forms = {name: tuple(set(forms(secret))) for name, secret in secrets.items()}

    def names(self, data: bytes) -> list[str]:
        return [name for name, each in self._forms.items() if any(form in data for form in each)]

    def data(self, where: str, data: bytes, allowed: Collection[str] = ()) -> list[str]:
        return [f"{name} in {where}" for name in self.names(data) if name not in allowed]

    def files(
        self, folder: Path, allowed: Mapping[Path, Collection[str]], but: Iterable[Path] = ()
    ) -> list[str]:
        """Contents and names of all files. ``allowed`` may hold what they are for; ``but`` is the user's."""
        left_out, hits = set(but), []
        for path in folder.rglob("*"):
            if left_out & {path, *path.parents} or not path.is_file():
                continue
            may = allowed.get(path, ())
            hits += self.data(str(path), path.read_bytes(), may)
            hits += self.data(f"the name {path}", str(path.relative_to(folder)).encode())
        return hits

    def processes(self, pids: Iterable[int]) -> list[str]:
        """What every user of the machine, or its root, may read of a process without stopping it."""
        hits = []
        for pid in pids:
            for name in ("environ", "cmdline", "comm"):
                try:
                    data = Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:  # it has ended
                    continue
                hits += self.data(f"/proc/{pid}/{name} of {_name(pid)}", data)
        return hits


def family(pid: int) -> Iterator[int]:
    """A process and all that come from it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from family(int(child))


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return "?"
