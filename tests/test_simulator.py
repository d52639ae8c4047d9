"""The simulator is what every other test stands on; here it is held to the APIs' own shape."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from simulator import Simulator

OPENAI = {"Authorization": "Bearer sk-test"}
KEBOOLA = {"X-StorageApi-Token": "kbc-test"}
JOB = {"component": "app", "config": "1", "mode": "run"}
REQUIRED = {
    "id": "batch_a",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "input_file_id": "file-batch_a-input",
    "completion_window": "24h",
}


@pytest.fixture
def sim(caplog: pytest.LogCaptureFixture) -> Iterator[Simulator]:
    with Simulator() as simulator:
        simulator.add_key("sk-test")
        simulator.add_token("kbc-test")
        simulator.add_batch("batch_a", "in_progress")
        yield simulator
    # What goes wrong inside the event loop is only logged by asyncio.
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.fixture
def web() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=5, headers=OPENAI | KEBOOLA) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def batch(sim: Simulator, web: httpx.Client, batch_id: str = "batch_a") -> dict[str, Any]:
    answer: dict[str, Any] = web.get(f"{sim.openai_url}/batches/{batch_id}").json()
    return answer


def post_job(sim: Simulator, web: httpx.Client, **fields: object) -> httpx.Response:
    return web.post(f"{sim.queue_url}/jobs", json=JOB | fields)


def search(sim: Simulator, web: httpx.Client, **query: str | int) -> list[str]:
    """The ids of the jobs found."""
    return [row["id"] for row in web.get(f"{sim.queue_url}/search/jobs", params=query).json()]


# ---- OpenAI ----


def test_a_batch_has_all_fields(sim: Simulator, web: httpx.Client) -> None:
    """A batch shows the required fields, null for what does not apply, and a request id."""
    answer = web.get(f"{sim.openai_url}/batches/batch_a")
    found = answer.json()
    assert answer.headers["x-request-id"].startswith("req_")
    assert found.items() >= REQUIRED.items()
    assert abs(found["created_at"] - time.time()) < 5
    assert found["request_counts"] == {"total": 100, "completed": 0, "failed": 0}
    for name in ("errors", "output_file_id", "error_file_id", "completed_at", "metadata", "usage"):
        assert found[name] is None


@pytest.mark.parametrize(
    ("status", "options", "expected"),
    [
        ("completed", {}, (100, True, False)),
        ("completed", {"failed": 3}, (97, True, True)),
        ("completed", {"failed": 100}, (0, False, True)),
        ("completed", {"output": False}, (100, False, False)),
        ("failed", {}, (0, False, False)),
        ("expired", {}, (50, True, False)),
        ("cancelled", {"output": False}, (50, False, False)),
    ],
)
def test_the_end_of_a_batch(
    sim: Simulator,
    web: httpx.Client,
    status: str,
    options: dict[str, Any],
    expected: tuple[int, bool, bool],
) -> None:
    """A terminal status brings its time, its counts and its output and error files."""
    sim.add_batch("batch_b", **options)
    sim.finish("batch_b", status)
    found = batch(sim, web, "batch_b")
    assert found["status"] == status
    assert abs(found[f"{status}_at"] - time.time()) < 5
    files = [found[name] is not None for name in ("output_file_id", "error_file_id")]
    assert (found["request_counts"]["completed"], *files) == expected
    assert bool(found["errors"]) is (status == "failed")


def test_a_timeline(sim: Simulator, web: httpx.Client) -> None:
    """Statuses follow by the clock, `set_batch` overrides them, `finish` ends them."""
    sim.add_batch("batch_later", [(0, "validating"), (60, "in_progress")])
    assert batch(sim, web, "batch_later")["status"] == "validating"
    sim.add_batch("batch_t", [(0, "validating"), (0.02, "in_progress"), (0.04, "completed")])
    sim.wait_for(lambda: sim.state()["batches"]["batch_t"] == "completed")
    assert batch(sim, web, "batch_t")["in_progress_at"] is not None
    sim.set_batch("batch_t", status="odd", output_file_id="")
    found = batch(sim, web, "batch_t")
    assert (found["status"], found["output_file_id"]) == ("odd", "")
    sim.finish("batch_t", "expired")
    assert batch(sim, web, "batch_t")["status"] == "expired"


def test_paging(sim: Simulator, web: httpx.Client) -> None:
    """The list is newest first, pages by `after`, and leaves out what is deleted or foreign."""
    for number in range(7):
        sim.add_batch(f"batch_{number}")
    sim.add_batch("batch_foreign", project="proj_other")
    sim.delete_batch("batch_3")
    found: list[str] = []
    query: dict[str, str | int] = {"limit": 3}
    while True:
        page = web.get(f"{sim.openai_url}/batches", params=query).json()
        ids = [one["id"] for one in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[0], ids[-1])
        found += ids
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert found == [f"batch_{number}" for number in (6, 5, 4, 2, 1, 0)] + ["batch_a"]


NEW_BATCH = {"endpoint": "/v1/responses", "completion_window": "24h"}


def upload(
    sim: Simulator, web: httpx.Client, content: bytes = b"{}\n{}\n", name: str = "requests.jsonl"
) -> httpx.Response:
    """Uploads a file of requests as OpenAI's own client does."""
    files = {"file": (name, content)}
    return web.post(f"{sim.openai_url}/files", data={"purpose": "batch"}, files=files)


@pytest.mark.parametrize(
    ("content", "end", "total"),
    [
        (b'{"custom_id": "\xc5\xbe"}\n{}', "completed", 2),
        (b"{}\nno json\n", "failed", 0),
        (b"", "failed", 0),
    ],
)
def test_a_created_batch(
    sim: Simulator, web: httpx.Client, content: bytes, end: str, total: int
) -> None:
    """An uploaded file becomes a batch with its metadata, which runs, ends, and is listed."""
    sim.batch_seconds = 0.05
    file = upload(sim, web, content).json()
    assert (file["object"], file["bytes"], file["purpose"]) == ("file", len(content), "batch")
    body = NEW_BATCH | {"input_file_id": file["id"], "metadata": {"pipeline": "nightly"}}
    created = web.post(f"{sim.openai_url}/batches", json=body).json()
    assert created.items() >= (body | {"status": "validating", "object": "batch"}).items()
    sim.wait_for(lambda: batch(sim, web, created["id"])["status"] == end)
    found = web.get(f"{sim.openai_url}/batches?limit=1").json()["data"][0]
    assert (found["id"], found["metadata"]) == (created["id"], body["metadata"])
    assert (found["request_counts"]["total"], bool(found["errors"])) == (total, end == "failed")


def test_cancel(sim: Simulator, web: httpx.Client) -> None:
    """A running batch is cancelled after a while, whatever was planned; an ended one is not."""
    sim.add_batch("batch_b", [(0, "in_progress"), (0.6, "completed")])
    url = f"{sim.openai_url}/batches/batch_b/cancel"
    assert web.post(url).json()["status"] == "cancelling"
    sim.wait_for(lambda: batch(sim, web, "batch_b")["status"] == "cancelled")
    answer = web.post(url)
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == "Cannot cancel a batch with status 'cancelled'."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": None}, "Missing required parameter: 'endpoint'."),
        ({"completion_window": "1h"}, "Invalid value: '1h'. Supported values are: 24h."),
        ({"input_file_id": "file-x"}, "Invalid input file: file-x."),
        (
            {"metadata": {"a": 1}},
            "Invalid 'metadata.a': a string of at most 512 characters is expected.",
        ),
        (
            {"metadata": {str(n): "" for n in range(17)}},
            "Invalid 'metadata': too many properties, at most 16.",
        ),
    ],
)
def test_a_batch_that_is_refused(
    sim: Simulator, web: httpx.Client, fields: dict[str, object], message: str
) -> None:
    """What OpenAI would refuse is a 400 that names it, and no batch."""
    body = NEW_BATCH | {"input_file_id": upload(sim, web).json()["id"]} | fields
    answer = web.post(f"{sim.openai_url}/batches", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert [*sim.state()["batches"]] == ["batch_a"]


def test_a_file_that_is_refused(sim: Simulator, web: httpx.Client) -> None:
    """Only .jsonl files are taken for batches, and only forms are uploads."""
    answer = upload(sim, web, name="requests.txt")
    message = "Invalid file format for Batch API. Must be .jsonl"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert web.post(f"{sim.openai_url}/files", json={"purpose": "batch"}).status_code == 400


@pytest.mark.parametrize(
    ("path", "headers", "status", "message"),
    [
        ("/batches/batch_a", {}, 401, "You didn't provide an API key."),
        (
            "/batches/batch_a",
            {"Authorization": "Bearer sk-unknown"},
            401,
            "Incorrect API key provided: sk-un***nown.",
        ),
        ("/batches/batch_x", OPENAI, 404, "No batch found with id 'batch_x'."),
        ("/batches/batch_foreign", OPENAI, 404, "No batch found with id 'batch_foreign'."),
        ("/batches?after=batch_x", OPENAI, 404, "No batch found with id 'batch_x'."),
        ("/batches?limit=101", OPENAI, 400, "Invalid 'limit': expected an integer from 1 to 100."),
        ("/batches?limit=0", OPENAI, 400, "Invalid 'limit': expected an integer from 1 to 100."),
        ("/models", OPENAI, 404, "No such endpoint: GET /v1/models"),
    ],
)
def test_openai_errors(
    sim: Simulator, path: str, headers: dict[str, str], status: int, message: str
) -> None:
    """Errors have OpenAI's shape and a request id."""
    sim.add_batch("batch_foreign", project="proj_other")
    answer = httpx.get(sim.openai_url + path, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"]) == (status, message)
    assert error.keys() == {"message", "type", "param", "code"}
    assert "x-request-id" in answer.headers


# ---- Keboola ----


def test_storage(sim: Simulator, web: httpx.Client) -> None:
    """The stack names its queue to everybody, and verifies tokens and configurations."""
    services = httpx.get(f"{sim.stack_url}/v2/storage").json()["services"]
    assert {"id": "queue", "url": sim.queue_url} in services
    sim.add_config("app", "1", {"parameters": {"a": 1}})
    base = f"{sim.stack_url}/v2/storage"
    assert web.get(f"{base}/tokens/verify").json()["owner"]["name"] == "Simulated project"
    assert httpx.get(f"{base}/tokens/verify").status_code == 401
    config = web.get(f"{base}/components/app/configs/1").json()
    assert config["configuration"] == {"parameters": {"a": 1}}
    assert web.get(f"{base}/components/app/configs/2").status_code == 404


def test_a_created_job(sim: Simulator, web: httpx.Client) -> None:
    """A created job comes back whole, and is read again by its id and from the simulator."""
    data = {"values": [{"name": "a", "value": "1"}]}
    answer = post_job(sim, web, variableValuesData=data)
    job = answer.json()
    assert answer.status_code == 201
    assert job["id"].isdigit()
    assert job.items() >= (JOB | {"status": "created", "isFinished": False}).items()
    assert job["variableValuesData"] == data
    assert job["createdTime"].endswith("+00:00")
    assert web.get(job["url"]).json() == job == sim.jobs[0]


def test_jobs_of_one_configuration_stand_in_line(sim: Simulator, web: httpx.Client) -> None:
    """A second job waits until the first has ended, another configuration's does not."""
    for config in ("1", "1", "2"):
        assert post_job(sim, web, config=config).json()["status"] == "created"
    first, second, _ = (job["id"] for job in sim.jobs)
    assert [job["status"] for job in sim.jobs] == ["created", "waiting", "created"]
    sim.finish_job(first, "error")
    assert [job["status"] for job in sim.jobs] == ["error", "created", "created"]
    assert web.get(f"{sim.queue_url}/jobs/{first}").json()["isFinished"] is True
    assert web.get(f"{sim.queue_url}/jobs/{second}").json()["isFinished"] is False


def test_jobs_that_run_by_themselves(sim: Simulator, web: httpx.Client) -> None:
    """With `job_seconds`, jobs of one configuration run and end one after another."""
    sim.job_seconds = 60
    first, _ = (post_job(sim, web).json()["id"] for _ in range(2))
    assert [job["status"] for job in sim.jobs] == ["processing", "waiting"]
    sim.job_seconds = 0.02
    sim.finish_job(first, "warning")
    sim.wait_for(lambda: sim.jobs[1]["isFinished"])
    assert [job["status"] for job in sim.jobs] == ["warning", "success"]


def pair(name: object, value: object) -> dict[str, object]:
    return {"variableValuesData": {"values": [{"name": name, "value": value}]}}


EMPTY = 'Invalid job: "variableValuesData.values.0.value" cannot contain an empty value.'


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"mode": ""}, 400, 'Invalid job: "mode" must be a non-empty string.'),
        ({"mode": "no"}, 400, "Invalid job: \"mode\" must be one of ['debug', 'forceRun', 'run']."),
        ({"config": 1}, 400, 'Invalid job: "config" must be a non-empty string.'),
        ({"config": "9"}, 404, "Configuration 9 of component app not found"),
        (pair("a", ""), 400, EMPTY),
        (pair("a", 1), 400, EMPTY),
        (pair("", "a"), 400, EMPTY.replace("0.value", "0.name")),
        (
            {"variableValuesData": []},
            400,
            'Invalid job: "variableValuesData.values" must be a list.',
        ),
        (
            pair("a", "b") | {"variableValuesId": "1"},
            400,
            'Only one of "variableValuesId" and "variableValuesData" can be set.',
        ),
    ],
)
def test_keboola_errors(
    sim: Simulator, web: httpx.Client, fields: dict[str, object], status: int, message: str
) -> None:
    """A job that the queue would refuse is refused, in Keboola's shape, and is not created."""
    sim.add_config("app", "1")
    answer = post_job(sim, web, **fields)
    error = answer.json()
    assert (answer.status_code, error["error"], error["code"]) == (status, message, status)
    assert (error["status"], bool(error["exceptionId"])) == ("error", True)
    assert sim.jobs == []


def test_search(sim: Simulator, web: httpx.Client) -> None:
    """The search filters, pages and ignores what it does not know."""
    for config, branch in (("1", None), ("2", None), ("1", "77"), ("1", None)):
        post_job(sim, web, config=config, branchId=branch)
    a, b, c, d = (job["id"] for job in sim.jobs)
    first = datetime.fromisoformat(sim.jobs[0]["createdTime"])
    last = datetime.fromisoformat(sim.jobs[-1]["createdTime"])
    second = timedelta(seconds=1)
    table: list[tuple[dict[str, str | int], list[str]]] = [
        ({}, [d, c, b, a]),
        ({"componentId": "app", "configId": "1"}, [d, c, a]),
        ({"configId": "2"}, [b]),
        ({"branchId": "77"}, [c]),
        ({"limit": 2, "offset": 1}, [c, b]),
        ({"sortBy": "createdTime", "sortOrder": "desc", "limit": 1}, [d]),
        ({"noSuchFilter": "x", "limit": 500}, [d, c, b, a]),
        ({"createdTimeFrom": first.isoformat()}, [d, c, b, a]),
        ({"createdTimeFrom": (last + second).isoformat()}, []),
        ({"createdTimeTo": last.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}, [d, c, b, a]),
        ({"createdTimeTo": (first - second).isoformat()}, []),
    ]
    for query, expected in table:
        assert search(sim, web, **query) == expected, query


def test_search_lags(sim: Simulator, web: httpx.Client) -> None:
    """A new job is not found until the lag is over, but is there by its id."""
    sim.search_lag = 60
    job_id = post_job(sim, web).json()["id"]
    assert search(sim, web) == []
    assert web.get(f"{sim.queue_url}/jobs/{job_id}").status_code == 200
    sim.search_lag = 0
    assert search(sim, web) == [job_id]


def test_search_hides_variables(sim: Simulator, web: httpx.Client) -> None:
    """Rows of the search may lack the variables; the job itself has them."""
    sim.search_hides_variables = True
    job = post_job(sim, web, **pair("a", "b")).json()
    row = web.get(f"{sim.queue_url}/search/jobs").json()[0]
    assert job.keys() - row.keys() == {"variableValuesData"}
    assert "variableValuesData" in web.get(job["url"]).json()


# ---- faults ----


@pytest.mark.parametrize(
    ("kind", "error", "created"),
    [
        ("reset_before", httpx.ReadError, 0),
        ("reset_after", httpx.ReadError, 1),
        ("close_after", httpx.RemoteProtocolError, 1),
        ("truncated", httpx.RemoteProtocolError, 1),
        ("hang_before", httpx.ReadTimeout, 0),
        ("hang_after", httpx.ReadTimeout, 1),
        ("redirect", httpx.TooManyRedirects, 0),
    ],
)
def test_faults_without_an_answer(
    sim: Simulator, kind: str, error: type[Exception], created: int
) -> None:
    """The client sees the failure that was asked for, and the job exists or does not."""
    fault = sim.fault("queue.create", kind, times=None)
    with httpx.Client(timeout=0.5, headers=KEBOOLA, follow_redirects=True) as client:
        with pytest.raises(error):
            post_job(sim, client)
        assert fault.hits > 0
        assert len(sim.jobs) == created
        sim.clear_faults()
        assert post_job(sim, client).status_code == 201


# ---- by hand ----


def test_command_line() -> None:
    """By hand it prints addresses and a config, logs requests, obeys, and ends with Ctrl-C."""
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("simulator.py"))]
    command += ["--openai-port=0", "--stack-port=0", "--queue-port=0"]
    command += ["--batch", "batch_a=validating@0,completed@60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], "it ended early"
        text = "".join(lines)
        assert "    batch_ids: [batch_a]\n" in text
        assert "export OPENAI_API_KEY=sk-simulator KEBOOLA_TOKEN=kbc-simulator\n" in text
        url = lines[0].split()[1]
        key = {"Authorization": "Bearer sk-simulator"}
        assert httpx.get(f"{url}/batches/batch_a", headers=key).json()["status"] == "validating"
        assert process.stdout.readline().endswith(" GET /v1/batches/batch_a -> 200\n")
        stack_url = lines[1].split()[1]
        body = {"id": "batch_a", "status": "expired"}
        assert httpx.post(f"{stack_url}/_sim/finish", json=body).json() == {"ok": True}
        state = httpx.get(f"{stack_url}/_sim/state").json()
        assert state["batches"] == {"batch_a": "expired"}
        os.kill(process.pid, signal.SIGINT)
        assert process.communicate(timeout=5) == ("", "")
        assert process.returncode == 0
