"""An ingest as `tuning-parameters.txt` describes today's, to compare with; written from that text, not copied.

Each DataLoader process fetches tasks, downloads them with eight threads into memory, decodes with Pillow and converts
to float32 tensors, which the default collate stacks; four batches a process are made ahead.
"""

from __future__ import annotations

import argparse
import io
import json
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
                with ThreadPoolExecutor(DOWNLOAD_THREADS) as threads:
                    for task, data in zip(tasks, list(threads.map(download, tasks)), strict=True):
                        image = to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
                        yield {"image": image, "image_id": task["image_id"], "subject": task["reply_subject"]}

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
    """Work a job off, with a sleep as the GPU; logs the same `batch` lines as our worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job_url")
    parser.add_argument("token")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--gpu-s", type=float, default=0.04)
    arguments = parser.parse_args()
    loader = DataLoader(
        RestDataset(arguments.job_url, arguments.token, arguments.batch_size),
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        prefetch_factor=PREFETCH_FACTOR,
        pin_memory=torch.cuda.is_available(),
    )
    with httpx.Client(headers={"Authorization": f"Token {arguments.token}"}, timeout=60) as client:

        def post(results: list[dict[str, Any]]) -> None:
            client.post(f"{arguments.job_url}result/", json={"results": results}).raise_for_status()

        with ThreadPoolExecutor(POSTS_AT_ONCE) as posts:
            waiting = []
            for batch in loader:
                time.sleep(arguments.gpu_s * len(batch["image"]))
                results = [_result(*pair) for pair in zip(batch["image_id"], batch["subject"], strict=True)]
                waiting.append(posts.submit(post, results))
                line = {"event": "batch", "images": len(results), "timestamp": datetime.now(UTC).isoformat()}
                print(json.dumps(line), file=sys.stderr, flush=True)
            for future in waiting:
                future.result()


if __name__ == "__main__":
    main()
