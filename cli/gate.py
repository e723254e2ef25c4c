"""`featstore gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_STORE,
    AllowPickleOption,
    AnyStoreOption,
    CaptionsOption,
    ControlnetScaleOption,
    DataRootOption,
    DatasetNameOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    GuidanceScaleOption,
    ImageSizeOption,
    IpAdapterScaleOption,
    JsonOption,
    LayersOption,
    LoraScaleOption,
    ModelOption,
    PromptOption,
    SeedOption,
    TechniquesOption,
    TimestepsOption,
    parse_image_size,
    parse_timesteps,
)
from featstore.pipelines.gate import GateConfig, GateReport, Judgement, make_gate_plan
from featstore.pipelines.gate import gate as judge
from featstore.techniques import SteeringOptions


@console.handled
def gate(
    dataset: DatasetOption,
    techniques: TechniquesOption,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", help="Judge by N images, evenly spaced over the data set.")
    ] = 16,
    split: Annotated[str | None, typer.Option("--split", metavar="S", help="Only this split's images.")] = None,
    model: ModelOption = None,
    timesteps: TimestepsOption = "50",
    anchor: Annotated[
        str,
        typer.Option(
            "--anchor", metavar="TECHNIQUE@T", help="Features with stronger shift, which score 0; T alone: of basic."
        ),
    ] = "basic@501",
    layers: LayersOption = None,
    image_size: ImageSizeOption = None,
    strength: Annotated[
        float, typer.Option("--strength", metavar="X", help="How far Img2Img noises the input; 1 leaves nothing of it.")
    ] = 0.8,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", help="Img2Img's steps of a whole schedule, of which it takes X.")
    ] = 20,
    prompt: PromptOption = None,
    captions: CaptionsOption = None,
    controlnet_scale: ControlnetScaleOption = 1.0,
    lora_scale: LoraScaleOption = 1.0,
    ip_adapter_scale: IpAdapterScaleOption = 1.0,
    guidance_scale: GuidanceScaleOption = 7.5,
    allow_pickle: AllowPickleOption = False,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder of gate.json and gate.png, a grid of what Img2Img made."),
    ] = Path("gate"),
    device: DeviceOption = None,
    store: AnyStoreOption = DEFAULT_STORE,
    dataset_name: DatasetNameOption = None,
    data_root: DataRootOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find out from a few images which techniques bring a model closer to them, before features are extracted.

    Two parts, both against `basic`: pictures remade by Img2Img from strong noise, with each technique, and how near
    they come to the input; and how far features have drifted from those at t = 0. Nothing is stored. It ends with the
    extract command to run. Exit status: 0 done, 1 some images failed, 2 a bad request, 130 interrupted.

    **Examples**

    `featstore gate --dataset toyhorse --techniques prompt,controlnet,lora,cfg`

    `featstore gate --dataset folder:photos --model sd15 --techniques controlnet:canny@0.5,controlnet --limit 8`
    """
    config = GateConfig(
        dataset=dataset,
        techniques=techniques,
        model=model,
        timesteps=parse_timesteps(timesteps),
        anchor=anchor,
        layers=layers,
        image_size_px=parse_image_size(image_size),
        split=split,
        limit=limit,
        strength=strength,
        steps=steps,
        steering=SteeringOptions(
            prompt=prompt,
            captions=captions,
            controlnet_scale=controlnet_scale,
            lora_scale=lora_scale,
            ip_adapter_scale=ip_adapter_scale,
            guidance_scale=guidance_scale,
            allow_pickle=allow_pickle,
        ),
        device=device,
        seed=seed,
        data_root=data_root,
        dataset_name=dataset_name,
        out=out,
    )
    plan = make_gate_plan(config)
    source = plan.extract.source.name
    console.say(
        (plan.extract.dataset_name, "bold"), f": {len(plan.samples)} images, model {source}, on {plan.extract.device}"
    )
    report = judge(plan, console.Bar())
    for note in report.notes:
        console.say(note)
    if as_json:
        console.print_json(report.to_json())
    else:
        _print(report)
    for key, reason in report.failed.items():
        console.say(("failed", "red"), f" {key}: {reason}")
    if report.failed:
        raise typer.Exit(console.FAILED)


def _print(report: GateReport) -> None:
    """The table, the verdicts and the command, on standard output."""
    plan, judged = report.plan, report.judgements
    several = len(plan.config.timesteps) > 1
    measures = list(judged[0].measures)
    names = {"ssim": "SSIM", "psnr_db": "PSNR dB", "edge_f1": "edges", "latent_distance": "latents"}
    rows = []
    for one in judged:
        row = [
            _name(one, several=several),
            f"{one.score.mean:.3f}",
            f"{one.pattern_score.mean:.3f}",
            _signed(one.pattern_difference.mean, one.pattern_difference.ci95),
        ]
        if measures:
            row += [f"{one.measures[name]:.{1 if name == 'psnr_db' else 3}f}" for name in measures]
        if one.closeness is not None:
            row.append(_signed(one.closeness.mean, one.closeness.ci95))
        row += [f"{1000 * one.seconds_per_pass:.0f}", console.human_bytes(one.bytes_per_image), one.verdict.value]
        rows.append(row)
    head = ["technique", "score", "pattern", "to basic", *(names.get(name, name) for name in measures)]
    head += ["closer by"] if judged[0].closeness is not None else []
    head += ["ms a pass", "an image", "verdict"]
    title = f"{plan.extract.dataset_name}, {len(report.images)} images, anchor {plan.anchor[0]}@{plan.anchor[1]}"
    console.print_table(title, head, rows)
    for one in judged[1:]:
        if one.technique != judged[0].technique:
            console.say((_name(one, several=several), "bold"), f": {one.verdict.value}; {one.advice}", to=console.out)
    console.say("next: ", (report.extract_command, "bold"), to=console.out)
    if plan.config.out is not None:
        console.say(f"wrote {plan.config.out}")


def _name(one: Judgement, *, several: bool) -> str:
    return f"{one.technique} t{one.timestep:03d}" if several else one.technique


def _signed(mean: float, ci95: tuple[float, float]) -> str:
    return f"{mean:+.3f} ({ci95[0]:+.3f} .. {ci95[1]:+.3f})"
