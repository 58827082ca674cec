"""Set-up that the tests of the search share: made once per session, because training and imports take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from search_examples import Prepared, Zygote, prepare, write_experiment

from nas.testing import requires_path


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Forks searches that have everything imported."""
    requires_path(Path("/proc/self"), "the process folder of Linux")
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="session")
def finished(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished mini run: `experiment.yaml`, `run`, `tables`, `cache`, `log`."""
    folder = tmp_path_factory.mktemp("finished")
    life = zygote.run(folder / "log", write_experiment(folder))
    assert life.code == 0, (folder / "log").read_text()
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Data, teacher's answers, latency table and supernet, in this process."""
    return prepare(tmp_path_factory.mktemp("prepared"))
