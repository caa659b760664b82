"""Which module of the live model a name in a LoRA file means.

Every spelling is made from the model's own module names and looked up whole. Nothing is ever turned back from
underscores to dots: ``a_b_c`` does not say where its dots were. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]


class ModuleKey(NamedTuple):
    """One module of the pipeline."""

    component: str
    """``unet``, ``te``, ``te2`` or ``te3``."""
    module: str
    """Dotted path within the component, as ``named_modules`` gives it."""


@dataclass(frozen=True, slots=True)
class _Component:
    name: str
    flat: tuple[str, ...]
    """Prefixes of names whose dots became underscores."""
    dotted: tuple[str, ...]
    """Prefixes of dotted names."""
    bare: tuple[str, ...]
    """Dotted prefixes that do not tell this component from others."""


_COMPONENTS = (
    _Component("unet", ("lora_unet_",), ("unet.", "unet.base_model.model."), ("", "base_model.model.")),
    _Component(
        "te",
        ("lora_te_", "lora_te1_"),
        ("text_encoder.", "text_encoder.base_model.model."),
        ("base_model.model.",),
    ),
    _Component("te2", ("lora_te2_",), ("text_encoder_2.", "text_encoder_2.base_model.model."), ()),
    _Component("te3", ("lora_te3_",), ("text_encoder_3.", "text_encoder_3.base_model.model."), ()),
)
_BY_NAME = {component.name: component for component in _COMPONENTS}

_ATTENTION_IN = re.compile(r"(.+)\.(to_[qkv])")
_ATTENTION_OUT = re.compile(r"(.+)\.to_out\.0")
_CLIP_ATTENTION = re.compile(r"(.+\.self_attn)\.(q|k|v|out)_proj")
_CLIP_ROOT = "text_model."

_OTHER_BASES = (
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "FLUX"),
    (re.compile(r"joint_blocks"), "SD 3"),
    (re.compile(r"lora_unet_(?:input|middle|output)_block|label_emb|add_embedding"), "SDXL in its original names"),
    (re.compile(r"(?:lora_unet_|^|\.)(?:blocks|layers|transformer_blocks)[._]\d"), "a diffusion transformer"),
    (re.compile(r"lora_te[23]_|text_encoder_[23]\."), "a model with more text encoders"),
    (re.compile(r"^transformer\.|lora_transformer_|^diffusion_model\."), "a diffusion transformer"),
)


class ModuleIndex:
    """The modules of a live model that a LoRA may change, under every spelling that files use for them."""

    def __init__(self, shapes: Mapping[str, Mapping[str, Shape]]) -> None:
        """Take the weight shapes of each component's modules, by component and dotted module name."""
        self.components = frozenset(shapes)
        self._shapes = {
            ModuleKey(component, module): shape
            for component, modules in shapes.items()
            for module, shape in modules.items()
        }
        self._by_spelling = _spellings(self._shapes)

    def find(self, stem: str) -> ModuleKey | None:
        """Look up a LoRA file's name for a module, without the part behind it such as ``.lora_down.weight``."""
        return self._by_spelling.get(stem)

    def shape(self, key: ModuleKey) -> Shape:
        """Give the shape of a module's weight: ``[out, in]`` or ``[out, in, kh, kw]``."""
        return self._shapes[key]

    def absent_component(self, stem: str) -> str | None:
        """Name the text encoder that a stem belongs to when this model has none such; else ``None``."""
        for component in _COMPONENTS:
            if component.name not in self.components and stem.startswith(component.flat + component.dotted):
                return component.name
        return None


def other_base(stems: Iterable[str]) -> str:
    """Say which other kind of base model names that match nothing point to; empty if unknown."""
    stems = list(stems)
    return next((base for pattern, base in _OTHER_BASES if any(map(pattern.search, stems))), "")


def _spellings(keys: Iterable[ModuleKey]) -> dict[str, ModuleKey]:
    """Map spellings to modules. A spelling that could mean two modules means none."""
    meanings: dict[str, set[ModuleKey]] = {}
    for key in keys:
        component = _BY_NAME[key.component]
        for name in _dotted_names(key.module):
            flat = name.replace(".", "_")
            for spelling in (
                *(p + flat for p in component.flat),
                *(p + name for p in component.dotted + component.bare),
            ):
                meanings.setdefault(spelling, set()).add(key)
    return {spelling: next(iter(found)) for spelling, found in meanings.items() if len(found) == 1}


def _dotted_names(module: str) -> Iterator[str]:
    """Give a module's own name and the dotted names that other tools and versions have for it."""
    roots = [module, module.removeprefix(_CLIP_ROOT)]
    if module.startswith(("encoder.", "embeddings.")):
        roots.append(_CLIP_ROOT + module)
    for name in dict.fromkeys(roots):
        yield name
        if match := _ATTENTION_IN.fullmatch(name):
            yield f"{match[1]}.processor.{match[2]}"
        elif match := _ATTENTION_OUT.fullmatch(name):
            yield f"{match[1]}.to_out"
            yield f"{match[1]}.processor.to_out"
        elif match := _CLIP_ATTENTION.fullmatch(name):
            yield f"{match[1]}.to_{match[2]}"
