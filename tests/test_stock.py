"""Stock servers are asked in the right order, go on whatever happens, and read whole checkpoints of one version."""

import asyncio
import json
import pathlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import marked_model
import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file

from engines.sglang.stock import (
    BEGIN,
    CONTINUE,
    END,
    PAUSE,
    Answer,
    Call,
    Outcome,
    StockServer,
    StockUpdate,
    conversation,
    update_call,
)
from stream_rl.errors import WeightsError
from stream_rl.types import Version

UPDATE = update_call(pathlib.Path("/checkpoint"), Version(1, 2))
WELL, NO = Answer(200, "fine"), Answer(400, "no such thing")
SESSION = Answer(400, "must run between begin_weight_update() and end_weight_update()")
OPEN = Answer(400, "a weight-update session is already open; call end_weight_update() first")
NOTHING = Answer(0, "gave no answer")


def talk(session: bool, *answers: Answer) -> tuple[list[Call], Outcome]:
    """The calls that are made if these are the answers, and what comes of it."""
    asking = conversation(UPDATE, session)
    calls = [next(asking)]
    for answer in answers[:-1]:
        calls.append(asking.send(answer))
    with pytest.raises(StopIteration) as end:
        asking.send(answers[-1])
    return calls, end.value.value


@pytest.mark.parametrize(
    ("session", "answers", "calls"),
    [
        (False, [WELL, WELL, WELL], [PAUSE, UPDATE, CONTINUE]),
        (True, [WELL] * 5, [PAUSE, BEGIN, UPDATE, END, CONTINUE]),
        (False, [WELL, SESSION, WELL, WELL, WELL, WELL], [PAUSE, UPDATE, BEGIN, UPDATE, END, CONTINUE]),
        (True, [WELL, OPEN, WELL, WELL, WELL], [PAUSE, BEGIN, UPDATE, END, CONTINUE]),
        (False, [WELL, WELL, NOTHING, WELL], [PAUSE, UPDATE, CONTINUE, CONTINUE]),
    ],
)
def test_an_update_that_goes_well(session: bool, answers: list[Answer], calls: list[Call]) -> None:
    made, outcome = talk(session, *answers)
    assert made == calls
    assert outcome == Outcome("", session or SESSION in answers)


@pytest.mark.parametrize("failure", [NO, NOTHING, Answer(500, "dead")], ids=["400", "nothing", "500"])
@pytest.mark.parametrize("session", [False, True])
def test_whatever_fails_the_server_goes_on(session: bool, failure: Answer) -> None:
    whole = [PAUSE, BEGIN, UPDATE, END, CONTINUE] if session else [PAUSE, UPDATE, CONTINUE]
    for at in range(len(whole) - 1):
        asking = conversation(UPDATE, session)
        call, made, outcome = next(asking), [], None
        while outcome is None:
            made.append(call)
            try:
                call = asking.send(failure if call == whole[at] else WELL)
            except StopIteration as end:
                outcome = end.value
        assert made[-1] == CONTINUE
        assert (END in made) == (BEGIN in made and whole[at] != BEGIN), "what was begun is ended"
        assert outcome.problem == failure.text


def test_a_server_that_may_be_left_paused_is_named() -> None:
    made, outcome = talk(False, WELL, WELL, NOTHING, NOTHING)
    assert made == [PAUSE, UPDATE, CONTINUE, CONTINUE]
    assert outcome.problem == "gave no answer; it may still be paused: POST /continue_generation to it"
    assert talk(False, WELL, NO, NO, NO)[1].problem.startswith("no such thing; it may still be paused")


def test_running_requests_keep_their_cache() -> None:
    assert UPDATE.body["flush_cache"] is False, "with requests running the default ends the server"
    assert PAUSE.body == {"mode": "in_place"}


# -- over HTTP -------------------------------------------------------------------------------------------------------

Handler = Callable[[str, dict[str, object]], web.Response | None]


class FakeServer:
    """Notes what it is asked, and answers 200 unless told otherwise; with None it never does."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.read: list[dict[str, torch.Tensor]] = []
        self.answers: Handler = lambda path, body: web.json_response({"success": True})
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(request.path)
        if "model_path" in body:
            self.read.append(load_file(str(pathlib.Path(body["model_path"]) / "model.safetensors")))
        answer = self.answers(request.path, body)
        if answer is None:
            await asyncio.sleep(3600)
        assert answer is not None
        return answer


@asynccontextmanager
async def fake_server() -> AsyncIterator[FakeServer]:
    server, app = FakeServer(), web.Application()
    app.router.add_post("/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def updates(
    tmp_path: pathlib.Path, versions: list[int], answers: Handler | None = None, timeout: float = 10.0
) -> tuple[FakeServer, list[StockUpdate]]:
    model = marked_model.write(tmp_path / "model", marked_model.marked_weights(0))
    (model / "tokenizer.json").write_text("{}")

    async def run() -> tuple[FakeServer, list[StockUpdate]]:
        async with fake_server() as server:
            server.answers = answers or server.answers
            stock = StockServer(server.url + "/", model, tmp_path / "scratch", timeout)
            return server, [
                await stock.update(Version(0, step), marked_model.marked_weights(step).items()) for step in versions
            ]

    return asyncio.run(run())


def test_the_server_reads_each_versions_weights_from_a_whole_model_directory(tmp_path: pathlib.Path) -> None:
    server, done = updates(tmp_path, [1, 2, 3])
    assert server.asked == [PAUSE.path, UPDATE.path, CONTINUE.path] * 3
    for step, read in zip([1, 2, 3], server.read, strict=True):
        expected = marked_model.marked_weights(step)
        assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    assert [update.version.step for update in done] == [1, 2, 3]
    assert all(u.problem == "" and 0 < u.pause_seconds < 5 and 0 < u.write_seconds < 5 for u in done)
    kept = sorted(path.name for path in (tmp_path / "scratch").iterdir())
    assert kept == ["version-0-2", "version-0-3"]
    assert {path.name for path in (tmp_path / "scratch" / kept[1]).iterdir()} >= {"config.json", "tokenizer.json"}


def test_a_version_that_failed_is_not_written_again(tmp_path: pathlib.Path) -> None:
    inodes = []

    def answers(path: str, body: dict[str, object]) -> web.Response:
        if "model_path" in body:
            inodes.append((pathlib.Path(str(body["model_path"])) / "model.safetensors").stat().st_ino)
        return web.json_response(
            {"message": "not now"}, status=400 if "model_path" in body and len(inodes) < 2 else 200
        )

    server, (first, second) = updates(tmp_path, [1, 1], answers)
    assert first.problem == f"{server.url}{UPDATE.path} answered 400: not now"
    assert second.problem == "" and len(set(inodes)) == 1
    assert server.asked[-1] == CONTINUE.path


def test_a_session_is_opened_once_a_server_has_asked_for_it(tmp_path: pathlib.Path) -> None:
    opened = []

    def answers(path: str, body: dict[str, object]) -> web.Response:
        if path in (BEGIN.path, END.path):
            opened.append(path == BEGIN.path)
        refused = path == UPDATE.path and not (opened and opened[-1])
        return web.json_response({"success": not refused, "message": SESSION.text}, status=400 if refused else 200)

    server, done = updates(tmp_path, [1, 2], answers)
    session = [BEGIN.path, UPDATE.path, END.path, CONTINUE.path]
    assert server.asked == [PAUSE.path, UPDATE.path, *session, PAUSE.path, *session]
    assert [update.problem for update in done] == ["", ""]


def test_a_server_that_does_not_answer_is_given_up_after_the_timeout(tmp_path: pathlib.Path) -> None:
    server, [done] = updates(
        tmp_path, [1], lambda path, body: None if path == UPDATE.path else web.json_response({}), timeout=0.2
    )
    assert server.asked == [PAUSE.path, UPDATE.path, CONTINUE.path]
    assert "gave no answer: TimeoutError" in done.problem
    assert done.pause_seconds >= 0.2, "the pause that a failure costs counts as well"


def test_a_server_that_is_gone_is_a_problem_and_no_error(tmp_path: pathlib.Path) -> None:
    model = marked_model.write(tmp_path / "model", marked_model.marked_weights(0))
    stock = StockServer("http://127.0.0.1:1", model, tmp_path / "scratch", 5)
    done = asyncio.run(stock.update(Version(0, 1), marked_model.marked_weights(1).items()))
    assert "gave no answer: ClientConnectorError" in done.problem and "may still be paused" in done.problem


def test_a_cancelled_update_lets_the_server_go_on(tmp_path: pathlib.Path) -> None:
    model = marked_model.write(tmp_path / "model", marked_model.marked_weights(0))

    async def run() -> list[str]:
        async with fake_server() as server:
            loading = asyncio.Event()

            def answers(path: str, body: dict[str, object]) -> web.Response | None:
                if path != UPDATE.path:
                    return web.json_response({})
                loading.set()
                return None

            server.answers = answers
            stock = StockServer(server.url, model, tmp_path / "scratch", 10)
            weights = marked_model.marked_weights(1).items()
            async with asyncio.TaskGroup() as tasks:
                update = tasks.create_task(stock.update(Version(0, 1), weights))
                await loading.wait()
                update.cancel()
            return server.asked

    assert asyncio.run(run()) == [PAUSE.path, UPDATE.path, CONTINUE.path]


def test_a_checkpoint_that_cannot_be_written_pauses_nobody(tmp_path: pathlib.Path) -> None:
    model = marked_model.write(tmp_path / "model", marked_model.marked_weights(0))
    (tmp_path / "file").touch()

    async def run() -> list[str]:
        async with fake_server() as server:
            stock = StockServer(server.url, model, tmp_path / "file" / "scratch", 10)
            with pytest.raises(WeightsError, match="cannot write"):
                await stock.update(Version(0, 1), marked_model.marked_weights(1).items())
            return server.asked

    assert asyncio.run(run()) == []


def test_the_servers_own_words_are_in_the_problem(tmp_path: pathlib.Path) -> None:
    def answers(path: str, body: dict[str, object]) -> web.Response:
        return web.Response(text=json.dumps({"message": "Failed to pause"}) if path == PAUSE.path else "{}", status=500)

    _, [done] = updates(tmp_path, [1], answers)
    assert "/pause_generation answered 500: Failed to pause" in done.problem
