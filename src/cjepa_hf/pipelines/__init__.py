"""Tasks of `transformers.pipeline`."""

from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .goal_planning import GoalPlanningPipeline


def register_pipelines() -> None:
    """Make the tasks of this package known to `transformers.pipeline` (importing the package does it)."""
    if "goal-planning" not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            "goal-planning", pipeline_class=GoalPlanningPipeline, pt_model=AutoModel, type="multimodal"
        )


__all__ = ["GoalPlanningPipeline", "register_pipelines"]
