"""The GATE guideline: which techniques bring a model closer to the images it sees, found out from a few of them.

From section 4.3 of Meng et al., "Suppress Content Shift: Better Diffusion Features via Off-the-Shelf Generation
Techniques" (NeurIPS 2024, arXiv 2410.06719).
"""

from __future__ import annotations

from featstore.pipelines.gate.config import GateConfig
from featstore.pipelines.gate.planning import GatePlan, make_gate_plan
from featstore.pipelines.gate.report import GateReport
from featstore.pipelines.gate.run import gate
from featstore.pipelines.gate.verdict import Judgement, Verdict

__all__ = ["GateConfig", "GatePlan", "GateReport", "Judgement", "Verdict", "gate", "make_gate_plan"]
