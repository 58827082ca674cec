"""Energy of an inference, from the power sensors that a board has: sampled by a thread while models run.

Energy is the power of the whole board over a window, divided by the inferences in it: what a battery gives, the idle
board included. It is never computed from anything but a sensor; a board without one gives None.

Source of the rails to take: jetson_stats (jtop/core/power.py). VDD_IN (TX2, Xavier NX, Orin Nano and NX) and POM_5V_IN
(Nano) measure all of a module; AGX Xavier, AGX Orin and Thor have no such rail, and the sum of theirs is approximate.
"""

import bisect
import statistics
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from .state import read_rails

TOTALS = ("VDD_IN", "POM_5V_IN")
INTERVAL_S = 0.02
LEAST_SAMPLES = 4  # in a window; the sensors themselves average over milliseconds


def total_power(rails: List[Dict[str, Any]]) -> Tuple[Optional[float], bool]:
    """Power of the board in milliwatt (None where there is no sensor), and whether it is one rail that measures all.

    Args:
        rails: from `state.read_rails`.
    """
    for rail in rails:
        if rail["name"] in TOTALS:
            return float(rail["mw"]), True
    return (float(sum(rail["mw"] for rail in rails)), False) if rails else (None, False)


class PowerSampler(object):
    """Reads the sensors in a thread from `start` to `stop`. Where there are none, nothing is started."""

    def __init__(
        self,
        root: str = "/",
        interval_s: float = INTERVAL_S,
        read: Optional[Callable[[], List[Dict[str, Any]]]] = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`read` gives the rails and `clock` the seconds that windows are given in; tests set them."""
        self._read = read or (lambda: read_rails(root))
        self._interval_s = interval_s
        self._clock = clock
        self._seconds = []  # type: List[float]
        self._milliwatt = []  # type: List[float]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = None  # type: Optional[threading.Thread]
        power, self.is_whole_board = total_power(self._read())
        self.has_sensor = power is not None

    def start(self) -> None:
        """Begins to read; nothing happens without a sensor."""
        if self.has_sensor and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what was read stays."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join()

    def take(self) -> None:
        """One reading now."""
        power, _ = total_power(self._read())
        if power is not None:
            with self._lock:
                self._seconds.append(self._clock())
                self._milliwatt.append(power)

    def window(self, began_s: float, ended_s: float) -> Tuple[Optional[float], int]:
        """Mean power in milliwatt within a window, and the readings it comes from; None with too few of them."""
        with self._lock:
            first = bisect.bisect_left(self._seconds, began_s)
            last = bisect.bisect_right(self._seconds, ended_s)
            values = self._milliwatt[first:last]
        if len(values) < LEAST_SAMPLES:
            return None, len(values)
        return sum(values) / len(values), len(values)

    def energy_mj(self, began_s: float, ended_s: float, runs: int) -> Optional[float]:
        """Millijoule of one inference; None where the window has too few readings.

        Args:
            began_s, ended_s: on the sampler's clock, while nothing but the runs went on.
            runs: inferences in the window.
        """
        power_mw, _ = self.window(began_s, ended_s)
        if power_mw is None or runs < 1 or ended_s <= began_s:
            return None
        return power_mw * (ended_s - began_s) / runs

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.take()


def of_rounds(energies: List[Optional[float]]) -> Optional[Dict[str, float]]:
    """Median and spread of the rounds' energies: `{"mj", "std_mj", "rounds"}`; None where no round has one.

    The spread is 1.4826 times the median deviation from the median, which is the standard deviation of a normal
    distribution and does not follow one odd round. It is 0 for a single round.
    """
    values = [v for v in energies if v is not None]
    if not values:
        return None
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(v - middle) for v in values)
    return {"mj": middle, "std_mj": spread, "rounds": float(len(values))}
