"""A run leaves no trace in its process, and depends on no locale."""

import ast
import os
import runpy
import shlex
import shutil
import subprocess
import sys

import arguments
import checkpoints
import common
import part1_baseline
import part2_robustness
import part3_augmented
import part4_angular
import report
import storage

import pytest
from conftest import META

from .conftest import PARTS, ROOT, on_tree, read, script, write_tree

# ---- after main ---------------------------------------------------------------------------------


def other_process_takes(folder, names):
    """Whether another process gets all these locks."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import checkpoints\n"
            "for name in sys.argv[3:]: checkpoints.lock(sys.argv[2], name)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(folder), *names], text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return True


@pytest.mark.parametrize("ending", ["returns", "is refused", "raises", "is interrupted"])
def test_no_claim_is_held_after_main(narrow, tree, mine, monkeypatch, ending):
    argv = [str(word) for word in on_tree(tree, mine)]
    if ending == "returns":
        argv += ["--loss", "arcface"]  # goes on with part 2, in the same process
        rows = part4_angular.main(argv)
        assert {row["condition"] for row in rows} >= {"clean", "cutout", "fgsm"}
    else:
        error = {"is refused": checkpoints.UsageError("no"), "raises": RuntimeError("a bug"),
                 "is interrupted": KeyboardInterrupt()}[ending]

        def stops(*args):
            assert checkpoints.LOCKS
            raise error

        monkeypatch.setattr(common, "predict_splits", stops)
        with pytest.raises(type(error)):
            part1_baseline.main(argv)
    assert not checkpoints.LOCKS
    assert other_process_takes(mine, ["part1", "part2", "part3", "part4", "part4_robustness"])


def test_a_notebooks_backend_is_not_asked_for_in_a_part_that_it_starts():
    backend = {"MPLBACKEND": "not-installed-here"}  # as Jupyter's inline may not be in .venv
    code, out, error = script("part1_baseline", "--help", narrow=False, env=os.environ | backend)
    assert code == 0, error
    assert b"--results-dir" in out


def test_a_part_runs_without_the_streams_that_its_caller_closed(tree, tmp_path):
    words = shlex.join(map(str, on_tree(tree, "results")))
    command = f"{sys.executable} {ROOT}/part1_baseline.py {words} >&- 2>&-"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "results/summary.html").exists()


def test_a_second_call_reads_the_images_anew(narrow, tree, tmp_path):
    data = shutil.copytree(tree, tmp_path / "tree")
    first = part1_baseline.main([str(w) for w in on_tree(data, tmp_path / "one")])
    images = sorted((data / "train/ant").iterdir())
    shutil.copy(images[0], images[1])
    second = part1_baseline.main([str(w) for w in on_tree(data, tmp_path / "two")])
    shutil.rmtree(data / "train/bee")
    shutil.copytree(data / "train/ant", data / "train/bee")
    third = part1_baseline.main([str(w) for w in on_tree(data, tmp_path / "three")])
    assert len({rows[0]["split_hash"] for rows in (first, second, third)}) == 3


def test_the_recorded_command_pasted_into_a_shell_gives_the_same_arguments(
        narrow, tree, tmp_path, monkeypatch):
    folder = """-x it's "$HOME" n\u00e4me; *"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    argv = [str(word) for word in on_tree(tree, f"./{folder}", "--families", "noise", "color")]
    argv += ["--no-part2", f"--data-dir={tree}"]
    part3_augmented.main(argv)
    command = storage.read_record(tmp_path / folder, "part3")["command"]
    assert shlex.split(command) == ["python", "part3_augmented.py", *argv]
    echo = subprocess.run(["bash", "-c", command.replace("python", "printf '%s\\0'", 1)], text=True,
                          capture_output=True, check=True)
    assert echo.stdout.split("\0")[1:-1] == argv
    again = part3_augmented.parse_args(shlex.split(command)[2:])
    assert vars(again) == vars(part3_augmented.parse_args(argv))
    _, meta = common.load_checkpoint(tmp_path / folder / "part3.pt", "cpu")
    assert meta["command"] == command


def test_on_windows_a_command_has_the_quotes_that_its_cmd_knows(monkeypatch):
    words = ["--data-dir", "C:\\a b\\it's", "--results-dir", "r\\1", "--quick"]
    expected = "part1_baseline.py --data-dir \"C:\\a b\\it's\" --results-dir r\\1 --quick"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        command = part1_baseline.parse_args(words).command
        assert arguments.pasted(command) == f"python {expected}"
        patch.setattr(sys, "argv", ["part1_baseline.py", *words])
        assert arguments.resuming_command() == f"python {expected} --resume"


def test_such_a_command_need_not_be_one_for_a_posix_shell(narrow, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "pasted", subprocess.list2cmdline)
    part1_baseline.main([str(word) for word in on_tree(tree, tmp_path / "it's")])
    record = storage.read_record(tmp_path / "it's", "part1")
    assert record["versions"]["script"] == "part1_baseline.py"
    assert "it's" in record["command"].split()[-1]


def test_a_path_of_windows_can_be_read_on_other_systems(monkeypatch):
    words = ["--data-dir", "data\\jpg", "--results-dir", "C:\\r", "--checkpoint", "r\\part1.pt"]
    monkeypatch.setattr(os, "sep", "\\")
    args = part2_robustness.parse_args(words)
    assert (args.data_dir, args.results_dir, args.checkpoint) == ("data/jpg", "C:/r", "r/part1.pt")


def test_a_python_that_is_too_old_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(sys, "hexversion", 0x030906F0)
    monkeypatch.setattr(sys, "version", "3.9.6 (default)")
    with pytest.raises(SystemExit, match=r"Python 3\.9\.6 is too old: this code needs 3\.10"):
        runpy.run_path(str(ROOT / "arguments.py"))
    ours = {path.stem for path in ROOT.glob("*.py")}
    for name in (*PARTS, "summary", "arguments"):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 9))
        imported = [node.names[0].name for node in tree.body if isinstance(node, ast.Import)]
        first = [module for module in imported if module in ours][:1]
        assert first == ([] if name == "arguments" else ["arguments"])


@pytest.mark.parametrize("notebook", [True, False])
def test_run_in_a_notebook_leaves_it_its_figures_and_its_exceptions(notebook, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "part1_baseline.py")])  # as %run sets it
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "IPython", runpy)
    runpy.run_path(str(ROOT / "arguments.py"))
    assert (sys.excepthook is sys.__excepthook__) == notebook
    assert ("MPLBACKEND" in os.environ) == notebook


def test_what_parts_3_and_4_hand_on_to_part_2_arrives():
    argv = ["--results-dir", "a b", "--device", "cpu", "--umap-points", "77"]
    for flags in ([], ["--no-umap", "--resume", "--compile"]):
        args = part3_augmented.parse_args(argv + flags)
        found = part2_robustness.parse_args(arguments.passed_on(args))
        for name in ("results_dir", "device", "umap_points", "no_umap", "resume", "compile"):
            assert getattr(found, name) == getattr(args, name)


def test_quick_is_at_most_two_epochs_and_fifty_attacked_images():
    for asked, found in ((1, 1), (9, 2)):
        args = part1_baseline.parse_args(["--epochs", str(asked), "--quick"])
        assert args.epochs == found
    quick = META | {"args": META["args"] | {"quick": True}}
    for asked, found in ((20, 20), (2000, 50)):
        args = part2_robustness.parse_args(["--attack-images", str(asked)])
        arguments.take_from_checkpoint(args, quick)
        assert (args.attack_images, args.audit_images) == (found, 10)


def test_home_is_meant_by_a_tilde_that_the_shell_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--data-dir=~/data", "--results-dir=~", "--checkpoint=~/a.pt", "--cifar10c=~/c"]
    args = part2_robustness.parse_args(argv)
    found = args.data_dir, args.results_dir, args.checkpoint, args.cifar10c
    assert found == tuple(str(tmp_path / name) for name in ("data", "", "a.pt", "c"))
    assert args.command[2:] == argv
    args = part3_augmented.parse_args(["--results-dir=./~x", "--data-dir", "a~b"])
    assert (args.results_dir, args.data_dir) == ("./~x", "a~b")
    code, _, error = script("summary", "~/a", "~/b", narrow=False)
    assert code == 2
    assert f"{tmp_path}/a holds no results" in error.decode()


def test_arguments_need_not_be_text_in_a_notebook(narrow, tree, tmp_path):
    rows = part1_baseline.main(on_tree(tree, tmp_path))  # numbers and paths
    assert rows[0]["part"] == "part1"


def test_importing_a_part_does_nothing(tmp_path):
    code = "import part1_baseline, part2_robustness, part3_augmented, part4_angular"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- locales ------------------------------------------------------------------------------------

NAMES = ("Stra\u00dfe", "\u0436\u0443\u043a", "\u6c34", "caf\u00e9 \u00b1 \u2013 \U0001f41d")
PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("foreign") / "tree", classes=NAMES)


@pytest.fixture(scope="module")
def locales(tmp_path_factory):
    """{name: environment}, ISO-8859-1 only where it can be compiled."""
    found = {"C": PLAIN | {"LC_ALL": "C"}, "POSIX": PLAIN | {"LC_ALL": "POSIX"},
             "ascii": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}}
    folder = tmp_path_factory.mktemp("locale")
    localedef = shutil.which("localedef")
    if localedef:
        subprocess.run([localedef, "-i", "en_US", "-f", "ISO-8859-1",
                        folder / "en_US.ISO-8859-1"], check=False, capture_output=True)
    if list(folder.iterdir()):
        found["ISO-8859-1"] = PLAIN | {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(folder)}
    return found


@pytest.mark.parametrize("locale", ["C", "ISO-8859-1", "ascii"])
def test_parts_run_in_any_locale_on_any_names(foreign, locales, tmp_path, locale):
    """Names that the locale has no characters for are read right: as UTF-8."""
    if locale not in locales:
        pytest.skip("this machine cannot make the locale")
    env = {key: value for key, value in os.environ.items()
           if not key.startswith(("LC_", "LANG", "PYTHON"))} | locales[locale]
    results = tmp_path / "results"
    name = "part4_angular" if locale == "ascii" else "part1_baseline"
    keywords = {"env": env | {"OMP_NUM_THREADS": "1"}, "options": ["-X", "warn_default_encoding"]}
    code, out, err = script(name, *on_tree(foreign, results), **keywords)
    ours = [line for line in err.decode(errors="replace").splitlines()
            if "EncodingWarning" in line and str(ROOT) in line and ".venv" not in line]
    assert ours == []
    assert code == 0, err.decode(errors="replace")
    for ending in (".md", ".json", ".csv", ".html"):
        files = list(results.glob(f"*{ending}"))
        assert files
        for path in files:
            path.read_text(encoding="utf-8")
    assert out
    part = "part4" if locale == "ascii" else "part1"
    metrics = {row["metric"] for row in read(results / f"{part}.csv")}
    assert {f"accuracy of {name}" for name in NAMES} <= metrics


def test_no_file_of_ours_is_opened_without_its_encoding():
    """Every call that opens text says utf-8: by the source, as no run comes by every line."""
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else words.get("mode", "")
            where = f"{path.name}:{node.lineno}"
            method = isinstance(node.func, ast.Attribute)
            opens = not method and name == "open" and "b" not in mode
            reads = name in ("read_text", "write_text") and ast.unparse(node.func)[:7] != "storage"
            if opens or (reads and method):
                assert words.get("encoding", "").startswith("'utf-8"), where
            if name in ("run", "Popen", "check_output") and "subprocess" in ast.unparse(node.func):
                assert "encoding" in words, where


def test_arguments_that_are_no_text_are_refused_in_one_sentence(tree, tmp_path):
    env = os.environ | PLAIN | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, ROOT / "part1_baseline.py", "--dataset", "folder", "--data-dir", tree,
         "--results-dir", os.fsencode(tmp_path) + b"/r\xff\xfe"], env=env, capture_output=True,
        check=False)
    assert done.returncode == 2
    line = done.stderr.decode().splitlines()[-1]
    assert "is not text here; rename the file or folder" in line
    assert not list(tmp_path.iterdir())
