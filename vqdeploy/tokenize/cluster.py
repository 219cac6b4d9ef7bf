"""Tokenizing on a Ray cluster. Ray runs a part again elsewhere when its process or machine dies."""

import logging
import socket
from collections.abc import Iterator, Sequence

import ray

from vqdeploy.errors import VqdeployError, one_line
from vqdeploy.tokenize.part import Done, Job, tokenize_part
from vqdeploy.tokenize.samples import Part

_TRIES = 10  # further ones of a part, since machines of a cluster come and go
_REACHED_S = 10.0


def run_on_ray(job: Job, parts: Sequence[Part], address: str, on_gpu: bool) -> Iterator[Done]:
    """Runs parts on a cluster, each on one core, or on one GPU.

    Raises:
        VqdeployError: There is no such cluster, a part failed on it, or its machines died too often.
    """
    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise VqdeployError("the Ray cluster cannot be reached", expected="its address", found=address) from error
    try:
        task = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=_TRIES)(tokenize_part)
        running = [task.remote(job, part, 1) for part in parts]
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VqdeployError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise VqdeployError(f"the Ray cluster failed ({one_line(error, 200)})") from error
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises an OSError where nothing answers at HOST:PORT: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _REACHED_S).close()
