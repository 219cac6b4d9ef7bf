"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUESTS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The metrics of one server, in a registry of its own. `model` is the name of a plan."""

    def __init__(self) -> None:
        self._registry = to = CollectorRegistry()
        self.requests = Counter("vqdeploy_requests", "Requests, by route and status.", ("route", "status"), registry=to)
        self.request_seconds = Histogram(
            "vqdeploy_request_seconds", "From a request to its reply.", ("route",), buckets=_REQUESTS, registry=to
        )
        self.in_flight = Gauge("vqdeploy_requests_in_flight", "Requests without a reply.", ("model",), registry=to)
        self.waiting = Gauge("vqdeploy_images_waiting", "Images that wait for a slot.", ("model",), registry=to)
        self.slots = Gauge("vqdeploy_slots", "Slots of the open samplers.", ("model",), registry=to)
        self.slots_in_use = Gauge("vqdeploy_slots_in_use", "Images being sampled.", ("model",), registry=to)
        self.step_seconds = Histogram(
            "vqdeploy_step_seconds",
            "A step of the prior, with images that join and leave.",
            ("model",),
            buckets=_CALLS,
            registry=to,
        )
        self.images = Counter("vqdeploy_images", "Images, by task.", ("model", "task"), registry=to)
        self.engine_failures = Counter("vqdeploy_engine_failures", "Engine calls that failed.", ("model",), registry=to)

    def text(self) -> bytes:
        """All of them in the text format of Prometheus."""
        return generate_latest(self._registry)
