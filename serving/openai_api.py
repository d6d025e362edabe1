"""The shapes of OpenAI's API, and of what the endpoint has beside it: what may be asked, and how errors look.

- Parameters that change how tokens are drawn mean nothing for a classification, whose answer is the likeliest label;
  they are taken and left aside, so that an application which sends them need not change. What would change the meaning
  of an answer (tools, images, several answers) is refused.
- No text may hold half a character (a lone surrogate): no tokenizer reads it.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from icl_compiler.errors import ICLError

_MOST_TEXTS = 256
_MOST_CHOICES = 16
_MOST_ALTERNATIVES = 20


def _readable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a character (a lone surrogate), so it is no text") from error
    return text


def _whole(text: str) -> str:
    if not _readable(text).strip():
        raise ValueError("is empty")
    return text


Readable = Annotated[str, AfterValidator(_readable)]
Text = Annotated[str, AfterValidator(_whole)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class RequestError(ICLError):
    """A request that cannot be answered as it is.

    Attributes:
        status: the HTTP status.
        param: the part of the request that is wrong.
        code: a word for programs.
        retry_after_s: seconds after which the same may be asked again, if that helps.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: Name


class ClassifyRequest(_Request):
    """Texts to classify."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=_MOST_TEXTS)]
    top: Annotated[int, Field(ge=1)] | None = None
    """How many labels to tell, best first; all by default."""


class ExplainRequest(_Request):
    """A text whose prompt is to be shown."""

    input: Text


class FeedbackRequest(_Request):
    """A text and its right label (or target)."""

    input: Text
    label: Text


class RollbackRequest(BaseModel):
    """The version to go back to."""

    version: Annotated[str, Field(pattern="^[0-9a-f]{12}$")] | None = None


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    include_usage: bool = False


class _Sampling(_Request):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Readable | Annotated[list[Readable], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends, as a list."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class ContentPart(BaseModel):
    """A part of a message."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class ChatRequest(_Sampling):
    """A conversation; its last message by the user is the query, all others are left aside."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_ALTERNATIVES)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    def query(self) -> str:
        """The text of the last message by the user.

        Raises:
            RequestError: if there is none, or it is more than text.
        """
        if self.tools or self.functions:
            raise RequestError("a program calls no tools; leave `tools` out", param="tools")
        said = [message for message in self.messages if message.role == "user"]
        if not said:
            raise RequestError("no message has the role 'user', so there is no query", param="messages")
        content = said[-1].content
        if isinstance(content, list):
            if any(part.type != "text" or part.text is None for part in content):
                raise RequestError("a program reads text only; the last message holds something else", param="messages")
            content = "".join(part.text or "" for part in content)
        try:
            return _whole(content or "")
        except ValueError as error:
            raise RequestError(f"the last message {error}", param="messages") from error


class CompletionRequest(_Sampling):
    """Prompts, each of them a query."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=_MOST_TEXTS)]
    logprobs: Annotated[int, Field(ge=0, le=_MOST_ALTERNATIVES)] | None = None
    echo: bool = False
    suffix: str | None = None


class ErrorDetail(BaseModel):
    """What went wrong: in words, of which kind, with which part of the request, and in a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error as OpenAI writes it."""

    error: ErrorDetail


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
