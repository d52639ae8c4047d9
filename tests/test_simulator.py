"""The simulator is what every other test stands on; here it is held to the APIs' own shape."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from simulator import Simulator

OPENAI = {"Authorization": "Bearer sk-test"}
KEBOOLA = {"X-StorageApi-Token": "kbc-test"}
LAST_LINE = '  found: {{match: {{pipeline: nightly}}, since: {}, config_id: "123457"}}\n'
JOB = {"component": "app", "config": "1", "mode": "run"}
REQUIRED = {"id": "batch_a", "object": "batch", "endpoint": "/v1/chat/completions"}


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


def test_the_end_of_a_batch(sim: Simulator, web: httpx.Client) -> None:
    """A terminal status brings its time, its counts and its output and error files."""
    table: list[tuple[str, dict[str, Any], tuple[int, bool, bool]]] = [
        ("completed", {}, (100, True, False)),
        ("completed", {"failed": 3}, (97, True, True)),
        ("completed", {"failed": 100}, (0, False, True)),
        ("completed", {"output": False}, (100, False, False)),
        ("failed", {}, (0, False, False)),
        ("expired", {}, (50, True, False)),
        ("cancelled", {"output": False}, (50, False, False)),
    ]
    for number, (status, options, expected) in enumerate(table):
        sim.add_batch(f"batch_{number}", **options)
        sim.finish(f"batch_{number}", status)
        found = batch(sim, web, f"batch_{number}")
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
    sim.wait_for(lambda: sim.batch_statuses()["batch_t"] == "completed")
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


@pytest.mark.parametrize(
    ("content", "end", "total"),
    [(b"{}\n{}", "completed", 2), (b"{}\nno json\n", "failed", 0), (b"", "failed", 0)],
)
def test_a_created_batch(
    sim: Simulator, web: httpx.Client, content: bytes, end: str, total: int
) -> None:
    """An uploaded file becomes a batch with its metadata, which runs, ends, and is listed."""
    sim.batch_seconds = 0.05
    files = {"file": ("requests.jsonl", content)}
    file = web.post(f"{sim.openai_url}/files", data={"purpose": "batch"}, files=files).json()
    assert (file["object"], file["bytes"]) == ("file", len(content))
    body = {"input_file_id": file["id"], "endpoint": "/v1/x", "metadata": {"pipeline": "a"}}
    created = web.post(f"{sim.openai_url}/batches", json=body).json()
    assert created.items() >= (body | {"status": "validating"}).items()
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
    assert web.post(url).status_code == 409


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
    assert [job["status"] for job in sim.jobs] == ["created", "waiting", "created"]
    sim.job_seconds = 0.02
    sim.finish_job(sim.jobs[0]["id"], "error")
    assert [job["status"] for job in sim.jobs] == ["error", "processing", "created"]
    sim.wait_for(lambda: sim.jobs[1]["isFinished"])
    assert web.get(f"{sim.queue_url}/jobs/{sim.jobs[1]['id']}").json()["status"] == "success"


def pair(name: object, value: object) -> dict[str, object]:
    return {"variableValuesData": {"values": [{"name": name, "value": value}]}}


def test_keboola_errors(sim: Simulator, web: httpx.Client) -> None:
    """A job that the queue would refuse is refused, in Keboola's shape, and is not created."""
    sim.add_config("app", "1")
    table: list[tuple[dict[str, object], int, str]] = [
        ({"mode": ""}, 400, '"mode" must be a non-empty string.'),
        ({"mode": "no"}, 400, "\"mode\" must be one of ['debug', 'forceRun', 'run']."),
        ({"config": 1}, 400, '"config" must be a non-empty string.'),
        ({"config": "9"}, 404, "Configuration 9 of component app not found"),
        (pair("a", ""), 400, '"variableValuesData.values.0.value" cannot contain an empty value.'),
        (pair("a", 1), 400, '"variableValuesData.values.0.value" cannot contain an empty value.'),
        (pair("", "a"), 400, '"variableValuesData.values.0.name" cannot contain an empty value.'),
        ({"variableValuesData": []}, 400, '"variableValuesData.values" must be a list.'),
    ]
    for fields, status, message in table:
        answer = post_job(sim, web, **fields)
        error = answer.json()
        assert error["error"].removeprefix("Invalid job: ") == message
        assert (answer.status_code, error["code"], error["status"]) == (status, status, "error")
        assert error["exceptionId"]
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


# ---- by hand ----


def test_command_line() -> None:
    """By hand it prints a config to use, serves, and ends with Ctrl-C."""
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("simulator.py"))]
    command += ["--batch", "batch_a=validating@0,completed@60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        text = "".join(iter(it.stdout.readline, LAST_LINE.format(datetime.now(UTC).date())))
        assert "batch_ids: [batch_a]" in text
        (url,) = re.findall("http://[^}]*/v1", text)
        key = {"Authorization": "Bearer sk-simulator"}
        assert httpx.get(f"{url}/batches/batch_a", headers=key).json()["status"] == "validating"
        it.send_signal(signal.SIGINT)
        assert (it.wait(5), it.stderr and it.stderr.read()) == (0, "")
