"""The worker's metrics for Prometheus: base units, and one label, `worker`, a process's slot."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from adc_worker.status.hub import StatusHub

# Each table: a metric's name, what it is read from, and its help.
_PROCESS_GAUGES = (
    ("memory_bytes", "memory_bytes", "Memory of its processes, decoded pixels included."),
    ("memory_budget_bytes", "budget_bytes", "Memory the worker plans with."),
    ("memory_limit_bytes", "limit_bytes", "The memory limit that binds."),
    ("results_waiting", "unposted", "Results that Antenna has not accepted yet."),
    ("staged_bytes", "staged_bytes", "Compressed images on disk."),
    ("last_progress_timestamp_seconds", "moved_at", "When a task last got an outcome."),
)
_JOB_GAUGES = (
    ("tasks_in_hand", "in_hand", "Tasks fetched and without an outcome."),
    ("batch_readiness_ratio", "readiness", "Share of the batches that were ready when asked for."),
    ("job_images_per_second", "images_per_s", "Outcomes a second of the job that runs."),
)
_COUNTERS = (
    ("images_done", "done", "Images with a result."),
    ("images_failed", "failed", "Images with an error result."),
    ("images_truncated", "truncated", "Images whose file ended early."),
    ("images_damaged", "damaged", "Images whose file has damage inside."),
    ("tasks_left_to_lease", "left_to_lease", "Tasks given up knowingly."),
    ("detections", "detections", "Insects found."),
    ("inference_seconds", "inference_s", "Time spent in inference."),
)


class Collector:
    def __init__(self, hub: StatusHub) -> None:
        self._hub = hub

    def collect(self) -> Iterable[Metric]:
        """Return all metrics of this moment."""
        yield GaugeMetricFamily(
            "adc_worker_ready",
            "Whether /readyz is green.",
            value=0.0 if self._hub.unready() else 1.0,
        )
        snapshots = self._hub.snapshots()
        for name, attribute, text in _PROCESS_GAUGES:
            gauge = GaugeMetricFamily(f"adc_worker_{name}", text, labels=["worker"])
            for one in snapshots:
                gauge.add_metric([str(one.slot)], getattr(one, attribute))
            yield gauge
        for name, attribute, text in _JOB_GAUGES:
            gauge = GaugeMetricFamily(f"adc_worker_{name}", text, labels=["worker"])
            for one in snapshots:
                job = one.running_job
                gauge.add_metric([str(one.slot)], getattr(job, attribute) if job else 0)
            yield gauge
        for name, key, text in _COUNTERS:
            counter = CounterMetricFamily(f"adc_worker_{name}", text, labels=["worker"])
            for one in snapshots:
                counter.add_metric([str(one.slot)], one.totals.get(key, 0))
            yield counter
