"""Whether a board was slowed down while it measured, and how it gets cool again.

`Watch.look` is called after each round, outside any timed window, and says whether that round is marked: a counter of
over-current, under-voltage or throttling moved, the GPU ran below the frequency it is locked to, or a zone came close
to where the kernel slows it down. Marked rounds are measured again after `cool_down`; one that stays marked is kept as
unstable, never averaged in silently.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

from .state import NEAR_TRIP_C, near_trip, slow_clocks, snapshot, trips

COOL_MARGIN_C = 15.0  # below the lowest trip: far enough that a round does not reach it again at once
COOL_LIMIT_S = 300.0
COOL_STEP_S = 2.0

Snapshot = Callable[[], Dict[str, Any]]


def marks(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    """Why what was measured between two snapshots cannot be trusted; empty where it can.

    Args:
        before, after: from `state.snapshot` or `state.read_state`. `trip_c` is taken from the first one that has it.
    """
    result = []
    counted = before.get("throttle") or {}
    for name, value in sorted((after.get("throttle") or {}).items()):
        if value > counted.get(name, value):
            result.append("%s rose by %d" % (name, value - counted[name]))
    for name, level in sorted((after.get("cooling") or {}).items()):
        if level > (before.get("cooling") or {}).get(name, 0) or (level and "throttle" in name.lower()):
            result.append("%s slows the board down (state %d)" % (name, level))
    slow = slow_clocks(after.get("clocks") or {})
    if slow:
        result.append(slow)
    known = after if after.get("trip_c") else dict(after, trip_c=before.get("trip_c") or {})
    return result + near_trip(known, NEAR_TRIP_C)


class Watch(object):
    """Looks at the board between rounds and compares with the look before."""

    def __init__(self, root: str = "/", read: Optional[Snapshot] = None) -> None:
        """`root`: where `sys` and `proc` lie. `read` gives a snapshot; tests set it."""
        self._read = read or (lambda: snapshot(root))
        self._trips = trips(root)
        self._usual = dict(self._read().get("cooling") or {})
        self._before = self._taken()

    def begin(self) -> None:
        """Takes what there is now as the state before the next round: what happened meanwhile marks nothing."""
        self._before = self._taken()

    def look(self) -> Dict[str, Any]:
        """Facts of the round that just ended.

        Returns:
            throttled: whether the round is marked; throttled_why: reasons, empty where it is not.
            temperature_c: of the hottest zone, None where there is none. clock_mhz: of the GPU, else of the fastest
            core.
        """
        before, self._before = self._before, self._taken()
        why = marks(before, self._before)
        clocks = self._before["clocks"]
        clock_mhz = clocks["gpu_mhz"]
        if clock_mhz is None:
            clock_mhz = max(clocks["cpu_mhz"]) if clocks["cpu_mhz"] else None
        return {
            "throttled": bool(why),
            "throttled_why": "; ".join(why),
            "temperature_c": max(self._before["temperature_c"].values(), default=None),
            "clock_mhz": clock_mhz,
        }

    def cool_down(
        self,
        sleep: Callable[[float], None],
        progress: Callable[[str], None] = lambda _: None,
        limit_s: float = COOL_LIMIT_S,
        margin_c: float = COOL_MARGIN_C,
    ) -> float:
        """Waits until every zone is `margin_c` below its trip and nothing slows the board down; seconds waited.

        Ends after `limit_s` at the latest: the next round then shows whether it is still hot.

        Args:
            sleep: waits so many seconds.
            progress: told in a line what it waits for, once per look.
            limit_s: longest wait.
            margin_c: how far below the temperature at which the kernel slows the board down.
        """
        waited_s = 0.0
        while waited_s < limit_s:
            now = self._taken()
            hot = near_trip(now, margin_c)
            hot += ["%s is in state %d" % item for item in sorted(_above(now["cooling"], self._usual))]
            if not hot:
                break
            progress("cooling down for %.0f of at most %.0f s: %s" % (waited_s, limit_s, "; ".join(hot)))
            pause_s = min(COOL_STEP_S, limit_s - waited_s)
            sleep(pause_s)
            waited_s += pause_s
        self.begin()
        return waited_s

    def _taken(self) -> Dict[str, Any]:
        return dict(self._read(), trip_c=self._trips)


def _above(now: Dict[str, int], usual: Dict[str, int]) -> List[Tuple[str, int]]:
    """What slows the board down more than when the watch began."""
    return [(name, level) for name, level in now.items() if level > usual.get(name, 0)]
