"""Take a picture of a report in headless Chromium.

    python docs/screenshot.py runs/default/report.html [docs/images/report.png] [--width 1280] [--height 1500] [--dark]

Needs selenium and Chromium with its driver (Debian: ``apt install chromium chromium-driver``).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any


def installed() -> tuple[str, str]:
    """Where Chromium and its driver are. Both are named to selenium, which would look for them on the network otherwise.

    Raises:
        FileNotFoundError: saying what to install.
    """
    browsers = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")]
    browser, driver = next(filter(None, browsers), None), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise FileNotFoundError("Chromium and its driver are needed; install them with: apt install chromium chromium-driver")
    return browser, driver


def driver(width: int = 1280, height: int = 1500, dark: bool = False, profile: str | None = None) -> Any:
    """A headless Chromium that talks to nobody, with its console and network logs kept."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    chromium, chromedriver = installed()
    options = Options()
    options.binary_location = chromium
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars", f"--window-size={width},{height}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(flag)
    if profile:
        options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(chromedriver))
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return browser


def open_report(browser: Any, page: Path, seconds: float = 60) -> None:
    """Open the page and wait until its plots are drawn."""
    browser.get(page.absolute().as_uri())
    end = time.monotonic() + seconds
    while browser.execute_script("return document.documentElement.dataset.drawn") != "true":
        if time.monotonic() > end:
            raise TimeoutError(f"the plots of {page} were not drawn within {seconds:.0f} seconds")
        time.sleep(0.1)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Take a picture of a report in headless Chromium.")
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", default=Path(__file__).parent / "images" / "report.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = driver(arguments.width, arguments.height, arguments.dark, profile)
        try:
            open_report(browser, arguments.report)
            arguments.picture.parent.mkdir(parents=True, exist_ok=True)
            browser.save_screenshot(str(arguments.picture))
        finally:
            browser.quit()
    print(arguments.picture)


if __name__ == "__main__":
    main()
