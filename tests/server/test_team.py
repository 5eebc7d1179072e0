"""A team's keys on /chat: limits, counts, turns, and faults, behind the real AsyncLLM on a scripted engine."""

import asyncio
import fcntl
import hashlib
import multiprocessing
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_vllm.protocol import ChatError
from qwen_vllm.server import team as team_module
from qwen_vllm.server.keys import Key
from qwen_vllm.server.team import Team
from qwen_vllm.vllm_plugin import patch, patches
from tests.support.chat_app import chat_app
from tests.support.counting import ask_often, open_together, team_of
from tests.support.scripted_core import ScriptedCore, engine_on

NAMES = ("ann", "bob", "root")
PLACES, BOUND = 8, 16


def secret(name: str) -> str:
    return f"{name}-0123456789abcdef"


def write_keys(path: Path, **lines: str) -> None:
    """The keys of NAMES, with further lines of their tables."""
    tables = [f'[{name}]\nkey = "{secret(name)}"\n{lines.get(name, "")}\n' for name in NAMES]
    path.write_text("\n".join([*tables, "admin = true\n"]))
    path.chmod(0o600)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    write_keys(tmp_path / "keys.toml")
    return tmp_path / "keys.toml"


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    with patches.TEAM.applied(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patch, "_applied", {*patch._applied, patches.TEAM.name})
        yield


class Server:
    """One front end on a scripted engine."""

    def __init__(self, core: ScriptedCore, team: Team, client: httpx.AsyncClient, tokenizer: Any) -> None:
        self.core, self.team, self._client, self._tokenizer = core, team, client, tokenizer

    async def chat(self, name: str, tokens: int = 4, **fields: Any) -> httpx.Response:
        body = {"query": name, "max_tokens": tokens, **fields}
        return await self._client.post("/chat", json=body, headers={"x-api-key": secret(name)})

    async def get(self, path: str, name: str) -> httpx.Response:
        return await self._client.get(path, headers={"Authorization": f"Bearer {secret(name)}"})

    async def queued(self, number: int) -> None:
        """Wait until so many requests are in the queue."""
        while self.team._queued < number:
            await asyncio.sleep(0.001)

    def names_started(self) -> list[str]:
        """The keys of the requests that the engine has begun, in their order."""
        texts = [self._tokenizer.decode(request.prompt_token_ids) for request in self.core.started]
        return ["ann" if "ann" in text else "bob" for text in texts]


@asynccontextmanager
async def serving(keys: Path) -> AsyncIterator[Server]:
    core = ScriptedCore(PLACES)
    core.open.set()
    engine = engine_on(core, max_num_seqs=PLACES, scheduling_policy="priority", max_model_len=512, enforce_eager=True)
    flags = {"key_file": str(keys), "usage_file": str(keys.parent / "usage.db"), "server_id": "server"}
    app = await chat_app(engine, **flags, queue_bound=BOUND, served_model_name=["base"])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        yield Server(core, app.state.team, client, engine.get_tokenizer())
    await app.state.team.close()
    engine.shutdown()


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


def refusal(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert "0123456789abcdef" not in response.text
    return response.status_code, error["type"], error["param"]


def test_tokens_are_counted_whole_and_streamed_and_each_sees_their_own(keys: Path) -> None:
    async def story() -> None:
        async with serving(keys) as server:
            whole, streamed = await server.chat("ann", 4), await server.chat("ann", 5, stream=True)
            prompts = 2 * whole.json()["usage"]["prompt_tokens"]
            await server.team.tick()
            used = {"requests": 2, "refused": 0, "prompt_tokens": prompts, "completion_tokens": 9}
            ann = (await server.get("/usage", "ann")).json()
            assert streamed.status_code == 200 and {**ann, **used} == ann and ann["name"] == "ann"
            everyone = (await server.get("/usage", "root")).json()["keys"]
            assert [row["name"] for row in everyone] == ["ann", "bob", "root"] and everyone[0] == ann
            assert (await server.get("/usage?day=2001-01-01", "ann")).json()["requests"] == 0
            assert (await server.get("/metrics", "ann")).status_code == 403
        rows = sqlite3.connect(keys.parent / "usage.db").execute("SELECT * FROM usage").fetchall()
        assert [row[1:] for row in rows] == [("ann", 2, 0, prompts, 9)]

    run(story())


def test_tokens_of_an_answer_that_runs_are_in_the_file_a_second_later(keys: Path) -> None:
    """What a killed server had counted is there for the next one."""

    async def story() -> None:
        async with serving(keys) as server:
            asking = asyncio.create_task(server.chat("ann", 400))
            while not server.core.started:
                await asyncio.sleep(0.001)
            await server.team.tick()
            await asyncio.sleep(0.05)
            await server.team.tick()
            killed = team_of(keys, keys.parent / "usage.db", "another server").usage(Key(name="ann", digest=b""))
            assert killed[0]["requests"] == 1 and killed[0]["prompt_tokens"] > 10 and killed[0]["completion_tokens"] > 2
            await asking

    run(story())


LIMITS = {
    "requests_per_minute": ("requests_per_minute = 2", 30),
    "tokens_per_day": ("tokens_per_day = 30", 86400),
    "requests_at_once": ("requests_at_once = 1", 1),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_over_a_limit_a_request_is_refused_with_its_name_and_others_go_on(keys: Path, limit: str) -> None:
    line, seconds = LIMITS[limit]
    write_keys(keys, ann=line)

    async def story() -> None:
        async with serving(keys) as server:
            first = asyncio.create_task(server.chat("ann", 60))
            await server.queued(1)
            if limit != "requests_at_once":
                assert (await server.chat("ann")).status_code == 200
            over = await server.chat("ann")
            assert refusal(over) == (429, "limited", limit)
            assert limit in over.json()["error"]["message"]
            assert 0 < int(over.headers["Retry-After"]) <= seconds
            assert (await server.chat("bob")).status_code == 200
            assert (await first).json()["usage"]["completion_tokens"] == 60
            if limit == "requests_at_once":
                assert (await server.chat("ann")).status_code == 200
            assert (await server.get("/usage", "ann")).json()["refused"] == 1

    run(story())


def test_a_key_may_use_its_models_alone(keys: Path) -> None:
    write_keys(keys, ann='models = ["poet"]')

    async def story() -> None:
        async with serving(keys) as server:
            assert refusal(await server.chat("ann")) == refusal(await server.chat("ann", model="base"))
            assert refusal(await server.chat("ann")) == (403, "unauthorized", "model")
            assert (await server.chat("bob", model="base")).status_code == 200

    run(story())


def test_when_one_key_floods_the_others_first_request_is_the_next_to_start(keys: Path) -> None:
    async def story() -> None:
        async with serving(keys) as server:
            server.core.open.clear()
            flood = [asyncio.create_task(server.chat("ann", 50)) for _ in range(BOUND)]
            await server.queued(BOUND)
            assert refusal(await server.chat("ann")) == (503, "overloaded", None)
            other = asyncio.create_task(server.chat("bob", 50))
            await server.queued(BOUND + 1)
            server.core.open.set()
            while len(server.core.started) < PLACES:
                await asyncio.sleep(0.001)
            assert sorted(server.names_started()) == ["ann"] * (PLACES - 1) + ["bob"]
            answers = await asyncio.gather(*flood, other)
            assert {answer.status_code for answer in answers} == {200}

    run(story())


def test_a_key_with_three_times_the_priority_has_three_times_the_turns(keys: Path) -> None:
    write_keys(keys, bob="priority = 3")

    async def story() -> None:
        async with serving(keys) as server:
            server.core.open.clear()
            asked = [asyncio.create_task(server.chat("ann", 2)) for _ in range(7)]
            await server.queued(7)
            asked += [asyncio.create_task(server.chat("bob", 2)) for _ in range(7)]
            await server.queued(14)
            server.core.open.set()
            while len(server.core.started) < PLACES:
                await asyncio.sleep(0.001)
            assert sorted(server.names_started()) == ["ann"] * 2 + ["bob"] * 6
            await asyncio.gather(*asked)

    run(story())


def test_a_client_that_leaves_while_it_waits_gives_its_turn_to_the_next(keys: Path) -> None:
    async def story() -> None:
        async with serving(keys) as server:
            server.core.open.clear()
            asked = [asyncio.create_task(server.chat("ann", 2)) for _ in range(PLACES + 2)]
            await server.queued(PLACES + 2)
            asked[PLACES].cancel()
            await asyncio.wait(asked[PLACES : PLACES + 1])
            server.core.open.set()
            assert all(answer.status_code == 200 for answer in await asyncio.gather(*asked[:PLACES], asked[-1]))
            await server.team.tick()
            assert not server.team.tickets and not server.team._queued

    run(story())


def test_a_key_that_is_taken_out_finishes_what_runs(keys: Path, capfd: pytest.CaptureFixture) -> None:
    async def story() -> None:
        async with serving(keys) as server:
            asking = asyncio.create_task(server.chat("bob", 300))
            await server.queued(1)
            keys.write_text(f'[ann]\nkey = "{secret("ann")}"\n')
            await server.team.tick()
            assert (await server.chat("bob")).status_code == 401
            assert (await asking).json()["usage"]["completion_tokens"] == 300
            await server.team.tick()
            used = server.team.usage(Key(name="bob", digest=b""))
            assert used[0]["completion_tokens"] == 300

    run(story())
    assert "the key file was read again" in capfd.readouterr().err


@pytest.mark.parametrize("broken", ["[ann", "", None])
def test_a_broken_key_file_leaves_the_keys_as_they_were(
    keys: Path, broken: str | None, capfd: pytest.CaptureFixture
) -> None:
    async def story() -> None:
        team = team_of(keys, keys.parent / "usage.db")
        keys.unlink() if broken is None else keys.write_text(broken)
        await team.tick()
        await team.tick()
        assert team.ring.find(secret("ann").encode())
        said = capfd.readouterr().err
        assert said.count("the keys stay as they were") == 1 and secret("ann") not in said
        write_keys(keys, ann="requests_per_minute = 7")
        await team.tick()
        assert team.ring.by_name()["ann"].requests_per_minute == 7
        await team.close()

    run(story())


def test_a_clock_that_goes_back_neither_locks_a_key_out_nor_gives_it_more(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_700_000_000.0]
    monkeypatch.setattr(team_module.time, "time", lambda: now[0])
    write_keys(keys, ann="requests_per_minute = 2")
    team = team_of(keys, keys.parent / "usage.db")
    ann = team.ring.by_name()["ann"]

    async def story() -> None:
        await team.admit(ann, {})
        await team.admit(ann, {})
        now[0] -= 86_400
        assert await refused_by(team.admit(ann, {})) == ("requests_per_minute", 30)
        now[0] += 31
        await team.admit(ann, {})
        assert (await refused_by(team.admit(ann, {})))[0] == "requests_per_minute"

    run(story())


def test_a_burst_waits_once_for_the_usage_file_and_the_limits_hold_in_it(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_keys(keys, ann="requests_at_once = 30", bob="requests_per_minute = 7")
    team, turns = team_of(keys, keys.parent / "usage.db"), list[None]()
    transaction = team_module.UsageFile.transaction
    monkeypatch.setattr(team_module.UsageFile, "transaction", lambda file: (turns.append(None), transaction(file))[1])

    async def story() -> None:
        ring = team.ring.by_name()
        asked = [team.admit(ring[name], {}) for name in ["ann", "bob"] * 40]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer.param for answer in answers if isinstance(answer, ChatError)]
        assert sorted(refused) == ["requests_at_once"] * 10 + ["requests_per_minute"] * 33
        assert len(turns) == 1

    run(story())


def test_where_the_usage_file_has_no_number_for_a_number_each_of_a_burst_is_told_so(keys: Path) -> None:
    write_keys(keys, ann="requests_per_minute = 7")
    team = team_of(keys, keys.parent / "usage.db")
    with sqlite3.connect(keys.parent / "usage.db") as file:
        file.execute("INSERT INTO rate VALUES ('ann', 'many', 'now')")

    async def story() -> None:
        asked = [team.admit(team.ring.by_name()["ann"], {}) for _ in range(3)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [TypeError] * 3
        team.end(await team.admit(team.ring.by_name()["bob"], {}))

    run(story())


def test_a_client_that_leaves_as_it_is_admitted_holds_no_place(keys: Path) -> None:
    write_keys(keys, ann="requests_at_once = 1")
    team = team_of(keys, keys.parent / "usage.db")
    ann = team.ring.by_name()["ann"]

    async def story() -> None:
        for steps in range(4):
            leaving = asyncio.create_task(team.admit(ann, {}))
            for _ in range(steps):
                await asyncio.sleep(0)
            if leaving.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            else:
                team.end(leaving.result())
            team.end(await team.admit(ann, {}))

    run(story())


async def refused_by(asked: Coroutine[Any, Any, Any]) -> tuple[str | None, int | None]:
    with pytest.raises(ChatError) as error:
        await asked
    return error.value.param, error.value.retry_after


def test_with_a_full_disk_answers_and_limits_go_on_and_no_count_is_lost(
    keys: Path, capfd: pytest.CaptureFixture
) -> None:
    write_keys(keys, ann="requests_per_minute = 5")

    async def story() -> None:
        async with serving(keys) as server:
            file = server.team._file
            for connection in (file._requests, file._writes):  # no page may be added, and none changed
                (pages,) = connection.execute("PRAGMA page_count").fetchone()
                connection.execute(f"PRAGMA max_page_count = {pages}")
                connection.execute("PRAGMA query_only = ON")
            for _ in range(5):
                assert (await server.chat("ann", 3)).status_code == 200
                await server.team.tick()
            assert refusal(await server.chat("ann")) == (429, "limited", "requests_per_minute")
            assert capfd.readouterr().err.count("the usage file cannot be written") == 1
            for connection in (file._requests, file._writes):
                connection.execute("PRAGMA query_only = OFF")
            await server.team.tick()
            assert "written again" in capfd.readouterr().err
            used = server.team.usage(Key(name="ann", digest=b""))[0]
            assert (used["requests"], used["completion_tokens"], used["refused"]) == (5, 15, 1)

    run(story())


@pytest.mark.parametrize("limit", ["requests_per_minute = 50", "requests_at_once = 50"])
def test_two_processes_that_count_at_once_admit_as_many_as_one(keys: Path, limit: str) -> None:
    keys.write_text(f'[ann]\nkey = "{secret("ann")}"\n{limit}\n')
    forks = multiprocessing.get_context("fork")
    admitted, together = forks.SimpleQueue(), forks.Barrier(2)
    given = (keys, keys.parent / "usage.db", 40, together, admitted)
    processes = [forks.Process(target=ask_often, args=given) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert admitted.get() + admitted.get() == 50
    rows = sqlite3.connect(keys.parent / "usage.db").execute("SELECT requests, refused FROM usage").fetchall()
    assert rows == [(50, 30)]


def test_front_ends_that_start_at_once_can_all_open_a_new_usage_file(tmp_path: Path) -> None:
    forks = multiprocessing.get_context("fork")
    failed, together = forks.SimpleQueue(), forks.Barrier(4)
    files = [tmp_path / f"{number}.db" for number in range(60)]
    processes = [forks.Process(target=open_together, args=(files, together, failed)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert failed.empty() or not failed.get()
    assert {process.exitcode for process in processes} == {0}


def test_a_front_end_that_hangs_holds_no_other_up(keys: Path) -> None:
    team = team_of(keys, keys.parent / "usage.db")
    (key, *_) = team.ring.by_name().values()
    with (keys.parent / "usage.db-lock").open() as held_by_another:
        fcntl.flock(held_by_another, fcntl.LOCK_EX)
        assert asyncio.run(team.admit(key, {})).account.key.name == key.name


def test_ten_thousand_keys_are_told_apart(tmp_path: Path) -> None:
    hashes = [hashlib.sha256(f"key number {number}".encode()).hexdigest() for number in range(10_000)]
    path = tmp_path / "keys.toml"
    path.write_text("".join(f'[k{number}]\nkey = "sha256:{key}"\n' for number, key in enumerate(hashes)))
    path.chmod(0o600)
    team = team_of(path, tmp_path / "usage.db")
    assert team.ring.find(b"key number 9999").name == "k9999"
    assert team.ring.find(b"key number 10000") is None


def test_a_flood_of_wrong_keys_costs_a_look_up_each_and_leaves_nothing_behind(keys: Path) -> None:
    async def story() -> None:
        async with serving(keys) as server:
            asked: list[bytes] = []
            find = server.team.ring.find
            server.team.ring.find = lambda key: asked.append(key) or find(key)
            before = server.team._file._requests.total_changes
            headers = [{"x-api-key": f"wrong-{number}"} for number in range(200)]
            answers = [await server._client.post("/chat", json={"query": "q"}, headers=wrong) for wrong in headers]
            assert {answer.status_code for answer in answers} == {401}
            assert len(asked) == 400  # one for each of the two headers
            assert not server.team._accounts and server.team._file._requests.total_changes == before

    run(story())
