"""What a gate found, as JSON and as the command to go on with."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from featstore.pipelines.gate.planning import GatePlan
from featstore.pipelines.gate.reconstruct import Reconstructions
from featstore.pipelines.gate.verdict import REFERENCE, Judgement, Verdict
from featstore.techniques import SteeringOptions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What a gate found; `to_json` is what ``--json`` prints."""

    plan: GatePlan
    judgements: tuple[Judgement, ...]
    """By technique, then timestep; ``basic`` first."""
    images: tuple[str, ...]
    """Keys of the images that were judged by."""
    failed: Mapping[str, str]
    """Why others were not."""
    reconstructions: Reconstructions | None
    notes: tuple[str, ...]
    """What is to be known about how it was judged."""
    seconds: float

    @property
    def helping(self) -> list[str]:
        """Techniques that help at any of the timesteps."""
        return list(dict.fromkeys(one.technique for one in self.judgements if one.verdict is Verdict.HELPS))

    @property
    def extract_command(self) -> str:
        """The extraction of what helps, or of ``basic`` where nothing does."""
        config, defaults = self.plan.config, SteeringOptions()
        steering = config.steering
        size = config.image_size_px
        options: dict[str, object] = {
            "--dataset": config.dataset,
            "--techniques": ",".join(self.helping or [REFERENCE]),
            "--timesteps": None if config.timesteps == (50,) else ",".join(map(str, config.timesteps)),
            "--model": config.model,
            "--layers": config.layers,
            "--image-size": "x".join(map(str, size)) if isinstance(size, tuple) else size,
            "--prompt": steering.prompt,
            "--captions": steering.captions,
            **{
                f"--{name.replace('_', '-')}": f"{getattr(steering, name):g}"
                for name in ("controlnet_scale", "lora_scale", "ip_adapter_scale", "guidance_scale")
                if getattr(steering, name) != getattr(defaults, name)
            },
            "--device": config.device,
            "--data-root": config.data_root,
            "--dataset-name": config.dataset_name,
            "--seed": config.seed or None,
        }
        words = ["featstore", "extract"]
        words += [str(word) for option, value in options.items() if value is not None for word in (option, value)]
        return shlex.join(words + (["--allow-pickle"] if steering.allow_pickle else []))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        plan, config, made = self.plan, self.plan.config, self.reconstructions
        return {
            "dataset": plan.extract.dataset_name,
            "model": plan.extract.source.name,
            "device": plan.extract.device,
            "anchor": f"{plan.anchor[0]}@{plan.anchor[1]}",
            "layers": list(plan.layers),
            "images": list(self.images),
            "failed": [{"key": key, "reason": reason} for key, reason in self.failed.items()],
            "seed": config.seed,
            "img2img": None
            if made is None
            else {
                "strength": config.strength,
                "steps": config.steps,
                "pipelines": list(made.pipelines),
                "scheduler": made.scheduler,
            },
            "techniques": [one.to_json() for one in self.judgements],
            "extract_command": self.extract_command,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }
