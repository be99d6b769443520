"""The JSON between worker and Antenna, held to the contract."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adc_worker.antenna.wire import (
    Algorithm,
    Classification,
    Detection,
    JobRef,
    PostEntry,
    SuccessResult,
    Task,
    error_result,
    parse_job,
    parse_jobs,
    parse_tasks,
    result_post,
)

ENTRY = {"id": "5", "image_id": "5", "image_url": "https://h/5.jpg", "reply_subject": "$JS.ACK.x"}
TASK = Task(image_id="5", image_url="https://h/5.jpg", reply_subject="$JS.ACK.x")
DETECTOR, CLASSIFIER = Algorithm("Sheet", "sheet", "detection"), Algorithm("Moths", "moths", "classification")
WHEN = "2026-07-01T23:15:00"


def fetch_answer(*entries: Any) -> bytes:
    return orjson.dumps({"tasks": list(entries)})


def classification(*, terminal: bool = True) -> Classification:
    scores, logits = np.array([0.1, 0.9], np.float32), np.array([-2.5, 1 / 3], np.float32)
    return Classification("Noctua pronuba", scores, logits, CLASSIFIER, terminal)


def test_a_fetch_brings_tasks_in_order() -> None:
    """Fields a later Antenna adds are ignored."""
    body = fetch_answer({**ENTRY, "priority": 3, "config": {"a": 1}}, {**ENTRY, "image_id": "6"})
    assert parse_tasks(body) == [TASK, TASK.model_copy(update={"image_id": "6"})]


def test_an_empty_fetch_brings_none() -> None:
    """It can mean six things, and none of them is an error."""
    assert parse_tasks(b'{"tasks": []}') == []


@pytest.mark.parametrize(
    "malformed",
    [
        {key: value for key, value in ENTRY.items() if key != "reply_subject"},
        {**ENTRY, "reply_subject": ""},
        {**ENTRY, "image_id": ["5"]},
        {**ENTRY, "image_id": None},
        {**ENTRY, "image_id": ""},
        "text",
        None,
    ],
)
def test_a_task_that_cannot_be_answered_is_left_to_its_lease_alone(malformed: object) -> None:
    """Its lease lapses; the others are worked on."""
    other = {**ENTRY, "image_id": "6"}
    assert parse_tasks(fetch_answer(ENTRY, malformed, other)) == [TASK, TASK.model_copy(update={"image_id": "6"})]


@pytest.mark.parametrize("url", [None, 5, ["https://h/5.jpg"], {}, ""])
def test_a_task_without_a_usable_url_is_taken_so_that_it_can_be_answered(url: object) -> None:
    """The image client makes the error of it; nobody has to wait for its lease."""
    assert parse_tasks(fetch_answer({**ENTRY, "image_url": url}, ENTRY)) == [
        TASK.model_copy(update={"image_url": ""}),
        TASK,
    ]
    assert parse_tasks(fetch_answer({key: ENTRY[key] for key in ENTRY if key != "image_url"}))[0].image_url == ""


def test_a_task_that_comes_twice_in_one_answer_is_taken_once() -> None:
    """One image, one result; the same image under another subject has to be answered, too."""
    again = {**ENTRY, "reply_subject": "$JS.ACK.y"}
    assert parse_tasks(fetch_answer(ENTRY, ENTRY, again)) == [
        TASK,
        TASK.model_copy(update={"reply_subject": "$JS.ACK.y"}),
    ]


@pytest.mark.parametrize("odd", ["a/b/../../etc", "n\0l", "x" * 10_000, "Käfer \N{BUG}", "5' OR 1=1 --", "5\r\n5"])
def test_an_id_is_any_text(odd: str) -> None:
    """It comes back as it was, in the result and in the post around it."""
    (task,) = parse_tasks(fetch_answer({**ENTRY, "image_id": odd, "reply_subject": odd}))
    body = error_result(task.image_id, "broken")
    size_bytes, parts = result_post([PostEntry(task.reply_subject, len(body), lambda: [body])])
    posted = b"".join(parts)
    assert len(posted) == size_bytes
    assert orjson.loads(posted)["results"] == [{"reply_subject": odd, "result": {"error": "broken", "image_id": odd}}]


@pytest.mark.parametrize(
    "odd", [rb'"\ud800"', rb'"x\udfff"', b'"\xff"', b'"\xed\xa0\x80"', b"1" * 5000, b'{"a": "\\ud800"}'],
    ids=["high half", "low half", "no UTF-8", "a surrogate in UTF-8", "a number", "an object"],
)  # fmt: skip
def test_what_is_no_unicode_costs_its_own_task_alone(odd: bytes) -> None:
    """As an id or a lease it cannot be answered, as a URL it is none, and elsewhere it is nobody's business."""
    whole = fetch_answer({**ENTRY, "image_id": "MARK"}, {**ENTRY, "reply_subject": "MARK"}, {**ENTRY, "note": "MARK"})
    tasks = parse_tasks(whole.replace(b'"MARK"', odd))
    assert tasks[-1] == TASK
    assert all(task.image_id.encode() and task.reply_subject.encode() for task in tasks)
    assert len(tasks) == (3 if odd.isdigit() else 1)
    (task,) = parse_tasks(fetch_answer({**ENTRY, "image_url": "MARK"}).replace(b'"MARK"', odd))
    assert task.image_url == ("1" * 5000 if odd.isdigit() else "")


def test_ten_megabytes_of_tasks_are_read() -> None:
    """More than was asked for, each with a long name."""
    entries = [{**ENTRY, "image_id": str(number), "note": "x" * 10_000} for number in range(1000)]
    assert len(parse_tasks(fetch_answer(*entries))) == 1000


def test_a_job_that_the_journal_cannot_number_is_skipped_alone() -> None:
    """SQLite's integers end at 2^63: one such job would end every worker that sees it."""
    rows = [{"id": number, "pipeline_slug": "moths"} for number in (1 << 63, -1, 7)]
    assert [job.id for job in parse_jobs(orjson.dumps({"results": rows}))] == [7]


def test_what_antenna_sends_is_not_quoted_in_errors() -> None:
    """A quotation cut short keeps the signature and loses what redaction knows it by."""
    with pytest.raises(ValueError, match="tasks") as caught:
        parse_tasks(b'{"tasks": "https://h/5.jpg?X-Amz-Signature=5ec2e7"}')
    assert "5ec2e7" not in str(caught.value)


def test_the_url_goes_back_without_what_opens_it() -> None:
    """Antenna finds the image by its id; results are kept, logged and looked at."""
    signed = TASK.model_copy(update={"image_url": "https://user:pw@h/5.jpg?X-Amz-Signature=5ec2e7#part"})
    result = orjson.loads(b"".join(SuccessResult(signed, "moths", [], 1.0, WHEN)))
    assert result["source_images"] == [{"id": "5", "url": "https://h/5.jpg"}]


def test_ids_may_be_numbers() -> None:
    """Antenna sends text today and has sent numbers before."""
    assert parse_tasks(fetch_answer({**ENTRY, "image_id": 5})) == [TASK]


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"tasks": null}', b'{"tasks": {}}', b'{"tasks": ' + b"[" * 200_000],
)
def test_an_answer_of_another_form_is_an_error(body: bytes) -> None:
    """It must not be taken for 'no tasks'."""
    with pytest.raises(ValueError, match=r"Expecting value|_TaskList|nested too deeply"):
        parse_tasks(body)


def test_an_answer_of_which_nothing_can_be_read_is_an_error() -> None:
    """It is a list of something else, or all its tasks are spent: neither means that there are none."""
    with pytest.raises(ValueError, match="none of its 2 entries"):
        parse_tasks(fetch_answer("text", {"name": "a row of another list"}))
    with pytest.raises(ValueError, match="none of its 1 entries"):
        parse_jobs(b'{"results": [{"id": 7, "name": "a project"}]}')


def test_the_job_list_is_read_and_a_malformed_row_is_skipped() -> None:
    """A job without pipeline is none of ours."""
    rows = [
        {"id": 12, "pipeline_slug": "moths", "user_permissions": []},
        {"id": 13, "pipeline_slug": None},
        {"id": "14", "pipeline_slug": "blobs"},
    ]
    body = {"count": 3, "next": None, "results": rows}
    assert parse_jobs(orjson.dumps(body)) == [
        JobRef(id=12, pipeline_slug="moths"),
        JobRef(id=14, pipeline_slug="blobs"),
    ]


@pytest.mark.parametrize(
    ("status", "served"),
    [
        ("STARTED", True),
        ("RETRY", True),
        ("CREATED", False),
        ("PENDING", False),
        ("CANCELING", False),
        ("SUCCESS", False),
    ],
)
def test_tasks_are_served_in_two_states(status: str, served: bool) -> None:
    """The contract names ten."""
    job = parse_job(orjson.dumps({"id": 1, "status": status, "progress": {"stages": []}}))
    assert job.is_served is served


@pytest.mark.parametrize("status", ["ok", "DELETED", ""])
def test_a_status_that_antenna_does_not_give_is_no_detail_of_a_job(status: str) -> None:
    """A health check says `ok`, and that a job is gone nobody but Antenna says, with a 404."""
    with pytest.raises(ValueError, match="none of Antenna's"):
        parse_job(orjson.dumps({"id": 1, "status": status}))


def test_a_success_is_written_as_the_contract_says() -> None:
    """Every key, and no other."""
    detections = [Detection((1, 2, 30, 40), DETECTOR, [classification(), classification(terminal=False)])]
    written = orjson.loads(b"".join(SuccessResult(TASK, "contract_moths", detections, 1.25, WHEN)))
    one = {
        "classification": "Noctua pronuba",
        "scores": [0.1, 0.8999999761581421],
        "logits": [-2.5, 0.33333334],
        "algorithm": {"name": "Moths", "key": "moths"},
        "terminal": True,
        "timestamp": WHEN,
    }
    assert written == {
        "pipeline": "contract_moths",
        "total_time": 1.25,
        "source_images": [{"id": "5", "url": "https://h/5.jpg"}],
        "detections": [
            {
                "source_image_id": "5",
                "bbox": {"x1": 1, "y1": 2, "x2": 30, "y2": 40},
                "algorithm": {"name": "Sheet", "key": "sheet"},
                "timestamp": WHEN,
                "classifications": [one, {**one, "terminal": False}],
            }
        ],
    }


def written_scores(scores: npt.NDArray[np.float32]) -> bytes:
    """Return the text of the scores of a classification in a result."""
    one = Classification("Noctua pronuba", scores, np.array([-2.5, 1 / 3], np.float32), CLASSIFIER, terminal=True)
    written = b"".join(SuccessResult(TASK, "p", [Detection((0, 0, 1, 1), DETECTOR, [one])], 1.0, WHEN))
    assert b'"logits":[-2.5,0.33333334]' in written, "nothing is matched on logits: float32 has these digits"
    return written.partition(b'"scores":')[2].partition(b"]")[0] + b"]"


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([0.1, 0.7, 0.2], b"[0.1,0.699999988079071,0.2]"),
        ([0.1, 0.1, 0.05, 0.1], b"[0.10000000149011612,0.10000000149011612,0.05,0.10000000149011612]"),
        ([0.3], b"[0.30000001192092896]"),
        ([0.0, 1.0], b"[0.0,1.0]"),
        ([1e-30, 3e-8], b"[1e-30,2.999999892949745e-8]"),
        ([-0.3, -0.1], b"[-0.3,-0.10000000149011612]"),
    ],
)
def test_the_top_score_has_the_digits_of_a_double_and_no_other_has(scores: list[float], text: bytes) -> None:
    """Antenna finds a classification again by its top score, and the worker of before posted doubles."""
    assert written_scores(np.array(scores, np.float32)) == text


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_whatever_the_scores_antenna_reads_the_top_one_that_it_knows(
    some: list[float], ties: int, random: Random
) -> None:
    """Also where others equal the top score or are next to it; and every score is still told."""
    top = np.float32(max(some))
    values = some + [float(top)] * ties + [float(np.nextafter(top, np.float32(0)))]
    random.shuffle(values)
    scores = np.array(values, np.float32)
    read = orjson.loads(written_scores(scores))
    assert max(read) == float(top)
    assert read.index(max(read)) == int(scores.argmax())
    assert np.array_equal(np.array(read, np.float32), scores)


def test_boxes_are_whole_numbers() -> None:
    """Antenna matches detections by exact values; numpy's integers are written like Python's."""
    x1, y1, x2, y2 = np.array([1, 2, 30, 40])
    written = b"".join(SuccessResult(TASK, "p", [Detection((x1, y1, x2, y2), DETECTOR)], 1.0, WHEN))
    assert b'"bbox":{"x1":1,"y1":2,"x2":30,"y2":40}' in written


def test_nothing_found_is_a_result_too() -> None:
    """Antenna records it."""
    assert orjson.loads(b"".join(SuccessResult(TASK, "p", [], 1.0, WHEN)))["detections"] == []


def test_an_error_names_its_image() -> None:
    """Without it the job could never finish."""
    assert orjson.loads(error_result("5", 'broken "header"')) == {"error": 'broken "header"', "image_id": "5"}
    with pytest.raises(ValueError, match="needs an image id"):
        error_result("", "broken")


def test_a_post_holds_every_result_under_its_subject() -> None:
    """Results are joined as they are, without being read again."""
    results = {"$JS.ACK.x": error_result("5", "a"), 'odd "subject"': error_result("6", "b")}
    entries = [PostEntry(subject, len(body), partial(iter, [body[:3], body[3:]])) for subject, body in results.items()]
    size_bytes, parts = result_post(entries)
    post = b"".join(parts)
    assert size_bytes == len(post)
    assert orjson.loads(post) == {
        "results": [
            {"reply_subject": "$JS.ACK.x", "result": {"error": "a", "image_id": "5"}},
            {"reply_subject": 'odd "subject"', "result": {"error": "b", "image_id": "6"}},
        ]
    }
    size_bytes, parts = result_post([])
    post = b"".join(parts)
    assert (orjson.loads(post), size_bytes) == ({"results": []}, len(post))
