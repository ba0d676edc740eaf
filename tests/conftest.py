"""Hypothesis profiles, the rule that CI skips nothing, and a fixture that several files use."""

from __future__ import annotations

import os
import random
import signal

import pytest
from hypothesis import HealthCheck, settings

from guest_driver.qemu.package import QEMU_ENVIRONMENT
from host_qemu_side.linux_guest.kernel import KERNEL_ENVIRONMENT, MODULES_ENVIRONMENT

IN_CI = bool(os.environ.get("CI"))
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci" if IN_CI else "dev")
SKIPPED_FILES: list[str] = []

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("dev", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(PROFILE)


@pytest.fixture
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says, the installed peers are meant."""
    for variable in (KERNEL_ENVIRONMENT, MODULES_ENVIRONMENT, QEMU_ENVIRONMENT):
        monkeypatch.delenv(variable, raising=False)


def pytest_configure(config: pytest.Config) -> None:
    """Where examples are random, draw the seed here, so that it can be printed and given again.

    A run in the background has Ctrl-C ignored, and so would the programs have that tests start and interrupt.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if PROFILE == "dev" and getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(1 << 32))


def pytest_report_header(config: pytest.Config) -> str:
    """Say which examples are drawn; with `--hypothesis-seed` they are drawn again."""
    seed = getattr(config.option, "hypothesis_seed", None)
    drawn = f"random, again with --hypothesis-seed={seed}" if PROFILE == "dev" else "the same every time"
    return f"hypothesis profile: {PROFILE} (examples are {drawn}); in CI a skipped test fails: {IN_CI}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI a test that was skipped is a test that failed: everything it needs has to be there."""
    outcome = yield
    report = outcome.get_result()
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and in CI nothing may be: {why}"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A whole file that skips itself counts as well."""
    if IN_CI and report.skipped:
        SKIPPED_FILES.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run for files that skipped themselves."""
    if SKIPPED_FILES and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which."""
    for name in SKIPPED_FILES:
        terminalreporter.write_line(f"{name} skipped itself, and in CI nothing may be skipped", red=True)
