"""`-p tests.forks --forks N`: tests are collected once, and run by as many forks of the process that did.

Collecting imports torch, transformers, Ray and all that is tested. Each of xdist's workers would do so by itself, and
there could be no more of them than cores; with one more than cores, somebody computes while others wait.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from itertools import groupby
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

# Tests of a file share what is made for its module, so they go together; not all, or the last would be waited for.
_TOGETHER = 20
_NUMBER = 4
"""Bytes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--forks", type=int, default=1, metavar="N", help="run tests in N forks of this process")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    # Whoever has asked CUDA for its devices, as collecting does, has forks that can't use them.
    gpu = Path("/dev/nvidiactl").exists()
    if session.config.option.forks < 2 or session.config.option.collectonly or session.testsfailed or gpu:
        return None
    chunks = list(_chunks(session.items))
    # All forks read from one pipe which is theirs to run next.
    work, numbers = os.pipe()
    os.set_blocking(numbers, False)  # more than it holds is an error, and no standstill
    waiting = b"".join(number.to_bytes(_NUMBER, "big") for number in range(len(chunks)))
    assert os.write(numbers, waiting) == len(waiting)
    os.close(numbers)
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one folder for all of them
    forks = [_Fork(session, work, chunks) for _ in range(session.config.option.forks)]
    try:
        while living := [fork for fork in forks if fork.reports is not None]:
            ready = wait([fork.reports for fork in living if fork.reports is not None])
            for fork in living:
                if fork.reports in ready:
                    fork.tell(session.config)
            if session.shouldfail or session.shouldstop:
                while os.read(work, 1 << 16):
                    pass  # what nobody has begun
    finally:
        os.close(work)
        for fork in forks:
            fork.end()
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True


def _chunks(items: Iterable[pytest.Item]) -> Iterator[list[pytest.Item]]:
    for _, of_file in groupby(items, lambda item: item.path):
        together = list(of_file)
        yield from (together[first : first + _TOGETHER] for first in range(0, len(together), _TOGETHER))


class _Fork:
    """A child, as its parent sees it: what it tells, and the test that it runs."""

    def __init__(self, session: pytest.Session, work: int, chunks: list[list[pytest.Item]]) -> None:
        ours, theirs = Pipe(duplex=False)
        self.reports: Connection | None = ours
        self._running: tuple[str, Any] = ("", ("", None, ""))
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                ours.close()
                _run(session, theirs, _taken(work, chunks))
                code = 0
            finally:
                # Without what is to be done once, at the parent's exit.
                os._exit(code)
        theirs.close()

    def tell(self, config: pytest.Config) -> None:
        """Pass on what has come, or that the fork died in the middle of a test."""
        assert self.reports is not None
        try:
            what, value = self.reports.recv()
        except EOFError:
            self.reports.close()
            self.reports = None
            if self._running[0]:
                config.hook.pytest_runtest_logreport(report=_crashed(*self._running))
            return
        if what == "begins":
            self._running = value
        elif what == "ends":
            config.hook.pytest_runtest_logfinish(nodeid=self._running[0], location=self._running[1])
            self._running = ("", ("", None, ""))
        elif what == "warning":
            message, *told = value
            found = warnings.WarningMessage(*message)
            config.hook.pytest_warning_recorded.call_historic(
                kwargs=dict(zip(("when", "nodeid", "location"), told, strict=True), warning_message=found)
            )
        else:
            report = config.hook.pytest_report_from_serializable(config=config, data=value)
            config.hook.pytest_runtest_logreport(report=report)

    def end(self) -> None:
        if self.reports is not None:
            os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)


def _crashed(test: str, location: Any) -> pytest.TestReport:
    why = "the process died that ran it, and others behind it may not have been run"
    return pytest.TestReport(test, location, {}, "failed", why, "call")


def _taken(work: int, chunks: list[list[pytest.Item]]) -> Iterator[pytest.Item]:
    while number := os.read(work, _NUMBER):
        yield from chunks[int.from_bytes(number, "big")]


def _run(session: pytest.Session, reports: Connection, items: Iterator[pytest.Item]) -> None:
    """The child's whole life."""
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(teller := _Teller(session.config, reports))
    teller.begun = True
    # Files of its own for what tests print.
    capture: Any = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    capture.suspend_global_capture()
    item = next(items, None)
    while item is not None:
        # What the next one shares with it stays.
        following = next(items, None)
        reports.send(("begins", (item.nodeid, item.location)))
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        reports.send(("ends", None))
        item = following


class _Teller:
    def __init__(self, config: pytest.Config, reports: Connection) -> None:
        self._config, self._reports = config, reports
        # Whoever is registered late is told again of warnings that were before.
        self.begun = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._reports.send(("report", data))

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        one = warning_message
        message = str(one.message), one.category, one.filename, one.lineno
        if self.begun:
            self._reports.send(("warning", (message, when, nodeid, location)))
