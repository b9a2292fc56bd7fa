"""Files and folders that appear whole or not at all, and a disk that is full for real."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import file_limit, files
from safetensors.torch import save_file

from askewq import disk
from askewq.errors import DiskFullError, OutputError


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 kB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestAppearing:
    def test_what_is_written_appears_at_the_end(self, tmp_path):
        """Within the block the old content is there, after it the new one and nothing else."""
        path = tmp_path / "a.txt"
        disk.write(path, "old")
        with disk.appearing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert files(tmp_path) == {"a.txt"}

    def test_an_error_leaves_the_old_file(self, tmp_path):
        """A block that fails changes nothing and leaves nothing behind."""
        path = tmp_path / "a.txt"
        disk.write(path, "old")

        def fail():
            with disk.appearing(path) as partial:
                partial.write_text("new")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert path.read_text() == "old"
        assert files(tmp_path) == {"a.txt"}

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_those_may_read_it_whom_the_umask_lets(self, tmp_path, umask, mode):
        """Safetensors writes files for their owner alone; beside others those would be lost."""
        before = os.umask(umask)
        try:
            with disk.appearing(tmp_path / "a.safetensors") as partial:
                save_file({"x": torch.ones(3)}, partial)
                assert files(tmp_path) == {"a.safetensors.partial/a.safetensors"}
            with disk.appearing_folder(tmp_path / "b") as folder:
                (folder / "c").mkdir()
                save_file({"x": torch.ones(3)}, folder / "c" / "d.safetensors")
        finally:
            os.umask(before)
        for path in (tmp_path / "a.safetensors", tmp_path / "b" / "c" / "d.safetensors"):
            assert path.stat().st_mode & 0o777 == mode

    def test_what_a_killed_process_left_is_replaced(self, tmp_path):
        """Whatever it is called, for it lies in a folder of a known name."""
        (tmp_path / "a.partial").mkdir()
        (tmp_path / "a.partial" / ".tmpX").write_text("x")
        disk.write(tmp_path / "a", "new")
        assert files(tmp_path) == {"a"}

    def test_everything_is_synced_before_and_after_the_rename(self, tmp_path, monkeypatch):
        """First the content, then the name, then the folder of the name."""
        calls = []
        real_sync, real_rename, real_replace = os.fsync, os.rename, os.replace

        def sync(descriptor):
            name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            calls.append(name.removeprefix(str(tmp_path)))
            real_sync(descriptor)

        def renamed(real):
            def rename(source, target, **kwargs):
                calls.append("rename")
                real(source, target, **kwargs)

            return rename

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "rename", renamed(real_rename))
        monkeypatch.setattr(os, "replace", renamed(real_replace))
        disk.write(tmp_path / "a.txt", "x")
        assert calls == ["/a.txt.partial/a.txt", "rename", ""]
        calls.clear()
        (tmp_path / "b.partial").mkdir()
        (tmp_path / "b.partial" / "c").write_text("x")
        disk.publish(tmp_path / "b.partial", tmp_path / "b")
        assert calls == ["/b.partial/c", "/b.partial", "rename", ""]
        calls.clear()
        (tmp_path / "d.partial" / "e").mkdir(parents=True)
        (tmp_path / "d.partial" / "e" / "f").write_text("x")
        disk.publish(tmp_path / "d.partial", tmp_path / "d")
        assert {*calls[:-2]} == {"/d.partial/e/f", "/d.partial/e", "/d.partial"}

    def test_a_deleted_folder_is_gone_at_once(self, tmp_path, monkeypatch):
        """A deletion that is cut short leaves nothing under the folder's own name."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").write_text("x")

        def cut(path, *args, **kwargs):
            if path.is_dir():
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(disk.shutil, "rmtree", cut)
            with pytest.raises(KeyboardInterrupt):
                disk.delete(tmp_path / "a")
        assert files(tmp_path) == {"a.partial/x"}
        (tmp_path / "a").mkdir()
        disk.delete(tmp_path / "a")
        assert files(tmp_path) == set()
        assert not list(tmp_path.iterdir())

    def test_a_terminated_process_leaves_nothing(self, tmp_path):
        """A scheduler ends a job by SIGTERM: what was begun goes, with the folders made for it."""
        program = (
            "import sys, time, pathlib; from askewq import disk\n"
            "with disk.appearing_folder(pathlib.Path(sys.argv[1])) as partial:\n"
            "    (partial / 'half').write_text('x'); print('begun', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "new" / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            assert files(tmp_path)
            process.terminate()
            assert process.wait(20) == 143
        assert not list(tmp_path.iterdir())


class TestAlone:
    def test_one_at_a_time(self, tmp_path, monkeypatch):
        """The second one waits for workers that outlive a killed process, not for a run."""
        monkeypatch.setattr(disk, "_ORPHANS", 0.3)
        with disk.alone_in(tmp_path):
            with pytest.raises(OutputError, match="another run is writing to"):
                disk.alone_in(tmp_path).__enter__()
            orphan = os.fork()  # has the lock, too, but not for longer
            if orphan == 0:
                time.sleep(60)
                os._exit(0)
        try:
            with disk.alone_in(tmp_path):
                assert not files(tmp_path)
        finally:
            os.kill(orphan, signal.SIGKILL)
            os.waitpid(orphan, 0)

    def test_a_killed_process_is_in_no_folder(self, tmp_path):
        """Its lock goes with it."""
        program = "import os, sys, pathlib\nfrom askewq import disk\n"
        program += "with disk.alone_in(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
        assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == -9
        with disk.alone_in(tmp_path):
            pass

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        """There nothing is refused."""

        def flock(*_):
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(disk.fcntl, "flock", flock)
        with disk.alone_in(tmp_path), disk.alone_in(tmp_path):
            pass


class TestFullDisk:
    def write_weights(self, folder):
        """Write 80 kB as a checkpoint does."""
        with disk.room_for(80_000, folder, "Do this."), disk.appearing(folder / "w") as partial:
            save_file({"a": torch.zeros(20_000)}, partial)

    def write_text(self, folder):
        """Write 80 kB as a model card is written."""
        with disk.room_for(80_000, folder, "Do this."):
            disk.write(folder / "w", 80_000 * "x")

    @pytest.mark.parametrize("how", ["write_weights", "write_text"])
    def test_a_full_file_system(self, small_disk, how):
        """The message says how much is needed and free, and what to do; nothing is left behind."""
        (small_disk / "other").write_bytes(bytes(40_000))
        with pytest.raises(
            DiskFullError, match=r"80,000 bytes.*24,576 are free.*Do this\."
        ) as caught:
            getattr(self, how)(small_disk)
        assert "os error 28" in str(caught.value) or "Errno 28" in str(caught.value)
        assert files(small_disk) == {"other"}

    @pytest.mark.parametrize("how", ["write_weights", "write_text"])
    def test_a_limit_of_file_size(self, tmp_path, how):
        """A quota is reported as a full disk is."""
        with file_limit() as limit:
            limit(10_000)
            with pytest.raises(DiskFullError, match=r"80,000 bytes are needed.*Do this\."):
                getattr(self, how)(tmp_path)
        assert files(tmp_path) == set()

    @pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), OSError("?"), ValueError("no")])
    def test_other_errors_stay_what_they_are(self, tmp_path, error):
        """What has nothing to do with room is passed on."""
        with pytest.raises(type(error)) as caught, disk.room_for(1, tmp_path, ""):
            raise error
        assert caught.value is error


def test_sha256_is_that_of_the_tool(tmp_path):
    """The sum is the one that sha256sum prints, also of files larger than a piece."""
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 10_000)
    printed = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True)
    assert disk.sha256_of(path) == printed.stdout.split()[0]
