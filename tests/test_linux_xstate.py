"""The preloaded ptrace that completes short writes of processor state: alone, and in place under a booting kernel."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import script

from host_qemu_side.linux_guest import LinuxGuest, initramfs, ptrace_xstate
from host_qemu_side.linux_guest.kernel import GuestKernel, find_kernel
from host_qemu_side.linux_guest.ptrace_xstate import KNOWN_BYTES, PtraceXstate, XstateCounts
from host_qemu_side.linux_guest.work_folder import compiled
from vring.errors import MissingFacility, PeerVanished, UsageError

MIB = 1 << 20
HERE = Path(ptrace_xstate.__file__).parent
uml = pytest.mark.uml

SHORT = 576
"""Legacy area and header: what follows, from the upper halves of the AVX registers on, is missing."""
WRITES = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import xstate_probe as probe
pid = probe.stopped_child()
def read():
    buffer = probe.ctypes.create_string_buffer(probe.LARGEST)
    error, size = probe.transfer(probe.PTRACE_GETREGSET, pid, buffer, probe.LARGEST)
    return error, bytes(buffer.raw[:size])
def write(data):
    buffer = probe.ctypes.create_string_buffer(bytes(data), len(data))
    return probe.transfer(probe.PTRACE_SETREGSET, pid, buffer, len(data))[0]
error, state = read()
full = bytearray(state)
full[512] |= 7  # x87, SSE and AVX are not in their initial state
full[160:176] = b"A" * 16  # XMM0
full[{SHORT}:{SHORT} + 16] = b"B" * 16  # the upper half of YMM0
whole = write(full)
before = read()[1]
longer = write(before[:-8])  # has all but the end: what follows must not be completed with what this one had
short = bytearray(before[:{SHORT}])
short[160:176] = b"C" * 16
refused = write(short)
after = read()[1]
text = lambda data, at: data[at:at + 16].strip(bytes(1)).decode()
print(error, len(state), whole, text(before, 160), text(before, {SHORT}) or "-", longer, refused, text(after, 160),
      text(after, {SHORT}) or "-")
os.kill(pid, signal.SIGKILL)
"""


def written(preload: PtraceXstate | None) -> list[str]:
    """Write the state of a stopped process whole, then short; return what came of it, in words."""
    done = subprocess.run(
        [sys.executable, "-c", WRITES],
        capture_output=True,
        text=True,
        env={**os.environ, **(preload.environment if preload else {})},
        pass_fds=preload.fds if preload else (),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, size, *words = done.stdout.split()
    assert error == "0"
    assert int(size) > SHORT, "this processor has no AVX"
    return words


@uml
def test_a_short_write_is_completed(tmp_path: Path) -> None:
    """The host refuses it; with the library it takes effect, and what was missing is in its initial state."""
    refused = str(errno.EFAULT)
    assert written(None) == ["0", "A" * 16, "B" * 16, refused, refused, "A" * 16, "B" * 16]
    preload = PtraceXstate(tmp_path)
    assert preload.counts == XstateCounts(0, 0)
    assert written(preload) == ["0", "A" * 16, "B" * 16, "0", "0", "C" * 16, "-"]
    # that it is traced is the child's call; three reads, a whole and two short writes are the parent's
    assert preload.counts == XstateCounts(calls=7, completed=2)
    preload.close()
    preload.close()


@uml
def test_what_the_host_accepts_is_tried() -> None:
    program = [sys.executable, "-I", "-S", str(HERE / "xstate_probe.py")]
    sizes = {}
    for short in (SHORT, KNOWN_BYTES, 1 << 16):
        said = subprocess.run([*program, str(short)], capture_output=True, text=True, check=True).stdout.split()
        sizes[short] = int(said[0])
        assert (said[1] == "0") == (short >= int(said[0])) or short == 1 << 16
    assert len(set(sizes.values())) == 1
    assert ptrace_xstate.host_takes_only_all() == (sizes[SHORT] > KNOWN_BYTES)


def test_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, wanted in (("always", True), ("never", False), ("auto", ptrace_xstate.host_takes_only_all())):
        monkeypatch.setenv(ptrace_xstate.ENVIRONMENT, said)
        assert ptrace_xstate.wanted() == wanted
    monkeypatch.setenv(ptrace_xstate.ENVIRONMENT, "yes")
    with pytest.raises(UsageError, match="auto, always or never"):
        ptrace_xstate.wanted()


# -- what is kept in the work folder ----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "x.c"
    path.write_text("int main(void) { return 0; }\n")
    return path


def another_user(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Give a file to somebody else; who may not do that becomes somebody else."""
    if os.geteuid() == 0:
        os.chown(path, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)


@pytest.mark.parametrize("planted", ["everybody's", "another user's", "link", "folder", "fifo"])
def test_a_file_that_others_may_have_put_there_is_not_used(
    tmp_path: Path, source: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept gets loaded and booted with this user's rights, and the folder may be one that is shared."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    data = compiled(source, [], cache)
    (made,) = cache.iterdir()
    assert compiled(source, [], cache) == data == made.read_bytes()
    if planted == "everybody's":
        made.chmod(0o666)
    elif planted == "another user's":
        another_user(monkeypatch, made)
        if os.geteuid() == 65534:
            monkeypatch.setattr("host_qemu_side.linux_guest.work_folder.own_folder", lambda folder: None)
    else:
        made.rename(tmp_path / "elsewhere")
        plant = {
            "link": lambda: made.symlink_to(tmp_path / "elsewhere"),
            "folder": made.mkdir,
            "fifo": lambda: os.mkfifo(made),
        }
        plant[planted]()
    with pytest.raises(UsageError, match="remove it, or name another work folder"):
        compiled(source, [], cache)


@pytest.mark.uml
def test_an_initramfs_that_others_may_have_put_there_is_not_booted(tmp_path: Path) -> None:
    made = initramfs.build(tmp_path)
    assert initramfs.build(tmp_path) == made
    made.chmod(0o666)
    with pytest.raises(UsageError, match=rf"{made.name} may be another user's"):
        LinuxGuest(128 * MIB, tmp_path)


@pytest.mark.parametrize("folder", ["everybody's", "another user's", "another group's"])
def test_a_folder_that_others_can_change_is_not_used(
    tmp_path: Path, source: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if folder == "everybody's":
        cache.chmod(0o777)
    elif folder == "another user's":
        another_user(monkeypatch, cache)
    else:
        cache.chmod(0o770)
        assert compiled(source, [], cache)  # Debian gives each user a group
        monkeypatch.setattr(os, "getegid", lambda: 65534)
        if os.geteuid() == 0:
            os.chown(cache, -1, 65533)
    with pytest.raises(UsageError, match="other users can change what is kept in"):
        compiled(source, [], cache)


def test_a_compiler_that_is_missing_or_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.c").write_text("#error no such luck\n")
    work = tmp_path / "work"
    with pytest.raises(MissingFacility, match=r"does not compile x\.c with -static .*no such luck"):
        compiled(tmp_path / "x.c", ["-static"], work)
    (tmp_path / "x.c").write_text("int main(void) { return 0; }\n")
    for said, says in (
        ("true", r"bin/true does not compile x\.c with -shared .*it ended with code 0"),
        ("false", "it ended with code 1"),
        ('gcc "', "CC in the environment is no command: No closing quotation"),
        ("/nope/cc -m64", "CC in the environment says '/nope/cc -m64', and there is no /nope/cc"),
    ):
        monkeypatch.setenv("CC", said)
        with pytest.raises(MissingFacility, match=says):
            compiled(tmp_path / "x.c", ["-shared"], work)
    assert list(work.iterdir()) == []
    monkeypatch.setenv("CC", "gcc -DX=1")
    assert compiled(tmp_path / "x.c", [], work)
    monkeypatch.delenv("CC")
    assert compiled(tmp_path / "x.c", [], work)
    assert len(list(work.iterdir())) == 2, "what another compiler made is not taken"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingFacility, match="apt install --no-install-recommends gcc"):
        compiled(tmp_path / "x.c", ["-static"], work)


# -- under a kernel ---------------------------------------------------------------------------------------------------

LOOP = "awk 'BEGIN { x = {}; for (i = 0; i < 300000; i++) x = (x * 1.0000001 + i / 3) / 1.00001; printf \"%.12e\", x }'"


@uml
def test_a_boot_with_it_forced(tmp_path: Path) -> None:
    """On any machine, from a folder whose name has a space: it is in place, and programs keep their registers."""
    with LinuxGuest(128 * MIB, tmp_path / "work folder", complete_xstate=True) as guest:
        guest.wait_ready(60.0)
        booted = guest.xstate_counts
        assert booted is not None
        assert booted.calls > 1000
        # Kernels since 6.13 write all of it themselves, also where the host wants all.
        assert not booted.completed or ptrace_xstate.host_takes_only_all()
        alone = [guest.run(LOOP.replace("{}", str(seed), 1)).output for seed in (1, 2)]
        assert alone[0] != alone[1]
        both = " & ".join(f"{LOOP.replace('{}', str(seed), 1)} >/tmp/{seed}" for seed in (1, 2))
        guest.run(f"{both} & wait")
        assert [guest.run(f"cat /tmp/{seed}").output for seed in (1, 2)] == alone
        counts = guest.xstate_counts
        assert counts.calls > booted.calls
    assert guest.xstate_counts is None


@uml
def test_a_boot_without_it(tmp_path: Path) -> None:
    """Where the host does not need it all is well, and an old kernel's error says why it ended elsewhere."""
    with LinuxGuest(128 * MIB, tmp_path, complete_xstate=False) as guest:
        ended = ""
        try:
            guest.wait_ready(60.0)
            assert guest.run("echo alive").output == "alive\n"
        except PeerVanished as error:
            ended = str(error)
        if ended:
            assert ptrace_xstate.host_takes_only_all()
            assert f"ptrace set fp regs failed, errno = {errno.EFAULT}" in ended
            assert "Kernel panic" in ended
        assert guest.xstate_counts is None


@uml
def test_preloaded_and_never_called_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says it is in place is its counter, nothing else."""
    real = PtraceXstate.environment.fget
    monkeypatch.setattr(PtraceXstate, "environment", property(lambda self: {"LD_PRELOAD": real(self)["LD_PRELOAD"]}))
    with LinuxGuest(128 * MIB, tmp_path, complete_xstate=True) as guest, pytest.raises(MissingFacility, match="called"):
        guest.wait_ready(60.0)


@uml
def test_a_program_that_ignores_it_is_named_also_if_it_does_not_boot(tmp_path: Path) -> None:
    """A setuid program is not preloaded into, for instance: on a host that needs it the guest panics."""
    real = find_kernel()
    bare = script(tmp_path / "bare", 'echo "Checking that ptrace can change system call numbers...OK"')
    kernel = GuestKernel(bare, real.module, real.release)
    with (
        LinuxGuest(128 * MIB, tmp_path / "w", kernel=kernel, complete_xstate=True) as guest,
        pytest.raises(MissingFacility, match=r"bare, but is not called.*gone during boot"),
    ):
        guest.wait_ready(60.0)


@uml
def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Descriptors run out at each step in turn."""
    guest = LinuxGuest(128 * MIB, tmp_path / "work", complete_xstate=True)
    PtraceXstate(guest.workdir).close()
    kept = set(guest.workdir.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    room = os.dup(0)
    os.close(room)
    failed = 0
    try:
        for more in range(soft - room):
            resource.setrlimit(resource.RLIMIT_NOFILE, (room + more, hard))
            try:
                guest.start()
                break
            except OSError:
                failed += 1
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert set(guest.workdir.iterdir()) == kept
                assert len(os.listdir("/proc/self/fd")) == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        guest.kill()
    assert failed >= 6
    assert set(guest.workdir.iterdir()) == kept
