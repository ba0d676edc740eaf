"""Which kernel and which QEMU are used: the installed ones or those named; and what is said of their origin."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from cli_support import run, script

from guest_driver.qemu import QemuMachine, QemuOptions, find_qemu
from guest_driver.qemu.package import BINARIES, QEMU_ENVIRONMENT
from host_qemu_side.linux_guest.kernel import KERNEL_ENVIRONMENT, MODULES_ENVIRONMENT, GuestKernel, find_kernel
from vring import programs
from vring.errors import MissingFacility, UsageError
from vring.programs import Origin

MODULE = "kernel/drivers/virtio/virtio_balloon.ko"


def module(folder: Path, name: str = MODULE) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"module")
    return folder / name


# -- the guest's kernel -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_named")
def test_a_kernel_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are beside it as they would be installed, in a folder for each release, or in one of its own."""
    linux = script(tmp_path / "usr/bin/linux.uml", "echo 9.8.7-rc1")
    installed = module(tmp_path / "usr/lib/uml/modules/9.8.7-rc1")
    module(tmp_path / "usr/lib/uml/modules/9.8.6")
    assert find_kernel(linux) == GuestKernel(linux, installed, "9.8.7-rc1")
    of_its_own = module(tmp_path / "own")
    assert find_kernel(linux, tmp_path / "own").module == of_its_own
    releases = module(tmp_path / "all/9.8.7-rc1")
    module(tmp_path / "all/1.0")
    assert find_kernel(str(linux), str(tmp_path / "all")).module == releases
    assert find_kernel(linux).origin() == Origin("", None)

    monkeypatch.setenv(KERNEL_ENVIRONMENT, str(linux))
    assert find_kernel().module == installed
    monkeypatch.setenv(MODULES_ENVIRONMENT, str(tmp_path / "own"))
    assert find_kernel() == GuestKernel(linux, of_its_own, "9.8.7-rc1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KERNEL_ENVIRONMENT, "usr/bin/linux.uml")
    assert find_kernel(modules="all") == GuestKernel(linux, releases, "9.8.7-rc1")


@pytest.mark.usefixtures("nothing_named")
def test_kernels_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = script(tmp_path / "good", "echo 9.8.7")
    plain = tmp_path / "plain"
    plain.write_text("9.8.7")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    for wrong, error, says in (
        (tmp_path / "none", UsageError, "is not there: .*none"),
        (tmp_path, UsageError, "is not there"),
        (plain, UsageError, "not a program that can be executed: .*plain"),
        (broken, MissingFacility, "broken does not start: Exec format error"),
        (
            script(tmp_path / "loader", "echo GLIBC_2.99 not found >&2; exit 1"),
            MissingFacility,
            "start: GLIBC_2.99 not",
        ),
        (script(tmp_path / "silent", "exit 7"), MissingFacility, "does not start: exit code 7"),
        (script(tmp_path / "other", "echo GNU nothing 1.0"), MissingFacility, "is not User-Mode Linux.*GNU nothing"),
        (script(tmp_path / "slash", "echo 6.1/../../x"), MissingFacility, "is not User-Mode Linux"),
        (script(tmp_path / "long", f"echo 6.1{'a' * 5000}"), MissingFacility, "is not User-Mode Linux"),
        (tmp_path / ("a" * 300), UsageError, "is not there"),
        (good, MissingFacility, "no virtio_balloon.ko of Linux 9.8.7 under .*: name the folder of its modules"),
    ):
        with pytest.raises(error, match=says):
            find_kernel(wrong)
    monkeypatch.setattr(programs, "VERSION_TIMEOUT", 0.5)
    with pytest.raises(MissingFacility, match="hang --version does not end"):
        find_kernel(script(tmp_path / "hang", "sleep 20"))
    with pytest.raises(UsageError, match="modules is not there: '/nope'"):
        find_kernel(good, "/nope")
    module(tmp_path / "packed", f"{MODULE}.xz")
    with pytest.raises(MissingFacility, match="is compressed"):
        find_kernel(good, tmp_path / "packed")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--guest", "linux", "--linux", "/nope/linux"], 2, "/nope/linux"),
        (["--guest", "linux", "--linux", "/bin/true"], 3, "not User-Mode Linux"),
        (["--guest", "linux", "--modules", "/nope"], 2, "/nope"),
        (["--linux", "/bin/true"], 2, "--linux: it is for --guest linux"),
        (["--modules", "/usr"], 2, "--modules: it is for --guest linux"),
    ],
)
@pytest.mark.usefixtures("nothing_named")
def test_wrong_kernels_on_the_command_line(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = run("migrate", "--memory", "64M", "--work-dir", str(tmp_path), *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.uml
def test_a_wrong_value_in_the_environment_makes_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "BALLOON_LINUX_XSTATE": "yes"}
    done = run("migrate", "--guest", "linux", "--memory", "64M", "--work-dir", str(tmp_path), env=environment)
    assert done.returncode == 2
    assert "BALLOON_LINUX_XSTATE='yes' in the environment: it can be" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.uml
def test_a_copy_is_not_said_to_be_the_package(tmp_path: Path) -> None:
    """It is the file that ran of which something is said, not one of the same name elsewhere."""
    kernel = find_kernel()
    copy = Path(shutil.copy(kernel.path, tmp_path / "linux"))
    chosen = ["--guest", "linux", "--linux", str(copy), "--modules", str(kernel.module.parents[3])]
    command = ["migrate", "--memory", "128M", "--hints", "on", "--work-dir", str(tmp_path), *chosen]
    done = run(*command, "--json", timeout=120)
    assert done.returncode == 0, done.stderr
    linux = json.loads(done.stdout)["runs"][0]["linux"]
    assert (linux["kernel"], linux["module"]) == (str(copy), str(kernel.module))
    assert (linux["package"], linux["dpkg_verify_clean"]) == ("", None)
    assert linux["release"] == kernel.release
    shown = run(*command, timeout=120).stdout
    assert f"{copy}, Linux {kernel.release}, of no Debian package" in " ".join(shown.split())


# -- QEMU -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_named")
def test_a_qemu_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = script(tmp_path / "mine", "echo QEMU emulator version 99.0")
    both = {t: script(tmp_path / "folder" / name, f"echo QEMU {t}") for t, name in BINARIES.items()}
    for transport, path in both.items():
        assert find_qemu(transport, str(program)).path == str(program)
        found = find_qemu(transport, str(tmp_path / "folder"))
        assert (found.path, found.version) == (str(path), f"QEMU {transport}")
        assert (found.package, found.dpkg_verify_clean) == ("", None)
        monkeypatch.setenv(QEMU_ENVIRONMENT, str(tmp_path / "folder"))
        assert find_qemu(transport).path == str(path)
        monkeypatch.delenv(QEMU_ENVIRONMENT)
    for wrong, error, says in (
        (tmp_path / "none", UsageError, "no program that can be executed: .*none"),
        (tmp_path, UsageError, "a folder without qemu-system-x86_64"),
        (script(tmp_path / "other", "echo GNU nothing"), MissingFacility, "is not QEMU"),
        (
            script(tmp_path / "failing", "echo no such thing >&2; exit 1"),
            MissingFacility,
            "does not start: no such thing",
        ),
    ):
        with pytest.raises(error, match=says):
            find_qemu("pci", str(wrong))
    monkeypatch.chdir(tmp_path)  # a path, not a name to look for
    assert find_qemu("mmio", "mine").path == str(program)
    with pytest.raises(UsageError, match="no program that can be executed: 'sh'"):
        find_qemu("mmio", "sh")
    for command in ("drive", "compare"):
        done = run(command, "--memory", "64M", "--qemu", "/nope/qemu")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "/nope/qemu" in done.stderr


@pytest.mark.qemu
@pytest.mark.parametrize("transport", list(BINARIES))
def test_a_named_qemu_is_the_one_that_runs(tmp_path: Path, transport: str) -> None:
    real = find_qemu(transport).path
    marker = tmp_path / "ran"
    named = script(tmp_path / BINARIES[transport], f'echo "$@" >>{marker}\nexec {real} "$@"')
    with QemuMachine(QemuOptions(64 << 20, transport, qemu=str(tmp_path))) as machine:
        assert machine.binary.path == str(named)
        assert "virtio-balloon" in marker.read_text()
