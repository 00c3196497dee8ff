"""Physics simulators with recorded contacts, and their frames."""

import gymnasium


def register_envs() -> None:
    """Register the Gymnasium ids of this package (`cjepa_hf/PushT-v0`); calling it again changes nothing."""
    if "cjepa_hf/PushT-v0" not in gymnasium.registry:
        gymnasium.register("cjepa_hf/PushT-v0", entry_point="cjepa_hf.simulators.push_t:PushTEnv")
