"""Hooks that any run can have."""

from collections.abc import Sequence
from typing import Any

from convscope.core.config import to_dict
from convscope.core.tracking import TrackerName, open_trackers
from convscope.core.training.config import Hook, LoopState


class TrackingHook(Hook):
    """Copies each logged line to TensorBoard or Weights & Biases.

    Args:
        names: which of them.
        config: the run's settings, shown beside the curves.
    """

    def __init__(self, names: Sequence[TrackerName], config: Any) -> None:
        self.names, self.config = names, config

    def start(self, state: LoopState) -> None:
        """Open the trackers, once the run directory is this process's own."""
        self.trackers = open_trackers(self.names, state.run.path, to_dict(self.config))

    def after_step(self, state: LoopState) -> None:
        """Pass on a logged line."""
        if state.logged:
            for tracker in self.trackers:
                tracker.log(state.step, state.logged)

    def finish(self, state: LoopState) -> None:
        """Write what is pending."""
        for tracker in self.trackers:
            tracker.close()
