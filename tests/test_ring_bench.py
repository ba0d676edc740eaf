"""The ring benchmark runs, checks contents, and its report keeps its form; figures are judged elsewhere."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from balloon_cli._bench import ffi, lib
from balloon_cli.bench import bench, bench_ring

two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


@two
def test_report():
    seen = []
    report = bench_ring(buffers=4096, repeats=1, progress=lambda *a: seen.append(a))
    assert report["schema_version"] == 1
    assert [bar["name"] for bar in report["bars"]] == ["c_32 / reference", "python_128 / c_128"]
    assert all(case["ns"] > 0 for case in report["cases"].values())
    assert {"reference", "c_1", "c_32", "c_128", "python_1", "python_128", "c_same_32"} <= set(report["cases"])
    assert seen[-1][0] == seen[-1][1]
    assert report["line_round_trip_ns"] > 0


@two
def test_command():
    done = CliRunner().invoke(bench, ["ring", "--json", "--repeats", "1", "--buffers", "1024"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["repeats"] == 1
    done = CliRunner().invoke(bench, ["ring", "--repeats", "1", "--buffers", "1024"])
    assert "plain ring, C, two processes" in done.stdout
    assert "bar c_32 / reference <= 0.35" in done.stdout


@pytest.mark.parametrize("kind", [lib.BENCH_PLAIN, lib.BENCH_BATCHED])
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_sums(kind, batch):
    result = ffi.new("struct bench_result *")
    assert lib.bench_same_thread(kind, batch, 10_001, result) == 0
    assert (result.done, result.sum) == (10_001, result.expect)
    assert lib.bench_two_processes(kind, batch, 10_001, -1, -1, 30.0, result) == 0
    assert (result.done, result.sum) == (10_001, result.expect)


def test_bad_arguments():
    result = ffi.new("struct bench_result *")
    assert lib.bench_same_thread(0, 0, 1, result) < 0
    assert lib.bench_two_processes(0, 257, 1, -1, -1, 1.0, result) < 0
