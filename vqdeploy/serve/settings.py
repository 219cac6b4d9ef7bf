"""The limits of a server."""

from dataclasses import dataclass

from vqdeploy.errors import VqdeployError


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        slots: Images of a plan that are sampled at once, if its largest batch holds as many.
        max_queue: Requests that may wait for a slot, for each plan.
        max_wait: Seconds from the arrival of a request to its reply.
        max_images: Images of one request.
        max_body: Bytes of a request.
        max_pixels: Pixels of an image that is sent.
        api_key: What clients send as `Authorization: Bearer KEY`; None lets everybody in.

    Raises:
        VqdeployError: The key is empty, or a header could not hold it.
    """

    slots: int = 16
    max_queue: int = 64
    max_wait: float = 300.0
    max_images: int = 16
    max_body: int = 2**24
    max_pixels: int = 2**24
    api_key: str | None = None

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key and all("!" <= character <= "~" for character in key)):
            found = "other characters" if key else "an empty one"
            raise VqdeployError("the API key is not valid", expected="ASCII without spaces", found=found)
