"""Planning in slot space: costs, sampling planners and model-predictive control."""

from .costs import RolloutCost, SlotGoalCost
from .mpc import MPCPlan, MPCPolicy, default_policy
from .planners import (
    CEMGDPlanner,
    CEMPlanner,
    ICEMPlanner,
    MPPIPlanner,
    PlannerOutput,
    default_planner,
    default_replanner,
    sampling_planner,
    sampling_replanner,
)

__all__ = [
    "CEMGDPlanner",
    "CEMPlanner",
    "ICEMPlanner",
    "MPCPlan",
    "MPCPolicy",
    "MPPIPlanner",
    "PlannerOutput",
    "RolloutCost",
    "SlotGoalCost",
    "default_planner",
    "default_policy",
    "default_replanner",
    "sampling_planner",
    "sampling_replanner",
]
