"""The Hugging Face hub: the real ``huggingface_hub`` client against a local server of the hub's HTTP interface."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as client_settings
import pytest
import safetensors.torch as st
import torch
from torch import Tensor, nn

import fewbits
from fewbits import FewbitsError, QuantTensor, init_empty_weights
from fewbits.errors import CheckpointError, CheckpointNotFoundError

ROUTE = re.compile(r"/(?P<repo>[\w.-]+(?:/[\w.-]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
LFS = (".safetensors", ".bin")  # what the hub keeps elsewhere, and redirects to


@dataclass
class Repo:
    """Files by revision; every revision is a commit, and "main" is the last one."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.refs |= dict.fromkeys(["main", *names], digest)
        return digest


class Hub:
    """Repositories, and what was asked of them."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, str | None]] = []  # method, path, token
        self.on_head: Callable[[str], None] = lambda file: None
        self.failing: int | None = None
        self.cut: str | None = None  # a file whose data ends early
        self.blobs: dict[str, bytes] = {}

    def tokens(self, part: str) -> set[str | None]:
        """What was sent as authorization to the addresses that hold this part."""
        return {token for _, path, token in self.log if part in path}

    def fetched(self) -> list[str]:
        """The files of repositories whose data was sent, in order (the client asks for other things, too)."""
        paths = [path for method, path, _ in self.log if method == "GET" and re.search("/resolve/|/blobs/", path)]
        return [path.rsplit("/", 1)[-1] for path in paths]

    def answer(self, method: str, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, as the hub gives them."""
        self.log.append((method, path, token))
        if self.failing is not None:
            return self.failing, {}, b""
        if path.startswith("/blobs/"):
            return 200, {}, self.blobs[path.split("/")[2]]
        route = ROUTE.fullmatch(path)
        if route is None:
            return 404, {}, b""
        repo = self.repos.get(route["repo"])
        if repo is None or (repo.token is not None and not repo.gated and token != f"Bearer {repo.token}"):
            # the hub does not tell what is private from what does not exist
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}, b""
        if repo.gated and token != f"Bearer {repo.token}":
            return 401 if token is None else 403, {"X-Error-Code": "GatedRepo"}, b""
        commit = repo.refs.get(route["revision"], route["revision"])
        if commit not in repo.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        facts = {"X-Repo-Commit": commit}
        body = repo.commits[commit].get(route["file"])
        if method == "HEAD":
            self.on_head(route["file"])
        if body is None:
            return 404, facts | {"X-Error-Code": "EntryNotFound"}, b""
        digest = hashlib.sha256(body).hexdigest()
        if route["file"].endswith(LFS):
            self.blobs[digest] = body
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
            return 302, facts | linked | {"Location": f"/blobs/{digest}/{route['file']}"}, b""
        return 200, facts | {"ETag": f'"{digest}"'}, body


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[tuple[str, Callable[[], None]]]:
    """The server's address, and a function that ends it."""

    class Handler(BaseHTTPRequestHandler):
        def _respond(self) -> None:
            status, headers, body = hub.answer(self.command, self.path, self.headers.get("Authorization"))
            self.send_response(status)
            if "Location" in headers:
                # to another host, as the hub does, which is not to be told the token
                headers["Location"] = f"http://localhost:{self.server.server_port}{headers['Location']}"
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                cut = hub.cut is not None and self.path.endswith(hub.cut)
                self.wfile.write(body[: len(body) // 2] if cut else body)

        do_GET = do_HEAD = _respond  # the names that http.server calls

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def end() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}", end
    finally:
        if thread.is_alive():
            end()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub that the client, with an empty cache and nobody logged in, talks to instead of the real one."""
    hub = Hub()
    with serving(hub) as (address, end):
        monkeypatch.setattr(client_settings, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(client_settings, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        home = client_settings.HF_HOME
        for name, value in list(vars(client_settings).items()):  # its cache, its token, and what else it keeps
            if isinstance(value, str) and value.startswith(home):
                monkeypatch.setattr(client_settings, name, str(tmp_path / "home") + value.removeprefix(home))
        monkeypatch.setattr(client_settings, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(client_settings, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        hub.end = end
        yield hub


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 64)
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 11)


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in Net().state_dict().items()}


def pickled(content: object, tmp_path: Path) -> bytes:
    torch.save(content, tmp_path / "pickled")
    return (tmp_path / "pickled").read_bytes()


def sharded(values: dict[str, Tensor], dump: Callable[[dict[str, Tensor]], bytes], suffix: str) -> dict[str, bytes]:
    """Two shards and their index."""
    halves = list(values)[:2], list(values)[2:]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i + 1}-of-00002.{suffix}" for i in range(2)]
    weight_map = {key: name for name, keys in zip(names, halves, strict=True) for key in keys}
    files = {name: dump({k: values[k] for k in keys}) for name, keys in zip(names, halves, strict=True)}
    return files | {f"{stem}.{suffix}.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def assert_holds(model: nn.Module, values: dict[str, Tensor]) -> None:
    have = model.state_dict()
    assert have.keys() == values.keys()
    assert all(torch.equal(have[name], t) for name, t in values.items())


CONFIG = {"config.json": b"{}"}
NOT_NEEDED = {"README.md": b"# hi", "tokenizer.json": b"{}", "flax_model.msgpack": b"1", "onnx/model.onnx": b"2"}


def test_a_single_file_and_nothing_that_is_not_needed(hub, tmp_path):
    others = NOT_NEEDED | {"pytorch_model.bin": pickled(state(1), tmp_path), "original/consolidated.safetensors": b"3"}
    hub.repos["owner/net"] = repo = Repo()
    commit = repo.commit({"model.safetensors": st.save(state())} | CONFIG | others)
    assert_holds(fewbits.load(Net, "owner/net"), state())
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors"]
    snapshot = Path(client_settings.HF_HUB_CACHE) / "models--owner--net" / "snapshots" / commit
    assert sorted(p.name for p in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    assert all(token is None for _, _, token in hub.log)


def test_only_a_pickle(hub, tmp_path):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit({"pytorch_model.bin": pickled(state(), tmp_path)} | NOT_NEEDED)
    assert_holds(fewbits.load(Net, "owner/net"), state())
    assert hub.fetched() == ["pytorch_model.bin"]


def test_sharded_safetensors_go_before_pickles(hub, tmp_path):
    hub.repos["owner/net"] = repo = Repo()
    files = sharded(state(), st.save, "safetensors")
    bins = sharded(state(1), lambda part: pickled(part, tmp_path), "bin")
    repo.commit(files | bins | CONFIG | NOT_NEEDED)
    assert_holds(fewbits.load(Net, "owner/net"), state())
    assert sorted(hub.fetched()) == sorted([*files, "config.json"])
    # another program has fetched the other index into the same cache: there is still no doubt which one is meant
    huggingface_hub.hf_hub_download("owner/net", "pytorch_model.bin.index.json")
    assert_holds(fewbits.load(Net, "owner/net"), state())


def test_sharded_pickles(hub, tmp_path):
    hub.repos["owner/net"] = repo = Repo()
    files = sharded(state(), lambda part: pickled(part, tmp_path), "bin")
    repo.commit(files)
    with init_empty_weights():
        model = Net()
    loaded = fewbits.load(model, "owner/net", "nf4")
    assert isinstance(loaded.fc.weight, QuantTensor)
    assert torch.equal(loaded.fc.weight.packed, QuantTensor.quantize(state()["fc.weight"], "nf4").packed)
    assert all(p.is_meta for p in model.parameters())
    assert sorted(hub.fetched()) == sorted(files)


def test_revisions(hub):
    hub.repos["owner/net"] = repo = Repo()
    first = repo.commit({"model.safetensors": st.save(state(1))}, "v1")
    repo.commit({"model.safetensors": st.save(state(2))})
    assert_holds(fewbits.load(Net, "owner/net"), state(2))
    assert_holds(fewbits.load(Net, "owner/net", revision="v1"), state(1))
    assert_holds(fewbits.load(Net, "owner/net", revision=first), state(1))
    assert hub.fetched() == ["model.safetensors"] * 2  # the tag and its commit are one
    with pytest.raises(CheckpointNotFoundError, match=r"RevisionNotFoundError(.|\n)*hub:owner/net@v9"):
        fewbits.load(Net, "owner/net", revision="v9")


def test_a_revision_that_was_deleted_is_not_served_from_the_cache(hub):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit({"model.safetensors": st.save(state(1))}, "draft")
    fewbits.load(Net, "owner/net", revision="draft")
    del repo.refs["draft"]
    with pytest.raises(CheckpointNotFoundError, match="RevisionNotFoundError"):
        fewbits.load(Net, "owner/net", revision="draft")


def test_a_branch_that_moves_meanwhile_does_not_mix(hub):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit(sharded(state(1), st.save, "safetensors") | CONFIG)

    def move(file: str) -> None:
        if file.endswith("00001-of-00002.safetensors"):
            repo.commit(sharded(state(2), st.save, "safetensors") | CONFIG)

    hub.on_head = move
    assert_holds(fewbits.load(Net, "owner/net"), state(1))
    assert_holds(fewbits.load(Net, "owner/net"), state(2))


def test_a_private_model_needs_its_token(hub):
    hub.repos["owner/net"] = repo = Repo(token="hf_right")
    repo.commit({"model.safetensors": st.save(state())})
    for token in (None, "hf_wrong", False):
        with pytest.raises(CheckpointNotFoundError, match=r"RepositoryNotFoundError(.|\n)*give a token") as caught:
            fewbits.load(Net, "owner/net", token=token)
        assert isinstance(caught.value, FileNotFoundError)
        assert "hf_wrong" not in str(caught.value)
    assert hub.fetched() == []
    assert_holds(fewbits.load(Net, "owner/net", token="hf_right"), state())
    assert hub.tokens("/blobs/") == {None}
    hub.log.clear()
    Path(client_settings.HF_TOKEN_PATH).write_text("hf_right")  # logged in
    assert_holds(fewbits.load(Net, "owner/net"), state())
    assert hub.tokens("/resolve/") == {"Bearer hf_right"}


def test_a_gated_model_says_so(hub):
    hub.repos["owner/net"] = repo = Repo(token="hf_right", gated=True)
    repo.commit({"model.safetensors": st.save(state())})
    for token in (None, "hf_wrong"):  # 401 and 403
        with pytest.raises(CheckpointNotFoundError, match=r"GatedRepoError(.|\n)*give a token"):
            fewbits.load(Net, "owner/net", token=token)
    assert_holds(fewbits.load(Net, "owner/net", token="hf_right"), state())


def test_the_second_load_comes_from_the_cache(hub):
    hub.repos["owner/net"] = repo = Repo()
    commit = repo.commit(sharded(state(), st.save, "safetensors") | NOT_NEEDED)  # no config.json, which is not needed
    fewbits.load(Net, "owner/net")
    hub.log.clear()
    assert_holds(fewbits.load(Net, "owner/net"), state())
    assert hub.fetched() == []
    hub.end()
    begin = time.monotonic()
    assert_holds(fewbits.load(Net, "owner/net"), state())
    assert_holds(fewbits.load(Net, "owner/net", revision="main"), state())
    assert_holds(fewbits.load(Net, "owner/net", revision=commit), state())
    assert time.monotonic() - begin < 5  # the client alone would wait half a minute for each file that it lacks
    with pytest.raises(CheckpointError, match=r"the hub cannot be read(.|\n)*owner/other(.|\n)*connect once"):
        fewbits.load(Net, "owner/other")
    with pytest.raises(CheckpointError, match="the hub cannot be read"):
        fewbits.load(Net, "owner/net", revision="v2")


def test_offline_mode_asks_nobody(hub, monkeypatch):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit({"model.safetensors": st.save(state())} | CONFIG)
    fewbits.load(Net, "owner/net")
    hub.log.clear()
    monkeypatch.setattr(client_settings, "HF_HUB_OFFLINE", True)
    assert_holds(fewbits.load(Net, "owner/net"), state())
    with pytest.raises(CheckpointError, match=r"OfflineModeIsEnabled(.|\n)*owner/other"):
        fewbits.load(Net, "owner/other")
    assert hub.log == []


def test_a_cache_that_lacks_a_shard(hub):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit(sharded(state(), st.save, "safetensors"))
    huggingface_hub.hf_hub_download("owner/net", "model.safetensors.index.json")
    hub.end()
    with pytest.raises(CheckpointNotFoundError, match=r"2 of 2 shards(.|\n)*connect once"):
        fewbits.load(Net, "owner/net")


def test_a_hub_that_fails(hub):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit({"model.safetensors": st.save(state())})
    hub.failing = 500
    with pytest.raises(CheckpointError, match=r"the hub cannot be read \(HfHubHTTPError: .*500"):
        fewbits.load(Net, "owner/net")
    hub.failing = None
    fewbits.load(Net, "owner/net")
    hub.failing = 503
    assert_holds(fewbits.load(Net, "owner/net"), state())  # the cache serves


def test_a_download_that_breaks_off(hub, monkeypatch, unchanged):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits a second before each of its retries
    hub.repos["owner/net"] = repo = Repo()
    repo.commit({"model.safetensors": st.save(state())})
    hub.cut = "model.safetensors"
    with init_empty_weights():
        model = Net()
    with unchanged(model), pytest.raises(CheckpointError, match="the hub cannot be read"):
        fewbits.load(model, "owner/net")
    hub.cut = None
    assert_holds(fewbits.load(model, "owner/net"), state())  # nothing half-fetched is left in the cache


def test_a_model_that_does_not_exist(hub, unchanged):
    with init_empty_weights():
        model = Net()
    for name in ("owner/missing", "missing", "runs/lsat"):  # the last is a mistyped folder
        with (
            unchanged(model),
            pytest.raises(CheckpointNotFoundError, match=f"no local path(.|\n)*hub:{name}") as caught,
        ):
            fewbits.load(model, name)
        assert isinstance(caught.value, FewbitsError)
        assert caught.value.file == f"hub:{name}"


def test_a_name_that_cannot_be(hub):
    with pytest.raises(CheckpointNotFoundError, match=r"hub:-a/\.\.b"):
        fewbits.load(Net, "-a/..b")
    assert hub.fetched() == []


def test_a_model_without_weights(hub):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit(CONFIG | NOT_NEEDED)
    with pytest.raises(CheckpointNotFoundError, match=r"holds no weights(.|\n)*owner/net(.|\n)*model\.safetensors"):
        fewbits.load(Net, "owner/net")


def test_a_missing_shard(hub):
    hub.repos["owner/net"] = repo = Repo()
    files = sharded(state(), st.save, "safetensors")
    del files["model-00002-of-00002.safetensors"]
    repo.commit(files)
    with pytest.raises(CheckpointNotFoundError, match=r"1 of 2 shards.*00002-of-00002(.|\n)*hub:owner/net"):
        fewbits.load(Net, "owner/net")


@pytest.mark.parametrize("shard", ["../../../../escaped.bin", "/etc/escaped.bin"])
def test_an_index_that_leaves_its_folder(shard, hub, tmp_path):
    hub.repos["owner/net"] = repo = Repo()
    index = json.dumps({"weight_map": dict.fromkeys(state(), shard)}).encode()
    repo.commit({"model.safetensors.index.json": index, shard: b"data"})
    with pytest.raises(CheckpointError, match="a file outside its folder"):
        fewbits.load(Net, "owner/net")
    assert hub.fetched() == ["model.safetensors.index.json"]
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("index", [b"", b"[]", b'{"weight_map": 1}', b"{}", b'{"weight_map": {}}'])
def test_an_index_that_is_none(index, hub):
    hub.repos["owner/net"] = repo = Repo()
    repo.commit({"model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match=r"index(.|\n)*model\.safetensors\.index\.json"):
        fewbits.load(Net, "owner/net")


# ------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama, and the files that transformers saves of it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.max_new_tokens = 17  # not the default, so that it shows whether the file was read
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


def test_from_pretrained_of_a_hub_id(hub, llama):
    model, folder = llama
    hub.repos["owner/llama"] = repo = Repo()
    repo.commit({p.name: p.read_bytes() for p in folder.iterdir()} | NOT_NEEDED, "v1")
    ids = torch.arange(16).reshape(2, 8)
    plain = fewbits.from_pretrained("owner/llama", revision="v1")
    assert type(plain) is type(model)
    assert not plain.training
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    assert plain.generation_config.max_new_tokens == 17
    assert sorted(hub.fetched()) == ["config.json", "generation_config.json", "model.safetensors"]

    by_its_file = fewbits.from_pretrained(folder / "model.safetensors")
    assert_holds(by_its_file, plain.state_dict())
    assert by_its_file.generation_config.max_new_tokens == 17

    hub.end()  # and from here on from the cache
    quantized = fewbits.from_pretrained("owner/llama", "nf4", revision="v1", double_quant=True)
    local = fewbits.from_pretrained(folder, "nf4", double_quant=True)
    assert_holds(quantized, local.state_dict())
    assert isinstance(quantized.model.layers[0].mlp.up_proj.weight, QuantTensor)


def test_a_quantized_model_on_the_hub_says_itself_what_it_is(hub, llama, tmp_path):
    source = fewbits.from_pretrained(llama[1], "int8", llm_int8_threshold=4.0)
    fewbits.save(source, tmp_path / "saved", max_shard_size="40KB")
    hub.repos["owner/llama"] = repo = Repo()
    repo.commit({p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()})
    loaded = fewbits.from_pretrained("owner/llama")
    assert_holds(loaded, source.state_dict())
    assert loaded.model.layers[1].self_attn.q_proj.weight.spec == source.model.layers[1].self_attn.q_proj.weight.spec
    assert len(hub.fetched()) > 4


def test_a_private_model_without_config(hub):
    pytest.importorskip("transformers")
    hub.repos["owner/net"] = repo = Repo(token="hf_right")
    repo.commit({"model.safetensors": st.save(state())})
    with pytest.raises(CheckpointNotFoundError, match=r"give a token"):
        fewbits.from_pretrained("owner/net")
    with pytest.raises(CheckpointNotFoundError, match=r"there is no config\.json(.|\n)*fewbits\.load"):
        fewbits.from_pretrained("owner/net", token="hf_right")


# ------------------------------------------------------------------------------------------------- the environment

PROGRAM = """
import sys, torch, fewbits
model = fewbits.load(torch.nn.Linear(64, 8), "owner/linear")
torch.save(model.state_dict(), sys.argv[1])
"""


def test_the_clients_own_environment_variables(tmp_path):
    values = {"weight": torch.randn(8, 64), "bias": torch.randn(8)}
    hub = Hub()
    hub.repos["owner/linear"] = repo = Repo(token="hf_right")
    repo.commit({"model.safetensors": st.save(values)})

    def run(**variables: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # what is compared was made on the CPU
        out = tmp_path / "state.pt"
        out.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-c", PROGRAM, str(out)], env=environment | variables, check=True, timeout=100)
        got = torch.load(out)
        assert got.keys() == values.keys()
        assert all(torch.equal(got[name], t) for name, t in values.items())

    with serving(hub) as (address, _):
        run(HF_ENDPOINT=address, HF_TOKEN="hf_right")
        assert "model.safetensors" in hub.fetched()
        assert hub.tokens("/resolve/") == {"Bearer hf_right"}
        assert hub.tokens("/blobs/") == {None}
        hub.log.clear()
        run(HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
        assert hub.log == []
