"""Requests and replies: the OpenAI image form, with sampling options as further fields."""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from vqdeploy.options import SAMPLING_OPTIONS, SamplingOption
from vqdeploy.runtime.arguments import LARGEST

_MOST_PREVIEWS = 1024


def _split(value: object) -> object:
    """Lists in forms are text, as on the command line: `0.9,0.95,1,1`."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value.split(",") if isinstance(value, str) and "," in value else value


def _field(option: SamplingOption) -> tuple[object, object]:
    """Type and description of an option, for pydantic; the plan checks the rest."""
    kind: Any = Literal[option.choices] if option.choices else option.type
    if option.per_depth:
        kind = Annotated[kind | list[kind], BeforeValidator(_split)]
    limits: Any = {}
    if not option.choices and not option.per_depth:
        limits = {"ge": option.low, "le": option.high}
    return kind | None, Field(default=None, description=option.help, **limits)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


_Options: Any = create_model(
    "SamplingOptions",
    __base__=_Strict,
    **{option.name: _field(option) for option in SAMPLING_OPTIONS},  # type: ignore[call-overload]
)


class Drawing(_Options):  # type: ignore[misc]  # its fields come from the table of sampling options
    """What generations and edits have in common."""

    model: str | None = Field(default=None, description="Name of the plan; the first one by default.")
    prompt: str = Field(default="", description="The class, by name or number.")
    label: int | str | None = Field(default=None, description="The class, instead of the prompt.")
    text_ids: list[int] | None = Field(
        default=None, description="Token ids of a text, for priors conditioned on texts."
    )
    text_features: str | None = Field(
        default=None,
        description="For priors conditioned on features of a text encoder: an NPY of floats [tokens, width] in base64.",
    )
    n: int = Field(default=1, ge=1, description="Number of images.")
    seed: int | None = Field(default=None, ge=0, le=LARGEST, description="Seed of the noise; by default a random one.")
    size: str = Field(default="auto", description="WIDTHxHEIGHT of the plan, or auto.")
    response_format: Literal["b64_json", "codes"] = Field(
        default="b64_json", description="codes skips the decoder, and gives no files."
    )
    output_format: Literal["png", "webp", "jpeg"] = "png"
    stream: bool = Field(default=False, description="Reply with server-sent events.")
    partial_images: int = Field(
        default=0,
        ge=0,
        le=_MOST_PREVIEWS,
        description="With stream: previews of each image, at most one per step.",
    )
    user: str | None = Field(default=None, description="Ignored.")

    def options(self) -> dict[str, Any]:
        """The sampling options that were given."""
        return {option.name: getattr(self, option.name) for option in SAMPLING_OPTIONS}


class Generation(Drawing):
    """Images to generate."""


class Edit(Drawing):
    """An image of which a part is drawn anew."""

    image: UploadFile = Field(description="The image; its centre is cropped to the shape of the plan.")
    mask: UploadFile | None = Field(
        default=None,
        description="Transparent pixels are drawn anew, or white ones if none are transparent; by default the "
        "transparent pixels of the image.",
    )


class Encoding(_Strict):
    """Images to encode."""

    model: str | None = None
    images: list[str] = Field(min_length=1, description="Image files in base64.")


class Decoding(_Strict):
    """Codes to decode."""

    model: str | None = None
    codes: list[Any] = Field(min_length=1, description="Integers [B, h, w, Q], or [B, N] of several levels.")
    depth: int | None = Field(default=None, ge=1, description="Number of codes to use per position, coarse to fine.")
    output_format: Literal["png", "webp", "jpeg"] = "png"


class Picture(BaseModel):
    """An image."""

    b64_json: str | None = Field(default=None, description="The file in base64; null if codes alone were asked for.")
    codes: list[Any] | None = Field(default=None, description="Its codes [h, w, Q], or [N] of several levels.")


class Pictures(BaseModel):
    """Images that were drawn."""

    created: int = Field(description="Unix time.")
    model: str
    data: list[Picture]
    size: str
    output_format: str
    seed: int | None = Field(default=None, description="The noise of image i depends on it and on i alone.")
    options: dict[str, Any] = Field(default={}, description="The effective sampling options.")
    note: str | None = Field(default=None, description="What an edit drew anew.")


class Codes(BaseModel):
    """Codes of images."""

    model: str
    codes: list[Any] = Field(description="[B, h, w, Q], or [B, N] of several levels.")


class Model(BaseModel):
    """A plan."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vqdeploy"
    size: str
    maps: list[list[int]] = Field(description="Height, width and depth of each code map, coarse to fine.")
    codebook_size: int
    omits_depths: bool = Field(description="Whether `depth` may be given to decode.")
    kind: str | None = Field(description="How codes are drawn; null without a prior.")
    keeps_pixels: bool | None = Field(description="Whether edits change nothing outside the mask.")
    classes: int | None
    labels: list[str]
    label_is_optional: bool | None = Field(description="Whether an image may be drawn without a class.")
    text_length: int | None = Field(description="Token ids of a text, for priors conditioned on texts.")
    text_features: list[int] | None = Field(
        description="Instead, for priors conditioned on features: the most tokens of a text, and the features of each."
    )
    options: dict[str, Any] = Field(description="Sampling options and their defaults.")
    max_images: int = Field(description="Most images of one request.")


class Models(BaseModel):
    """All plans."""

    object: Literal["list"] = "list"
    data: list[Model]


class State(BaseModel):
    """State of the server."""

    status: str


class Problem(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refusal(BaseModel):
    """The reply to a request that failed."""

    error: Problem
