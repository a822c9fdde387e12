"""minift.hub: folders stay here, ids come from a hub on this machine, and one line for the rest."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minift import InputError
from minift.hub import locate, wanted_files

TOKEN = "hf_secretsecretsecret"
NEW, OLD = "a" * 40, "b" * 40  # commits of org/safe
ALL = ("config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "README.md")
SAFE = {name: f"{name} of the new one" for name in (*ALL, "model.safetensors")}
SAFE |= dict.fromkeys(("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"), "large")
BIN = {"config.json": "{}", "vocab.txt": "a", "pytorch_model.bin": "b", "flax_model.msgpack": "f"}
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
SHARDED = dict.fromkeys([*SHARDS, "model.safetensors.index.json", *ALL, *BIN], "shards")
MODELS = {
    "org/safe": SAFE,
    "bare": BIN,
    "org/sharded": SHARDED,
    "org/private": BIN,
    "org/gated": BIN,
    "org/flaky": BIN,
    "org/short": BIN,
    "org/torn": BIN,
    "org/flax": {"config.json": "{}", "flax_model.msgpack": "f", "README.md": "r"},
    "org/text": {"README.md": "r"},
}
ASKED = []  # method, path, authorization and user agent of every request


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs, with one model for each way to fail."""

    def do_HEAD(self):
        path, token = self.path.split("?")[0], self.headers.get("Authorization", "")
        ASKED.append((self.command, path, token, self.headers.get("User-Agent", "")))
        if found := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/(revision|tree)/(.+)", path):
            self.tell(found[1], found[3], found[2] == "tree")
        elif path.startswith("/api/models/"):
            self.tell(path.removeprefix("/api/models/"), "main", False)
        elif found := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            self.give(*found.groups())
        else:
            self.answer(404, b"")

    do_GET = do_HEAD

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content_Type": "application/json", "Content_Length": len(body)} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who waits no longer
            if self.command == "GET":
                self.wfile.write(body)

    def refused(self, model) -> bool:
        """Answers for those that must not see a model, as the real hub does."""
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            text = "Invalid credentials in Authorization header"
            self.answer(401, {"error": text}, X_Error_Message=text)
        elif model not in MODELS and token:
            self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        elif model not in MODELS or (model == "org/private" and not token):
            text = "Invalid username or password."
            self.answer(401, {"error": text}, X_Error_Message=text)
        else:
            return False
        return True

    def tell(self, model, revision, tree):
        """What files there are."""
        commit = {"main": NEW, NEW: NEW, "v1": OLD, "a/branch": OLD, OLD: OLD}.get(
            revision.replace("%2F", "/")
        )
        had = ("GET", f"/{model}/resolve/{NEW}/config.json") in [a[:2] for a in ASKED]
        if model == "org/late":
            time.sleep(2.5)
        if model == "org/lost":
            self.connection.close()
        elif model == "org/page":
            self.answer(200, b"<html>please log in to this network</html>")
        elif model == "org/broken" or (model == "org/flaky" and had):
            self.answer(503, {"error": "out of order " + TOKEN})
        elif self.refused(model):
            pass
        elif commit is None:
            self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        elif tree:
            entry = {"type": "file", "oid": "0" * 40}
            self.answer(
                200, [entry | {"path": n, "size": len(c)} for n, c in MODELS[model].items()]
            )
        else:
            files = [{"rfilename": name} for name in MODELS[model]]
            self.answer(200, {"id": model, "sha": commit, "siblings": files})

    def give(self, model, commit, name):
        """One file, or what is known of it."""
        body = MODELS[model][name].replace("new", "old" if commit == OLD else "new").encode()
        about = {"X_Repo_Commit": commit, "ETag": f'"{commit[:5]}{name}"'}
        if self.refused(model):
            return
        if model == "org/gated":
            self.answer(403, {"error": "restricted"}, X_Error_Code="GatedRepo")
        elif model == "org/torn" and self.command == "GET":
            self.answer(500, {"error": "disk"})
        elif model == "org/short" and self.command == "HEAD":
            self.answer(200, body + b"more", **about)
        else:
            self.answer(200, body, **about)


CLIENT = """
import json, os, sys, time
import minift.hub
assert "huggingface_hub" not in sys.modules
for number, (settings, cases) in enumerate(json.load(sys.stdin)):
    if not (child := os.fork()):
        os.environ.update(settings)  # huggingface_hub reads them when it is imported
        from huggingface_hub import constants
        from huggingface_hub.utils import logging
        state = lambda: (logging.get_verbosity(), constants.HF_HUB_DISABLE_TELEMETRY)
        answers, before = [], state()
        for case in cases:
            start = time.perf_counter()
            try:
                answer = {"folder": str(minift.hub.locate(*case))}
            except minift.InputError as error:
                answer = {"error": str(error)}
            assert state() == before
            answers.append(answer | {"seconds": time.perf_counter() - start})
        with open(f"{sys.argv[1]}/{number}.json", "w") as file:
            json.dump(answers, file)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
ONLINE = [
    ("org/safe",),
    ("org/safe", "v1"),
    ("org/safe", "a/branch"),
    ("org/safe", OLD),
    ("org/safe", "v9"),
    ("bare",),
    ("org/sharded",),
    ("org/private", None, TOKEN),
    ("org/private", None, f" {TOKEN}\n"),
    ("org/private",),
    ("org/private", "", "hf_wrong"),
    ("org/none",),
    ("org/none", None, TOKEN),
    ("org/gated",),
    ("org/flaky",),
    ("org/flaky", "main"),
    ("org/broken",),
    ("org/short",),
    ("org/torn",),
    ("org/late",),
    ("org/lost",),
    ("org/page",),
    ("org/flax",),
    ("org/text",),
    ("org--x",),
    ("my-modle",),
]
CACHED = [("org/safe",), ("org/safe", OLD), ("org/safe", "v1"), ("hand/made",)]
UNCACHED = [
    ("hand/part",),
    ("hand/lost",),
    ("hand/lacks",),
    ("org/safe", "v2"),
    ("org/none",),
    ("my-modle",),
]


def by_hand(cache: Path, name: str, files: tuple[str, ...]) -> Path:
    """A model in the hub's cache, as whatever program put it there."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(NEW)
    (folder / "snapshots" / NEW).mkdir(parents=True)
    for file in files:
        (folder / "snapshots" / NEW / file).write_text(name)
    return folder / "snapshots" / NEW


@pytest.fixture(scope="module")
def hub():
    """Address of the hub while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory):
    """What `locate` says to all cases: at the hub, logged in, offline, and at a hub that is not
    there. One process, since importing costs seconds; huggingface_hub's variables are read once,
    so it forks for each."""
    here = tmp_path_factory.mktemp("here")
    (here / "my-model").mkdir()
    cache = here / "home" / "hub"
    by_hand(cache, "hand/made", ("config.json", "vocab.txt", "pytorch_model.bin"))
    by_hand(cache, "hand/part", ("config.json", "vocab.txt"))
    by_hand(cache, "hand/lost", ("config.json", "model.safetensors"))
    index = "model.safetensors.index.json"
    lacks = by_hand(cache, "hand/lacks", ("config.json", "vocab.txt", index)) / index
    lacks.write_text(json.dumps({"weight_map": {"a": SHARDS[0]}}))
    home = {"HF_HOME": str(here / "home"), "HF_HUB_ETAG_TIMEOUT": "1", "NO_PROXY": "*"}
    gone = "http://127.0.0.1:9"
    groups = {
        "online": ({"HF_ENDPOINT": hub}, ONLINE),
        "logged in": ({"HF_ENDPOINT": hub, "HF_TOKEN": TOKEN}, [("org/private",), ("org/none",)]),
        "offline": ({"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "1"}, CACHED + UNCACHED),
        "no network": ({"HF_ENDPOINT": gone}, CACHED + UNCACHED),
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(here)],
        input=json.dumps([(home | settings, cases) for settings, cases in groups.values()]),
        env={k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        capture_output=True,
        text=True,
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""  # no bars, no warnings
    assert TOKEN not in "".join(p.read_text() for p in here.glob("*.json"))
    return {
        name: dict(zip(cases, json.loads((here / f"{i}.json").read_text()), strict=True))
        for i, (name, (_, cases)) in enumerate(groups.items())
    } | {"cache": cache, "hub": hub}


def files(answer: dict) -> dict[str, str]:
    assert "folder" in answer, answer
    return {p.name: p.read_text() for p in Path(answer["folder"]).iterdir()}


# ---------------------------------------------------------------- folders and paths


def test_a_folder_is_itself(tmp_path, monkeypatch):
    """As it was given, whatever it is called."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org", "org/name", "./org/name/", str(tmp_path), ".", tmp_path / "org"):
        assert locate(name) == Path(name)
    assert locate("~/org", "") == tmp_path / "org"
    with pytest.raises(InputError, match=r"org: a folder has no revision 'v1': leave it out"):
        locate("org", "v1")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("./my-modle", "did you mean ./my-model?"),
        ("runs/my-modl/", "did you mean runs/my-model?"),
        ("runs/deep/my-modle", "check the path"),
        ("/nowhere/my-model", "check the path"),
        ("~/my-modle", "did you mean {home}/my-model?"),
        ("a\0b", "check the path"),
        ("n" * 300 + "/x/y", "check the path"),
        ("nom français", "check the path"),
        ("", "check the path"),
        (Path("my-modle"), "did you mean my-model?"),
        (Path("org/name"), "check the path"),
    ],
)
def test_a_path_that_is_not_there(tmp_path, monkeypatch, name, near):
    """Nobody asks a hub for it; a folder here with nearly that name is shown."""
    (tmp_path / "runs" / "my-model").mkdir(parents=True)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-modle.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    with pytest.raises(InputError) as error:
        locate(name)
    name = str(name).replace("\0", r"\x00")
    near = near.format(home=tmp_path)
    assert str(error.value) == f"{name}: expected a model folder or a hub id, found neither: {near}"


def test_a_file(tmp_path):
    """Of the model, most likely."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="got a file: give its folder"):
        locate(tmp_path / "model.safetensors")


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\nb", "hf_ä", "hf_\0"])
def test_a_token_that_cannot_be_one(token, monkeypatch):
    """Seen here: the library beneath would repeat it in its error."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError) as error:
        locate("org/name", token=token)
    assert str(error.value) == "token: expected letters and digits, got others: copy it again"


# ---------------------------------------------------------------- at the hub


def test_what_is_fetched(answers):
    """Configuration, tokenizer and one kind of weights; not what others need."""
    online = answers["online"]
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert files(online["org/safe",]).keys() == wanted | {"model.safetensors"}
    assert files(online["bare",]).keys() == {"config.json", "vocab.txt", "pytorch_model.bin"}
    index = {"model.safetensors.index.json"}
    assert files(online["org/sharded",]).keys() == wanted | index | set(SHARDS)
    assert all(
        folder.startswith(str(answers["cache"]))
        for folder in [answer["folder"] for answer in online.values() if "folder" in answer]
    )
    given = {path.split("/resolve/")[1] for _, path, *_ in ASKED if "safe/resolve" in path}
    assert {name.split("/")[1] for name in given} == wanted | {"model.safetensors"}


def test_revisions(answers):
    """A tag, a branch and a commit; each is a folder of its own content."""
    online = answers["online"]
    assert files(online["org/safe",])["config.json"] == "config.json of the new one"
    assert Path(online["org/safe",]["folder"]).name == NEW
    for revision in ("v1", "a/branch", OLD):
        answer = online["org/safe", revision]
        assert files(answer)["config.json"] == "config.json of the old one"
        assert Path(answer["folder"]).name == OLD
    assert online["org/safe", "v9"]["error"] == (
        f"org/safe: {answers['hub']} has no revision 'v9' of it: give a branch, tag or commit"
    )


def test_tokens(answers):
    """Given, or as HF_TOKEN says; sent for what was asked with it and never shown."""
    assert files(answers["online"]["org/private", None, TOKEN])
    assert files(answers["online"]["org/private", None, f" {TOKEN}\n"])
    assert files(answers["logged in"]["org/private",])
    assert answers["online"]["org/private", "", "hf_wrong"]["error"] == (
        f"org/private: {answers['hub']} refuses the token: give another --token or run "
        "`hf auth login`"
    )
    assert all("secret" not in token for _, path, token, _ in ASKED if "safe" in path)


def test_private_or_not_there(answers):
    """The hub does not say which, nor do we."""
    nothing = (
        f": no folder here, and {answers['hub']} has no such model, or it is private: check the "
        "name, or give --token or run `hf auth login`"
    )
    online = answers["online"]
    assert online["org/private",]["error"] == "org/private" + nothing
    assert online["org/none",]["error"] == "org/none" + nothing
    assert online["org/none", None, TOKEN]["error"] == "org/none" + nothing
    assert answers["logged in"]["org/none",]["error"] == "org/none" + nothing
    mistyped = nothing.replace("here,", "here (did you mean my-model?),")
    assert online["my-modle",]["error"] == "my-modle" + mistyped


def test_gated(answers):
    """Everyone sees what it has; its files are refused."""
    assert answers["online"]["org/gated",]["error"] == (
        f"org/gated: {answers['hub']} gives it only to those it has let in: ask on "
        f"{answers['hub']}/org/gated, then give --token or run `hf auth login`"
    )


def test_a_hub_that_fails(answers):
    """What was fetched before still serves; the words of the hub are not repeated."""
    online, where = answers["online"], answers["hub"]
    assert online["org/flaky", "main"]["folder"] == online["org/flaky",]["folder"]
    last = [status for status in ASKED if "flaky" in status[1]][-1]
    assert last[1].startswith("/api/")
    assert online["org/broken",]["error"] == (
        f"org/broken: {where} fails (503), and it is not whole in the cache {answers['cache']}: "
        "try again later"
    )
    start = f"not whole in the cache {answers['cache']}, and {where} cannot be reached ("
    for name in ("late", "lost", "page"):
        assert start in online[f"org/{name}",]["error"]
    assert "reached (no answer in time): give a folder; or" in online["org/late",]["error"]
    assert online["org/late",]["seconds"] < 2.5


def test_a_download_that_breaks_off(answers):
    """Of another size than was said, or an error in the middle."""
    again = "): give the command again, which keeps what is whole"
    short, torn = (answers["online"][f"org/{name}",]["error"] for name in ("short", "torn"))
    assert short.startswith("org/short: the download broke off (Consistency check failed: ")
    assert short.endswith(again)
    assert torn == "org/torn: the download broke off (it answers 500" + again


def test_not_a_model(answers):
    """Before anything is downloaded."""
    assert answers["online"]["org/flax",]["error"] == (
        "org/flax: expected model.safetensors or pytorch_model.bin, found only flax_model.msgpack "
        "(Flax): save the whole model as model.safetensors"
    )
    assert answers["online"]["org/text",]["error"] == (
        "org/text: expected a model with config.json, found none: is it a model?"
    )
    assert not [path for _, path, *_ in ASKED if re.search("/org/(flax|text)/resolve", path)]
    assert answers["online"]["org--x",]["error"] == (
        "org--x: expected a model folder or a hub id, found neither: check the path"
    )


def test_the_hub_is_told_nothing_of_this_machine(answers):
    """No telemetry: no request of its own, and no list of what is installed."""
    assert answers
    assert {path.split("/")[1:3][-1] for _, path, *_ in ASKED if path.startswith("/api")} == {
        "models"
    }
    assert not [agent for *_, agent in ASKED if "torch" in agent]


# ---------------------------------------------------------------- without one


@pytest.mark.parametrize("group", ["offline", "no network"])
def test_the_cache(answers, group):
    """What was fetched once is there, by branch, tag or commit, and what others put there."""
    again = answers[group]
    for case in CACHED[:3]:
        assert again[case]["folder"] == answers["online"][case]["folder"]
    assert files(again["hand/made",])["config.json"] == "hand/made"
    for case in UNCACHED:
        assert f"whole in the cache {answers['cache']}" in again[case]["error"]


def test_lines_without_a_network(answers):
    """Both meanings of the name, why it cannot be had, and what helps; soon."""
    cache = f"whole in the cache {answers['cache']}"
    assert answers["offline"]["org/none",]["error"] == (
        f"org/none: no folder here, and no model {cache}: check the name, or fetch it once "
        "without HF_HUB_OFFLINE"
    )
    assert answers["no network"]["my-modle",]["error"] == (
        f"my-modle: no folder here (did you mean my-model?), not {cache}, and http://127.0.0.1:9 "
        "cannot be reached (Connection refused): give a folder; or fetch it where there is a "
        "network, copy the cache and set HF_HUB_OFFLINE=1"
    )
    for group in ("offline", "no network"):
        assert max(answer["seconds"] for answer in answers[group].values()) < 2.5


def test_one_kind_of_weights():
    """Of all that a repository may hold, in storage's order."""
    names = [*SAFE, *SHARDED, *BIN, "model.fp16.safetensors", "2/model-1.safetensors"]
    beside = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    orders = [
        ["model.safetensors"],
        ["model.safetensors.index.json", *SHARDS],
        ["model.fp16.safetensors"],
        ["pytorch_model.bin"],
    ]
    for weights in orders:
        assert wanted_files(names, "x") == sorted(beside + weights)
        names = [name for name in names if name not in weights]
    parts = ["pytorch_model-1.bin", "pytorch_model.bin.index.json"]
    assert wanted_files([*names, *parts], "x") == sorted(beside + parts)


def test_an_adapter_is_fetched_without_a_model():
    """PEFT's folders have no config.json; what is a model beside is taken for that."""
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert wanted_files(["README.md", *adapter], "x") == adapter
    assert wanted_files(["config.json", "tokenizer.json", *adapter], "x") == sorted(
        ["config.json", "tokenizer.json", *adapter]
    )
    whole = ["config.json", "model.safetensors"]
    assert wanted_files([*whole, *adapter], "x") == whole
