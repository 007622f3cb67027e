"""Leases: one worker at a time, whatever becomes of the others."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from xlfa.study import leases
from xlfa.study.leases import LeaseLost, owner_of, take

LONG, SHORT = 1000.0, 0.6
ELSEWHERE = {"host": "other", "machine": ["other"], "pid": 1, "taken": "2026-01-01T00:00:00+00:00"}


def write_lease(folder, number=0, age=0.0, owner=ELSEWHERE):
    """What a worker of another machine left; its last sign of life is that many seconds old."""
    path = folder / "leases" / f"{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(owner) + "\n" if owner else "")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_cell_has_one_worker_until_it_is_released(tmp_path):
    with take(tmp_path, LONG):
        assert take(tmp_path, LONG) is None
        assert owner_of(tmp_path, LONG)["pid"] == os.getpid()
    assert owner_of(tmp_path, LONG) is None
    assert take(tmp_path, LONG).path.name == "1.json"


def test_a_cell_is_free_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), take(tmp_path, LONG):
        raise KeyboardInterrupt
    assert owner_of(tmp_path, LONG) is None


def test_the_cell_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path):
    code = f"from pathlib import Path; from xlfa.study.leases import take; take(Path({str(tmp_path)!r}), 1000.0)"
    process = subprocess.Popen([sys.executable, "-c", code])
    # Ended, but not waited for: its number is still taken.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert json.loads((tmp_path / "leases" / "0.json").read_text())["pid"] == process.pid
    assert owner_of(tmp_path, LONG) is None
    process.wait()
    assert take(tmp_path, LONG).path.name == "1.json"


def test_another_machines_worker_keeps_its_cell_while_it_lives(tmp_path):
    path = write_lease(tmp_path, age=LONG - 100)
    assert take(tmp_path, LONG) is None and owner_of(tmp_path, LONG) == ELSEWHERE
    os.utime(path, (time.time() - LONG - 100,) * 2)
    assert owner_of(tmp_path, LONG) is None
    assert take(tmp_path, LONG).path.name == "1.json"


def test_a_worker_that_was_killed_while_it_took_the_cell_loses_it_by_the_time_limit(tmp_path):
    write_lease(tmp_path, owner=None)
    assert take(tmp_path, LONG) is None and owner_of(tmp_path, LONG) == {}
    write_lease(tmp_path, owner=None, age=LONG + 100)
    assert take(tmp_path, LONG).path.name == "1.json"


def test_a_damaged_lease_counts_until_the_time_limit(tmp_path):
    write_lease(tmp_path).write_text("garbage\n")
    assert take(tmp_path, LONG) is None
    os.utime(tmp_path / "leases" / "0.json", (time.time() - LONG - 100,) * 2)
    assert take(tmp_path, LONG).path.name == "1.json"


def test_the_clock_is_that_of_the_file_system(tmp_path, monkeypatch):
    write_lease(tmp_path, age=LONG - 100)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert take(tmp_path, LONG) is None


def test_signs_of_life_keep_a_cell_beyond_the_time_limit(tmp_path):
    # A busy machine may hold up a sign by a second.
    limit = 3 * SHORT
    with take(tmp_path, limit) as lease:
        lease.path.write_text(json.dumps(ELSEWHERE) + "\n")
        time.sleep(1.5 * limit)
        assert take(tmp_path, limit) is None
        os.utime(lease.path, (0, 0))
        deadline = time.monotonic() + 60
        while not lease.path.stat().st_mtime:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_of_those_who_find_the_same_dead_owner_one_gets_the_cell(tmp_path, monkeypatch):
    write_lease(tmp_path, age=LONG + 100)
    judge = leases._read_owner
    others = []

    def judge_while_another_takes(path, seconds):
        monkeypatch.setattr(leases, "_read_owner", judge)
        others.append(take(tmp_path, LONG))
        return judge(path, seconds)

    monkeypatch.setattr(leases, "_read_owner", judge_while_another_takes)
    assert take(tmp_path, LONG) is None
    assert others[0].path.name == "1.json"


def test_a_worker_whose_cell_was_taken_over_is_interrupted_and_leaves_the_new_lease_alone(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), take(tmp_path, SHORT) as lease:
            new = write_lease(tmp_path, number=1)
            for _ in range(6000):
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert lease.lost
    with pytest.raises(LeaseLost, match="taken over"):
        lease.confirm()
    assert json.loads(new.read_text()) == ELSEWHERE and owner_of(tmp_path, LONG) == ELSEWHERE


def test_a_lost_cell_is_seen_before_its_result_is_written(tmp_path):
    lease = take(tmp_path, LONG)
    lease.confirm()
    write_lease(tmp_path, number=1)
    with pytest.raises(LeaseLost):
        lease.confirm()
