"""SAEs are published to and fetched from a server that speaks the hub's protocol, by processes of their own."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from lmm_sae_nb.sae import hub
from lmm_sae_nb.sae.topk import TopKSAE

REPO, HOOKPOINT = "someone/an-sae", "model.layers.24"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a model repository needs: make it, commit files to it, list and download them.

    server.commits: for each commit, in order, the files by path. A commit's name is its number in 40 digits.
    """

    def commit(self, revision: str) -> tuple[str, dict[str, bytes]]:
        number = len(self.server.commits) - 1 if revision == "main" else int(revision)
        return f"{number:040}", self.server.commits[number]

    def answer(self, value=None, status: int = 200, data: bytes | None = None, **headers: str) -> None:
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        if match := re.fullmatch(rf"/{REPO}/resolve/(\w+)/(.+)", path):
            commit, files = self.commit(match[1])
            if match[2] not in files:
                return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            data = files[match[2]]
            return self.answer(data=data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit)
        if not self.server.commits or not path.startswith(f"/api/models/{REPO}"):
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        if match := re.fullmatch(rf"/api/models/{REPO}/tree/(\w+)/?", path):
            files = self.commit(match[1])[1].items()
            return self.answer([{"type": "file", "path": name, "size": len(d), "oid": "0"} for name, d in files])
        revision = path.rsplit("/revision/", 1)[1] if "/revision/" in path else "main"
        sha, files = self.commit(revision)
        siblings = [{"rfilename": name} for name in files]
        return self.answer({"id": REPO, "modelId": REPO, "sha": sha, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        self.server.seen.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        assert self.headers["Authorization"] == "Bearer hf_of_the_test"
        if path == "/api/repos/create":
            assert json.loads(body)["name"] == REPO.split("/")[1]
            self.server.commits = self.server.commits or [{}]
            return self.answer({"url": f"http://{self.headers['Host']}/{REPO}", "id": REPO})
        if path == f"/api/models/{REPO}/preupload/main":
            modes = [{"uploadMode": "regular", "shouldIgnore": False} | file for file in json.loads(body)["files"]]
            return self.answer({"files": modes})
        assert path == f"/api/models/{REPO}/commit/main", path
        files = dict(self.server.commits[-1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.commits.append(files)
        commit = f"{len(self.server.commits) - 1:040}"
        return self.answer({"commitUrl": f"http://{self.headers['Host']}/{REPO}/commit/{commit}", "commitOid": commit})

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.commits, server.seen = [], []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(server, tmp_path, root):
    """Run Python in a process whose hub is the server; what it prints."""

    def run(code: str, **more: str) -> str:
        environment = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
        environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_the_test", "PYTHONPATH": str(root)} | more
        command = [sys.executable, "-c", f"from lmm_sae_nb.sae.topk import TopKSAE\n{code}"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout + done.stderr.strip().rsplit("\n", 1)[-1] * bool(done.returncode)

    return run


def made(seed: int = 0, k: int = 3) -> TopKSAE:
    return TopKSAE(4, 12, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_published_fetched_and_read_again_without_the_hub(server, run, tmp_path):
    made(0).save(tmp_path / "first")
    made(1, k=5).save(tmp_path / "second", "saelens")
    printed = run(f"""
print(TopKSAE.load('first').push_to_hub('{REPO}', '{HOOKPOINT}', base_model='llava-hf/llama3-llava-next-8b-hf'))
TopKSAE.load('second').push_to_hub('{REPO}', 'model.layers.8', 'saelens')
""")
    assert printed.strip().endswith(f"/{REPO}/commit/{1:040}")
    _, first, second = server.commits
    assert set(first) == {"README.md", f"{HOOKPOINT}/cfg.json", f"{HOOKPOINT}/sae.safetensors"}
    assert first[f"{HOOKPOINT}/sae.safetensors"] == (tmp_path / "first/sae.safetensors").read_bytes()
    assert set(second) - set(first) == {f"model.layers.8/{file}" for file in ("cfg.json", "sae_weights.safetensors")}
    card = second["README.md"].decode()
    assert second["README.md"] == first["README.md"]  # a card that is there may be somebody's own, and stays
    assert "base_model: llava-hf/llama3-llava-next-8b-hf" in card and f'("{REPO}", "{HOOKPOINT}")' in card
    assert "At most 3 of 12 latents are active" in card

    server.seen.clear()
    load = f"TopKSAE.from_pretrained('{REPO}', '{HOOKPOINT}', cache_dir='cache').save('again')"
    assert run(load) == ""
    assert all(map(torch.equal, TopKSAE.load(tmp_path / "again").parameters(), made(0).parameters()))
    assert not [line for line in server.seen if "model.layers.8/" in line or "README" in line]  # only what is asked for

    server.seen.clear()
    other = f"TopKSAE.from_pretrained('{REPO}', 'model.layers.8', cache_dir='cache')"
    printed = run(f"{load}\nprint('read')\n{other}", HF_HUB_OFFLINE="1")
    assert printed.startswith("read") and "Error" in printed and REPO in printed  # the hub's own: it is not cached
    assert not server.seen


@pytest.mark.slow
def test_a_revision_is_that_of_the_past(run, tmp_path):
    made(0).save(tmp_path / "sae0")
    made(1).save(tmp_path / "sae1")
    printed = run(f"""
for folder in 'sae0', 'sae1':
    TopKSAE.load(folder).push_to_hub('{REPO}', '{HOOKPOINT}')
TopKSAE.from_pretrained('{REPO}', '{HOOKPOINT}', revision='{1:040}').save('old')
TopKSAE.from_pretrained('{REPO}', '{HOOKPOINT}').save('new')
""")
    assert printed == ""
    assert torch.equal(TopKSAE.load(tmp_path / "old").W_dec, made(0).W_dec)
    assert torch.equal(TopKSAE.load(tmp_path / "new").W_dec, made(1).W_dec)


@pytest.mark.slow
def test_a_missing_sae_is_named_with_those_that_exist(run, tmp_path):
    made().save(tmp_path / "sae")
    printed = run(f"""
def attempt(*where):
    try:
        TopKSAE.from_pretrained(*where)
    except Exception as error:
        print(type(error).__name__, error)

attempt('{REPO}')
TopKSAE.load('sae').push_to_hub('{REPO}', '{HOOKPOINT}')
attempt('{REPO}', 'layers.3')
attempt('{REPO}')
""")
    assert printed.startswith("RepositoryNotFoundError")  # the hub's own
    for where in ("at layers.3", "at its root"):
        assert f"FileNotFoundError {REPO} has no SAE {where}; hookpoints that hold one: {HOOKPOINT}" in printed


def test_a_local_folder_is_read_as_a_repository_is(tmp_path):
    made().save(tmp_path / HOOKPOINT)
    assert hub.fetch(tmp_path, HOOKPOINT) == tmp_path / HOOKPOINT
    assert torch.equal(TopKSAE.from_pretrained(str(tmp_path / HOOKPOINT)).W_dec, made().W_dec)
    with pytest.raises(FileNotFoundError, match=f"has no SAE at layers.3; hookpoints that hold one: {HOOKPOINT}"):
        hub.fetch(tmp_path, "layers.3")
    with pytest.raises(ValueError, match=f"for each seed or hookpoint: {HOOKPOINT}; give one of them"):
        hub.fetch(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no SAE at its root; hookpoints that hold one: none"):
        hub.fetch(Path(tmp_path / "nowhere"))


def test_nothing_is_sent_of_a_folder_without_an_sae(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no SAE"):
        hub.publish(tmp_path, REPO, HOOKPOINT)
    assert not server.seen


@pytest.mark.parametrize("hookpoint", ["../outside", "a/../../outside", "/etc", "a\\..\\b"])
def test_a_hookpoint_stays_in_its_repository(tmp_path, hookpoint):
    sae = TopKSAE(4, 8, 2)
    for name in ("repository", "outside"):
        sae.save(tmp_path / name)
    for call in (
        lambda: hub.fetch(tmp_path / "repository", hookpoint),
        lambda: TopKSAE.from_pretrained(REPO, hookpoint),
        lambda: hub.publish(tmp_path / "repository", REPO, hookpoint),
    ):
        with pytest.raises(ValueError, match="leads out of the repository; give a folder in it, such as"):
            call()
