"""The tables in results/: nothing in them is typed by hand."""
import json
import shutil

import pytest
from conftest import ROOT, assert_one_sentence, make_category, run, save_vit, tiny_vit

from results.report import cell, table


def result(category, seed, auroc, **changes):
    values = {"dataset": "mvtec", "category": category, "seed": seed, "auroc": auroc, "auroc_score_d": auroc - 1, "auroc_score_a": 70.0,
              "auroc_score_a_teacher": 60.0, "pixel_auroc": None, "au_pro": None, "steps": 1643, "teacher": "t", "teacher_sha256": "0",
              "trained": {"command": f"python train.py --seed {seed}", "commit": "abc", "device": "cpu", "date": "2026-11-23T00:00:00"},
              "command": "python evaluate.py", "commit": "def", "device": "cpu", "date": "2026-11-24T00:00:00", "versions": {"torch": "2.15.0"}}
    return {**values, **changes}


def rows(text):
    return {cells[0]: cells[1:] for line in text.splitlines() if line.startswith("| ") for cells in [[c.strip() for c in line.strip("| ").split(" | ")]]}


def test_the_table_means_over_seeds_then_over_categories():
    text = table([result("bottle", 0, 90.0), result("bottle", 1, 100.0), result("pill", 0, 65.0)])
    found = rows(text)
    assert list(found)[1:16] == "bottle hazelnut capsule metal_nut leather pill wood carpet tile grid cable transistor toothbrush screw zipper".split()
    assert found["bottle"] == ["100.0", "95.00 ± 7.07", "94.00 ± 7.07", "70.00 ± 0.00", "60.00 ± 0.00", "0, 1", "1643"]
    assert found["pill"][:2] == ["88.1", "65.00"] and found["hazelnut"][:2] == ["96.4", "not yet run"]
    assert found["mean of 2"][:3] == ["94.05", "80.00", "79.00"]  # of bottle and pill, ours and the paper's
    assert "| `python train.py --seed 1` | abc | cpu | 2.15.0 | 2026-11-23 |\n| `python evaluate.py` | def | cpu | 2.15.0 | 2026-11-24 |\n" in text
    assert "pixels" not in text and "pixels" in table([result("bottle", 0, 90.0, pixel_auroc=95.0, au_pro=80.0)])


def test_cell():
    assert cell([]) == "" and cell([None]) == "" and cell([99.756]) == "99.76" and cell([1.0, 2.0, 3.0]) == "2.00 ± 1.00"


FOLDERS = sorted(path for path in (ROOT / "results").glob("*/*/") if list(path.glob("*.json")))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_tables_follow_from_the_results_beside_them(folder):
    assert folder.with_suffix(".md").read_text() == table([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])


def test_a_report_scores_what_has_no_result_and_one_broken_run_stops_no_other(tmp_path):
    make_category(tmp_path / "own", train=4)
    save_vit(tiny_vit(), tmp_path / "teacher.safetensors")
    command = ("--dataset", "folder", "--data-root", "own", "--weights", "teacher.safetensors", "--epochs", 1)
    process = run(ROOT / "train.py", *command, "--seeds", "0,1", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    model = tmp_path / "runs/folder/own/seed1/model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-50])
    process = run(ROOT / "evaluate.py", "--report", "out", cwd=tmp_path)
    assert process.returncode == 2 and "mean" in process.stdout and (tmp_path / "runs/folder/own/seed0/result.json").exists()
    assert "seed1/model.safetensors" in process.stderr and process.stderr.endswith("1 of 2 runs could not be scored, for the reasons above\n")
    model.write_bytes(whole)
    result = json.loads((tmp_path / "runs/folder/own/seed0/result.json").read_text())
    process = run(ROOT / "results/anatomy.py", "runs/folder/own/seed0", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = rows(process.stdout)
    for name, key in (("S_D + S_A (Eq. 10)", "auroc"), ("S_D", "auroc_score_d"), ("S_D with k = 20", "auroc_score_d"), ("S_A", "auroc_score_a")):
        assert found[name] == [f"{result[key]:.2f}"], name
    process = run(ROOT / "evaluate.py", "--report", "out", cwd=tmp_path)
    assert process.returncode == 0 and "table: out/folder.md" in process.stdout, process.stderr
    assert process.stdout.count("own seed") == 1  # seed 0 was not scored again
    text = (tmp_path / "out/folder.md").read_text()
    assert rows(text)["own"][-2:] == ["0, 1", "1"] and sorted(path.name for path in (tmp_path / "out/folder").iterdir()) == ["own_seed0.json", "own_seed1.json"]
    again = run(ROOT / "evaluate.py", "--report", "out", cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "out/folder.md").read_text() == text

    shutil.copytree(tmp_path / "runs", tmp_path / "others/runs")
    path = tmp_path / "others/runs/folder/own/seed0/result.json"
    path.write_text(path.read_text().replace('"teacher_sha256": "', '"teacher_sha256": "0'))
    assert_one_sentence(run(ROOT / "evaluate.py", "--out", "others", "--report", "out", cwd=tmp_path), "expected the results of one teacher")
