"""The documentation builds as a site without a broken link or an unresolved reference, and its pictures are
current."""

import faulthandler
import re
import shutil
import subprocess
import sys
from pathlib import Path

from xpar.comm import DISPATCHERS
from xpar.engine.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
GUIDE = ("run", "generate", "score", "cluster", "gpu", "speed", "features", "troubleshooting")
RUNNER_PAGE = Path("api", "xpar.engine.layer.rst")


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("api", "site"))
    for name in (".typing", "engine", "comm", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-d", str(tmp_path / "read")]
    # No source has types in comments, and a search for them in each function takes a fifth of the time.
    command = [*words, "-D", "autodoc_use_type_comments=0", str(docs), str(tmp_path / "site")]
    # On a busy machine the build takes longer than pytest lets a test be silent; it has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    # Furo makes the whole tree of links anew for each page, which takes as long as all else that is written:
    # every page is written without it, then two of them with it.
    for more in (["-D", "html_theme=basic"], [str(docs / "index.md"), str(docs / RUNNER_PAGE)]):
        done = subprocess.run([*command, *more], check=False, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index", "tour", *GUIDE):
        assert (tmp_path / "site" / f"{page}.html").exists()
    runner = (tmp_path / "site" / RUNNER_PAGE).with_suffix(".html").read_text()
    assert "xpar.engine.layer.runner.MoERunner.start" in runner and "furo" in runner


def test_pictures_are_what_their_program_draws(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "images" / "draw.py", tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "draw.py")], check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert len(drawn) == 3


def test_the_picture_and_the_table_show_every_dispatcher() -> None:
    picture = (ROOT / "docs" / "images" / "dispatchers.svg").read_text()
    table = (ROOT / "docs" / "run.md").read_text()
    names = [dispatcher.name for dispatcher in DISPATCHERS]
    assert re.findall(r">(?!rank)([a-z]+(?:-[a-z]+)?)</text>", picture) == sorted(names, key=picture.find)
    assert re.findall(r"^\| `([a-z-]+)` \|.+\|.+\|$", table, re.MULTILINE)[: len(names)] == names


def test_the_readme_counts_the_families_with_a_schema() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"(\d+) values of `model_type`", text) == [str(len(ARCHITECTURES))]


def test_links_of_the_pages_beside_the_site_lead_to_files_and_headings() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("comm/*/README.md")]
    links = [
        (page, *link)
        for page in pages
        for link in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    ]
    assert len(links) > 20
    for page, file, anchor in links:
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {file}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {file}#{anchor}"
