"""A captioner, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image

from featstore.errors import BadRequestError
from featstore.models.backbones.loading import errors_about, freeze, pretrained_text, torch_device, torch_dtype
from featstore.models.quiet import quiet

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from featstore.models.captioners import CaptionerSource

_INPUTS = ("pixel_values", "input_ids", "attention_mask", "image_embeds_position_mask")


class Captioner:
    """Writes a text for each image, always the same one: the likeliest token at every step.

    Args:
        source: the folder.
        device: a torch device.
        compute_dtype: element type of weights and activations.

    Raises:
        BadRequestError: for a device or type that is not there, or a damaged folder.
        NotFoundError: if weights are missing.
    """

    def __init__(self, source: CaptionerSource, *, device: str, compute_dtype: str) -> None:
        self._kind = source.kind
        self._dtype, self._device = torch_dtype(compute_dtype), torch_device(device)
        with quiet(), errors_about(f"captioner {source.name!r} in {source.folder}"):
            processor = getattr(transformers, source.kind.processor)
            self._processor = processor.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        model = pretrained_text(getattr(transformers, source.kind.model), source.folder, source.weights, self._dtype)
        self._model = freeze(model, self._device)
        queries = getattr(self._model.config, "num_query_tokens", None)
        if queries is not None and self._processor.num_query_tokens != queries:
            # Without the right number of places in the text, BLIP-2 never sees the image.
            raise BadRequestError(
                f"captioner {source.name!r}: its processor says {self._processor.num_query_tokens} image tokens, its "
                f"model {queries}",
                hint="the files are of an older version of transformers; take a newer revision of them",
            )

    def captions(
        self, images: Sequence[npt.NDArray[np.uint8]], *, prompt: str, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """A text for each image, on one line, without the prompt.

        Every batch has one size, short ones are filled up with copies of their last image; so, on one kind of device,
        a text does not depend on the images beside it.

        Args:
            images: uint8 (H, W, 3), RGB, of any sizes.
            prompt: what is asked, or how every text begins; empty: nothing.
            max_new_tokens: where a text is broken off.
            batch_size: images at once.
        """
        texts = []
        for start in range(0, len(images), batch_size):
            batch = [Image.fromarray(image) for image in images[start : start + batch_size]]
            padded = batch + [batch[-1]] * (batch_size - len(batch))
            texts += self._written(padded, prompt, max_new_tokens)[: len(batch)]
        return texts

    def _written(self, images: Sequence[Image.Image], prompt: str, max_new_tokens: int) -> list[str]:
        inputs, echoed = self._inputs(images, prompt)
        with quiet(), torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        texts = self._processor.batch_decode(tokens[:, echoed:], skip_special_tokens=True)
        if hasattr(self._processor, "post_process_generation"):  # takes Kosmos-2's tags off
            texts = [self._processor.post_process_generation(text)[0] for text in texts]
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: Sequence[Image.Image], prompt: str) -> tuple[dict[str, Any], int]:
        """Arguments of ``generate``, and how many tokens of the prompt its output begins with."""
        asked = {"text": [prompt] * len(images)} if prompt or not self._kind.ends_prompts else {}
        made = self._processor(images=list(images), return_tensors="pt", **asked).to(self._device, self._dtype)
        inputs = {name: made[name] for name in _INPUTS if name in made}
        if not asked:
            return inputs, 0
        if self._kind.ends_prompts and not self._kind.drops_end:
            inputs |= {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        language = getattr(self._model, "language_model", self._model)
        if language.config.is_encoder_decoder:
            return inputs, 0
        return inputs, inputs["input_ids"].shape[1] - int(self._kind.drops_end)
