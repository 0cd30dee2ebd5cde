"""What goes over the wire. Boxes are xyxy in absolute pixels, scores probabilities, masks COCO run-length encodings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Task = Literal["caption", "tags", "attributes", "category"]
Box = Annotated[list[FiniteFloat], Len(4, 4)]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Word = Annotated[str, Field(min_length=1, max_length=500)]
Zero = Annotated[FiniteFloat, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Len(0, 0)]


class Body(BaseModel):
    """Of a request. What is not known is refused, not left out silently."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Mask(Body):
    """A mask as COCO run-length encoding."""

    size: Annotated[list[int], Len(2, 2)] = Field(description="[height, width] of the picture")
    counts: str | list[int] = Field(description="compressed, or the lengths of runs down the columns")


class DescribeBody(Body):
    """What `/v1/regions` and `/v1/everything` have in common."""

    model: str | None = Field(None, description="must be the describing model of `/v1/models`, if it is given")
    tasks: Annotated[list[Task], Len(1, 4)] = Field(["caption", "tags", "attributes", "category"])
    view_policy: Literal["task", "auto", "official", "pairwise", "median"] | Annotated[list[Fraction], Len(1, 8)] = (
        Field(
            "task",
            description="how much context to look at: what suits each task, a search for each region, or the views' "
            "coefficients from 0 (the region) to 1 (the whole image)",
        )
    )
    classes: Annotated[list[Word], Len(1, 2000)] | None = Field(None, description="categories to choose from")
    controls: list[Word] = Field([], description="words that captions should use")
    num_beams: Annotated[int, Field(ge=1, le=8)] | None = Field(None, description="beam width of captions; 1 is greedy")
    views: bool = Field(False, description="give the views that the model looked at as PNG data URLs")
    attention: bool = Field(False, description="give where in the views the model read as PNG data URLs")
    scores: bool = Field(False, description="give the scores of all tags, attributes and categories")
    stream: bool = Field(False, description="server-sent events, region by region")


class RegionsBody(DescribeBody):
    """`POST /v1/regions`, all but the picture."""

    boxes: list[Box] | None = Field(None, description="xyxy pixels; neither boxes nor masks: the whole picture")
    masks: list[Mask] | None = Field(None, description="of the picture's size; each adds a region after the boxes")


class EverythingBody(DescribeBody):
    """`POST /v1/everything`, all but the picture."""

    max_regions: Annotated[int, Field(ge=1)] = Field(50, description="so many of the surest proposals are described")
    min_score: Fraction = Field(0.0, description="proposals below it are left out")
    box_iou: Fraction | None = Field(0.7, description="of two proposals that overlap by more, the surer one stays")
    caption_iou: Fraction | None = Field(
        0.3, description="of two regions of one caption that overlap by more, the surer one stays"
    )


class Picture(Body):
    """The picture of a JSON request."""

    image: str = Field(min_length=1, description="base64, or a data: URL with base64; nothing is fetched")


class RegionsRequest(Picture, RegionsBody):
    """`POST /v1/regions` in JSON."""


class EverythingRequest(Picture, EverythingBody):
    """`POST /v1/everything` in JSON."""


# ---------------------------------------------------------------------------------------------------------------------
# Chat, as OpenAI's clients send it
# ---------------------------------------------------------------------------------------------------------------------


class ImageUrl(Body):
    """Where a picture is: inside the URL itself."""

    url: str = Field(min_length=1, description="a data: URL with base64; nothing is fetched")
    detail: Literal["auto", "low", "high"] = Field("auto", description="taken, and without effect")


class TextPart(Body):
    """A text."""

    type: Literal["text"]
    text: str


class ImagePart(Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(Body):
    """What goes before the first question, in its text: the models' templates have no other place for it."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], Len(1)]
    name: str | None = None


class UserMessage(Body):
    """A question. The picture belongs to the first."""

    role: Literal["user"]
    content: str | Annotated[list[TextPart | ImagePart], Len(1)]
    name: str | None = None


class AssistantMessage(Body):
    """What the model answered before."""

    role: Literal["assistant"]
    content: str | Annotated[list[TextPart], Len(1)]
    name: str | None = None
    refusal: None = None
    annotations: Nothing | None = Field(None, description="as the next three, in answers that are sent back whole")
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="taken, and without effect")


class ResponseFormat(Body):
    """Of an answer."""

    type: Literal["text"]


class ChatRequest(Body):
    """`POST /v1/chat/completions`."""

    model: str | None = Field(None, description="must be the asking model of `/v1/models`, if it is given")
    messages: Annotated[list[ChatMessage], Len(1, 64)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy")
    top_p: Fraction | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Word | Annotated[list[Word], Len(0, 4)] | None = None
    n: Literal[1] | None = Field(None, description="one answer")
    keep: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = Field(
        None, description="share of the picture's tokens that the language model reads, chosen by HiRED"
    )
    boxes: list[Box] | None = Field(
        None, description="objects to look at one by one, xyxy pixels; [] for none, null for those that are found"
    )
    user: str | None = Field(None, description="taken, and without effect, as all that follow")
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    frequency_penalty: Zero | None = Field(None, description="0, as the next; nothing else is known")
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Len(0, 0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Zero | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Len(1, 1)] | None = None
    tools: Nothing | None = Field(None, description="no model here calls any")
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


class ViewOut(BaseModel):
    """A view that the model looked at."""

    t: float = Field(description="0 for the region itself, 1 for the whole image")
    box: list[int]
    tasks: list[Task]
    png: str | None = Field(None, description="data URL, at most 224 pixels a side; where `views` was true")


class AttentionViewOut(BaseModel):
    """Where in a view the model read."""

    t: float
    box: list[int] = Field(description="the view in the picture; the map's pixels tile it")
    most: float = Field(description="share of the attention that the map's most opaque pixel stands for")
    png: str = Field(description="data URL: a pixel for each patch of the view, opaque in proportion to its share")


class AttentionOut(BaseModel):
    """Where the model read for one query: cross-attention of the Q-Former, a mean over its heads and layers."""

    query: Literal["region", "category", "tag"] = Field(
        description="all queries alike, or as the query of the category or best tag weighs what they became"
    )
    word: str | None = Field(None, description="the category or the tag")
    tasks: list[Task] = Field(description="those that looked through these views")
    whole: float = Field(
        description="share of the class token, which stands for the views as wholes; the rest is mapped"
    )
    views: list[AttentionViewOut]


class RegionOut(BaseModel):
    """A described region. What was not asked for is absent."""

    model_config = ConfigDict(extra="allow")

    index: int = Field(description="the number of its box, then of its mask; of `/v1/everything` of its proposal")
    box: list[float]
    caption: str | None = None
    caption_score: float | None = None
    tags: dict[str, float] | None = Field(None, description="likely tags, best first, with their probabilities")
    attributes: dict[str, float] | None = None
    category: str | None = None
    category_score: float | None = None
    score: float | None = Field(None, description="of the proposal")
    joint_score: float | None = None
    mask: Mask | None = None
    views: list[ViewOut]
    attention: list[AttentionOut] | None = Field(None, description="where `attention` was true")
    searches: list[dict[str, Any]] | None = None
    tag_scores: dict[str, float] | None = Field(None, description="of all tags, where `scores` was true")
    attribute_scores: dict[str, float] | None = None
    category_scores: dict[str, float] | None = None


class RegionsResponse(BaseModel):
    """The regions of a picture."""

    id: str
    object: Literal["regions"]
    model: str
    width: int
    height: int
    regions: list[RegionOut]
    milliseconds: dict[str, float] = Field(description="queue: waiting, work: in the model, total")


class Usage(BaseModel):
    """Tokens; those of pictures are among the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Looked(BaseModel):
    """What an answer was made of."""

    width: int | None = Field(description="of the picture as the model saw it, upright; null without one")
    height: int | None
    boxes: list[list[float]] = Field(description="objects that the model looked at one by one")
    labels: list[str]
    kept: dict[str, Any] | None = Field(
        description="which of the picture's tokens were read: kept, of, partitions with their region, tokens a side "
        "(grid) and the numbers of the kept ones in raster order; null where none are dropped"
    )
    milliseconds: dict[str, float]


class AnswerMessage(BaseModel):
    """The answer's text."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatResponse(BaseModel):
    """An answer in OpenAI's form, and what it was made of."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    foveate: Looked


class ModelOut(BaseModel):
    """A model that answers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    verb: Literal["describe", "ask"]
    routes: list[str]
    world_only: bool = Field(description="whether it knows the rendered world only, nothing of photographs")
    note: str | None
    loaded: bool


class ModelList(BaseModel):
    """The models of this server."""

    object: Literal["list"]
    data: list[ModelOut]
    limits: dict[str, float]


class SampleObject(BaseModel):
    """What is in a sample."""

    box: list[float]
    category: str


class Sample(BaseModel):
    """A rendered picture to try things on."""

    name: str
    width: int
    height: int
    image: str = Field(description="PNG data URL")
    objects: list[SampleObject]
    questions: list[str]


class SampleList(BaseModel):
    """Rendered pictures to try things on."""

    object: Literal["list"]
    data: list[Sample]


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error, in OpenAI's form."""

    error: ErrorBody
