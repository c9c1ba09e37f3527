"""What an engine process counts of its dispatches."""

from __future__ import annotations


class DispatchStats:
    """Counters of one engine process, read by its metrics; plain numbers, one writer."""

    def __init__(self) -> None:
        self.dispatches = 0
        self.rows = 0
        self.nanoseconds = 0
        self.slowest_ns = 0
        """The longest dispatch of all."""
        self.slowest_table_ns = 0
        """The longest that taking up another table kept the engine from its next step."""
        self.lost = 0
        """Connections to hosts that ended."""
        self.late = 0
        """Answers that were late."""
        self.hedges = 0
        """Dispatches whose late rows were sent to another replica."""
        self.failovers = 0
        """Dispatches in which a lost host's rows were sent to another replica."""
        self.let_back = 0
        self.ejected = 0
        """Hosts of the table that are out now."""
        self.unanswered_rows = 0
        self.degraded_rows = 0
        self.capacity_coefficient = 0.0
        """What `cluster.capacity` has adapted it to; 0 where experts take any number of rows."""
        self.capacity_pairs = 0
        """Pairs of row and expert that a capacity was held against."""
        self.overflow_pairs = 0
        """Those of them that were over it."""
        self.overflow_rerouted_rows = 0
        self.overflow_dropped_rows = 0
        self.overflow_deferred_steps = 0
        """Steps that took fewer tokens than waited, for an overflow in the step before."""
        self.last_detect_ns = 0
        """`time.monotonic_ns` when a host was last found late or lost; 0 if never."""
        self.last_reroute_ns = 0
        """`time.monotonic_ns` when another replica last answered in such a host's place."""
