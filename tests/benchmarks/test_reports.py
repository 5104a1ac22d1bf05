"""Reports: they survive JSON, a planted regression is found, a plot is drawn."""

import copy
from pathlib import Path

import pytest

from fastseq_benchmarks import plot, report, results
from fastseq_benchmarks.results import CaseResult, Report, RivalResult, Table
from fastseq_benchmarks.stats import Estimate


def around(value: float) -> Estimate:
    return Estimate(value, value * 0.98, value * 1.02)


def sample_report() -> Report:
    peer = RivalResult("peer", "", True, 1e-3, around(1e-1), around(1.0), around(0.01), 3341, 5_000_000, 9_000_000)
    ours = RivalResult("ours", "", True, 1e-7, around(1e-3), around(100.0), around(0.6), 9, 150_000, 160_000)
    wrong = RivalResult("wrong", "wrong: error 1.0e+00, allowed 1.0e-04", False, 1.0)
    probe = RivalResult("probe", seconds=around(2e-5))
    case = CaseResult("crf", "loss", "B,T,K", "32,64,9", "float32", "cpu", "peer", 20, around(1.0), True, 1e11)
    case.goals = {"ours": 90.0}
    case.rivals = [peer, ours, wrong, probe]
    return Report({"cpu": "some", "cores": 2}, {"quick": True}, [case], [Table("t", ["a"], [["1"]])])


def slowed(times: float) -> Report:
    new = copy.deepcopy(sample_report())
    ours = new.cases[0].rivals[1]
    ours.seconds, ours.speedup = around(1e-3 * times), around(100.0 / times)
    return new


def verdicts(old: Report, new: Report) -> tuple[dict[str, str], int]:
    table, regressions = report.compare(old, new)
    return {row[1]: row[-1] for row in table.rows}, regressions


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    results.save(sample_report(), path)
    assert results.load(path) == sample_report()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "machine": {}}'])
def test_a_file_that_is_no_report_gets_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a report of fastseq bench"):
        results.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        results.load(tmp_path / "absent.json")


def test_equal_runs_have_no_regression() -> None:
    words, regressions = verdicts(sample_report(), sample_report())
    assert regressions == 0
    assert words["ours"] == "same"


def test_a_planted_regression_is_flagged() -> None:
    words, regressions = verdicts(sample_report(), slowed(1.3))
    assert words["ours"] == "REGRESSION: slower"
    assert regressions == 1
    assert verdicts(sample_report(), slowed(0.7))[0]["ours"] == "faster"


def test_a_busier_machine_is_no_regression() -> None:
    busy = slowed(1.0)
    for rival in busy.cases[0].rivals[:2]:
        assert rival.seconds is not None
        rival.seconds = around(3 * rival.seconds.median)
    assert verdicts(sample_report(), busy)[1] == 0


def test_a_run_that_is_not_judged_flags_no_time() -> None:
    new = slowed(2.0)
    new.cases[0].judged = False
    assert verdicts(sample_report(), new) == (
        {"peer": "not judged", "ours": "not judged", "probe": "not judged", "wrong": "not timed in both"},
        0,
    )


def test_a_refused_result_and_more_operators_are_regressions() -> None:
    new = slowed(1.0)
    new.cases[0].rivals[1].ops = 10
    assert verdicts(sample_report(), new)[0]["ours"] == "REGRESSION: ops 9 -> 10"
    new.cases[0].rivals[1].matches = False
    assert verdicts(sample_report(), new)[0]["ours"] == "REGRESSION: its result is refused"


def test_the_table_says_what_was_refused_and_which_goal_was_met() -> None:
    case = sample_report().cases[0]
    rows = {row[0]: row for row in report.case_table(case).rows}
    assert rows["wrong"][1].startswith("NO")
    assert rows["ours"][4] == "90x met"
    assert rows["probe"][1] == "probe"
    case.judged = False
    assert "NOT JUDGED" in report.case_table(case).title
    assert report.case_table(case).rows[1][4] == "90x not judged"


def test_on_a_gpu_the_table_has_bandwidth_and_launches() -> None:
    case = sample_report().cases[0]
    case.device, case.copy_bytes_per_s, case.traffic_bytes = "cuda", 3e12, 2e9
    ours = case.rivals[1]
    ours.copy_share, ours.kernels, ours.launches, ours.waits = around(0.25), 4, 3, 0
    table = report.case_table(case)
    assert table.title.endswith("copy 3000 GB/s")
    assert dict(zip(table.columns[-4:], table.rows[1][-4:], strict=True)) == {
        "GB/s (of a copy)": "2000 (25.0 %)",
        "kernels": "4",
        "launches": "3",
        "waits": "0",
    }
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_more_kernels_and_waits_are_regressions() -> None:
    old, new = slowed(1.0), slowed(1.0)
    old.cases[0].rivals[1].kernels, new.cases[0].rivals[1].kernels = 3, 4
    assert verdicts(old, new)[0]["ours"] == "REGRESSION: kernels 3 -> 4"
    old.cases[0].rivals[1].waits, new.cases[0].rivals[1].waits, new.cases[0].rivals[1].kernels = 0, 1, 3
    assert verdicts(old, new)[0]["ours"] == "REGRESSION: waits 0 -> 1"


def test_a_report_of_an_earlier_version_is_read() -> None:
    committed = Path(__file__).parents[2] / "benchmarks" / "results" / "crf-cpu.json"
    assert results.load(committed).cases[0].rivals[0].kernels is None


def test_plain_and_rich_tables_print(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report.print_table(report.case_table(sample_report().cases[0]))
    monkeypatch.setenv("COLUMNS", "300")
    report.print_table(report.case_table(sample_report().cases[0]))
    assert capsys.readouterr().out.count("3,341") == 2


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_plot(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    plot.draw(sample_report(), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000


def test_plot_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"svg or \.png"):
        plot.draw(sample_report(), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw(Report({}, {}), tmp_path / "a.svg")
