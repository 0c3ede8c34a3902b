"""The chat page in a real browser, headless Chromium: it streams an answer, shows its speed, and fits a phone."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving import serving_in_thread, wait_for

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
ENTER = "\ue007"  # of WebDriver
PHONE = {"width": 360, "height": 640}
pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="needs chromium and chromedriver")


class Browser:
    """A session of WebDriver: a page, and scripts that run in it."""

    def __init__(self, url: str) -> None:
        self.session = url

    def post(self, command: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.session}/{command}", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        return self.post("execute/sync", script=f"return {script}", args=[])

    def write(self, field: str, text: str) -> None:
        """Types into the field with this id."""
        element = self.post("element", using="css selector", value=f"#{field}")
        self.post(f"element/{next(iter(element.values()))}/value", text=text)

    def wait(self, script: str) -> None:
        wait_for(lambda: self.run(script))


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Browser]]:
    """Opens a page in the browser of this module."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(DRIVER), f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield start_session(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        finally:
            httpx.get(f"http://127.0.0.1:{port}/shutdown", timeout=30)
            process.wait(30)


def start_session(driver: str, profile: Path) -> Callable[[str], Browser]:
    """A session with an empty profile, in the size of a phone."""
    wait_for(lambda: answers(f"{driver}/status"))
    options = {"binary": BROWSER, "args": [*FLAGS, f"--user-data-dir={profile}", "--window-size=360,640"]}
    body = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
    session = httpx.post(f"{driver}/session", json=body, timeout=60).json()["value"]["sessionId"]
    browser = Browser(f"{driver}/session/{session}")
    browser.post("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params={
        **PHONE, "deviceScaleFactor": 2, "mobile": True,
    })  # fmt: skip

    def open_page(url: str) -> Browser:
        browser.post("url", url=url)
        return browser

    return open_page


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_a_message_is_answered_as_a_stream_with_its_speed(browse: Callable[[str], Browser]) -> None:
    with serving_in_thread(step_seconds=0.1) as server:
        page = browse(f"{server.root}/")
        page.wait("document.getElementById('model').textContent === 'tiny'")
        page.run("void (document.getElementById('max_tokens').value = 40)")
        page.run("void (document.getElementById('temperature').value = 0)")
        page.write("text", "a wash" + ENTER)
        page.wait("document.querySelectorAll('.user').length === 1")
        page.wait("document.getElementById('send').textContent === 'Stop'")
        page.wait("/ tokens\\/s/.test(document.getElementById('status').textContent)")
        lengths = []
        while page.run("document.getElementById('send').textContent") == "Stop":
            lengths.append(page.run("document.querySelector('.assistant').textContent.length"))
            time.sleep(0.2)
        assert len(set(lengths)) > 2, "the text came at once"
        body = {"messages": [{"role": "user", "content": "a wash"}], "max_tokens": 40, "temperature": 0}
        expected = httpx.post(f"{server.url}/chat/completions", json=body).json()
        text = page.run("document.querySelector('.assistant').textContent")
        assert text == expected["choices"][0]["message"]["content"]
        status = page.run("document.getElementById('status').textContent")
        assert status.startswith(f"{expected['usage']['completion_tokens']} tokens, ")
        assert 1 < float(status.split(", ")[1].split()[0]) < 12


def test_stop_ends_the_answer_and_frees_its_slot(browse: Callable[[str], Browser]) -> None:
    with serving_in_thread(step_seconds=0.05) as server:
        page = browse(f"{server.root}/")
        page.write("text", "a long wash" + ENTER)
        page.wait("document.querySelector('.assistant')?.textContent.length > 0")
        page.run("document.getElementById('send').click()")
        page.wait("/stopped/.test(document.getElementById('status').textContent)")
        server.wait_until_idle()


def test_the_page_fits_a_phone_and_asks_nobody_else(browse: Callable[[str], Browser]) -> None:
    with serving_in_thread() as server:
        page = browse(f"{server.root}/")
        assert page.run("innerWidth") == PHONE["width"]
        assert page.run("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.run("Math.min(...['send', 'text'].map(i => document.getElementById(i).offsetHeight))") >= 40
        origins = page.run("[...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).origin))]")
        assert set(origins) <= {server.root}


def test_a_key_is_asked_for_and_an_error_is_shown(browse: Callable[[str], Browser]) -> None:
    with serving_in_thread(api_key="secret") as server:
        page = browse(f"{server.root}/")
        page.wait("/API key/.test(document.querySelector('.error')?.textContent)")
        page.wait("document.activeElement.id === 'key'")
        page.write("key", "secret")
        page.write("text", "a" + ENTER)
        page.wait("document.querySelector('.assistant')?.textContent.length > 0")
