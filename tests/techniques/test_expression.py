from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import BadRequestError
from featstore.techniques import TECHNIQUES, Part, parse


def test_passes_parts_and_variants() -> None:
    passes = parse("prompt,ControlNet:Canny+lora:./My/Horse.safetensors, basic")
    assert [p.expression for p in passes] == ["prompt", "controlnet:canny+lora:./My/Horse.safetensors", "basic"]
    assert passes[1].parts == (
        Part(name="controlnet", variant="canny"),
        Part(name="lora", variant="./My/Horse.safetensors"),
    )
    assert passes[1].parts[0].path is None
    assert str(passes[1].parts[1].path) == "My/Horse.safetensors"


def test_several_loras_with_different_files_are_one_pass() -> None:
    (one,) = parse("lora:./a.safetensors+lora:b.safetensors+lora+controlnet:canny+prompt:caption")
    assert [str(part) for part in one.parts][-1] == "prompt:caption"
    assert len(one.parts) == 5


@pytest.mark.parametrize(
    ("text", "message", "position"),
    [
        ("", "a technique is missing", 1),
        ("basic,", "a technique is missing", 7),
        ("prompt,+lora", "a technique is missing", 8),
        ("prompt,lora+", "a technique is missing", 13),
        (":canny", "a technique is missing", 1),
        ("basic,promt", "unknown technique 'promt'; known: basic, cfg, controlnet, ip-adapter, lora, prompt", 7),
        ("controlnet+t2i-adapter", "unknown technique 't2i-adapter'", 12),
        ("prompt,lora:", "nothing after the colon", 8),
        ("basic+lora", "'basic' is the absence of steering", 7),
        ("lora+prompt+basic", "'basic' is the absence of steering", 13),
        ("basic+basic", "'basic' is the absence of steering", 7),
        ("lora+lora", "'lora' is twice in one pass", 6),
        ("lora:./a.safetensors+lora:./a.safetensors", "is twice in one pass", 22),
        ("prompt+prompt:caption", "exclude each other", 8),
        ("prompt,lora,prompt", "'prompt' is the same pass as at position 1", 13),
        ("lora+prompt,basic,prompt+lora", "'prompt+lora' is the same pass as at position 1", 19),
    ],
)
def test_what_means_nothing_is_refused_with_its_place(text: str, message: str, position: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert f"(position {position} of {text!r})" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("basic:x", "'basic' has no variants", None),
        ("prompt:detailed", "no variant 'detailed'", "--prompt"),
        ("controlnet:cany", "unknown variant of technique 'controlnet' 'cany'; known: .*canny", "controlnet:./cany"),
    ],
)
def test_variants_that_do_not_exist(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        parse(text)
    assert hint is None or hint in str(caught.value.hint)


def test_nearest_technique_is_named() -> None:
    with pytest.raises(BadRequestError) as caught:
        parse("controlnt")
    assert caught.value.hint == "did you mean 'controlnet'?"


@given(st.text(alphabet="basicpromtln:+,/. ", max_size=30))
def test_anything_typed_is_parsed_or_refused(text: str) -> None:
    try:
        passes = parse(text)
    except BadRequestError:
        return
    again = parse(",".join(p.expression for p in passes))
    assert again == passes


def test_every_technique_says_what_it_does() -> None:
    assert list(TECHNIQUES) == ["basic", "prompt", "controlnet", "lora", "ip-adapter", "cfg"]
    assert all(kind.TITLE for kind in TECHNIQUES.values())
