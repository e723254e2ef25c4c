"""What both parts say of a technique, and what a person can do about it."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from featstore.pipelines.gate.reconstruct import Reconstructions
from featstore.pipelines.gate.scores import Key, Scores
from featstore.pipelines.gate.statistics import Difference, Estimate, difference, estimate

REFERENCE = "basic"
"""What every technique is compared with, at the same timestep."""
_NOTHING = {"features": 0.01, "pictures": 0.1}
"""Gains of the score and of the closeness below which an interval's upper end counts as none."""


class Verdict(enum.Enum):
    """In a word."""

    REFERENCE = "reference"
    HELPS = "helps"
    NO_HELP = "does not help"
    UNCLEAR = "unclear"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One technique at one timestep."""

    technique: str
    timestep: int
    score: Estimate
    """The paper's score: 1 for features like those of `basic` at t = 0, 0 for the anchor's shift."""
    layer_scores: dict[str, float]
    """Mean score of each layer."""
    score_at_0: float
    """Score of the technique's own features at t = 0, where nothing is hidden and nothing can shift."""
    score_difference: Difference
    """To that of `basic` at the same timestep."""
    pattern_score: Estimate
    """The same of patterns, where only the places of changes count and not how large activations are."""
    pattern_difference: Difference
    """To that of `basic` at the same timestep. This one decides."""
    pattern_since_0: Difference
    """How much less the score of patterns has fallen since t = 0 than that of `basic`: below 0, it has fallen more."""
    measures: dict[str, float]
    """Mean similarities of Img2Img to the input; empty where there is none."""
    differences: dict[str, Difference]
    """Of the measures to those of `basic`, turned so that above 0 is closer."""
    closeness: Difference | None
    """Mean of the measures' differences in spreads of `basic`; None where there is no Img2Img."""
    verdict: Verdict
    advice: str
    """What to do, a sentence."""
    more_images: int | None
    """How many more images would make an unclear verdict clear; None where none would, or it is clear."""
    seconds_per_pass: float
    """Measured here, of one image."""
    bytes_per_image: int
    """What an extraction would store of one image, in float16."""

    @property
    def suppresses(self) -> bool:
        """Whether features drift less than those of `basic`: the interval of the patterns' difference is above 0."""
        return self.pattern_difference.above

    @property
    def closer_than_reference(self) -> bool | None:
        """Whether Img2Img comes closer than `basic`: the interval of the closeness is above 0. None: no Img2Img."""
        return None if self.closeness is None else self.closeness.above

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        measures = {"ssim": None, "psnr_db": None, **self.measures}
        return {
            "technique": self.technique,
            "timestep": self.timestep,
            "score": self.score.mean,
            "score_ci95": list(self.score.ci95),
            **measures,
            "closer_than_reference": self.closer_than_reference,
            "suppresses": self.suppresses,
            "score_difference": self.score_difference.to_json(),
            "score_at_0": self.score_at_0,
            "pattern_score": self.pattern_score.mean,
            "pattern_score_ci95": list(self.pattern_score.ci95),
            "pattern_difference": self.pattern_difference.to_json(),
            "pattern_since_0": self.pattern_since_0.to_json(),
            "layer_scores": self.layer_scores,
            "closeness": None if self.closeness is None else self.closeness.to_json(),
            "differences": {name: one.to_json() for name, one in self.differences.items()},
            "verdict": self.verdict.value,
            "advice": self.advice,
            "more_images": self.more_images,
            "seconds_per_pass": self.seconds_per_pass,
            "bytes_per_image": self.bytes_per_image,
        }


def judge(key: Key, scores: Scores, made: Reconstructions | None, *, seed: int, bytes_per_image: int) -> Judgement:
    """Put together what both parts say of a technique at a timestep."""
    technique, timestep = key
    values, reference = scores.of(key), scores.of((REFERENCE, timestep))
    pattern, plain = scores.pattern_of(key), scores.pattern_of((REFERENCE, timestep))
    by_pattern = difference(pattern, plain, seed)
    at_0, plain_at_0 = scores.pattern_of((technique, 0)), scores.pattern_of((REFERENCE, 0))
    since_0 = difference(pattern - at_0, plain - plain_at_0, seed)
    by_picture: Difference | None = None
    differences: dict[str, Difference] = {}
    if made is not None:
        closeness = made.closeness(technique)
        by_picture = difference(closeness, 0 * closeness, seed)
        differences = {
            name: difference(made.closer(technique, name), made.closer(REFERENCE, name), seed)
            for name in made.measures[technique]
        }
    verdict, advice, more = _decide(technique, len(values), by_pattern, since_0, by_picture)
    return Judgement(
        technique=technique,
        timestep=timestep,
        score=estimate(values, seed),
        layer_scores={name: float(one.mean()) for name, one in scores.layers[key].items()},
        score_at_0=float(scores.of((technique, 0)).mean()),
        score_difference=difference(values, reference, seed),
        pattern_score=estimate(pattern, seed),
        pattern_difference=by_pattern,
        pattern_since_0=since_0,
        measures={} if made is None else {name: float(one.mean()) for name, one in made.measures[technique].items()},
        differences=differences,
        closeness=by_picture,
        verdict=verdict,
        advice=advice,
        more_images=more,
        seconds_per_pass=scores.seconds_per_pass[technique],
        bytes_per_image=bytes_per_image,
    )


def _decide(
    technique: str, images: int, by_features: Difference, since_0: Difference, by_picture: Difference | None
) -> tuple[Verdict, str, int | None]:
    """Verdict, advice and images that are lacking.

    A technique that adds to activations changes its features at t = 0 already, where no content can shift. So a score
    below that of `basic` speaks against it only if it has also fallen more since t = 0 than that of `basic`.
    """
    if technique == REFERENCE:
        return Verdict.REFERENCE, "what the others are compared with", None
    parts = [("features", by_features)] + ([] if by_picture is None else [("pictures", by_picture)])
    for_it = [name for name, one in parts if one.above]
    against = [name for name, one in parts if one.below and (name == "pictures" or since_0.below)]
    if for_it and against:
        return (
            Verdict.UNCLEAR,
            f"{for_it[0]} come closer, {against[0]} do not: more images will not settle it, train a head",
            None,
        )
    if for_it:
        return Verdict.HELPS, f"extract it: {' and '.join(for_it)} come closer", None
    if against:
        return Verdict.NO_HELP, f"leave it out: {' and '.join(against)} go farther away", None
    undecided = [(one, _NOTHING[name]) for name, one in parts if one.mean > 0 and one.ci95[1] >= _NOTHING[name]]
    if undecided:
        needed = min(one.images_needed(least) for one, least in undecided)
        more = needed - images if needed > images else images  # an interval that just reaches 0: as many again
        return Verdict.UNCLEAR, f"judge it by {more} more images: --limit {images + more}", more
    flat = all(one.mean == 0 and one.ci95 == (0.0, 0.0) for _, one in parts)
    gain = any(one.mean > 0 for _, one in parts)
    nothing = "it changes nothing" if flat else "what it gains is next to nothing" if gain else "no gain is seen"
    return Verdict.NO_HELP, f"leave it out: {nothing}", None
