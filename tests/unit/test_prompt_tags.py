"""The grammar of <lora:…> tags."""

import pytest

from core.errors import InvalidPromptTag
from core.prompt_tags import PromptTag, extract, refuse_tags


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:ink>", PromptTag("ink")),
        ("<lora:ink:0.8>", PromptTag("ink", 0.8, 0.8)),
        ("<lora:ink:0.5:0.8>", PromptTag("ink", te=0.5, unet=0.8)),
        ("<lora:ink:te=0.5>", PromptTag("ink", te=0.5, unet=None)),
        ("<lora:ink:1:unet=0>", PromptTag("ink", te=1.0, unet=0.0)),
        ("<lora:ink:unet=2:0.5>", PromptTag("ink", te=0.5, unet=2.0)),
        ("<lora:ink:-1.5>", PromptTag("ink", -1.5, -1.5)),
        ("<LORA:ink:1>", PromptTag("ink", 1.0, 1.0)),
        ("<lyco:ink:1>", PromptTag("ink", 1.0, 1.0)),
        ("<lora:my ink v1.2, (b):1>", PromptTag("my ink v1.2, (b)", 1.0, 1.0)),
        ("<lora:墨水🎨:1>", PromptTag("墨水🎨", 1.0, 1.0)),
    ],
)
def test_a_tag_is_read_as_a1111_reads_it(tag: str, expected: PromptTag) -> None:
    assert extract(f"a cat {tag}") == ("a cat", (expected,))


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:>",
        "<lora::1>",
        "<lora:ink:strong>",
        "<lora:ink:nan>",
        "<lora:ink:inf>",
        "<lora:ink:te=>",
        "<lora:ink:1:2:3>",
        "<lora:ink:colour=blue>",
        "<lora:te=1>",
        "<lora:outline:1",
        "<lora:",
        "<LoRA:outline:1",
        "<lyco:outline:1",
        "<lora:ink:1> and <lora:outline:1",
        "<lora<lora:ink:1>:outline:1",
    ],
)
def test_a_tag_that_cannot_be_read_is_refused(tag: str) -> None:
    with pytest.raises(InvalidPromptTag):
        extract(f"a cat {tag}")


@pytest.mark.parametrize("text", ["blur <lora:ink:1>", "<LYCO:ink>", "blur <lora:ink:1", "<lora:"])
def test_a_text_that_may_hold_no_tag_is_told_where_loras_belong(text: str) -> None:
    with pytest.raises(InvalidPromptTag, match=r"negative_prompt.*into the prompt or into `loras`"):
        refuse_tags("negative_prompt", text)


def test_tags_keep_their_order_and_the_text_keeps_its_commas() -> None:
    text, tags = extract("<lora:a:1> a cat, <lora:b:0.5>, sitting <lora:a:1>")
    assert text == "a cat, , sitting"
    assert [tag.name for tag in tags] == ["a", "b", "a"]


@pytest.mark.parametrize("prompt", ["", "a < b > c", "<lora", "<hypernet:x:1>", "lora:ink:1", "  spaced  "])
def test_text_without_tags_is_left_alone(prompt: str) -> None:
    assert extract(prompt) == (prompt, ())
    refuse_tags("negative_prompt", prompt)
