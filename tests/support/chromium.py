"""Debian's Chromium without a window, driven over a pipe by the DevTools protocol; no port, no other program.

Source of the words: https://chromedevtools.github.io/devtools-protocol/. A browser is for one test.
"""

import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

from support import programs
from support.waiting import WAIT_S

FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1280,900",
)
Json = dict[str, Any]
Scheme = Literal["dark", "light"]
SCHEMES: Final[tuple[Scheme, ...]] = ("dark", "light")
_LEFT: Final = "navigated or closed"  # what an answer says whose page has gone


class Chromium:
    """One tab. ``complaints`` are what the console said of errors, and violations of the content policy."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._number = 0
        self._tab = ""
        self._loaded = 0
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> Json:
        """A command, and its answer."""
        answer = self._answer(method, **parameters)
        assert "error" not in answer, f"{method}: {answer['error']}"
        found: Json = answer["result"]
        return found

    def _answer(self, method: str, **parameters: object) -> Json:
        """The answer to a command, or its error."""
        self._number += 1
        message: Json = {"id": self._number, "method": method, "params": parameters}
        if self._tab:
            message["sessionId"] = self._tab
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                return answer

    def _next(self) -> Json:
        deadline = time.monotonic() + WAIT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium said nothing for {WAIT_S} s"
            piece = os.read(self._from, 1 << 16)
            assert piece, "Chromium has ended: see chromium.log in the test's folder"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: Json = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, said: Json) -> None:
        if method == "Page.loadEventFired":
            self._loaded += 1
        elif method == "Log.entryAdded" and said["entry"]["level"] in {"error", "warning"}:
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        elif method == "Audits.issueAdded" and "ContentSecurityPolicy" in said["issue"]["code"]:
            self.complaints.append(json.dumps(said["issue"]))

    # -- what a person does ------------------------------------------------------------------------------

    def appear(self, scheme: Scheme) -> None:
        """The colours that the person prefers."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Load a page, and wait until all that belongs to it is there."""
        before = self._loaded
        self.call("Page.navigate", url=url)
        self._wait_for_load(before)

    def submit(self, form: str) -> None:
        """Press the button of a form, by CSS selector, and wait for the page that it leads to."""
        before = self._loaded
        self.evaluate(f"document.querySelector({json.dumps(form)}).querySelector('button').click()")
        self._wait_for_load(before)

    def _wait_for_load(self, before: int) -> None:
        while self._loaded == before:
            self._next()

    def evaluate(self, expression: str) -> Any:  # noqa: ANN401 -- whatever the page says
        """The value of an expression in the page; in the next one, if the page is left meanwhile."""
        answer = self._answer("Runtime.evaluate", expression=expression, returnByValue=True)
        while _LEFT in str(answer.get("error", "")):
            answer = self._answer("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer.get("result", answer), answer
        return answer["result"]["result"].get("value")

    def picture(self, name: str) -> None:
        """The whole page as PNG, for a person: in the folder that the environment names, else nowhere.

        It is taken in any case: the page has been drawn at its size then, and can be measured.
        """
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        width = max(size["width"], self.evaluate("innerWidth"))  # it is drawn without the bar to scroll
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        if folder := os.environ.get("KMS_TEST_PICTURES"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{name}.png").write_bytes(b64decode(taken["data"]))

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )


@contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """Start it, with a profile of its own in ``folder``. It reads commands from 3 and writes to 4."""
    program = programs.program("chromium")
    command_out, command_in = os.pipe()
    answer_out, answer_in = os.pipe()
    shell = [programs.program("bash"), "-c", f'exec "$0" "$@" 3<&{command_out} 4>&{answer_in}', program]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [*programs.tethered(*shell), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(command_out, answer_in),
            env={"HOME": str(folder), "PATH": os.environ["PATH"]},
        )
        os.close(command_out)
        os.close(answer_in)
        try:
            yield Chromium(command_in, answer_out)
        finally:
            with suppress(FileNotFoundError):  # its socket is in /tmp, and its directory stays there
                shutil.rmtree((folder / "profile/SingletonSocket").readlink().parent, ignore_errors=True)
            process.terminate()
            process.wait(WAIT_S)
            os.close(command_in)
            os.close(answer_out)
