"""``optuna-dashboard`` on a study's own store, in a browser."""

from __future__ import annotations

import subprocess
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

from gatework.bench import compare

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def dashboard(request, tmp_path_factory, free_port):
    """The address of a dashboard on the store of a small study, and the study."""
    pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard: pip install optuna-dashboard")
    folder = tmp_path_factory.mktemp("dashboard")
    store = request.getfixturevalue("database")("dashboard") if request.param == "postgresql" else None
    study = compare(
        task="digits", variants={"golu": "activation=golu"}, tokens=256, tune=1, seeds=2, workers=0, quiet=True,
        out=folder / "activations", store=store,
    )  # fmt: skip
    url = f"sqlite:///{folder}/activations/study.db" if store is None else store.replace("postgresql:", "postgresql+psycopg:")
    port = free_port()
    program = Path(sysconfig.get_path("scripts")) / "optuna-dashboard"
    command = [program, url, "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "the dashboard does not answer"
                time.sleep(0.2)
        yield address, study
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def read(screenshot, tmp_path_factory, dashboard):
    """The text of a page of the dashboard, once all of ``wanted`` stands there."""
    pytest.importorskip("selenium", reason="browser tests need selenium: pip install selenium")
    try:
        screenshot.installed()
    except FileNotFoundError:
        pytest.skip("browser tests need Chromium and its driver: apt-get install chromium chromium-driver")
    browser = screenshot.driver(profile=str(tmp_path_factory.mktemp("profile")))

    def text(path, *wanted):
        browser.get(dashboard[0] + path)
        deadline = time.monotonic() + 60
        while True:
            said = browser.execute_script("return document.body.innerText")
            missing = [word for word in wanted if word not in said]
            if not missing:
                return said
            assert time.monotonic() < deadline, f"{missing} not in {said}"
            time.sleep(0.2)

    yield text
    browser.quit()


def test_the_study_is_listed_by_its_name(read):
    assert "activations" in read("/dashboard/", "activations", "MINIMIZE")


def test_the_study_s_page_names_the_score_and_the_variants(read):
    read("/dashboard/studies/1", "activations", "error", "Best Trial", "activation=golu")


def test_a_trial_says_what_it_was(read, dashboard):
    """Variant, phase, seed, learning rate and score, and none of gatework's own bookkeeping."""
    record = next(r for r in dashboard[1].records if r["key"] == "final/golu/seed1")
    wanted = ["variant golu", "phase final", "seed 1", f"learning_rate {record['learning_rate']}", f"score {record['score']}"]
    found = [read(f"/dashboard/studies/1/trials?numbers={number}", f"Trial {number} (", "User Attributes") for number in (4, 5)]
    (said,) = (text for text in found if all(word in text for word in wanted[:3]))
    assert all(word in said for word in wanted)
    assert "6 Trials" in said
    assert not any(word in said for word in ("config_hash", "owner", "boot"))
