"""From a name to a whole model: the hubs' own clients, against a stand-in of both hubs on loopback."""

import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import huggingface_hub
import modelscope_hub
import pexpect
import pytest
import torch
from safetensors.torch import save_file

from qwen_vllm.models import download
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.download import fetch
from qwen_vllm.models.resolve import resolve_model, resolve_parts
from tests.support.scripted_hub import NAME, PIECE, Hub, files_of, scripted_hub, sha256
from tests.support.tiny_checkpoints import write_model
from vllm_server import parse_args

WEIGHTS, TEMPLATE = "model.safetensors", "chat_template.jinja"
NOT_LOADED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "original/params.json", "q4.gguf", ".gitattributes"]
OTHERS = ["README.md", "own.py", "generation_config.json", TEMPLATE, "additional_chat_templates/tools.jinja"]
HUBS = ["modelscope", "huggingface"]
MAIN = {"modelscope": "master", "huggingface": "main"}
PROGRAM = "import sys; from qwen_vllm.models.download import fetch; print(fetch(*sys.argv[1:]))"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model, which both clients ask; caches that are empty; no waits between a client's tries."""
    model = write_model(tmp_path / "model")
    save_file({"weight": torch.zeros(5 * PIECE)}, model / WEIGHTS)  # 20 pieces
    others = {path: path.encode() for path in OTHERS + NOT_LOADED}
    others |= {"pytorch_model.bin.index.json": b'{"weight_map": {}}', "generation_config.json": b'{"top_k": 7}'}
    with scripted_hub(files_of(model) | others) as hub:
        for name, value in {
            "MODELSCOPE_ENDPOINT": hub.url,
            "MODELSCOPE_CACHE": str(tmp_path / "modelscope"),
            "MODELSCOPE_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "huggingface"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(download, "CACHE", tmp_path / "cache" / "qwen-vllm")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "huggingface"))
        monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # its thread would outlive the test
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0)
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS", 0)
        yield hub


@pytest.fixture
def unplug(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Takes name resolution away; returns the list of the names that are looked up from now on."""

    def go(monkeypatch: pytest.MonkeyPatch = monkeypatch) -> list[str]:
        asked = []

        def getaddrinfo(host: str, *_: object, **__: object) -> None:
            asked.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(download, "HUB_TIMEOUT", 0.1)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.invalid")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
        return asked

    return go


def loaded(hub: Hub) -> list[str]:
    return sorted({*hub.files} - {*NOT_LOADED, "README.md"})


def whole(folder: Path, hub: Hub, revision: str = "master") -> bool:
    """Tells whether the folder has all that is loaded, as the hub has it."""
    files = hub.revisions[revision]
    return all((folder / path).read_bytes() == files[path] for path in loaded(hub) if path in files)


def unavailable(*args: str, **options: str) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        fetch(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", HUBS)
def test_a_whole_model_is_fetched_once_and_no_file_that_is_not_loaded(hub: Hub, name: str) -> None:
    folder = Path(resolve_model(NAME, name))
    assert whole(folder, hub)
    assert hub.fetched == loaded(hub)
    hub.asked.clear()
    (folder / WEIGHTS).chmod(0)  # nor is it read again, to compare it
    assert fetch(NAME, name) == folder
    assert hub.asked == []


@pytest.mark.parametrize("name", HUBS)
def test_a_path_that_leads_out_of_the_copy_is_left_alone(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.py").write_text("mine")
    expected = loaded(hub)
    hub.files.update({f"own/{'../' * 9}{tmp_path}/mine.py": b"theirs", f"{tmp_path}/mine.py": b"theirs"})
    fetch(NAME, name)
    assert (tmp_path / "mine.py").read_text() == "mine"
    assert sorted({*hub.fetched}) == expected


def test_without_safetensors_the_weights_of_the_next_format_are_fetched(hub: Hub) -> None:
    del hub.files[WEIGHTS]
    fetch(NAME, "modelscope")
    assert {"pytorch_model.bin", "pytorch_model.bin.index.json"} <= {*hub.fetched}


def test_what_is_no_model_is_refused_before_its_files_are_fetched(hub: Hub) -> None:
    del hub.files["config.json"]
    assert "no config.json" in unavailable(NAME, "modelscope")
    assert hub.fetched == []


@pytest.mark.parametrize("name", HUBS)
def test_a_name_that_the_hub_does_not_know(hub: Hub, name: str) -> None:
    message = unavailable("owner/no-such", name)
    assert "owner/no-such cannot be fetched" in message
    assert "check the name" in message.lower()


@pytest.mark.parametrize("name", HUBS)
def test_a_connection_that_breaks_off_is_taken_up_again(hub: Hub, name: str) -> None:
    hub.cuts[WEIGHTS] = [3 * PIECE, 2 * PIECE]
    assert whole(fetch(NAME, name), hub)
    if name == "modelscope":  # the other client keeps only whole pieces of 10 MiB
        ranges = [asked for path, asked in hub.asked if path == WEIGHTS]
        assert ranges == [None, f"bytes={3 * PIECE}-", f"bytes={5 * PIECE}-"]


def test_after_many_breaks_it_goes_on_by_itself_as_long_as_data_flows(hub: Hub) -> None:
    hub.cuts[WEIGHTS] = [PIECE] * 12  # the client gives up after five
    assert whole(fetch(NAME, "modelscope"), hub)


def test_a_slow_line_past_the_time_that_hugging_faces_client_waits(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.seconds_a_piece[WEIGHTS] = 0.05  # 20 pieces
    assert whole(fetch(NAME, "huggingface"), hub)
    assert hub.fetched.count(WEIGHTS) == 1


def test_a_slow_line_past_the_time_that_the_client_has_for_a_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_TOTAL_TIMEOUT", 1)
    hub.seconds_a_piece[WEIGHTS] = 0.15  # 20 pieces
    assert whole(fetch(NAME, "modelscope"), hub)
    starts = [int(asked[6:-1]) for path, asked in hub.asked if path == WEIGHTS and asked]
    assert starts == sorted({*starts}) != []  # what had come was kept each time


def test_where_nothing_comes_it_ends_and_a_later_start_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_TOTAL_TIMEOUT", 0.3)
    hub.held.clear()
    message = unavailable(NAME, "modelscope")
    assert "run again to go on" in message
    hub.held.set()
    assert whole(fetch(NAME, "modelscope"), hub)


@pytest.mark.parametrize(("name", "told"), [("modelscope", "Hash mismatch"), ("huggingface", "another checksum")])
@pytest.mark.parametrize("path", [WEIGHTS, TEMPLATE])
def test_a_checksum_that_never_fits(hub: Hub, unplug: Callable, name: str, told: str, path: str) -> None:
    hub.corrupt.add(path)
    message = unavailable(NAME, name)
    assert path in message
    assert told in message
    with pytest.MonkeyPatch.context() as patch:
        unplug(patch)
        assert f"it lacks {path}" in unavailable(NAME, name)
    hub.corrupt.clear()
    hub.asked.clear()
    assert whole(fetch(NAME, name), hub)
    assert hub.fetched == [path]


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize("path", ["generation_config.json", TEMPLATE])
def test_a_model_of_which_a_file_is_gone_is_not_served(hub: Hub, unplug: Callable, name: str, path: str) -> None:
    hub.gone.add(path)
    assert path in unavailable(NAME, name)
    unplug()
    message = unavailable(NAME, name)
    assert path in message
    assert "Name or service not known" in message


def test_a_full_disk_is_told_and_what_has_come_is_kept(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "modelscope" / "models" / NAME.replace("/", "--") / "snapshots" / "master"
    folder.mkdir(parents=True)
    (folder / f"{WEIGHTS}.incomplete").symlink_to("/dev/full")  # where the client writes
    assert "No space left on device" in unavailable(NAME, "modelscope")
    (folder / f"{WEIGHTS}.incomplete").unlink()
    hub.asked.clear()
    assert whole(fetch(NAME, "modelscope"), hub)
    assert hub.fetched == [WEIGHTS]


def test_a_full_disk_is_told_by_hugging_faces_client_too(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = tmp_path / "huggingface" / f"models--{NAME.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(hub.files[WEIGHTS])}.00000000.incomplete").symlink_to("/dev/full")  # where the client writes
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.uuid.uuid4", lambda: UUID(int=0))
        assert "No space left on device" in unavailable(NAME, "huggingface")
    hub.asked.clear()
    assert whole(fetch(NAME, "huggingface"), hub)
    assert hub.fetched.count(WEIGHTS) == 1


@pytest.mark.parametrize("name", HUBS)
def test_a_whole_copy_needs_no_network(hub: Hub, unplug: Callable, name: str) -> None:
    folder = fetch(NAME, name)
    asked = unplug()
    assert fetch(NAME, name) == folder
    assert asked == []


@pytest.mark.parametrize("name", HUBS)
def test_a_whole_copy_of_the_revision_is_used_where_the_hub_cannot_be_asked(
    hub: Hub, unplug: Callable, capsys: pytest.CaptureFixture, name: str
) -> None:
    folder = fetch(NAME, name)
    unplug()
    assert fetch(NAME, name, MAIN[name]) == folder
    assert f"{name} cannot be asked" in capsys.readouterr().err


@pytest.mark.parametrize("name", HUBS)
def test_a_copy_of_which_a_file_is_missing_is_not_used_without_the_hub(hub: Hub, unplug: Callable, name: str) -> None:
    folder = fetch(NAME, name)
    (folder / TEMPLATE).unlink()
    hub.asked.clear()
    assert whole(fetch(NAME, name), hub)
    assert {*hub.fetched} <= {TEMPLATE}
    (folder / WEIGHTS).unlink()
    unplug()
    assert f"it lacks {WEIGHTS}" in unavailable(NAME, name)


@pytest.mark.parametrize("name", HUBS)
def test_without_a_copy_and_a_network_the_reason_is_told(hub: Hub, unplug: Callable, name: str) -> None:
    unplug()
    message = unavailable(NAME, name)
    assert f"{NAME} cannot be fetched from {name} (Name or service not known)" in message


def by_another_program(name: str, *without: str) -> Path:
    """Fetches the model as another program would that uses the hub's client."""
    if name == "modelscope":
        return modelscope_hub.HubApi(modelscope_hub.HubConfig()).download_repo(
            NAME, "model", ignore_patterns=[*without] or None
        )
    return Path(huggingface_hub.snapshot_download(NAME, ignore_patterns=[*without]))


@pytest.mark.parametrize("name", HUBS)
def test_what_another_program_has_fetched_is_used_and_completed(hub: Hub, name: str) -> None:
    folder = by_another_program(name, TEMPLATE)
    hub.asked.clear()
    assert fetch(NAME, name) == folder
    assert whole(folder, hub)
    assert hub.fetched == [TEMPLATE]


@pytest.mark.parametrize("name", HUBS)
def test_what_another_program_has_fetched_is_used_without_a_network_if_it_is_whole(
    hub: Hub, unplug: Callable, name: str
) -> None:
    folder = by_another_program(name)
    unplug()
    assert fetch(NAME, name) == folder
    (folder / "generation_config.json").unlink()
    assert "it lacks generation_config.json" in unavailable(NAME, name)


@pytest.mark.parametrize("place", [NAME, "hub/owner/Tiny-1___5", "hub/models/owner/Tiny-1___5"])
def test_where_modelscope_kept_models_before(hub: Hub, tmp_path: Path, place: str) -> None:
    old = tmp_path / "modelscope" / place
    old.parent.mkdir(parents=True)
    (tmp_path / "model").rename(old)
    assert fetch(NAME, "modelscope") == old
    assert hub.fetched == sorted({*loaded(hub)} - {"config.json", "tokenizer.json", WEIGHTS})


@pytest.mark.parametrize("name", HUBS)
def test_a_revision_is_fetched_and_kept_apart(hub: Hub, name: str) -> None:
    hub.revisions["v1"] = {**hub.files, "config.json": b'{"v": 1}'}
    first, folder = fetch(NAME, name), fetch(NAME, name, "v1")
    assert whole(folder, hub, "v1")
    assert whole(first, hub)
    assert fetch(NAME, name) == first


@pytest.mark.parametrize("name", HUBS)
def test_a_revision_asks_the_hub_anew_and_fetches_what_has_changed(hub: Hub, name: str) -> None:
    fetch(NAME, name)
    hub.files["config.json"] = hub.files["config.json"].replace(b"Qwen2", b"Qwen3")  # of the same size
    hub.asked.clear()
    assert b"Qwen3" in (fetch(NAME, name, MAIN[name]) / "config.json").read_bytes()
    assert hub.fetched == ["config.json"]


@pytest.mark.parametrize("name", HUBS)
def test_two_programs_at_once_fetch_a_model_once(hub: Hub, name: str) -> None:
    hub.held.clear()
    programs = [start(name), start(name)]
    for program in programs:
        assert program.expect(["Fetching", "Waiting for another program"]) in (0, 1)
    hub.held.set()
    folders = [finish(program) for program in programs]
    assert folders[0] == folders[1]
    assert whole(folders[0], hub)
    assert hub.fetched == loaded(hub)


def start(name: str) -> pexpect.spawn:
    return pexpect.spawn(sys.executable, ["-c", PROGRAM, NAME, name], encoding="utf-8", timeout=60)


def finish(program: pexpect.spawn) -> Path:
    program.expect(pexpect.EOF)
    return Path(re.findall(r"/\S+/snapshots/\S+", program.before)[-1])


@pytest.mark.parametrize("name", HUBS)
def test_a_terminal_shows_how_far_it_is(hub: Hub, name: str) -> None:
    hub.seconds_a_piece[WEIGHTS] = 0.05
    program = start(name)
    program.expect_exact(f"Fetching {NAME} from {name}: {len(loaded(hub))} files, 0.0 GB")
    program.expect(r"\d%")
    assert whole(finish(program), hub)


@pytest.mark.parametrize("name", HUBS)
def test_elsewhere_there_is_a_line_now_and_then(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    hub.seconds_a_piece[WEIGHTS] = 0.05
    said = f"Fetching {NAME} from {name}: {len(loaded(hub))} files, 0.0 GB …\n"
    fetch(NAME, name)
    assert capsys.readouterr().err == said
    monkeypatch.setattr(download, "LOG_INTERVAL", 0.2)
    fetch(NAME, name, cache=str(tmp_path / "mine"))
    _, *lines = capsys.readouterr().err.splitlines()
    assert len(lines) in range(1, 9)
    assert any("%" in line for line in lines)
    assert all(line == line.strip("\x1b[A\r") for line in lines)


def test_the_tokenizer_comes_from_the_same_hub_without_weights(hub: Hub, tmp_path: Path) -> None:
    args = {"tokenizer": NAME, "download_dir": str(tmp_path / "mine")}
    resolve_parts(args, "modelscope")
    assert WEIGHTS not in hub.fetched
    assert Path(args["tokenizer"]).is_relative_to(tmp_path / "mine")
    assert (Path(args["tokenizer"]) / "tokenizer.json").is_file()
    folder = fetch(NAME, "modelscope", cache=args["download_dir"])  # that copy is not taken for a whole model
    assert whole(folder, hub)


def test_the_speculative_model_comes_from_the_same_hub(hub: Hub) -> None:
    args = {"speculative_config": {"model": NAME, "num_speculative_tokens": 2}}
    resolve_parts(args, "huggingface")
    assert whole(Path(args["speculative_config"].pop("model")), hub)
    assert args == {"speculative_config": {"num_speculative_tokens": 2}}


@pytest.mark.parametrize("tokenizer", ["{folder}", "no-id", None])
def test_what_is_no_id_is_left_to_vllm(hub: Hub, tmp_path: Path, tokenizer: str | None) -> None:
    tokenizer = tokenizer and tokenizer.format(folder=tmp_path)
    args = {"tokenizer": tokenizer, "speculative_config": {"method": "ngram"}}
    resolve_parts(args, "modelscope")
    assert args == {"tokenizer": tokenizer, "speculative_config": {"method": "ngram"}}
    assert hub.asked == []


def test_where_our_own_cache_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(download, "CACHE", tmp_path / "file")
    with pytest.raises(ModelUnavailable, match=r"cannot write .*: Not a directory"):
        resolve_parts({"tokenizer": NAME}, "modelscope")


def test_the_server_takes_revision_and_download_dir(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["v1"] = {**hub.files, TEMPLATE: b"of v1"}
    flags = ["--revision", "v1", "--download-dir", str(tmp_path / "mine"), "--tokenizer", NAME]
    args = parse_args(["--model", NAME, "--port", "0", *flags])
    folder, tokenizer = Path(args.model), Path(args.tokenizer)
    assert folder.is_relative_to(tmp_path / "mine")
    assert whole(folder, hub, "v1")
    assert (tokenizer / TEMPLATE).read_bytes() == hub.files[TEMPLATE]
    assert args.served_model_name == [NAME]
