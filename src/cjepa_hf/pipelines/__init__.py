"""Tasks of `transformers.pipeline`."""

from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .counterfactual_rollout import CounterfactualRolloutPipeline
from .goal_planning import GoalPlanningPipeline
from .video_question_answering import VideoQuestionAnsweringPipeline

_PIPELINES = {
    "counterfactual-rollout": CounterfactualRolloutPipeline,
    "goal-planning": GoalPlanningPipeline,
    "video-question-answering": VideoQuestionAnsweringPipeline,
}


def register_pipelines() -> None:
    """Make the tasks of this package known to `transformers.pipeline` (importing the package does it)."""
    known = PIPELINE_REGISTRY.get_supported_tasks()
    for task, pipeline_class in _PIPELINES.items():
        if task not in known:
            PIPELINE_REGISTRY.register_pipeline(
                task, pipeline_class=pipeline_class, pt_model=AutoModel, type="multimodal"
            )


__all__ = [*(pipeline_class.__name__ for pipeline_class in _PIPELINES.values()), "register_pipelines"]
