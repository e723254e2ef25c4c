from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import BadRequestError
from featstore.recipe import slug
from featstore.techniques import Part, parse


@pytest.mark.parametrize(
    ("text", "variant", "scale", "canonical"),
    [
        ("controlnet:canny@0.50", "canny", 0.5, "controlnet:canny@0.5"),
        ("ControlNet : Depth @ 2.", "depth", 2.0, "controlnet:depth@2"),
        ("controlnet@.25", None, 0.25, "controlnet@0.25"),
        ("lora@-1", None, -1.0, "lora@-1"),
        ("lora@-0.0", None, 0.0, "lora@0"),
        ("lora:./Me@Home/Horse.safetensors", "./Me@Home/Horse.safetensors", None, "lora:./Me@Home/Horse.safetensors"),
        ("lora:./horse@v2", "./horse@v2", None, "lora:./horse@v2"),
        ("lora:./horse@2@1.5", "./horse@2", 1.5, "lora:./horse@2@1.5"),
        ("lora:./a@b@1", "./a@b", 1.0, "lora:./a@b@1"),
        ("lora:./horse@1e3", "./horse@1e3", None, "lora:./horse@1e3"),
        ("controlnet:depth=My-Net@0.5", "depth=My-Net", 0.5, "controlnet:depth=My-Net@0.5"),
    ],
)
def test_what_follows_the_last_at_is_a_scale_if_it_is_a_number(
    text: str, variant: str | None, scale: float | None, canonical: str
) -> None:
    (one,) = parse(text)
    assert one.parts == (Part(name=canonical.partition(":")[0].partition("@")[0], variant=variant, scale=scale),)
    assert one.expression == canonical
    assert parse(canonical) == (one,)


@pytest.mark.parametrize(
    ("text", "message", "position"),
    [
        ("prompt,prompt:caption@2", "technique 'prompt' has no scale", 8),
        ("basic@1", "technique 'basic' has no scale", 1),
        ("prompt,lora@high", "'high' after the @ of 'lora@high' is no number", 8),
        ("controlnet@nan", "'nan' after the @", 1),
        ("lora@", "'' after the @", 1),
        ("lora@1" + "0" * 400, "too large", 1),
        ("lora:@1", "nothing after the colon", 1),
        ("@1", "a technique is missing", 1),
        ("lora:./a@1+lora:./a@2", "is twice in one pass", 12),
    ],
)
def test_scales_that_mean_nothing_are_refused_with_their_place(text: str, message: str, position: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert f"(position {position} of {text!r})" in str(caught.value)


def test_passes_that_differ_in_a_scale_are_two() -> None:
    assert len(parse("lora@0.5,lora@1,lora")) == 3


@given(
    scale=st.floats(allow_nan=False, allow_infinity=False),
    variant=st.sampled_from([None, "canny", "depth=./a", "./a@b", "./a@2"]),
)
def test_any_number_goes_round_exactly(scale: float, variant: str | None) -> None:
    part = Part(name="controlnet", variant=variant, scale=scale)
    (one,) = parse(str(part))
    assert one.parts == (part,)
    assert "e" not in str(part).rpartition("@")[2]


@given(st.text(alphabet="loracntept:@+,/.-0159= ", max_size=25).map(lambda tail: f"lora{tail}"))
def test_anything_typed_with_scales_is_parsed_or_refused(text: str) -> None:
    try:
        passes = parse(text)
    except BadRequestError:
        return
    assert parse(",".join(one.expression for one in passes)) == passes


def test_paths_of_stores_are_short_with_scales_too() -> None:
    assert slug("controlnet:depth=./my/Net@0.5+lora:a/b/horse.safetensors@2") == "controlnet_net_0.5_lora_horse_2"
    assert slug("lora:a/b/horse.safetensors") == "lora_horse"
