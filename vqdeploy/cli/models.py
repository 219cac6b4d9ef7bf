"""`vqdeploy models`."""

from vqdeploy.cli.options import Json
from vqdeploy.cli.output import finish


def models(as_json: Json = False) -> None:
    """List systems and presets, and which weights are shipped."""
    from vqdeploy.checkpoint import SHIPPED
    from vqdeploy.systems import SYSTEMS

    listing = {
        model: {
            name: "trained" if (SHIPPED / model / name / "config.json").exists() else "random"
            for name in system.presets
        }
        for model, system in SYSTEMS.items()
    }
    lines = [
        f"{model:8} {name:16} {weights} weights" for model, named in listing.items() for name, weights in named.items()
    ]
    finish(listing, as_json, "\n".join(lines))
