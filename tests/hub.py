"""A small hub on this machine, and what the package says of references to it, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """What of a hub's interface a download uses, on a free local port.

    Attributes:
        repositories: files by path, by revision, by owner/name.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, dict[str, bytes]]]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories = repositories

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = self.path.partition("?")[0]
        # A slash of the revision is quoted.
        match = re.fullmatch(r"(?:/api/models)?/(\w+/\w+)/(?:resolve|tree|revision)/([^/]+)(?:/(.+))?", url)
        repository, revision, file = [part and unquote(part) for part in match.groups()] if match else ("", "", None)
        revisions = self.server.repositories.get(repository)
        # A commit stands for the revision whose hash it is.
        revision = {commit_of(name): name for name in revisions or ()}.get(revision, revision)
        files = revisions.get(revision) if revisions else None
        if revisions is None:
            self.answer(404, error="RepoNotFound")
        elif files is None:
            self.answer(404, error="RevisionNotFound")
        elif "/revision/" in url:
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": repository, "sha": commit_of(revision), "siblings": siblings}
            self.answer(200, json.dumps(answer).encode(), revision)
        elif file is None:
            listing = [{"type": "file", "path": path, "size": len(b), "oid": "0" * 40} for path, b in files.items()]
            self.answer(200, json.dumps(listing).encode(), revision)
        elif file not in files:
            self.answer(404, revision=revision, error="EntryNotFound")
        else:
            self.answer(200, files[file], revision)

    def answer(self, status: int, body: bytes = b"", revision: str = "", error: str = "") -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span:
            status, body = 206, body[int(span[1]) : int(span[2]) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if revision:
            self.send_header("X-Repo-Commit", commit_of(revision))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def hub_of(repositories: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


# huggingface_hub reads its settings when it is imported, and waits 23 s in all before it gives a hub up.
ASK = """
import json, sys, time
from mergekit_snrf.errors import SnrfError

def answer(reference):
    if reference.startswith("hf://"):
        from mergekit_snrf.files.references import local_path
        return str(local_path(reference))
    from mergekit_snrf.models.checkpoint import open_checkpoint
    name, _, revision = reference.partition("@")
    checkpoint = open_checkpoint(name, revision or None)
    return {
        "folder": checkpoint.folder and str(checkpoint.folder),
        "tensors": {name: [header.dtype, header.shape, header.file] for name, header in checkpoint.tensors.items()},
        "config_sha256": checkpoint.config_sha256,
        "side_files": [] if checkpoint.missing else checkpoint.side_files(),
        "missing": checkpoint.missing,
        "revision": checkpoint.revision,
        "commit": checkpoint.commit,
    }

time.sleep = lambda seconds: None
answers = {}
for reference in sys.argv[1:]:
    try:
        answers[reference] = answer(reference)
    except SnrfError as error:
        answers[reference] = f"SnrfError: {error}"
print(json.dumps(answers))
"""


def ask_hub(endpoint: str, home: Path, *references: str) -> dict[str, Any]:
    """Open the references in a new process that takes ``endpoint`` for the hub and keeps downloads in ``home``."""
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment = {
        **inherited,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, "-c", ASK, *references], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
