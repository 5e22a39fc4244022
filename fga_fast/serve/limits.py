"""What the service takes, and how it refuses what it does not take."""

from __future__ import annotations

from dataclasses import dataclass, fields

# What a refusal's code means, as an HTTP status.
STATUS = {
    "bad_request": 400, "bad_image": 400, "unauthorised": 401, "cross_origin": 403, "wrong_host": 403, "not_found": 404,
    "method": 405, "not_acceptable": 406, "slow_body": 408, "too_large": 413, "unsupported_type": 415,
    "bad_target": 422, "bad_parameter": 422, "gone": 499, "internal": 500, "busy": 503, "starting": 503,
    "stopping": 503, "deadline": 504,
}  # fmt: skip


class Refused(Exception):
    """A request that gets an error for an answer.

    Attributes:
        code: a key of `STATUS`.
        message: for the one who asked.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.code]

    def content(self) -> dict[str, dict[str, str]]:
        """The JSON of the answer."""
        return {"error": {"code": self.code, "message": self.message}}


@dataclass(frozen=True)
class Limits:
    """Sizes and times that bound what requests can cost.

    Attributes:
        max_batch: images explained together.
        max_wait: seconds that the first request of a batch waits for others at most.
        queue: requests that are decoded, waiting or explained at once; more are refused as busy. As many again may be
            sending their bodies, and as many streams may be open.
        deadline: seconds from a request's body to its answer.
        body_bytes: of a request's body or a stream's frame.
        body_seconds: for the headers of a request to arrive, and again for its body.
        pixels: of a picture, before it is decoded.
        targets: classes or prompts of a request.
        prompt_chars: of one prompt.

    Raises:
        TypeError, ValueError: a value that is no number, or not above 0 (`max_wait`: below 0).
    """

    max_batch: int = 8
    max_wait: float = 0.005
    queue: int = 64
    deadline: float = 10.0
    body_bytes: int = 16 * 2**20
    body_seconds: float = 10.0
    pixels: int = 40_000_000
    targets: int = 16
    prompt_chars: int = 500

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            kinds = (int,) if entry.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"{entry.name}: expected a number ({entry.type}), got {type(value).__name__}")
            if not 0 <= value < 2**62 or (value == 0 and entry.name != "max_wait"):
                raise ValueError(f"{entry.name}: expected a number above 0, got {value}")
