from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PASSWORD = "let me in"


def _load(path):
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def synthetic():
    """The module beside this file that makes up studies nobody trained."""
    return _load(Path(__file__).with_name("synthetic.py"))


@pytest.fixture(scope="session")
def screenshot():
    """The script that opens reports in headless Chromium."""
    return _load(Path(__file__).parents[2] / "docs" / "screenshot.py")


@pytest.fixture(scope="session")
def hostile(synthetic):
    """A study whose names mean harm: (the variant's name, the study, its records)."""
    name = "<script>alert('x')</script>|\"&`{{ 7*7 }}`"
    study, records = json.loads(json.dumps(synthetic.build()).replace('"wide"', json.dumps(name)))
    for r in records:
        r["key"] = f"{r['phase']}/{r['variant']}/{r['index']}"
    study["name"] = "<img src=x onerror=alert(1)>"
    study["variants"][name] = "feedforward=<b>|</b>"
    return name, study, records


def _programs():
    """The folder of PostgreSQL's programs: on the path, or where Debian puts them (the newest)."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))[::-1]
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@pytest.fixture(scope="session")
def free_port():
    return _free_port


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(free_port):
    """The URL of a server with a database ``postgres``; it asks for a password."""
    psycopg = pytest.importorskip("psycopg", reason='PostgreSQL tests need psycopg: pip install "gatework[postgres]"')
    folder = _programs()
    if folder is None:
        pytest.skip("PostgreSQL tests need its server: apt-get install postgresql")
    other = {}
    home = Path(tempfile.mkdtemp(prefix="gatework-postgres-"))
    if os.getuid() == 0:  # PostgreSQL refuses to run as root.
        import pwd

        names = {entry.pw_name for entry in pwd.getpwall()}
        name = next(name for name in ("postgres", "nobody") if name in names)
        other = {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}
        os.chown(home, pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
    (home / "password").write_text(PASSWORD)
    (home / "password").chmod(0o644)
    port = free_port()
    with contextlib.ExitStack() as end:
        end.callback(shutil.rmtree, home)
        log = end.enter_context(open(home / "log", "w"))
        start = [folder / "initdb", "-D", home / "data", "-U", "me", "-A", "scram-sha-256", f"--pwfile={home}/password"]
        done = subprocess.run([*start, "--no-sync", "-E", "UTF8", "--locale=C"], stdout=log, stderr=log, cwd=home, **other)
        assert done.returncode == 0, (home / "log").read_text()
        settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={home}", "fsync=off"]
        options = [piece for setting in settings for piece in ("-c", setting)]
        process = subprocess.Popen([folder / "postgres", "-D", home / "data", *options], stdout=log, stderr=log, cwd=home, **other)
        try:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(psycopg.OperationalError):
                    psycopg.connect(f"postgresql://me@127.0.0.1:{port}/postgres", password=PASSWORD).close()
                    break
                assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()  # noqa: PT018
                time.sleep(0.1)
            yield f"postgresql://me:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # Of the server: a fast shutdown.
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def database(server):
    """Make an empty database of a name; gives its URL."""
    import sqlalchemy as sql

    def make(name):
        engine = sql.create_engine(server.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sql.text(f'CREATE DATABASE "{name}"'))
        engine.dispose()
        return server.removesuffix("postgres") + name

    return make
