"""An ingest as `tuning-parameters.txt` describes today's, to compare with; written from that text, not copied.

Each DataLoader process fetches tasks, downloads them with eight threads into memory, decodes with Pillow and converts
to float32 tensors, which the default collate stacks; four batches a process are made ahead. Each job gets a new
DataLoader.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx
import torch
import urllib3
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import ToTensor

DOWNLOAD_THREADS = 8
PREFETCH_FACTOR = 4
POSTS_AT_ONCE = 5
FLOATS_PER_PAGE = 1024


class RestDataset(IterableDataset[dict[str, Any]]):
    """Tasks of a job as float32 [3, H, W] with what is needed to post their results."""

    def __init__(self, job_url: str, token: str, tasks_per_fetch: int) -> None:
        self._job_url = job_url
        self._token = token
        self._tasks_per_fetch = tasks_per_fetch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        to_tensor, pool = ToTensor(), urllib3.PoolManager(maxsize=DOWNLOAD_THREADS)

        def download(task: dict[str, str]) -> bytes:
            return pool.request("GET", task["image_url"]).data

        with httpx.Client(headers={"Authorization": f"Token {self._token}"}) as client:
            while tasks := self._fetch(client):
                started_s = time.monotonic()
                with ThreadPoolExecutor(DOWNLOAD_THREADS) as threads:
                    downloaded = list(threads.map(download, tasks))
                download_s = (time.monotonic() - started_s) / len(tasks)
                for task, data in zip(tasks, downloaded, strict=True):
                    started_s = time.monotonic()
                    image = to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
                    seconds = {"download_s": download_s, "decode_s": time.monotonic() - started_s}
                    yield {"image": image, "image_id": task["image_id"], "subject": task["reply_subject"], **seconds}

    def _fetch(self, client: httpx.Client) -> list[dict[str, str]]:
        answer = client.post(f"{self._job_url}tasks/", json={"batch_size": self._tasks_per_fetch}, timeout=60)
        tasks: list[dict[str, str]] = answer.raise_for_status().json()["tasks"]
        return tasks


def _result(image_id: str, subject: str) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat()
    image = {"id": image_id, "url": f"http://desk/{image_id}"}
    result = {
        "pipeline": "simulated", "algorithms": {}, "total_time": 0.0, "source_images": [image], "detections": [],
        "created_at": now, "errors": None,
    }  # fmt: skip
    return {"reply_subject": subject, "result": result}


def main() -> None:
    """Work jobs off, with a sleep as the GPU; logs the same `batch` lines as our worker, and a `job` line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("token")
    parser.add_argument("job_urls", nargs="*", help="without any: a line of stdin each, one job after the other")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--prefetch", type=int, default=PREFETCH_FACTOR)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--gpu-s", type=float, default=0.04)
    parser.add_argument(
        "--stall-s",
        type=float,
        default=0.0,
        help="of the GPU in the very first batch, or until no more can wait behind it",
    )
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--lists", action="store_true", help="do not stack, as where the images of a batch differ")
    arguments = parser.parse_args()
    with httpx.Client(headers={"Authorization": f"Token {arguments.token}"}, timeout=60) as client:
        for job_url in arguments.job_urls or map(str.strip, sys.stdin):
            _work_off(job_url, arguments, client)
            arguments.stall_s = 0.0
            _log("job")


def _work_off(job_url: str, arguments: argparse.Namespace, client: httpx.Client) -> None:
    loader = DataLoader(
        RestDataset(job_url, arguments.token, arguments.batch_size),
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        prefetch_factor=arguments.prefetch,
        pin_memory=arguments.pin,
        collate_fn=_in_lists if arguments.lists else None,
    )

    def post(results: list[dict[str, Any]]) -> None:
        client.post(f"{job_url}result/", json={"results": results}).raise_for_status()

    with ThreadPoolExecutor(POSTS_AT_ONCE) as posts:
        waiting, stall_s, asked_s = [], arguments.stall_s, time.monotonic()
        for batch in (batches := iter(loader)):
            load_s = time.monotonic() - asked_s
            images = len(batch["image"])
            for image in batch["image"]:  # a copy to the device reads them: their pages become this process's, too
                image.flatten()[::FLOATS_PER_PAGE].sum()
            _stall(stall_s, batches)
            time.sleep(arguments.gpu_s * images)
            stall_s = 0.0
            results = [_result(*pair) for pair in zip(batch["image_id"], batch["subject"], strict=True)]
            waiting.append(posts.submit(post, results))
            made = {name: float(sum(batch[name])) for name in ("download_s", "decode_s")}
            _log("batch", images=images, load_s=load_s, inference_s=arguments.gpu_s * images, **made)
            asked_s = time.monotonic()
        for future in waiting:
            future.result()


def _stall(most_s: float, batches: Any) -> None:
    """Wait until all batches that were asked for wait, which only torch's own queue knows."""
    until_s = time.monotonic() + most_s
    while time.monotonic() < until_s and batches._worker_result_queue.qsize() < batches._tasks_outstanding:  # noqa: SLF001
        time.sleep(0.1)


def _in_lists(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _log(event: str, **fields: float) -> None:
    """Write a line as our worker does, with what the kernel calls the largest resident size of this process."""
    largest_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    line = {"event": event, "timestamp": datetime.now(UTC).isoformat(), "maxrss_bytes": largest_bytes, **fields}
    print(json.dumps(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
