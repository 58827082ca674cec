"""Changes of a board's power mode and clocks, made only when they are asked for, with `sudo -n` and no shell.

sudo never waits for a password: where it would, nothing is done and the answer has the command for a person. Each
change comes with the way back.
"""

import os
from typing import Any, Dict, List, Optional

from .errors import BoardError
from .state import RUN_TIMEOUT_S, Run, read_state, run_program

SET_TIMEOUT_S = 60.0


def change(
    set_mode: Optional[str], lock_clocks: bool, store: str, root: str = "/", run: Run = run_program
) -> Dict[str, Any]:
    """Sets the power mode, then locks the clocks, as far as asked for.

    Args:
        set_mode: name or id of a power mode of this board; None leaves it.
        lock_clocks: whether to pin all clocks to the highest of the mode.
        store: file into which the clocks go as they are now, for the way back.
        root: where `sys`, `proc` and `etc` lie.
        run: starts programs.

    Returns:
        ran: each command that was run, as a list of arguments. back: commands that undo it, in order. notes: lines for
        people. state: the record afterwards.

    Raises:
        BoardError: `bad_request`: no such mode; `unsupported`: it did not work, with what to do by hand.
    """
    state = read_state(root, run)
    told = {"ran": [], "back": [], "notes": []}  # type: Dict[str, Any]
    if set_mode is not None:
        _set_mode(told, state, set_mode, run)
        state = read_state(root, run)
    if lock_clocks:
        _lock(told, state, store, run)
        state = read_state(root, run)
    told["state"] = state
    return told


def mode_of(state: Dict[str, Any], wanted: str) -> Dict[str, Any]:
    """The power mode with this name or id.

    Raises:
        BoardError: there is none; the message lists them.
    """
    modes = state["power_modes"]
    if not modes:
        why = state["unknown"].get("power_modes", "/etc/nvpmodel.conf lists none")
        raise BoardError("unsupported", "this board has no power modes: %s" % why)
    for mode in modes:
        if wanted in (mode["name"], str(mode["id"])):
            return dict(mode)
    near = [mode for mode in modes if mode["name"].lower() == wanted.lower()]
    if len(near) == 1:
        return dict(near[0])
    known = ", ".join("%d=%s" % (mode["id"], mode["name"]) for mode in modes)
    raise BoardError("bad_request", "no power mode %r on this board; modes: %s" % (wanted, known))


def _set_mode(told: Dict[str, Any], state: Dict[str, Any], wanted: str, run: Run) -> None:
    mode = mode_of(state, wanted)
    now = state["power_mode"] or {}
    if now.get("id") == mode["id"]:
        told["notes"].append("the power mode is %s already: nothing was run" % mode["name"])
        return
    argv = ["sudo", "-n", "nvpmodel", "-m", str(mode["id"])]
    code, text = _run(told, argv, run)
    if "reboot" in text.lower():
        raise BoardError(
            "unsupported",
            "power mode %s needs a reboot, which is never done from here. On the board: sudo nvpmodel -m %d, and "
            "answer its question" % (mode["name"], mode["id"]),
        )
    if code != 0 or "NVPM ERROR" in text:
        raise _refused(argv, code, text)
    if now.get("id") is not None:
        told["back"].append("sudo nvpmodel -m %d" % now["id"])
    else:
        told["notes"].append("which power mode it had before could not be told, so there is no way back to name")
    told["notes"].append("the power mode is %s now; this unlocks clocks, and a boot may undo it" % mode["name"])


def _lock(told: Dict[str, Any], state: Dict[str, Any], store: str, run: Run) -> None:
    if state["clocks_locked"]:
        told["notes"].append("the clocks are locked already: nothing was run")
        return
    if os.path.lexists(store):  # what is there are clocks of an earlier time; --store would put these over them
        os.remove(store)
    for argv in (["sudo", "-n", "jetson_clocks", "--store", store], ["sudo", "-n", "jetson_clocks"]):
        code, text = _run(told, argv, run)
        if code != 0:
            raise _refused(argv, code, text)
    told["back"].insert(0, "sudo jetson_clocks --restore %s" % store)
    told["notes"].append("the clocks are locked to the highest of the power mode; a boot or another mode unlocks them")


def _run(told: Dict[str, Any], argv: List[str], run: Run) -> Any:
    told["ran"].append(argv)
    code, out, err = run(argv, max(SET_TIMEOUT_S, RUN_TIMEOUT_S))
    return code, out + "\n" + err


def _refused(argv: List[str], code: int, text: str) -> BoardError:
    by_hand = "sudo " + " ".join(argv[2:])
    if "password" in text or "terminal" in text:
        return BoardError(
            "unsupported",
            "sudo wants a password on this board, so nothing was changed. Log in there and run: %s" % by_hand,
        )
    last = next((line for line in reversed(text.split("\n")) if line.strip()), "nothing was printed")
    return BoardError("unsupported", "%s ended with %d: %s. Try on the board: %s" % (argv[2], code, last, by_hand))
