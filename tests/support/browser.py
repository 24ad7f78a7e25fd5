"""A headless Chromium, driven over a pipe, for tests of the pages that this project writes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# The page is a local file of ours; Chromium's sandbox needs rights that containers lack.
COMPLAINTS = """(() => {
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page is wider than the screen");
  for (const drawn of document.querySelectorAll("svg"))
    if (drawn.querySelector("text") && drawn.getBoundingClientRect().width < 0.9 * drawn.viewBox.baseVal.width)
      found.push("a drawing is too small to read");
  for (const control of [...document.querySelectorAll("a, button, select, input, [tabindex]")].reverse()) {
    const name = control.getAttribute("aria-label") || control.labels?.[0]?.textContent || control.textContent;
    control.focus();
    const radio = control.type === "radio";
    const [seen, ringed] = radio ? [control.parentElement, control.nextElementSibling] : [control, control];
    const box = seen.getBoundingClientRect();
    const middle = (Math.max(0, box.left) + Math.min(innerWidth, box.right)) / 2;
    const onTop = document.elementFromPoint(middle, box.y + box.height / 2);
    if (!name.trim()) found.push(`${control.tagName} ${control.id}: no name`);
    if (document.activeElement !== control) found.push(`${name}: takes no focus`);
    if (getComputedStyle(ringed).outlineStyle !== "solid") found.push(`${name}: shows no focus`);
    if (!seen.contains(onTop)) found.push(`${name}: covered`);
    if (Math.min(box.width, box.height) < 40) found.push(`${name}: ${box.width} x ${box.height} pixels`);
  }
  return found;
})()"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Page:
    """An open page.

    wrong: errors and warnings of its console.
    asked: addresses that it has requested.
    """

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self._process, self._to, self._back = process, to, back
        self._number, self._waiting, self._session = 0, b"", ""

    def start(self) -> None:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._call(f"{domain}.enable")

    def open(self, file: Path) -> None:
        self._call("Page.navigate", url=file.as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def run(self, script: str) -> Any:
        """Evaluate a JavaScript expression and return its value."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """What a reader complains of who has a small screen, a finger and a keyboard. At the present size."""
        self.press("Tab", 9)  # a ring is shown to those who use the keyboard
        return self.run(COMPLAINTS)

    def show(self, *, width: int, height: int, dark: bool = False) -> None:
        phone = width < 500
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._back)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._answers():
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))
        raise AssertionError(f"the browser has gone during {method}")

    def _answers(self) -> Iterator[dict[str, Any]]:
        while True:
            text, end, rest = self._waiting.partition(b"\0")
            if end:
                self._waiting = rest
                yield json.loads(text)
                continue
            more = os.read(self._back, 2**16)
            if not more:
                return
            self._waiting += more

    def _note(self, event: str, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.wrong.append(str(about["exceptionDetails"]))
        elif event == "Log.entryAdded" or (
            event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning")
        ):
            self.wrong.append(str(about))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start a browser; skip the test if none is installed.

    folder: an empty folder for the browser's own files.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(PROGRAMS)}")
    (read, to), (back, write) = os.pipe(), os.pipe()
    # Chromium reads descriptor 3 and writes descriptor 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash"]
    process = subprocess.Popen(
        [*shell, program, *FLAGS, f"--user-data-dir={folder}"], pass_fds=(read, write), stderr=subprocess.DEVNULL
    )
    os.close(read)
    os.close(write)
    page = Page(process, to, back)
    try:
        page.start()
        yield page
    finally:
        page.close()
