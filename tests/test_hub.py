"""The Hub, without the Hub: a small server on the loopback that ``HF_ENDPOINT`` points to."""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import jax.numpy as jnp
import pytest

import lorax_fn as lx

ROOT = pathlib.Path(__file__).parents[1]
PARAMS = {"a.q_proj.weight": jnp.ones((6, 4))}
SHA = "1" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, ``org/name``, of the files in ``files``; uploads land in ``uploaded``."""

    def log_message(self, *args):
        pass

    def answer(self, code=200, body=b"", **headers):
        self.server.seen.append((self.command, self.path, self.headers.get("authorization")))
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def facts(self, x):
        self.answer(body=json.dumps(x).encode(), Content_Type="application/json")

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/name/tree"):
            entries = [
                {"type": "file", "path": n, "size": len(x), "oid": SHA} for n, x in self.server.files.items()
            ]
            return self.facts(entries)
        if path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.facts(
                {"id": "org/name", "sha": SHA, "siblings": siblings, "private": False, "tags": []}
            )
        name = path.rpartition("/")[2]
        if path.startswith("/org/name/resolve/") and name in self.server.files:
            body = self.server.files[name]
            tag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(body=body, ETag=tag, X_Repo_Commit=SHA, Accept_Ranges="bytes")
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/api/repos/create"):
            return self.facts(
                {"url": f"http://{self.headers['host']}/org/name", "name": "org/name", "id": "1"}
            )
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.facts(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.uploaded[value["path"]] = base64.b64decode(value["content"])
            return self.facts(
                {
                    "commitUrl": f"http://{self.headers['host']}/org/name/commit/{SHA}",
                    "commitOid": SHA,
                    "pullRequestUrl": None,
                }
            )
        return self.facts({"errors": [], "warnings": []})


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.uploaded, server.seen = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub, tmp_path, script):
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    head = 'import jax.numpy as jnp, lorax_fn as lx\nPARAMS = {"a.q_proj.weight": jnp.ones((6, 4))}\n'
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(script)],
        capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_adapters_and_weights_come_from_a_repository(hub, tmp_path):
    lx.peft.save(tmp_path / "a", lx.split(PARAMS, 2)[1], params=PARAMS)
    lx.huggingface.save(tmp_path / "w", PARAMS, config={"x": 1})
    hub.files = {f.name: f.read_bytes() for folder in ("a", "w") for f in (tmp_path / folder).iterdir()}
    hub.files["pytorch_model.bin"] = b"never asked for"
    out = run(hub, tmp_path, """
        print(lx.peft.load("org/name", PARAMS, revision="main")["a.q_proj.weight"].rank)
        print(lx.huggingface.load("org/name", PARAMS)["a.q_proj.weight"].shape)
    """)  # fmt: skip
    assert out.split("\n")[:2] == ["2", "(6, 4)"]
    asked = {path.rpartition("/")[2] for _, path, _ in hub.seen if "/resolve/" in path}
    assert "pytorch_model.bin" not in asked and "adapter_model.safetensors" in asked
    assert any(token == "Bearer hf_secret" for *_, token in hub.seen)


def test_what_the_hub_does_not_have_is_an_error_of_ours(hub, tmp_path):
    out = run(hub, tmp_path, """
        for name in ("org/other", "no-such-folder", "../x/y", "/org/name"):
            try:
                lx.peft.load(name, PARAMS)
            except lx.LoraError as failure:
                print(str(failure).splitlines()[0])
    """)  # fmt: skip
    lines = out.splitlines()
    assert lines[0] == "the Hub did not serve this repository."
    assert lines[1:] == ["there is no such folder."] * 3


def test_an_adapter_is_pushed(hub, tmp_path):
    out = run(hub, tmp_path, """
        lx.peft.save("mine", lx.split(PARAMS, 2)[1], params=PARAMS)
        (__import__("pathlib").Path("mine") / "secret.txt").write_text("not a part of it")
        print(lx.peft.push("mine", "org/name"))
    """)  # fmt: skip
    assert out.strip().endswith(f"/org/name/commit/{SHA}")
    assert set(hub.uploaded) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert hub.uploaded["adapter_config.json"] == (tmp_path / "mine" / "adapter_config.json").read_bytes()
