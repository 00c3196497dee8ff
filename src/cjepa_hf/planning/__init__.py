"""Planning in slot space: costs, sampling planners and model-predictive control."""

from .costs import RolloutCost, SlotGoalCost
from .mpc import MPCPlan, MPCPolicy, default_policy
from .planners import CEMPlanner, ICEMPlanner, MPPIPlanner, PlannerOutput, default_planner, default_replanner

__all__ = [
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
]
