"""The site: every document has its place, what is linked to comes along, and MkDocs finds no broken link."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from docsite.examples import write  # noqa: E402
from docsite.gather import gather  # noqa: E402


def test_every_document_has_its_place() -> None:
    named = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    there = {str(page.relative_to(ROOT)) for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
    assert len(named) == len({*named})
    assert {*named} == there | {"examples/index.md"}


def test_what_is_linked_to_comes_along(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for name, text in {
        "README.md": "[a](docs/a.md) [p](pkg) [web](https://example.org) [to](#there)\n```\n[no](no/file.py)\n```\n",
        "docs/a.md": "![x](x.svg) [c](../pkg/code.py#L1)", "docs/x.svg": "<svg/>", "pkg/code.py": "1",
        "pkg/__init__.py": "2",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (site / "old").mkdir(parents=True)
    gather(source, site)
    assert sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()) == [
        "README.md", "docs/a.md", "docs/x.svg", "pkg/__init__.py", "pkg/code.py"]
    assert "[p](pkg/__init__.py)" in (site / "README.md").read_text()
    assert "[no](no/file.py)" in (site / "README.md").read_text()


@pytest.mark.long
@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("material") is None,
                    reason="MkDocs is not here: pip install 'guest-memfd[docs]'")
def test_the_site_has_no_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("unicorn")
    gather(ROOT, tmp_path / "docs")
    write(tmp_path / "docs" / "examples", ("compare", "none", "--hypervisor", "gunyah", "--parties", "vcpu,zeropad", "-q"))
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(config.replace("build/docs", "docs").replace("build/site", "site"))
    command = [sys.executable, "-m", "mkdocs", "build"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    examples = tmp_path / "site" / "examples"
    shown = re.findall(r'<iframe src="([^"]+)"', (examples / "index.html").read_text(encoding="utf-8"))
    assert shown == ["none-gunyah.html", "v17-pins.html", "table.html"]
    assert all("What leads there" in (examples / name).read_text(encoding="utf-8") for name in shown)
    assert (tmp_path / "site" / "search").is_dir()


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = dict(re.findall(r"^(\S+): (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M))
    assert (cited["title"], cited["version"], cited["license"]) == (project["name"], project["version"], project["license"])
