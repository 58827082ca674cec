import pytest

from nas.core.errors import ConfigError
from nas.core.jsonio import from_plain, to_plain
from nas.train.settings import DistillSettings, TeacherSettings


def test_defaults_are_valid_and_survive_json() -> None:
    for settings in (TeacherSettings(), DistillSettings()):
        assert from_plain(type(settings), to_plain(settings), "x") == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "distill.epochs: must be at least 1, got 0"),
        ({"batch_size": 1}, "distill.batch_size: must be at least 2, got 1"),
        ({"lr": 0.0}, "distill.lr: must be above 0, got 0.0"),
        ({"lr": float("nan")}, "distill.lr: must be above 0, got nan"),
        ({"temperature": float("inf")}, "distill.temperature: must be above 0, got inf"),
        ({"alpha": 1.5}, "distill.alpha: must be from 0 to 1, got 1.5"),
        ({"ema": 1.0}, "distill.ema: must be 0 or more and below 1, got 1.0"),
        ({"weight_decay": -1.0}, "distill.weight_decay: must be 0 or more, got -1.0"),
        ({"exit_weights": (0.5, -0.1)}, "distill.exit_weights: must be 0 or more"),
    ],
)
def test_impossible_distillation_settings_say_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        DistillSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "onnx"}, "teacher.weights: a teacher of kind 'onnx' needs the path"),
        ({"kind": "torchvision", "weights": "w.safetensors"}, "needs the name of the model"),
        ({"widths": ()}, "teacher.widths: at least one width"),
        ({"resolution": 4}, "teacher.resolution: must be at least 8 pixels, got 4"),
        ({"label_smoothing": 1.0}, "teacher.label_smoothing: must be from 0 to 0.999, got 1.0"),
    ],
)
def test_impossible_teacher_settings_say_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        TeacherSettings(**values)  # type: ignore[arg-type]
