"""`vqdeploy serve`: plans over HTTP, with continuous batching."""

from vqdeploy.serve.app import create_app
from vqdeploy.serve.metrics import Metrics
from vqdeploy.serve.plans import ServedPlan
from vqdeploy.serve.settings import Settings

__all__ = ["Metrics", "ServedPlan", "Settings", "create_app"]
