"""``prompt``: a text in place of the plain one, for all images or, as ``prompt:caption``, one an image."""

from __future__ import annotations

from featstore.datasets.captions import load_captions
from featstore.errors import BadRequestError, unknown_name
from featstore.techniques.base import Draft, Part, Request

TITLE = "a fixed detailed text, a caption an image, or words of praise or blame after the plain text"
VARIANTS = "caption (a text an image, of --captions FILE or the data set), low, neutral, high (words of quality)"
REPEATABLE = False
SCALED = False

QUALITY_WORDS = {
    "low": "low quality, worst quality, blurry",
    "neutral": "",
    "high": "high quality, best quality, highly realistic, masterpiece",
}
"""What follows the plain text in `prompt:low`, `prompt:neutral` and `prompt:high`.

A data set brings others if the model that it is meant for was trained with them: `DatasetInfo.quality_words`."""

_CAPTION = "caption"
_CAPTION_KIND = "fine"


def check(part: Part) -> None:
    """Refuse variants that the technique does not have."""
    known = (_CAPTION, *QUALITY_WORDS)
    if part.variant is not None and part.variant not in known:
        near = unknown_name("variant", part.variant, known).hint
        raise BadRequestError(
            f"technique 'prompt' has no variant {part.variant!r}; it is prompt or prompt:{', prompt:'.join(known)}",
            hint=f"{f'{near} ' if near else ''}a text of your own goes into --prompt",
        )


def apply(part: Part, request: Request, draft: Draft) -> None:
    """Replace the plain prompt.

    ``--prompt`` replaces the data set's detailed text and, before words of quality, its plain one.

    Raises:
        BadRequestError: if the data set has no detailed text, or there are no captions.
        NotFoundError: if there is no such captions file.
    """
    info, options = request.dataset.info, request.options
    if part.variant == _CAPTION:
        _apply_captions(request, draft)
        return
    if part.variant is not None:
        words = info.quality_words.get(part.variant, QUALITY_WORDS[part.variant])
        plain = info.plain_prompt if options.prompt is None else options.prompt
        draft.prompt = ", ".join(filter(None, (plain, words)))
        return
    text = options.prompt if options.prompt is not None else info.prompt
    if text is None:
        raise BadRequestError(
            f"data set {info.name!r} has no detailed prompt of its own, which 'prompt' needs",
            hint='give one: --prompt "a photo of .., high quality"',
        )
    draft.prompt = text


def _apply_captions(request: Request, draft: Draft) -> None:
    if request.options.captions is not None:
        draft.captions = load_captions(request.options.captions)
        draft.prompt, draft.caption_source = None, draft.captions.source
        return
    source = request.dataset.caption_source
    if source is None:
        raise BadRequestError(
            f"data set {request.dataset.info.name!r} has no captions, which 'prompt:caption' needs",
            hint="give them: --captions FILE (`featstore caption` makes one); or use `prompt`, one text for all images",
        )
    draft.prompt, draft.caption_kind, draft.caption_source = None, _CAPTION_KIND, source
